"""Matrix multiplication with quantized weights: what all block formats share.

A sub-block is the 16 or 32 weights of a row that have one scale. Its dot product with the rounded activations is an
exact integer; only what happens to that integer is floating-point, and the same in both ways through a panel:

    K-quants     v  = -(dmin * mins), or 0         begin, once in 256 weights; mins: an integer, minimums times sums
                 v  = fma(dot, scale, v)            for each sub-block; scale = d * integer scale, exact in float32
                 y  = fma(v, x scale, y)            end
    blocks of 32 y  = fma(dot, scale * x scale, y)  for each block, then for Q4_1 and Q5_1
                 y  = fma(minimum, x sum, y)

Levels are unsigned. Where the format's are biased by a centre, the dot product starts at -centre times the sum of the
activations, which the activations carry.

Unpacked chunk, for P panels and a sub-block of S weights, every entry 64 bytes (levels in the order of `matmul_pairs`
where that is used):

    first sub-block (in the order of runs):  levels[P][S / 4]  scale[P]  minimum[P] (Q4_1, Q5_1)
    second:  ...
    mins (Q2_K, Q4_K, Q5_K): pairs of int16 [P][pairs]  dmin[P]
"""

from __future__ import annotations

from abc import abstractmethod

from .activations import CHUNK
from .emit import F32, I8, I16, I32, Emitter, Value, vec
from .matmul_pairs import PairDot, has_pairs, paired
from .matmul_tiles import LANES, Floats, Format
from .simd import concatenate, dot_pairs, dot_quads, half_to_float, multiply_add

__all__ = ["BlockFormat", "WideLevels", "halves", "nibbles", "spread_bits", "spread_nibble"]

ENTRY = 64  # bytes of 4 levels, or one float32, for each of 16 rows
LEVELS = vec(I8, ENTRY)


def nibbles(v: Value) -> tuple[Value, Value]:
    """Low and high halves of bytes."""
    return v & 15, _shifted(v, 4) & 15


def spread_nibble(nibble: Value) -> Value:
    """Bit b of a nibble at bit 8 b, i32 lanes; higher bits of the lanes must be clear."""
    return (nibble * 0x00204081) & 0x01010101


def spread_bits(e: Emitter, bits: Value) -> Value:
    """Bit 4 i + b of i32 lanes moved to bit i of byte b."""
    out = e.const(bits.type, 0)
    for i in range(8):
        out = out | (spread_nibble(bits.lsr(4 * i) & 15) << i)
    return out


