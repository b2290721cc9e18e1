"""How much memory a run may take: threads, each with one piece of a tensor and its conversion, within a limit."""

import sys
from collections.abc import Iterable
from typing import Final

from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType
from phiquant.gguf.checksum import pieces
from phiquant.kernels.dequantize import FLOATS

__all__ = ["DEFAULT_LIMIT", "bounded_threads", "thread_bytes"]

DEFAULT_LIMIT: Final = 1_500_000_000
"""Bytes of resident memory that a run keeps to, whatever the model and the number of threads."""

_COMPILING: Final = 96_000_000  # what LLVM takes while it compiles quantizers, measured, rounded up
_THREAD: Final = 1_000_000  # stack, Python's objects, what the allocator keeps


def thread_bytes(tensors: Iterable[PlannedTensor]) -> int:
    """Bytes that a thread takes at most: the largest piece as stored, in float32 if it passes through, as written."""
    most = 0
    for tensor in tensors:
        first = next(pieces(tensor.shape), None)
        if first is not None:
            floats = 2 * first.nbytes(GGMLType.F32) if tensor.source not in (*FLOATS, tensor.type) else 0
            written = first.nbytes(tensor.type) * (1 if tensor.importance is None else 2)
            most = max(most, first.nbytes(tensor.source) + floats + written)
    return most + _THREAD


def bounded_threads(wanted: int, tensors: Iterable[PlannedTensor], limit: int | None) -> int:
    """`wanted` threads or as many as the limit allows (bytes; None: DEFAULT_LIMIT).

    RequestError, with the least that is possible, if it does not allow one.
    """
    each = thread_bytes(tensors)
    base = _resident() + _COMPILING
    allowed = ((DEFAULT_LIMIT if limit is None else limit) - base) // each
    if allowed >= 1:
        return int(min(wanted, allowed))
    if limit is None:
        return 1
    least = -(-(base + each) // 1_000_000)
    raise RequestError(f"--max-memory of {limit / 1e6:,.0f} MB is too little; this takes at least {least:,} MB.")


def _resident() -> int:
    """Bytes of this process in memory: now where the system tells, else at its peak; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a path of the user's
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
