"""Panels of Q2_K to Q6_K: 16 rows of a super-block of 256 weights, interleaved by groups of 4 bytes.

A panel's chunk is laid out in the order in which it is read: the processor's own prefetcher follows ascending addresses
only (Q6_K with its two planes apart came from memory at a third of the speed). Offsets in bytes; `x 16` means once for
each row:

    Q2_K   d 0, dmin 32, scales 64 (words of two bytes x 16: sub-blocks 2 j and 2 j + 1), qs 320
    Q3_K   d 0, scales 64 (int8 x 16, in order of runs, bias taken off), then 4 groups of pairs and 2 of top bits for
           each run, 320 + 384 run
    Q4_K   d 0, dmin 32, for each run low bits 64 + 32 run and high bits 192 + 16 run of its scales, qs 256
    Q5_K   as Q4_K up to the scales, then 8 groups of nibbles and 2 of top bits for each run, 256 + 640 run
    Q6_K   d 0, scales 64 (int8 x 16, in order of runs), then 8 low groups and 4 high ones for each run, 320 + 768 run

Top bits are gathered, four or eight neighbouring groups in a byte, so that a run needs none but its own: bit 2 i + t of
group g of Q5_K belongs to group 4 g + i of its sub-block t, bit 4 i + t of group g of Q3_K to group 2 g + i of t.

Formats with 16 sub-blocks keep 4 levels in corresponding bits of neighbouring 32 weights. A run of theirs is half of
the groups of bytes of half a super-block, and yields 4 sub-blocks that lie 32 weights apart.
"""

from __future__ import annotations

from abc import abstractmethod

from .activations import CHUNK, Activations
from .emit import I8, I16, I32, Emitter, Value, vec
from .matmul_blocks import ENTRY, LEVELS, BlockFormat, halves, nibbles
from .matmul_float import gather
from .matmul_tiles import LANES

__all__ = ["K_FORMATS", "KFormat", "moved", "split_bytes", "words"]


class KFormat(BlockFormat):
    """What the K formats have in common: whole chunks, packed one by one."""

    block_bytes: int  # of a row in the file

    def panel_bytes(self, columns: int) -> int:
        """Bytes of 16 rows."""
        return columns // CHUNK * self.chunk_bytes

    def pack(self, e: Emitter, rows: list[Value], panel: Value, columns: Value) -> None:
        """Emit the interleaving of 16 rows."""
        with e.loop(0, columns.udiv(CHUNK)) as i:
            self.pack_block(e, [r + i * self.block_bytes for r in rows], panel + i * self.chunk_bytes)

    @abstractmethod
    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""


def words(e: Emitter, rows: list[Value], source: int, chunk: Value, target: int, count: int) -> None:
    """Interleave `count` groups of 4 bytes."""
    with e.loop(0, count) as i:
        e.store(gather(e, [r + i * 4 for r in rows], source, I32), chunk + i * ENTRY + target)


def split_bytes(word: Value) -> list[Value]:
    """The 4 bytes of i32 lanes, lowest first, each as i32 lanes."""
    return [word.lsr(8 * i) & 255 for i in range(4)]


def _integer_scale(e: Emitter, at: Value) -> Value:
    return e.load(at, vec(I8, LANES)).sext(I32).to_float()


class _Sixteen(KFormat):
    """Q2_K, Q3_K and Q6_K: 16 sub-blocks in 4 runs."""

    span, run = 16, 4

    def sub(self, position: Value) -> Value:
        """Run 2 h + g yields sub-blocks 8 h + g + (0, 2, 4, 6)."""
        return (position & 8) + ((position & 3) << 1) + ((position >> 2) & 1)


def _position(sub: int) -> int:
    """The inverse of `_Sixteen.sub`."""
    return (sub & 8) + ((sub & 1) << 2) + (sub % 8 >> 1)


class _Signed(_Sixteen):
    """Q3_K and Q6_K: levels biased by a centre, signed scales at offset 64."""

    def __init__(self, centre: int, below: int) -> None:
        self.below = below
        self.activations = Activations(CHUNK, 16, "start", centre)

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d = halves(e, chunk)
        at = chunk + run * (4 * LANES) + 64
        return [d * _integer_scale(e, at + s * LANES) for s in range(4)]


