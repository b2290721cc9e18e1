"""Attention over the paged cache, with the softmax computed as the keys come (online), in one order for every caller.

A ticket is a tile of tokens of one sequence with one key-value head: all query heads that share the head are rows of
the tile. Keys are taken in blocks of 64 at absolute positions; for each block a few rows at a time compute

    scores      keys in the lanes, channels one after the other          s[r, k] = Σ_d q[r, d] K[d, k]
    softmax     m' = max(m, max s), p = exp(s - m'), l' = l exp(m - m') + Σ p
    results     channels in the lanes, keys one after the other          o'[r] = o[r] exp(m - m') + Σ_k p[r, k] V[k]

Where the cache has scales, a scale multiplies the sum over its 32 channels of a key, and p is multiplied by the scales
of the values before it meets them: a multiplication for each token and block, and not for each channel.

What a row computes depends on its own position only: a block that it cannot see is left out or contributes exactly
nothing (p = 0 and m' = m), so tiles, chunks, threads, neighbours and page numbers never change a bit of the result.

    attention_passes.py   what a few rows compute over a block of keys
    attention_kernel.py   a ticket: the rows of a tile, block by block
    attention_sparse.py   the same where heads see some blocks only
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from ..ops import BlockSparse
from .attention_kernel import ARGS, Kernel
from .attention_passes import GROUP, memory_bytes
from .attention_sparse import SparseKernel
from .attention_tiles import sparse_share, tile, tile_tokens
from .cache import KVCache, StepTables
from .cache_elements import Elements
from .emit import I64, Emitter, Value
from .library import function
from .operation import NativeOp, Region, StepHeader, aligned, float_bits, tickets
from .target import Target, host

__all__ = ["HEAD_SIZES", "bind", "scratch", "sparse_share", "tile"]

HEAD_SIZES = tuple(range(16, 257, 16))
"""Channels of a head that there are kernels for."""

_UNLIMITED = 1 << 40  # a window wider than any position


def _rows(cache: KVCache) -> int:
    group = cache.shape.heads // cache.shape.kv_heads
    return tile_tokens(group) * group


def _scratch_bytes(cache: KVCache) -> int:
    return memory_bytes(_rows(cache), cache.shape.head_size, cache.elements)


def scratch(cache: KVCache, threads: int) -> NDArray[np.uint8]:
    """Working memory that all attention operations of a model may share."""
    return aligned(threads * _scratch_bytes(cache))


def bind(
    q: Region,
    out: Region,
    tables: StepTables,
    header: StepHeader,
    cache: KVCache,
    layer: int,
    memory: NDArray[np.uint8],
    threads: int,
    target: Target | None = None,
    *,
    sparse: BlockSparse | None = None,
) -> NativeOp:
    """Attend, to all keys or those that `sparse` says; `memory` comes from `scratch`.

    Raises:
        KernelError: there is no kernel for the head size or the size of the blocks, or a buffer is too small.
    """
    shape = cache.shape
    if shape.head_size not in HEAD_SIZES:
        raise KernelError(f"no attention kernel for heads of {shape.head_size} channels; possible: {HEAD_SIZES}")
    if not q.width == out.width == shape.q_width:
        raise KernelError(f"attention with rows of {q.width} and {out.width} channels does not fit {shape}")
    if min(len(tables.positions), len(tables.slots), len(tables.tiles), out.capacity) < q.capacity:
        raise KernelError(f"the tables of a step have no room for {q.capacity} tokens")
    if len(memory) < threads * _scratch_bytes(cache):
        raise KernelError(f"attention by {threads} threads needs {threads * _scratch_bytes(cache)} bytes of scratch")
    if cache.page_tokens % GROUP or not 0 <= layer < len(cache.layers):
        raise KernelError(f"no layer {layer} in a cache of {len(cache.layers)}, or pages not a multiple of {GROUP}")
    if sparse is not None and (sparse.block % GROUP or shape.window):
        raise KernelError(
            f"no sparse attention kernel for blocks of {sparse.block} keys and a window of {shape.window}; possible "
            f"are multiples of {GROUP} without a window"
        )
    pattern = sparse or BlockSparse(GROUP, 1, 1)
    block = ARGS.pack(
        q=q.address, out=out.address, row_bytes=4 * shape.q_width,
        positions=tables.positions.ctypes.data, slots=tables.slots.ctypes.data,
        pages=tables.pages.ctypes.data, columns=tables.pages.shape[1],
        tiles=tables.tiles.ctypes.data,
        first_tile=header.address("first_tile"), last_tile=header.address("last_tile"),
        cache=cache.layers[layer].ctypes.data, page_bytes=cache.page_bytes, plane_bytes=cache.plane_bytes,
        page_tokens=cache.page_tokens, kv_heads=shape.kv_heads, group=shape.heads // shape.kv_heads,
        scale=float_bits(shape.scale), window=shape.window or _UNLIMITED,
        scratch=memory.ctypes.data, scratch_bytes=_scratch_bytes(cache), rows=_rows(cache),
        sparse_block=pattern.block, sparse_local=pattern.local, sparse_stride=pattern.stride,
    )  # fmt: skip
    kind = "attention" if sparse is None else "attention_sparse"
    emitter = _emitter(shape.head_size, cache.elements, sparse=sparse is not None)
    kernel = function(f"{kind}_{cache.elements.name}_{shape.head_size}", 4, emitter, target or host())
    return NativeOp(kernel, block, (q, out, tables, header, cache, memory))


def _emitter(head_size: int, elements: Elements, *, sparse: bool = False) -> Callable[..., None]:
    def body(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        k = (SparseKernel if sparse else Kernel)(e, head_size, elements, block, thread)
        first, last = e.load(k.a["first_tile"], I64), e.load(k.a["last_tile"], I64)
        kv_heads = k.a["kv_heads"]
        with tickets(e, counter, (last - first) * kv_heads) as ticket:
            k.run(first + ticket // kv_heads, ticket % kv_heads)

    return body