def _shifted(v: Value, by: int) -> Value:
    """Bytes shifted right as 16-bit lanes (no processor shifts bytes): the upper bits are the neighbour's."""
    return v.bits(vec(I16, v.lanes // 2)).lsr(by).bits(v.type)


def halves(e: Emitter, at: Value) -> Value:
    """16 half-precision numbers as float32."""
    return half_to_float(e, e.load(at, vec(I16, LANES)))


class Dot:
    """A dot product in the making, of one panel and one column.

    x86 without VNNI multiplies bytes to sums of two products in 16 bits; as many of those as cannot overflow are added
    before they are widened, which saves a third of the instructions.
    """

    def __init__(self, f: BlockFormat, e: Emitter, start: Value) -> None:
        self.f, self.e, self.total = f, e, start
        self.batch = 32767 // (2 * (f.below - 1) * 127) if e.target.lowering in _BYTES else 0
        self.part: Value | None = None
        self.held = 0

    def add(self, levels: Value, quad: Value) -> None:
        """Levels times activations, added by fours."""
        if not self.batch:
            self.total = self.f.dot(self.e, self.total, levels, quad)
            return
        name, width = _BYTES[self.e.target.lowering]
        spans = [range(i, i + width) for i in range(0, ENTRY, width)]
        halves = vec(I16, width // 2)
        made = concatenate(self.e, [self.e.intrinsic(name, halves, levels.shuffle(s), quad.shuffle(s)) for s in spans])
        self.part = made if self.part is None else self.part + made
        self.held += 1
        if self.held == self.batch:
            self._widen()

    def _widen(self) -> None:
        if self.part is not None:
            self.total = dot_pairs(self.e, self.total, self.part, self.e.const(self.part.type, 1))
        self.part, self.held = None, 0

    def sum(self) -> Value:
        """The dot product so far."""
        self._widen()
        return self.total


# Lowering: the instruction that multiplies unsigned by signed bytes and adds by twos, and its bytes.
_BYTES = {"avx2": ("llvm.x86.avx2.pmadd.ub.sw", 32), "sse41": ("llvm.x86.ssse3.pmadd.ub.sw.128", 16)}


class BlockFormat(Format):
    """A format of 8-bit dot products.

    Attributes:
        span: weights of a sub-block.
        run: sub-blocks that `levels` yields at once, because they share bytes.
        below: bound of the levels.
        pairs: pairs of minimums in a chunk (K-quants).
        minimum: whether a sub-block has a minimum of its own (Q4_1, Q5_1).
    """

    span: int
    run: int
    below: int
    pairs: int = 0
    minimum: bool = False

    def sub(self, position: Value) -> Value:
        """Which sub-block is the one at a position in the order of runs, the order in which they are added."""
        return position

    @abstractmethod
    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run: i8 × 64 each, 4 consecutive weights of 16 rows."""

    @abstractmethod
    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run, float32 × 16."""

    def minimums(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Minimums of the sub-blocks of a run, float32 × 16; asked for if `minimum`."""
        return []

    def mins(self, e: Emitter, chunk: Value) -> tuple[list[Value], Value | None]:
        """Pairs of integer minimums, i16 × 32 each, and their unit dmin, float32 × 16, where there are any."""
        return [], None

    # -- the floating-point part ------------------------------------------------------------------------------------

    @property
    def chunked(self) -> bool:
        """Whether activations have one scale for a chunk."""
        return self.activations.group == CHUNK

    def _begin(self, e: Emitter, x: Value, y: Value, mins: list[Value], dmin: Value | None) -> Value:
        if not self.chunked:
            return y
        if dmin is None:
            return e.const(y.type, 0.0)
        total = e.const(vec(I32, LANES), 0)
        for j, pair in enumerate(mins):
            sums = e.splat(e.load(x + (self.activations.sums_offset + 4 * j), I32), LANES)
            total = dot_pairs(e, total, pair, sums.bits(pair.type))
        return -(total.to_float() * dmin)

    def _apply(self, e: Emitter, x: Value, sub: Value, v: Value, dot: Value, scale: Value, low: Value | None) -> Value:
        if self.chunked:
            return multiply_add(e, dot.to_float(), scale, v)
        of = sub if self.span == self.activations.group else sub >> 1
        unit = e.load(x + self.activations.scale_offset + of * 4, F32)
        v = multiply_add(e, dot.to_float(), scale * unit, v)
        if low is None:
            return v
        return multiply_add(e, low, e.splat(e.load(x + self.activations.sums_offset + sub * 4, F32), LANES), v)

    def _end(self, e: Emitter, x: Value, v: Value, y: Value) -> Value:
        if not self.chunked:
            return v
        return multiply_add(e, v, e.splat(e.load(x + self.activations.scale_offset, F32), LANES), y)

    def dot(self, e: Emitter, total: Value, levels: Value, quad: Value) -> Value:
        """Levels times activations, added by fours."""
        return dot_quads(e, total, levels, quad, below=self.below)

    def start(self, e: Emitter, x: Value, sub: Value) -> Value:
        """What a dot product starts from."""
        if self.activations.sums != "start":
            return e.const(vec(I32, LANES), 0)
        return e.splat(e.load(x + self.activations.sums_offset + sub * 4, I32), LANES)

    def _quad(self, e: Emitter, x: Value, sub: Value, j: int) -> Value:
        """Four activations, for every row."""
        return e.splat(e.load(x + sub * self.span + 4 * j, I32), LANES).bits(LEVELS)

    # -- through unpacked weights -----------------------------------------------------------------------------------

    def _sub_bytes(self, panels: int) -> int:
        return panels * ENTRY * (self.span // 4 + 1 + self.minimum)

    def unpacked_bytes(self, panels: int) -> int:
        """Bytes of an unpacked chunk."""
        return CHUNK // self.span * self._sub_bytes(panels) + panels * ENTRY * (self.pairs + 1)

    def unpack(self, e: Emitter, chunks: list[Value], scratch: Value, left: Value) -> list[Value]:
        """Emit the unpacking of a chunk."""
        panels, quads = len(chunks), self.span // 4
        sub_bytes = self._sub_bytes(panels)
        mins_at = scratch + CHUNK // self.span * sub_bytes
        for p, chunk in enumerate(chunks):
            with e.loop(0, left.udiv(self.span * self.run)) as run:
                scales = self.scales(e, chunk, run)
                lows = self.minimums(e, chunk, run) if self.minimum else []
                for s, levels in enumerate(self.levels(e, chunk, run)):
                    at = scratch + (run * self.run + s) * sub_bytes
                    for j, v in enumerate(paired(levels) if has_pairs(e.target) else levels):
                        e.store(v, at + (p * quads + j) * ENTRY, align=ENTRY)
                    e.store(scales[s], at + (panels * quads + p) * ENTRY, align=ENTRY)
                    if lows:
                        e.store(lows[s], at + (panels * (quads + 1) + p) * ENTRY, align=ENTRY)
            pairs, dmin = self.mins(e, chunk)
            for j, pair in enumerate(pairs):
                e.store(pair, mins_at + (p * self.pairs + j) * ENTRY, align=ENTRY)
            if dmin is not None:
                e.store(dmin, mins_at + (panels * self.pairs + p) * ENTRY, align=ENTRY)
        return [scratch]

    def many(self, e: Emitter, weights: list[Value], x: list[Value], sums: Floats, left: Value) -> Floats:
        """Emit a tile over an unpacked chunk."""
        (scratch,) = weights
        panels, quads = len(sums), self.span // 4
        sub_bytes = self._sub_bytes(panels)
        mins_at = scratch + CHUNK // self.span * sub_bytes

        def entry(at: Value, index: int, kind: object) -> Value:
            return e.load(at + index * ENTRY, kind, align=ENTRY)

        values = []
        for p in range(panels):
            mins = [entry(mins_at, p * self.pairs + j, vec(I16, 2 * LANES)) for j in range(self.pairs)]
            dmin = entry(mins_at, panels * self.pairs + p, vec(F32, LANES)) if self.pairs else None
            values.append([e.var(self._begin(e, xc, y, mins, dmin)) for xc, y in zip(x, sums[p], strict=True)])
        with e.loop(0, left.udiv(self.span)) as position:
            at, sub = scratch + position * sub_bytes, self.sub(position)
            dots = (self._pair_dots if has_pairs(e.target) else self._dots)(e, at, x, sub, panels)
            for p in range(panels):
                scale = entry(at, panels * quads + p, vec(F32, LANES))
                low = entry(at, panels * (quads + 1) + p, vec(F32, LANES)) if self.minimum else None
                for c, xc in enumerate(x):
                    v = values[p][c]
                    v.set(self._apply(e, xc, sub, v.get(), dots[p][c], scale, low))
        return [
            [self._end(e, xc, v.get(), y) for xc, v, y in zip(x, values[p], sums[p], strict=True)]
            for p in range(panels)
        ]

    def _dots(self, e: Emitter, at: Value, x: list[Value], sub: Value, panels: int) -> list[list[Value]]:
        """Dot products [panel][column] of a sub-block whose unpacked levels are at an address."""
        quads = self.span // 4
        starts = [self.start(e, xc, sub) for xc in x]
        dots = [[Dot(self, e, start) for start in starts] for _ in range(panels)]
        for j in range(quads):
            levels = [e.load(at + (p * quads + j) * ENTRY, LEVELS, align=ENTRY) for p in range(panels)]
            for c, xc in enumerate(x):
                quad = self._quad(e, xc, sub, j)
                for p in range(panels):
                    dots[p][c].add(levels[p], quad)
        return [[dot.sum() for dot in line] for line in dots]

    def _pair_dots(self, e: Emitter, at: Value, x: list[Value], sub: Value, panels: int) -> list[list[Value]]:
        """The same of levels that are `paired`, for an even number of columns."""
        quads = self.span // 4
        starts = [self.start(e, xc, sub) for xc in x]
        columns = [xc + sub * self.span for xc in x]
        dots = [[PairDot(e, both) for both in zip(starts[::2], starts[1::2], strict=True)] for _ in range(panels)]
        for j in range(0, quads, 2):
            for p in range(panels):
                levels = [e.load(at + (p * quads + i) * ENTRY, LEVELS, align=ENTRY) for i in (j, j + 1)]
                for dot, a, b in zip(dots[p], columns[::2], columns[1::2], strict=True):
                    dot.add(levels, (a + 4 * j, b + 4 * j))
        return [[total for dot in line for total in dot.sums()] for line in dots]

    # -- through panels as they are stored ----------------------------------------------------------------------------

    def few(self, e: Emitter, chunk: Value, x: list[Value], sums: list[Value], left: Value) -> list[Value]:
        """Emit a tile over a chunk as it is stored."""
        mins, dmin = self.mins(e, chunk)
        values = [e.var(self._begin(e, xc, y, mins, dmin)) for xc, y in zip(x, sums, strict=True)]
        # With one column one chain of dot products would wait for its own latency.
        split = 2 if len(x) == 1 else 1
        with e.loop(0, left.udiv(self.span * self.run)) as run:
            scales = self.scales(e, chunk, run)
            lows = self.minimums(e, chunk, run) if self.minimum else []
            # The processor's prefetcher runs ahead of ascending addresses only, and then needs no help: at the memory's
            # speed, where LLVM's order with prefetching by hand reached 75 to 95 % of it.
            with e.in_order():
                runs = self.levels(e, chunk, run)
            for s, levels in enumerate(runs):
                sub = self.sub(run * self.run + s)
                zero = e.const(vec(I32, LANES), 0)
                starts = [[self.start(e, xc, sub), *[zero] * (split - 1)] for xc in x]
                dots = [[Dot(self, e, start) for start in parts] for parts in starts]
                for j, v in enumerate(levels):
                    for c, xc in enumerate(x):
                        dots[c][j % split].add(v, self._quad(e, xc, sub, j))
                for c, xc in enumerate(x):
                    dot = dots[c][0].sum() + dots[c][1].sum() if split == 2 else dots[c][0].sum()
                    values[c].set(self._apply(e, xc, sub, values[c].get(), dot, scales[s], lows[s] if lows else None))
        return [self._end(e, xc, v.get(), y) for xc, v, y in zip(x, values, sums, strict=True)]


class WideLevels(BlockFormat):
    """Formats whose levels, biased by 128, need all 8 bits, with another way where unsigned bytes are too wide for it.

    x86 without VNNI multiplies |w| by sign(w) x, which does not saturate and saves widening both to 16 bits; Arm's
    instruction takes signed bytes.
    """

    below = 256

    def dot(self, e: Emitter, total: Value, levels: Value, quad: Value) -> Value:
        """Levels times activations, added by fours."""
        if e.target.lowering == "neon":
            return dot_quads(e, total, levels ^ -128, quad, below=128)
        if e.target.lowering not in _SIGN:
            return super().dot(e, total, levels, quad)
        name, width = _SIGN[e.target.lowering]
        weights = levels ^ -128
        parts = [range(i, i + width) for i in range(0, ENTRY, width)]
        signed = [e.intrinsic(name, vec(I8, width), quad.shuffle(p), weights.shuffle(p)) for p in parts]
        return dot_quads(e, total, e.abs(weights), concatenate(e, signed), below=129)

    def start(self, e: Emitter, x: Value, sub: Value) -> Value:
        """What a dot product starts from."""
        if e.target.lowering not in _SIGN and e.target.lowering != "neon":
            return super().start(e, x, sub)
        return e.const(vec(I32, LANES), 0)


# Lowering: the instruction that gives one vector the signs of another, and its bytes.
_SIGN = {"avx2": ("llvm.x86.avx2.psign.b", 32), "sse41": ("llvm.x86.ssse3.psign.b.128", 16)}
