"""Kernels: the contract with models (`ops`), the choice of a backend (`select`), compiled quantizers (`quantize`)."""
