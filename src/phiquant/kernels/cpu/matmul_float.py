"""Matrix multiplication with F32, F16 and BF16 weights, widened to float32 and accumulated with FMA.

A panel is [columns][16 rows]. For every element the products of a chunk of 256 are chained in order of k from zero, and
the chunks' totals are added in order: the same for any tile, and more exact than one long chain.

BF16 weights also meet activations that were rounded to bfloat16, where one asks for it and the processor has the
instruction: it multiplies two columns at a time, twice as many as an FMA. A panel is then [pairs of columns][16
rows][2], with zeros beside an odd last column.
"""

from __future__ import annotations

from .activations import CHUNK, Activations
from .emit import F32, I16, I32, Emitter, Value, vec
from .matmul_tiles import LANES, Floats, Format
from .simd import bfloat_to_float, dot_bfloats, half_to_float, multiply_add
from .target import Target

__all__ = ["BFloatDot", "FloatFormat", "gather"]

_STEP = 4  # columns, or pairs of them, unrolled
_PAIRS = 4 * LANES  # bytes of two columns of a panel of bfloat16


def gather(e: Emitter, rows: list[Value], offset: Value | int, element: object) -> Value:
    """One element from the same offset of each row: a lane is a row."""
    out = e.const(vec(element, len(rows)), 0)
    for i, row in enumerate(rows):
        out = out.with_lane(i, e.load(row + offset, element))
    return out


