"""LLVM, by several threads at once.

llvmlite lets one thread at a time into LLVM. LLVM itself asks for less: that what two threads work on belongs to two
contexts and two target machines. Every kernel gets its own of both, so the two calls that take all of the time, of the
optimiser and of the code generator, go past llvmlite's lock; everything else is llvmlite's as ever.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite.binding import ffi

from ...errors import KernelError
from .target import Target

__all__ = ["emit_object", "optimise"]


@cache
def _direct(name: str) -> Any:
    """A function of LLVM without llvmlite's lock around it; with it, should llvmlite be built otherwise one day."""
    locked = getattr(ffi.lib, name)
    handle, library = getattr(ffi.lib, "_handle", None), getattr(ffi.lib, "_name", None)
    if handle is None or library is None:
        return locked
    function = getattr(ctypes.CDLL(library, handle=handle), name)
    function.argtypes, function.restype = locked.argtypes, locked.restype
    return function


def optimise(text: str, machine: Any) -> Any:
    """The module of a kernel's IR, optimised, in a context of its own."""
    module = llvm.parse_assembly(text, llvm.create_context())
    module.verify()
    # Kernels are written as their loops shall run: what is left is to bring variables into registers, to fold, and to
    # turn loops so that what does not change within them can move out. All of -O3 takes ten times as long, and its code
    # is no faster (docs/log.md).
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_loop_rotate_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    _direct("LLVMPY_RunNewModulePassManager")(passes, module, builder)
    return module


def emit_object(text: str, target: Target) -> bytes:
    """The object file of a kernel's IR. Errors: KernelError."""
    machine = target.machine()
    module = optimise(text, machine)
    with ffi.OutputString() as error:
        buffer = _direct("LLVMPY_TargetMachineEmitToMemory")(machine, module, 1, error)
        if not buffer:
            raise KernelError(f"LLVM makes no code of a kernel: {error}")
    try:
        return ctypes.string_at(ffi.lib.LLVMPY_GetBufferStart(buffer), ffi.lib.LLVMPY_GetBufferSize(buffer))
    finally:
        ffi.lib.LLVMPY_DisposeMemoryBuffer(buffer)
