"""Repacking a weight to panels of 16 interleaved rows, by a native kernel, in parallel over panels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import Emitter, Value
from .library import function
from .matmul_tiles import LANES, Format
from .operation import Arguments, aligned, tickets
from .target import Target

__all__ = ["SLACK", "call", "pack", "pack_kernel"]

_ARGUMENTS = Arguments("weights", "out", "rows", "columns", "row_bytes", "panel_bytes")
_SIGNATURE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
SLACK = 64  # bytes after the last panel


def _body(f: Format) -> Callable[..., None]:
    def kernel(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        weights, out, rows, columns, row_bytes, panel_bytes = _ARGUMENTS.read_all(e, block)

        with tickets(e, counter, (rows + (LANES - 1)).udiv(LANES)) as panel:
            # Rows that the last panel lacks repeat the last one; what they yield is never stored.
            mine = [weights + e.min(panel * LANES + i, rows - 1) * row_bytes for i in range(LANES)]
            f.pack(e, mine, out + panel * panel_bytes, columns)

    return kernel


def pack_kernel(name: str, f: Format, target: Target) -> int:
    """The kernel that makes panels."""
    return function(f"pack.{name}", 4, _body(f), target)


def call(kernel: int, block: NDArray[np.int64], threads: int) -> None:
    """Run a native operation on threads of Python's, which hold no interpreter lock meanwhile."""
    f = _SIGNATURE(kernel)
    counter = np.zeros(2, np.int64)
    if threads == 1:
        f(block.ctypes.data, 0, 1, counter.ctypes.data)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: f(block.ctypes.data, i, threads, counter.ctypes.data), range(threads)))


def pack(
    name: str,
    f: Format,
    data: NDArray[np.uint8],
    rows: int,
    columns: int,
    target: Target,
    threads: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Panels of a matrix of which `data` holds the rows as the file does; in `out`, if it is given.

    Errors: KernelError if `out` is too small.
    """
    panels, panel_bytes = -(-rows // LANES), f.panel_bytes(columns)
    size = panels * panel_bytes
    if out is None:
        out = aligned(size + SLACK)
    if out.size < size:
        raise KernelError(f"panels of {rows} rows of {name} need {size} bytes where there are {out.size}")
    block = _ARGUMENTS.pack(
        weights=data.ctypes.data,
        out=out.ctypes.data,
        rows=rows,
        columns=columns,
        row_bytes=data.size // rows,
        panel_bytes=panel_bytes,
    )
    call(pack_kernel(name, f, target), block, min(threads, panels))
    return out