class Q6K(_Signed):
    """256 weights of 6 bits: low nibbles in two halves of 64 bytes, high pairs of bits in two of 32."""

    chunk_bytes, block_bytes = 3392, 210

    def __init__(self) -> None:
        super().__init__(32, 64)

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        e.store(gather(e, rows, 208, I16), chunk)
        for i in range(4):
            for j, byte in enumerate(split_bytes(gather(e, rows, 192 + 4 * i, I32))):
                e.store(byte.trunc(I8), chunk + (64 + _position(4 * i + j) * LANES))
        with e.loop(0, 4) as run:
            at, part = chunk + run * (12 * ENTRY) + 320, (run & 1) * 16
            low = [r + (run >> 1) * 64 + part for r in rows]
            words(e, low, 0, at, 0, 4)
            words(e, low, 32, at, 4 * ENTRY, 4)
            words(e, [r + (run >> 1) * 32 + part for r in rows], 128, at, 8 * ENTRY, 4)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (12 * ENTRY) + 320
        low = [e.load(at + i * ENTRY, LEVELS) for i in range(8)]
        high = [e.load(at + (8 + i) * ENTRY, LEVELS) for i in range(4)]
        return [
            [nibbles(low[i + 4 * (turn % 2)])[turn // 2] | (moved(high[i], 4 - 2 * turn) & 0x30) for i in range(4)]
            for turn in range(4)
        ]


class Q3K(_Signed):
    """256 weights of 3 bits: low pairs of bits in two halves of 32 bytes, top bits in 32 bytes, 8 to a byte."""

    chunk_bytes, block_bytes = 1856, 110

    def __init__(self) -> None:
        super().__init__(4, 8)

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        e.store(gather(e, rows, 108, I16), chunk)
        parts = [gather(e, rows, 96 + 4 * i, I32) for i in range(3)]
        tops = split_bytes(parts[2])
        for j in range(16):
            byte = (parts[j // 4 % 2].lsr(8 * (j % 4)) & 255).lsr(4 * (j // 8)) & 15
            top = tops[j % 4].lsr(2 * (j // 4)) & 3
            e.store(((byte | (top << 4)) - 32).trunc(I8), chunk + (64 + _position(j) * LANES))
        masks = [gather(e, rows, 4 * i, I32) for i in range(8)]
        for run in range(4):
            at, half, first = 384 * run + 320, run >> 1, (run & 1) * 4
            words(e, rows, 32 + 32 * half + 4 * first, chunk, at, 4)
            for g in range(2):
                low, high = (masks[first + 2 * g + i].lsr(4 * half) & 0x0F0F0F0F for i in range(2))
                e.store(low | (high << 4), chunk + (at + (4 + g) * ENTRY))

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (6 * ENTRY) + 320
        low = [e.load(at + i * ENTRY, LEVELS) for i in range(4)]
        tops = [e.load(at + (4 + g) * ENTRY, LEVELS) for g in range(2)]
        return [
            [(moved(low[i], -2 * turn) & 3) | (moved(tops[i // 2], 2 - 4 * (i % 2) - turn) & 4) for i in range(4)]
            for turn in range(4)
        ]


def moved(v: Value, left: int) -> Value:
    """Bytes shifted left, or right if negative, as 16-bit lanes."""
    wide = v.bits(vec(I16, v.lanes // 2))
    return (wide << left if left > 0 else wide.lsr(-left) if left else wide).bits(v.type)


class Q4K(KFormat):
    """256 weights of 4 bits (or 5, with a plane of top bits), 8 sub-blocks with scale and minimum of 6 bits."""

    span, run, pairs = 32, 2, 4
    activations = Activations(CHUNK, 32, "pairs")

    def __init__(self, five: bool) -> None:
        self.five = five
        self.chunk_bytes, self.block_bytes = (2816, 176) if five else (2304, 144)
        self.below, self.groups = (32, 10) if five else (16, 8)

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        both = gather(e, rows, 0, I32)
        e.store(both.trunc(I16), chunk)
        e.store(both.lsr(16).trunc(I16), chunk + 32)
        low, middle, high = (split_bytes(gather(e, rows, 4 + 4 * i, I32)) for i in range(3))
        scales = [v & 63 for v in low] + [(h & 15) | (v.lsr(6) << 4) for v, h in zip(low, high, strict=True)]
        mins = [v & 63 for v in middle] + [h.lsr(4) | (v.lsr(6) << 4) for v, h in zip(middle, high, strict=True)]
        # Kept at 6 bits, since decoding is bound by bytes. For a run of sub-blocks (0, 1) and each row:
        #     low   bits 15 14 13 12   11 10  9  8    7  6  5  4    3  2  1  0      high   7  6    5  4    3  2    1  0
        #               min 1 & 15   scale 1 & 15  min 0 & 15   scale 0 & 15          min 1   scale 1 min 0  scale 0
        for run in range(4):
            (s0, s1), (m0, m1) = (part[2 * run : 2 * run + 2] for part in (scales, mins))
            fours = (s0 & 15) | ((m0 & 15) << 4) | ((s1 & 15) << 8) | ((m1 & 15) << 12)
            twos = s0.lsr(4) | (m0.lsr(4) << 2) | (s1.lsr(4) << 4) | (m1.lsr(4) << 6)
            e.store(fours.trunc(I16), chunk + (64 + run * 2 * LANES))
            e.store(twos.trunc(I8), chunk + (192 + run * LANES))
        tops = [gather(e, rows, 16 + 4 * i, I32) for i in range(8)] if self.five else []
        for run in range(4):
            at = 256 + run * self.groups * ENTRY
            words(e, rows, (48 if self.five else 16) + 32 * run, chunk, at, 8)
            for g in range(self.groups - 8):
                parts = [(top.lsr(2 * run) & 0x03030303) << (2 * i) for i, top in enumerate(tops[4 * g : 4 * g + 4])]
                e.store(parts[0] | parts[1] | parts[2] | parts[3], chunk + (at + (8 + g) * ENTRY))

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (self.groups * ENTRY) + 256
        entries = [e.load(at + i * ENTRY, LEVELS) for i in range(self.groups)]
        low, high = [], []
        for i, entry in enumerate(entries[:8]):
            a, b = nibbles(entry)
            if self.five:
                top, bit = entries[8 + i // 4], 2 * (i % 4)
                a, b = a | (moved(top, 4 - bit) & 16), b | (moved(top, 3 - bit) & 16)
            low.append(a)
            high.append(b)
        return [low, high]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d, (low, high) = halves(e, chunk), self._six_bits(e, chunk, run)
        first, second = (low & 15) | ((high & 3) << 4), (low.lsr(8) & 15) | (high & 0x30)
        return [d * first.to_float(), d * second.to_float()]

    def mins(self, e: Emitter, chunk: Value) -> tuple[list[Value], Value | None]:
        """Pairs of integer minimums and their unit."""
        pairs = []
        for run in range(4):
            low, high = self._six_bits(e, chunk, e.integer(run))
            even, odd = (low.lsr(4) & 15) | ((high & 0x0C) << 2), ((low & 0xF000) << 4) | ((high & 0xC0) << 14)
            pairs.append((even | odd).bits(vec(I16, 2 * LANES)))
        return pairs, halves(e, chunk + 32)

    @staticmethod
    def _six_bits(e: Emitter, chunk: Value, run: Value) -> tuple[Value, Value]:
        """Low and high bits of a run's scales and minimums, as i32 lanes."""
        low = e.load(chunk + run * (2 * LANES) + 64, vec(I16, LANES))
        return low.zext(I32), e.load(chunk + run * LANES + 192, vec(I8, LANES)).zext(I32)


class Q2K(_Sixteen):
    """256 weights of 2 bits, 16 sub-blocks with scale (low nibble) and minimum (high nibble) in a byte."""

    chunk_bytes, block_bytes = 1344, 84
    below, pairs = 4, 8
    activations = Activations(CHUNK, 16, "pairs")

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        both = gather(e, rows, 80, I32)
        e.store(both.trunc(I16), chunk)
        e.store(both.lsr(16).trunc(I16), chunk + 32)
        for i in range(4):
            word = gather(e, rows, 4 * i, I32)
            e.store(word.trunc(I16), chunk + (64 + 4 * i * LANES))
            e.store(word.lsr(16).trunc(I16), chunk + (64 + (4 * i + 2) * LANES))
        words(e, rows, 16, chunk, 320, 16)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (4 * ENTRY) + 320
        packed = [e.load(at + i * ENTRY, LEVELS) for i in range(4)]
        return [[moved(v, -2 * turn) & 3 for v in packed] for turn in range(4)]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d, at = halves(e, chunk), chunk + (run >> 1) * (8 * LANES) + 64
        shift = ((run & 1) * 8).trunc(I16)
        words = [e.load(at + i * 2 * LANES, vec(I16, LANES)) for i in range(4)]
        return [d * (word.lsr(shift) & 15).zext(I32).to_float() for word in words]

    def mins(self, e: Emitter, chunk: Value) -> tuple[list[Value], Value | None]:
        """Pairs of integer minimums and their unit."""
        at = chunk + 64
        pairs = [nibbles(e.load(at + j * 2 * LANES, vec(I8, 2 * LANES)))[1].zext(I16) for j in range(8)]
        return pairs, halves(e, chunk + 32)


K_FORMATS: dict[str, KFormat] = {"Q2_K": Q2K(), "Q3_K": Q3K(), "Q4_K": Q4K(False), "Q5_K": Q4K(True), "Q6_K": Q6K()}
