"""What a few rows of a tile compute over one block of keys, wherever the keys come from and whichever they see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cache_elements import Elements
from .emit import F32, I32, I64, Emitter, Value, Variable, vec
from .simd import exp, multiply_add, reduce

__all__ = ["BLOCK", "GROUP", "GROUPS", "MOST_ROWS", "PASSES", "Pass", "Passes", "memory_bytes", "tables"]

BLOCK, GROUP = 64, 16  # keys of a block; keys that are never split between two pages
GROUPS = BLOCK // GROUP
LINE = 64  # bytes of a line of the processor's caches


@dataclass(frozen=True)
class Pass:
    """Rows that are computed together, and groups of keys that their scores are computed for at a time."""

    rows: int
    groups: int


# Accumulators fill the registers: 32 of 16 lanes, 32 of 4, 16 of 8, 16 of 4.
PASSES = {
    "avx512vnni": (Pass(8, 2), Pass(4, 4), Pass(2, 4), Pass(1, 4)),
    "i8mm": (Pass(4, 1), Pass(2, 2), Pass(1, 4)),
    "neon": (Pass(4, 1), Pass(2, 2), Pass(1, 4)),
    "avxvnni": (Pass(4, 1), Pass(2, 2), Pass(1, 4)),
    "avx2": (Pass(4, 1), Pass(2, 2), Pass(1, 4)),
    "sse41": (Pass(2, 1), Pass(1, 2)),
    "generic": (Pass(2, 1), Pass(1, 2)),
}
MOST_ROWS = max(p.rows for passes in PASSES.values() for p in passes)


def tables(elements: Elements) -> int:
    """Addresses for each group of keys: of the keys and the values, of the scales of both, of what comes next."""
    return 6 if elements.block else 2


def memory_bytes(rows: int, size: int, elements: Elements) -> int:
    """Working memory of a thread for tiles of so many rows."""
    used = 4 * rows * (2 * size + BLOCK + GROUP + 5) + 8 * GROUPS * tables(elements) + 4 * GROUPS
    if elements.block:
        used += 4 * BLOCK * MOST_ROWS * (size // elements.block)
    return -(-used // 256) * 256 + 64  # not a power of two, so that threads do not share cache sets


class Passes:
    """Emits for one head size and element type; holds the addresses in a thread's working memory, `at`.

    `a` are the kernel's arguments, of which `rows`, `scale`, `window`, `page_tokens` and `plane_bytes` are used here.
    """

    def __init__(self, e: Emitter, head_size: int, elements: Elements, a: dict[str, Value], at: Value) -> None:
        self.e, self.size, self.elements, self.a = e, head_size, elements, a
        self.fetching = elements.block > 0
        self.channels = elements.block or head_size  # that have one scale, or none
        self.lanes = e.target.vector_bytes // 4
        self.vector = vec(F32, self.lanes)
        self.accumulators = 24 if e.target.lowering == "avx512vnni" or e.target.arm else 12
        self.scale = a["scale"].trunc(I32).bits(F32)
        rows = a["rows"]
        self.tables = at
        self.next = at + 8 * GROUPS * 4
        self.q = at + 8 * GROUPS * tables(elements)
        self.totals = self.q + 4 * head_size * rows
        self.p = self.totals + 4 * head_size * rows
        self.sums = self.p + 4 * BLOCK * rows
        self.highest = self.sums + 4 * GROUP * rows
        self.factors = self.highest + 4 * rows
        self.places = self.factors + 4 * rows
        self.local, self.remote = self.places + 4 * rows, self.places + 8 * rows  # of sparse attention
        self.phases = self.places + 12 * rows
        self.scaled = self.phases + 4 * GROUPS  # p times the scales of the values, of the rows of a pass

    def oldest(self, row: Value, block: Value) -> Sequence[Value]:
        """The first position that a row sees, for each group of keys of a block: int32."""
        place = self.e.load(self.places + 4 * row, I32)
        return [self.e.max(place.sext(I64) + 1 - self.a["window"], 0).trunc(I32)] * GROUPS

    def scores(self, p: Pass, row: Value, group: int) -> None:
        """p[r, k] = q[r] · K[:, k] for some groups of the block."""
        e, x = self.e, self.elements
        planes = [e.load(self.tables + 8 * (group + g), I64) for g in range(p.groups)]
        q = self.q + 4 * self.size * row
        starts = [GROUP * g + self.lanes * i for g in range(p.groups) for i in range(GROUP // self.lanes)]

        def place(r: int, start: int) -> Value:
            return self.p + 4 * BLOCK * (row + r) + 4 * (GROUP * group + start)

        if not x.block:
            for r, totals in enumerate(self._products(p, planes, q, group, e.integer(0))):
                for start, total in zip(starts, totals, strict=True):
                    e.store(total.get(), place(r, start))
            return
        scales = [e.load(self.tables + 8 * (2 * GROUPS + group + g), I64) for g in range(p.groups)]
        for r in range(p.rows):
            for start in starts:
                e.store(e.const(self.vector, 0.0), place(r, start))
        stride = x.token_bytes(x.block) * self.a["page_tokens"]
        with e.loop(0, self.size // x.block) as i:
            self._fetch_scales(1, i)
            rows = x.token_bytes(x.block) * i
            found = self._products(p, [plane + i * stride for plane in planes], q + 4 * x.block * i, group, rows)
            factors = [
                x.scales(e, scales[start // GROUP] + 2 * (i * self.a["page_tokens"] + start % GROUP), self.lanes)
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
        levels = self.elements.token_bytes(self.size) * BLOCK
        for line in range(0, 2 * BLOCK, LINE):
            self._fetch(plane, levels + 2 * BLOCK * block + line)

    def _products(self, p: Pass, planes: list[Value], q: Value, group: int, done: Value) -> list[list[Variable]]:
        """Sums of q[r, d] K[d, k] over the channels that have one scale, of which the first are at `planes` and `q`.

        `done` are the rows of keys before them.
        """
        e, x, per_group = self.e, self.elements, GROUP // self.lanes
        stride = x.key_bytes * self.a["page_tokens"]
        totals = [[e.var(e.const(self.vector, 0.0)) for _ in range(p.groups * per_group)] for _ in range(p.rows)]
        unroll = 4 // len(x.offsets)
        with e.loop(0, self.channels // len(x.offsets), unroll) as d0:
            for u in range(unroll):
                d = d0 + u
                for i in range(x.key_bytes if group == 0 else 0):
                    self._fetch(1, LINE * (x.key_bytes * (done + d) + i))
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

    def softmax(self, row: Value, block: Value) -> None:
        """Scores to weights in place; the row's maximum, sum and factor."""
        e, t = self.e, vec(F32, GROUP)
        at, integers = self.p + 4 * BLOCK * row, vec(I32, GROUP)
        place = e.load(self.places + 4 * row, I32)
        scores = []
        for g, oldest in enumerate(self.oldest(row, block)):
            key = e.const(integers, range(GROUP * g, GROUP * (g + 1))) + block.trunc(I32)
            seen = (key <= place) & (key >= oldest)
            scores.append(e.where(seen, e.load(at + 4 * GROUP * g, t) * self.scale, float("-inf")))
        top = e.max(e.max(scores[0], scores[1]), e.max(scores[2], scores[3]))
        before = e.load(self.highest + 4 * row, F32)
        highest = e.max(reduce(e, top, "max"), before)
        factor = exp(e, e.splat(before - highest, GROUP))
        weights = [exp(e, s - highest) for s in scores]
        for g, w in enumerate(weights):
            e.store(w, at + 4 * GROUP * g)
        total = e.load(self.sums + 4 * GROUP * row, t)
        added = (weights[0] + weights[1]) + (weights[2] + weights[3])
        e.store(multiply_add(e, total, factor, added), self.sums + 4 * GROUP * row)
        e.store(highest, self.highest + 4 * row)
        e.store(factor.lane(0), self.factors + 4 * row)

    def scale_weights(self, p: Pass, row: Value) -> None:
        """scaled[i, r, k] = p[r, k] times the scale of block i of V[k]."""
        e, x, t = self.e, self.elements, vec(F32, GROUP)
        with e.loop(0, self.size // x.block) as i:
            self._fetch_scales(0, i)
            for g in range(GROUPS):
                at = e.load(self.tables + 8 * (3 * GROUPS + g), I64)
                scale = x.scales(e, at + 2 * i * self.a["page_tokens"], GROUP)
                for r in range(p.rows):
                    weights = e.load(self.p + 4 * BLOCK * (row + r) + 4 * GROUP * g, t)
                    e.store(weights * scale, self.scaled + 4 * BLOCK * (p.rows * i + r) + 4 * GROUP * g)

    def results(self, p: Pass, row: Value, block: Value, start: Value, stop: Value) -> None:
        """totals[r] = totals[r] * factor[r] + Σ p[r, k] V[k] over the keys start..stop of the block."""
        e, vectors = self.e, self.size // self.lanes
        most = max(c for c in range(1, vectors + 1) if vectors % c == 0 and c * p.rows <= self.accumulators)
        factors = [e.load(self.factors + 4 * (row + r), F32) for r in range(p.rows)]
        weights = self.scaled if self.elements.block else self.p + 4 * BLOCK * row
        lines = -(-self.elements.token_bytes(self.size) // LINE)
        for c0 in range(0, vectors, most):
            blocks = [self.lanes * (c0 + c) // self.channels for c in range(most)]
            places = [
                [self.totals + 4 * self.size * (row + r) + 4 * self.lanes * (c0 + c) for c in range(most)]
                for r in range(p.rows)
            ]
            totals = [
                [e.var(e.load(at, self.vector) * factor) for at in line]
                for line, factor in zip(places, factors, strict=True)
            ]
            with e.loop(start // GROUP, (stop + GROUP - 1) // GROUP) as group:
                values = e.load(self.tables + 8 * (GROUPS + group), I64)
                base = group * GROUP
                with e.loop(e.max(start - base, 0), e.min(stop - base, GROUP)) as k:
                    at = values + self.elements.token_bytes(self.size) * k
                    vs = [self.elements.values(e, at, c0 + c, self.lanes) for c in range(most)]
                    for i in range(lines if c0 == 0 else 0):
                        self._fetch(0, LINE * (lines * (base + k) + i))
                    for r in range(p.rows):
                        places_of = {i: weights + 4 * BLOCK * (p.rows * i + r) + 4 * (base + k) for i in set(blocks)}
                        weight = {i: e.splat(e.load(place, F32), self.lanes) for i, place in places_of.items()}
                        for i, v, total in zip(blocks, vs, totals[r], strict=True):
                            total.set(multiply_add(e, weight[i], v, total.get()))
            for line, sums in zip(places, totals, strict=True):
                for at, total in zip(line, sums, strict=True):
                    e.store(total.get(), at)
