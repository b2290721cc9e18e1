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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .attention_tiles import tile, tile_tokens
from .cache import KVCache, StepTables
from .cache_elements import Elements
from .emit import F32, I32, I64, Emitter, Value, Variable, vec
from .library import function
from .operation import Arguments, NativeOp, Region, StepHeader, aligned, tickets
from .simd import exp, multiply_add, reduce
from .target import Target, host

__all__ = ["HEAD_SIZES", "bind", "scratch", "tile"]

HEAD_SIZES = tuple(range(16, 257, 16))
"""Channels of a head that there are kernels for."""

ARGS = Arguments(
    "q", "out", "row_bytes", "positions", "slots", "pages", "columns", "tiles", "first_tile", "last_tile", "cache",
    "page_bytes", "plane_bytes", "page_tokens", "kv_heads", "group", "scale", "window", "scratch", "scratch_bytes",
    "rows",
)  # fmt: skip

_BLOCK, _GROUP = 64, 16  # keys of a block; keys that are never split between two pages
_GROUPS = _BLOCK // _GROUP
_LINE = 64  # bytes of a line of the processor's caches
_UNLIMITED = 1 << 40  # a window wider than any position
_NOTHING = -1e30  # below any score: finite, so that its difference to itself is 0


def _rows(cache: KVCache) -> int:
    group = cache.shape.heads // cache.shape.kv_heads
    return tile_tokens(group) * group


