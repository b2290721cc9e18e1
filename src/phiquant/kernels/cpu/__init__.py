"""Kernels for the processor, as LLVM IR emitted from Python: compiled when first used, run by a team of threads."""
