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
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    # Kernels are vectorised and unrolled by hand; LLVM doing it again to their remainders only costs compile time.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    _direct("LLVMPY_RunNewModulePassManager")(builder.getModulePassManager(), module, builder)
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