def _scratch_bytes(cache: KVCache) -> int:
    rows, size = _rows(cache), cache.shape.head_size
    used = 4 * rows * (2 * size + _BLOCK + _GROUP + 3) + 8 * _GROUPS * _tables(cache.elements)
    if cache.elements.block:
        used += 4 * _BLOCK * _MOST_ROWS * (size // cache.elements.block)
    return -(-used // 256) * 256 + 64  # not a power of two, so that threads do not share cache sets


def _tables(elements: Elements) -> int:
    """Addresses for each group of keys: of the keys and the values, of the scales of both, of what comes next."""
    return 6 if elements.block else 2


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
) -> NativeOp:
    """Attend; `memory` comes from `scratch`.

    Raises:
        KernelError: there is no kernel for the head size, or a buffer is too small.
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
    if cache.page_tokens % _GROUP or not 0 <= layer < len(cache.layers):
        raise KernelError(f"no layer {layer} in a cache of {len(cache.layers)}, or pages not a multiple of {_GROUP}")
    block = ARGS.pack(
        q=q.address, out=out.address, row_bytes=4 * shape.q_width,
        positions=tables.positions.ctypes.data, slots=tables.slots.ctypes.data,
        pages=tables.pages.ctypes.data, columns=tables.pages.shape[1],
        tiles=tables.tiles.ctypes.data,
        first_tile=header.address("first_tile"), last_tile=header.address("last_tile"),
        cache=cache.layers[layer].ctypes.data, page_bytes=cache.page_bytes, plane_bytes=cache.plane_bytes,
        page_tokens=cache.page_tokens, kv_heads=shape.kv_heads, group=shape.heads // shape.kv_heads,
        scale=int(np.float32(shape.scale).view(np.int32)), window=shape.window or _UNLIMITED,
        scratch=memory.ctypes.data, scratch_bytes=_scratch_bytes(cache), rows=_rows(cache),
    )  # fmt: skip
    name = f"attention_{cache.elements.name}_{shape.head_size}"
    kernel = function(name, 4, _emitter(shape.head_size, cache.elements), target or host())
    return NativeOp(kernel, block, (q, out, tables, header, cache, memory))


@dataclass(frozen=True)
class _Pass:
    """Rows that are computed together, and groups of keys that their scores are computed for at a time."""

    rows: int
    groups: int


# Accumulators fill the registers: 32 of 16 lanes, 32 of 4, 16 of 8, 16 of 4.
_PASSES = {
    "avx512vnni": (_Pass(8, 2), _Pass(4, 4), _Pass(2, 4), _Pass(1, 4)),
    "i8mm": (_Pass(4, 1), _Pass(2, 2), _Pass(1, 4)),
    "neon": (_Pass(4, 1), _Pass(2, 2), _Pass(1, 4)),
    "avxvnni": (_Pass(4, 1), _Pass(2, 2), _Pass(1, 4)),
    "avx2": (_Pass(4, 1), _Pass(2, 2), _Pass(1, 4)),
    "sse41": (_Pass(2, 1), _Pass(1, 2)),
    "generic": (_Pass(2, 1), _Pass(1, 2)),
}
_MOST_ROWS = max(p.rows for passes in _PASSES.values() for p in passes)


class _Kernel:
    """Emits the body for one head size and element type; holds the addresses that its parts share."""

    def __init__(self, e: Emitter, head_size: int, elements: Elements, block: Value, thread: Value) -> None:
        self.e, self.size, self.elements = e, head_size, elements
        self.fetching = elements.block > 0
        self.channels = elements.block or head_size  # that have one scale, or none
        self.lanes = e.target.vector_bytes // 4
        self.vector = vec(F32, self.lanes)
        self.accumulators = 24 if e.target.lowering == "avx512vnni" or e.target.arm else 12
        self.a = dict(zip(ARGS.names, ARGS.read_all(e, block), strict=True))
        self.scale = self.a["scale"].trunc(I32).bits(F32)
        rows = self.a["rows"]
        at = self.a["scratch"] + thread * self.a["scratch_bytes"]
        self.tables = at
        self.next = at + 8 * _GROUPS * 4
        self.q = at + 8 * _GROUPS * _tables(elements)
        self.results = self.q + 4 * head_size * rows
        self.p = self.results + 4 * head_size * rows
        self.sums = self.p + 4 * _BLOCK * rows
        self.highest = self.sums + 4 * _GROUP * rows
        self.factors = self.highest + 4 * rows
        self.places = self.factors + 4 * rows
        self.scaled = self.places + 4 * rows  # p times the scales of the values, of the rows of a pass

    def run(self, tile: Value, head: Value) -> None:
        """One ticket."""
        e, a, group = self.e, self.a, self.a["group"]
        entry = a["tiles"] + 16 * tile
        first, tokens, lowest, highest = (e.load(entry + 4 * i, I32).sext(I64) for i in range(4))
        slot = e.load(a["slots"] + 4 * first, I32).sext(I64)
        table = a["pages"] + 4 * slot * a["columns"]
        rows = tokens * group
        offset = first * a["row_bytes"] + 4 * self.size * group * head
        with e.loop(0, tokens) as token, e.loop(0, group) as member:
            self._begin(token * group + member, offset + token * a["row_bytes"] + 4 * self.size * member,
                        e.load(a["positions"] + 4 * (first + token), I32))  # fmt: skip
        start, stop = e.max(lowest + 1 - a["window"], 0), highest + 1
        with e.loop(start - start % _BLOCK, stop, _BLOCK) as block:
            self._locate(table, head, block, stop)
            done = e.integer(0)
            for p in _PASSES[e.target.lowering]:
                end = rows - (rows - done) % p.rows
                with e.loop(done, end, p.rows) as row:
                    self._pass(p, row, block)
                done = end
        with e.loop(0, tokens) as token, e.loop(0, group) as member:
            self._finish(token * group + member, offset + token * a["row_bytes"] + 4 * self.size * member)

    def _begin(self, row: Value, offset: Value, position: Value) -> None:
        e = self.e
        for i in range(0, 4 * self.size, 4 * self.lanes):
            e.store(e.load(self.a["q"] + offset + i, self.vector), self.q + 4 * self.size * row + i)
            e.store(e.const(self.vector, 0.0), self.results + 4 * self.size * row + i)
        e.store(e.const(vec(F32, _GROUP), 0.0), self.sums + 4 * _GROUP * row)
        e.store(e.const(F32, _NOTHING), self.highest + 4 * row)
        e.store(position, self.places + 4 * row)

    def _finish(self, row: Value, offset: Value) -> None:
        e = self.e
        inverse = 1.0 / reduce(e, e.load(self.sums + 4 * _GROUP * row, vec(F32, _GROUP)))
        for i in range(0, 4 * self.size, 4 * self.lanes):
            v = e.load(self.results + 4 * self.size * row + i, self.vector) * inverse
            # -0.0 becomes 0.0: a block that contributes nothing would have made it so.
            e.store(v + 0.0, self.a["out"] + offset + i)

    def _locate(self, table: Value, head: Value, block: Value, stop: Value) -> None:
        """Write the addresses of the block's groups of keys and of values."""
        e, a = self.e, self.a
        final = (stop - 1) // _GROUP * _GROUP
        for g in range(_GROUPS):
            # Beyond the last key there may be no page: the last group is read again, and masked.
            at = e.min(block + _GROUP * g, final)
            page = e.load(table + 4 * (at // a["page_tokens"]), I32).sext(I64)
            within = at % a["page_tokens"]
            keys = a["cache"] + page * a["page_bytes"] + 2 * head * a["plane_bytes"]
            token = self.elements.token_bytes(self.size)
            e.store(keys + self.elements.key_bytes * within, self.tables + 8 * g)
            e.store(keys + a["plane_bytes"] + token * within, self.tables + 8 * (_GROUPS + g))
            if self.elements.block:
                for i, plane in ((2, keys), (3, keys + a["plane_bytes"])):
                    e.store(plane + token * a["page_tokens"] + 2 * within, self.tables + 8 * (i * _GROUPS + g))
        if self.fetching:
            page = e.load(table + 4 * (e.min(block + _BLOCK, final) // a["page_tokens"]), I32).sext(I64)
            e.store(a["cache"] + page * a["page_bytes"] + 2 * head * a["plane_bytes"], self.next)

    def _pass(self, p: _Pass, row: Value, block: Value) -> None:
        e = self.e
        low = e.load(self.places + 4 * row, I32).sext(I64)
        high = e.load(self.places + 4 * (row + p.rows - 1), I32).sext(I64)
        start, stop = e.max(low + 1 - self.a["window"], block), e.min(high + 1, block + _BLOCK)
        with e.when(start < stop):
            for g in range(0, _GROUPS, p.groups):
                with e.when(block + _GROUP * g < stop):
                    self._scores(p, row, g)
            with e.loop(0, p.rows) as r:
                self._softmax(row + r, block)
            if self.elements.block:
                self._scale_weights(p, row)
            self._results(p, row, block, start - block, stop - block)

    def _scores(self, p: _Pass, row: Value, group: int) -> None:
        """p[r, k] = q[r] · K[:, k] for some groups of the block."""
        e, x = self.e, self.elements
        planes = [e.load(self.tables + 8 * (group + g), I64) for g in range(p.groups)]
        q = self.q + 4 * self.size * row
        starts = [_GROUP * g + self.lanes * i for g in range(p.groups) for i in range(_GROUP // self.lanes)]

        def place(r: int, start: int) -> Value:
            return self.p + 4 * _BLOCK * (row + r) + 4 * (_GROUP * group + start)

        if not x.block:
            for r, totals in enumerate(self._products(p, planes, q, group, e.integer(0))):
                for start, total in zip(starts, totals, strict=True):
                    e.store(total.get(), place(r, start))
            return
        scales = [e.load(self.tables + 8 * (2 * _GROUPS + group + g), I64) for g in range(p.groups)]
        for r in range(p.rows):
            for start in starts:
                e.store(e.const(self.vector, 0.0), place(r, start))
        stride = x.token_bytes(x.block) * self.a["page_tokens"]
        with e.loop(0, self.size // x.block) as i:
            self._fetch_scales(1, i)
            rows = x.token_bytes(x.block) * i
            found = self._products(p, [plane + i * stride for plane in planes], q + 4 * x.block * i, group, rows)
            factors = [
                x.scales(e, scales[start // _GROUP] + 2 * (i * self.a["page_tokens"] + start % _GROUP), self.lanes)
                for start in starts
            ]
            for r, totals in enumerate(found):
                for start, total, factor in zip(starts, totals, factors, strict=True):
                    at = place(r, start)
                    e.store(multiply_add(e, factor, total.get(), e.load(at, self.vector)), at)

    def _fetch(self, plane: int, offset: Value) -> None:
        """Ask for a line of the next block's keys (plane 0) or values (1), as they lie where a page has 64 tokens.

        The planes of a head are a few kilobytes, too short for the processor to see where it is going. Elsewhere the
        line may be another's, which costs its way and no more: asking reads nothing.
        """
        if self.fetching:
            self.e.prefetch(self.e.load(self.next, I64) + plane * self.a["plane_bytes"] + offset, locality=2)

    def _fetch_scales(self, plane: int, block: Value) -> None:
        levels = self.elements.token_bytes(self.size) * _BLOCK
        for line in range(0, 2 * _BLOCK, _LINE):
            self._fetch(plane, levels + 2 * _BLOCK * block + line)

    def _products(self, p: _Pass, planes: list[Value], q: Value, group: int, done: Value) -> list[list[Variable]]:
        """Sums of q[r, d] K[d, k] over the channels that have one scale, of which the first are at `planes` and `q`.

        `done` are the rows of keys before them.
        """
        e, x, per_group = self.e, self.elements, _GROUP // self.lanes
        stride = x.key_bytes * self.a["page_tokens"]
        totals = [[e.var(e.const(self.vector, 0.0)) for _ in range(p.groups * per_group)] for _ in range(p.rows)]
        unroll = 4 // len(x.offsets)
        with e.loop(0, self.channels // len(x.offsets), unroll) as d0:
            for u in range(unroll):
                d = d0 + u
                for i in range(x.key_bytes if group == 0 else 0):
                    self._fetch(1, _LINE * (x.key_bytes * (done + d) + i))
                keys = [
                    x.keys(e, plane + d * stride + x.key_bytes * self.lanes * i, self.lanes)
                    for plane in planes
                    for i in range(per_group)
                ]
                for offset, vectors in zip(x.offsets, zip(*keys, strict=True), strict=True):
                    for r in range(p.rows):
                        factor = e.splat(e.load(q + 4 * self.size * r + 4 * (d + offset), F32), self.lanes)
                        for key, total in zip(vectors, totals[r], strict=True):
                            total.set(multiply_add(e, factor, key, total.get()))
        return totals

    def _softmax(self, row: Value, block: Value) -> None:
        """Scores to weights in place; the row's maximum, sum and factor."""
        e, t = self.e, vec(F32, _GROUP)
        at, integers = self.p + 4 * _BLOCK * row, vec(I32, _GROUP)
        place = e.load(self.places + 4 * row, I32)
        oldest = e.max(place.sext(I64) + 1 - self.a["window"], 0).trunc(I32)
        scores = []
        for g in range(_GROUPS):
            key = e.const(integers, range(_GROUP * g, _GROUP * (g + 1))) + block.trunc(I32)
            seen = (key <= place) & (key >= oldest)
            scores.append(e.where(seen, e.load(at + 4 * _GROUP * g, t) * self.scale, float("-inf")))
        top = e.max(e.max(scores[0], scores[1]), e.max(scores[2], scores[3]))
        before = e.load(self.highest + 4 * row, F32)
        highest = e.max(reduce(e, top, "max"), before)
        factor = exp(e, e.splat(before - highest, _GROUP))
        weights = [exp(e, s - highest) for s in scores]
        for g, w in enumerate(weights):
            e.store(w, at + 4 * _GROUP * g)
        total = e.load(self.sums + 4 * _GROUP * row, t)
        added = (weights[0] + weights[1]) + (weights[2] + weights[3])
        e.store(multiply_add(e, total, factor, added), self.sums + 4 * _GROUP * row)
        e.store(highest, self.highest + 4 * row)
        e.store(factor.lane(0), self.factors + 4 * row)

    def _scale_weights(self, p: _Pass, row: Value) -> None:
        """scaled[i, r, k] = p[r, k] times the scale of block i of V[k]."""
        e, x, t = self.e, self.elements, vec(F32, _GROUP)
        with e.loop(0, self.size // x.block) as i:
            self._fetch_scales(0, i)
            for g in range(_GROUPS):
                at = e.load(self.tables + 8 * (3 * _GROUPS + g), I64)
                scale = x.scales(e, at + 2 * i * self.a["page_tokens"], _GROUP)
                for r in range(p.rows):
                    weights = e.load(self.p + 4 * _BLOCK * (row + r) + 4 * _GROUP * g, t)
                    e.store(weights * scale, self.scaled + 4 * _BLOCK * (p.rows * i + r) + 4 * _GROUP * g)

    def _results(self, p: _Pass, row: Value, block: Value, start: Value, stop: Value) -> None:
        """results[r] = results[r] * factor[r] + Σ p[r, k] V[k] over the keys start..stop of the block."""
        e, vectors = self.e, self.size // self.lanes
        most = max(c for c in range(1, vectors + 1) if vectors % c == 0 and c * p.rows <= self.accumulators)
        factors = [e.load(self.factors + 4 * (row + r), F32) for r in range(p.rows)]
        weights = self.scaled if self.elements.block else self.p + 4 * _BLOCK * row
        lines = -(-self.elements.token_bytes(self.size) // _LINE)
        for c0 in range(0, vectors, most):
            blocks = [self.lanes * (c0 + c) // self.channels for c in range(most)]
            places = [
                [self.results + 4 * self.size * (row + r) + 4 * self.lanes * (c0 + c) for c in range(most)]
                for r in range(p.rows)
            ]
            totals = [
                [e.var(e.load(at, self.vector) * factor) for at in line]
                for line, factor in zip(places, factors, strict=True)
            ]
            with e.loop(start // _GROUP, (stop + _GROUP - 1) // _GROUP) as group:
                values = e.load(self.tables + 8 * (_GROUPS + group), I64)
                base = group * _GROUP
                with e.loop(e.max(start - base, 0), e.min(stop - base, _GROUP)) as k:
                    at = values + self.elements.token_bytes(self.size) * k
                    vs = [self.elements.values(e, at, c0 + c, self.lanes) for c in range(most)]
                    for i in range(lines if c0 == 0 else 0):
                        self._fetch(0, _LINE * (lines * (base + k) + i))
                    for r in range(p.rows):
                        places_of = {i: weights + 4 * _BLOCK * (p.rows * i + r) + 4 * (base + k) for i in set(blocks)}
                        weight = {i: e.splat(e.load(place, F32), self.lanes) for i, place in places_of.items()}
                        for i, v, total in zip(blocks, vs, totals[r], strict=True):
                            total.set(multiply_add(e, weight[i], v, total.get()))
            for line, sums in zip(places, totals, strict=True):
                for at, total in zip(line, sums, strict=True):
                    e.store(total.get(), at)


def _emitter(head_size: int, elements: Elements) -> Callable[..., None]:
    def body(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        k = _Kernel(e, head_size, elements, block, thread)
        first, last = e.load(k.a["first_tile"], I64), e.load(k.a["last_tile"], I64)
        kv_heads = k.a["kv_heads"]
        with tickets(e, counter, (last - first) * kv_heads) as ticket:
            k.run(first + ticket // kv_heads, ticket % kv_heads)

    return body
