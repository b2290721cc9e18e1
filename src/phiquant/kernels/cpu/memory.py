"""What the operating system is told about memory; everything here is advice that may be ignored."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["release"]


def release(array: NDArray[Any]) -> bool:
    """Let go of the memory behind a view of a mapped file, which is read again if it is used again.

    Does nothing to memory that is not a read-only map of a file, or on systems without the call.

    Returns:
        Whether the system was told.
    """
    mapped = _file_map(array)
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if mapped is None or advice is None:
        return False
    view = memoryview(mapped)
    try:
        start = array.ctypes.data - np.frombuffer(view, np.uint8).ctypes.data
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: their neighbours may be in use
        last = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if not 0 <= first < last <= len(mapped):
            return False
        with contextlib.suppress(OSError, ValueError):
            mapped.madvise(advice, first, last - first)
            return True
        return False
    finally:
        del view


def _file_map(array: Any) -> mmap.mmap | None:
    """The read-only map that the array is a view of. A writable one is no file's, and would lose what it holds."""
    base = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is None or not memoryview(base).readonly:
        return None
    return base if isinstance(base, mmap.mmap) else None