class FloatFormat(Format):
    """F32, F16 ("half") or BF16 ("bfloat")."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.size = 4 if kind == "float" else 2
        self.activations = Activations(0)
        self.chunk_bytes = CHUNK * LANES * self.size

    def panel_bytes(self, columns: int) -> int:
        """Bytes of 16 rows."""
        return columns * LANES * self.size

    def panels(self, target: Target) -> int:
        """Panels of a tile for many columns."""
        return 4 if target.vector_bytes == 64 else 1

    def tile(self, target: Target) -> int:
        """Columns of a tile for many columns."""
        return 6 if target.vector_bytes >= 32 else 2

    def pack(self, e: Emitter, rows: list[Value], panel: Value, columns: Value) -> None:
        """Emit the interleaving of 16 rows."""
        if self.kind == "float":
            with e.loop(0, columns) as k:
                e.store(gather(e, rows, k * 4, I32), panel + k * (4 * LANES))
            return
        even = columns & ~1
        with e.loop(0, even, 2) as k:
            pairs = gather(e, rows, k * 2, I32)
            e.store(pairs.trunc(I16), panel + k * (2 * LANES))
            e.store(pairs.lsr(16).trunc(I16), panel + (k + 1) * (2 * LANES))
        with e.loop(even, columns) as k:
            e.store(gather(e, rows, k * 2, I16), panel + k * (2 * LANES))

    def _widened(self, e: Emitter, at: Value) -> Value:
        if self.kind == "float":
            return e.load(at, vec(F32, LANES))
        bits = e.load(at, vec(I16, LANES))
        return half_to_float(e, bits) if self.kind == "half" else bfloat_to_float(e, bits)

    def unpacked_bytes(self, panels: int) -> int:
        """None: widening is cheaper than storing what was widened."""
        return 0

    def unpack(self, e: Emitter, chunks: list[Value], scratch: Value, left: Value) -> list[Value]:
        """Chunks are used as they are stored."""
        return chunks

    def many(self, e: Emitter, weights: list[Value], x: list[Value], sums: Floats, left: Value) -> Floats:
        """Emit a tile over a chunk of each panel."""

        def widened(k: Value) -> list[Value]:
            return [self._widened(e, chunk + k * (LANES * self.size)) for chunk in weights]

        totals = self._products(e, widened, len(sums), x, left)
        return [[s + t for s, t in zip(*lines, strict=True)] for lines in zip(sums, totals, strict=True)]

    def few(self, e: Emitter, chunk: Value, x: list[Value], sums: list[Value], left: Value) -> list[Value]:
        """Emit a tile over a chunk as it is stored."""

        def weights(k: Value) -> list[Value]:
            return [self._widened(e, chunk + k * (LANES * self.size))]

        (totals,) = self._products(e, weights, 1, x, left)
        return [s + t for s, t in zip(sums, totals, strict=True)]

    def _products(self, e: Emitter, weights: object, panels: int, x: list[Value], left: Value) -> Floats:
        """Sums over a chunk of weights(k) [panel] times x [column][k]."""
        zero = e.const(vec(F32, LANES), 0.0)
        sums = [[e.var(zero) for _ in x] for _ in range(panels)]

        def step(k: Value, ahead: int) -> None:
            w = weights(k + ahead)  # type: ignore[operator]
            for c, column in enumerate(x):
                value = e.splat(e.load(column + (k + ahead) * 4, F32), LANES)
                for p in range(panels):
                    sums[p][c].set(multiply_add(e, w[p], value, sums[p][c].get()))

        whole = left & ~(_STEP - 1)
        with e.loop(0, whole, _STEP) as k:
            for ahead in range(_STEP):
                step(k, ahead)
        with e.loop(whole, left) as k:
            step(k, 0)
        return [[s.get() for s in line] for line in sums]


class BFloatDot(Format):
    """BF16, multiplied by activations rounded to bfloat16; for targets with `has_bfloat_dot`."""

    def __init__(self) -> None:
        self.activations = Activations(0, bfloat=True)
        self.chunk_bytes = CHUNK * LANES * 2

    def panel_bytes(self, columns: int) -> int:
        """Bytes of 16 rows."""
        return (columns + 1) // 2 * _PAIRS

    def panels(self, target: Target) -> int:
        """Panels of a tile for many columns."""
        return 4

    def pack(self, e: Emitter, rows: list[Value], panel: Value, columns: Value) -> None:
        """Emit the interleaving of 16 rows."""
        pairs = columns.lsr(1)
        with e.loop(0, pairs) as k:
            e.store(gather(e, rows, k * 4, I32), panel + k * _PAIRS)
        with e.when((columns & 1) != 0):
            e.store(gather(e, rows, pairs * 4, I16).zext(I32), panel + pairs * _PAIRS)

    def unpacked_bytes(self, panels: int) -> int:
        """None: panels are as the instruction wants them."""
        return 0

    def unpack(self, e: Emitter, chunks: list[Value], scratch: Value, left: Value) -> list[Value]:
        """Chunks are used as they are stored."""
        return chunks

    def many(self, e: Emitter, weights: list[Value], x: list[Value], sums: Floats, left: Value) -> Floats:
        """Emit a tile over a chunk of each panel."""
        zero = e.const(vec(F32, LANES), 0.0)
        totals = [[e.var(zero) for _ in x] for _ in weights]

        def step(pair: Value) -> None:
            w = [e.load(chunk + pair * _PAIRS, vec(I32, LANES)) for chunk in weights]
            for c, column in enumerate(x):
                value = e.splat(e.load(column + pair * 4, I32), LANES)
                for p, panel in enumerate(w):
                    totals[p][c].set(dot_bfloats(e, totals[p][c].get(), panel, value))

        pairs = (left + 1).lsr(1)
        whole = pairs & ~(_STEP - 1)
        with e.loop(0, whole, _STEP) as k:
            for ahead in range(_STEP):
                step(k + ahead)
        with e.loop(whole, pairs) as k:
            step(k)
        return [[s + t.get() for s, t in zip(*lines, strict=True)] for lines in zip(sums, totals, strict=True)]

    def few(self, e: Emitter, chunk: Value, x: list[Value], sums: list[Value], left: Value) -> list[Value]:
        """Emit a tile over a chunk as it is stored."""
        return self.many(e, [chunk], x, [sums], left)[0]
