"""Panels of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: points of the lattices are looked up once, when packing.

What remains are planes of bits, so that no lattice is needed while multiplying; the panels are 1.22 to 1.49 times the
file. Offsets in bytes of a panel's chunk of 256 weights; `x 16` means once for each row:

    IQ3_XXS, IQ3_S   d 0 (half x 16), scales 32 (byte of two nibbles x 16 for each 64 weights), nibbles 96
    IQ2_XS, IQ2_S    d 0, scales 32 (byte of two nibbles x 16 for each 32 weights), then for each 32 weights, 192 bytes
                     from 160: 2 entries of magnitudes and one of signs
    IQ2_XXS          d 0, then for each 32 weights, 192 bytes from 32: the same, scales among the signs

An entry of magnitudes holds 16 weights of a row in 4 bytes, two bits each (0 to 2: 8, 25 or 43), one of signs 32:

            bits  7 6|5 4|3 2|1 0                    bits  7  6  5  4| 3  2  1 0
    byte b  of   12+b|8+b|4+b| b             byte b  of  28+b 20+b 12+b 4+b|24+b 16+b 8+b b

Of 8 weights of IQ2_XXS the last has the sign that makes the number of negative ones even. So its place, the upper four
bits of byte 3, is free for the scale of the 32 weights, as it is in the file; all of it is 3.06 bits a weight.

Levels are the values biased by the largest: 43 (IQ2), 62 (IQ3_XXS), 15 (IQ3_S, of which a nibble is half the level).
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from ...gguf.types import GGMLType
from ...quants.grids import GRIDS, codes
from .activations import CHUNK, Activations
from .emit import I8, I16, I32, I64, Emitter, Value, vec
from .matmul_blocks import ENTRY, LEVELS, halves, nibbles, spread_nibble
from .matmul_float import gather
from .matmul_kquants import KFormat, moved
from .matmul_tiles import LANES
from .simd import lookup

__all__ = ["LATTICE_FORMATS"]


def _points(type: GGMLType) -> bytes:
    """A 32-bit word for each point: byte b has the codes of component b and, in IQ2, 2 bits above, of b + 4."""
    parts = codes(type).reshape(GRIDS[type].count, -1, 4)
    joined = parts[:, 0] if parts.shape[1] == 1 else parts[:, 0] | parts[:, 1] << 2
    return np.ascontiguousarray(joined, np.uint8).tobytes()


def _picked(e: Emitter, table: Value, indices: list[Value]) -> Value:
    """The words of a table at an I64 index for each row."""
    return gather(e, [table + i * 4 for i in indices], 0, I32)


def _byte(e: Emitter, at: Value) -> Value:
    return e.load(at, I8).zext(I64)


def _with_parity(code: Value) -> Value:
    """Eight signs for a code of seven, i32 lanes: the last is the parity of the others."""
    folded = code ^ code.lsr(4)
    folded = folded ^ folded.lsr(2)
    return code | (((folded ^ folded.lsr(1)) & 1) << 7)


class _Lattice(KFormat):
    """What the formats have in common: odd multiples of a fraction of d as scales.

    Attributes:
        type: whose lattice.
        unit: d times an odd integer and this is the scale.
    """

    type: GGMLType
    unit: float

    def scaled(self, e: Emitter, d: Value, bits: Value) -> Value:
        """The scale of a sub-block from its four bits, i32 lanes; exact."""
        return d * ((bits << 1) | 1).to_float()

    def unit_of(self, e: Emitter, chunk: Value) -> Value:
        """d times the fraction, exact."""
        d = halves(e, chunk)
        return d if self.unit == 1.0 else d * self.unit


class _Three(_Lattice):
    """IQ3: points of 4, a nibble for each weight."""

    chunk_bytes = 2144
    span, run = 32, 2

    @abstractmethod
    def quads(self, e: Emitter, rows: list[Value], table: Value, part: Value) -> list[Value]:
        """Nibbles of sub-block `part`: 8 groups of 4 weights, i32 × 16 each, one nibble to a byte."""

    @abstractmethod
    def pack_scales(self, e: Emitter, rows: list[Value], at: Value) -> None:
        """Interleave the scales of the sub-blocks."""

    @abstractmethod
    def level(self, e: Emitter, packed: Value) -> tuple[Value, Value]:
        """Levels of the low and the high nibbles."""

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        table = e.table(_points(self.type))
        e.store(gather(e, rows, 0, I16), chunk)
        self.pack_scales(e, rows, chunk + 32)
        with e.loop(0, 8) as part:
            quads = self.quads(e, rows, table, part)
            for j in range(4):
                e.store(quads[j] | (quads[j + 4] << 4), chunk + part * (4 * ENTRY) + (96 + j * ENTRY))

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (8 * ENTRY) + 96
        both = [self.level(e, e.load(at + i * ENTRY, LEVELS)) for i in range(8)]
        return [[pair[half] for half in range(2) for pair in both[4 * s : 4 * s + 4]] for s in range(2)]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d, byte = self.unit_of(e, chunk), e.load(chunk + run * LANES + 32, vec(I8, LANES)).zext(I32)
        return [self.scaled(e, d, byte & 15), self.scaled(e, d, byte.lsr(4))]


class IQ3XXS(_Three):
    """256 weights of 3 bits: an index for 4 weights, and a word of signs and scale for 32."""

    type, unit = GGMLType.IQ3_XXS, 0.25
    block_bytes, below = 98, 125
    activations = Activations(CHUNK, 32, "start", 62)

    def quads(self, e: Emitter, rows: list[Value], table: Value, part: Value) -> list[Value]:
        """Nibbles: the code of the magnitude, and the sign in the top bit."""
        signs = gather(e, [r + part * 4 for r in rows], 66, I32)
        out = []
        for group in range(4):
            eight = _with_parity(signs.lsr(7 * group) & 127)
            for half, negative in enumerate((eight & 15, eight.lsr(4))):
                indices = [_byte(e, r + part * 8 + (2 + 2 * group + half)) for r in rows]
                out.append(_picked(e, table, indices) | (spread_nibble(negative) << 3))
        return out

    def pack_scales(self, e: Emitter, rows: list[Value], at: Value) -> None:
        """Interleave the scales of the sub-blocks, the top bits of the words of signs."""
        with e.loop(0, 4) as i:
            first, second = (gather(e, [r + i * 8 for r in rows], 66 + 4 * s, I32).lsr(28) for s in range(2))
            e.store((first | (second << 4)).trunc(I8), at + i * LANES)

    def level(self, e: Emitter, packed: Value) -> tuple[Value, Value]:
        """Levels of the low and the high nibbles."""
        values = GRIDS[self.type].values
        table = [62 + v for v in values] + [62 - v for v in values]
        low, high = nibbles(packed)
        return lookup(e, table, low), lookup(e, table, high)


class IQ3S(_Three):
    """256 weights of 3.4 bits: an index of 9 bits for 4 weights, 8 signs for 8."""

    type, unit = GGMLType.IQ3_S, 1.0
    block_bytes, below = 110, 31
    activations = Activations(CHUNK, 32, "start", 15)

    def quads(self, e: Emitter, rows: list[Value], table: Value, part: Value) -> list[Value]:
        """Nibbles q that stand for the odd number 2 q - 15."""
        tops = [_byte(e, r + part + 66) for r in rows]
        signs = gather(e, [r + part * 4 for r in rows], 74, I32)
        out = []
        for k in range(8):
            indices = [
                _byte(e, r + part * 8 + (2 + k)) | ((top.lsr(k) & 1) << 8) for r, top in zip(rows, tops, strict=True)
            ]
            negative = spread_nibble(signs.lsr(4 * k) & 15)
            out.append((_picked(e, table, indices) | 0x08080808) ^ (negative * 15))
        return out

    def pack_scales(self, e: Emitter, rows: list[Value], at: Value) -> None:
        """Interleave the scales of the sub-blocks."""
        with e.loop(0, 4) as i:
            e.store(gather(e, [r + i for r in rows], 106, I8), at + i * LANES)

    def level(self, e: Emitter, packed: Value) -> tuple[Value, Value]:
        """Levels of the low and the high nibbles."""
        return moved(packed, 1) & 30, moved(packed, -3) & 30


class _Two(_Lattice):
    """IQ2: points of 8, two bits for a magnitude and one for a sign."""

    unit, below = 0.125, 87
    runs_at: int  # offset of the first entry

    @abstractmethod
    def pick(self, e: Emitter, rows: list[Value], part: Value, group: int) -> tuple[list[Value], Value]:
        """Indices of the points of group `group` (8 weights) of the 32 weights `part`, and its signs in i32 lanes."""

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        table = e.table(_points(self.type))
        e.store(gather(e, rows, 0, I16), chunk)
        with e.loop(0, 8) as part:
            at = chunk + part * (3 * ENTRY) + self.runs_at
            signs = e.const(vec(I32, LANES), 0)
            magnitudes = []
            for group in range(4):
                indices, eight = self.pick(e, rows, part, group)
                magnitudes.append(_picked(e, table, indices))
                signs = signs | (spread_nibble(eight & 15) << group) | (spread_nibble(eight.lsr(4)) << (group + 4))
            e.store(magnitudes[0] | (magnitudes[1] << 4), at)
            e.store(magnitudes[2] | (magnitudes[3] << 4), at + ENTRY)
            e.store(self.with_scale(e, rows, part, signs, chunk), at + 2 * ENTRY)

    @abstractmethod
    def with_scale(self, e: Emitter, rows: list[Value], part: Value, signs: Value, chunk: Value) -> Value:
        """Put the scales of 32 weights away, and return the entry of signs."""

    def quads(self, e: Emitter, at: Value, signs: Value) -> list[Value]:
        """Levels of 32 weights from two entries of magnitudes and one of signs."""
        low = [e.load(at + i * ENTRY, LEVELS) for i in range(2)]
        values = GRIDS[self.type].values
        table = [43 + v for v in values] + [0] + [43 - v for v in values] + [0]
        out = []
        for j in range(8):
            magnitude, bit = moved(low[j // 4], -2 * (j % 4)) & 3, 4 * (j % 2) + j // 2
            out.append(lookup(e, table, magnitude | (moved(signs, 2 - bit) & 4)))
        return out


class IQ2XXS(_Two):
    """256 weights of 2.06 bits: 4 indices of 8 bits, 28 bits of signs and 4 of scale for 32 weights."""

    type = GGMLType.IQ2_XXS
    chunk_bytes, block_bytes, runs_at = 1568, 66, 32
    span, run = 32, 1
    activations = Activations(CHUNK, 32, "start", 43)

    def pick(self, e: Emitter, rows: list[Value], part: Value, group: int) -> tuple[list[Value], Value]:
        """Indices and the seven signs that are stored."""
        indices = [_byte(e, r + part * 8 + (2 + group)) for r in rows]
        return indices, self._word(e, rows, part).lsr(7 * group) & 127

    @staticmethod
    def _word(e: Emitter, rows: list[Value], part: Value) -> Value:
        return gather(e, [r + part * 8 for r in rows], 6, I32)

    def with_scale(self, e: Emitter, rows: list[Value], part: Value, signs: Value, chunk: Value) -> Value:
        """The four bits of scale stay where they are in the file."""
        return signs | (self._word(e, rows, part) & -0x10000000)

    @staticmethod
    def _entry(e: Emitter, chunk: Value, run: Value) -> tuple[Value, Value]:
        """Address of a run, and its signs and scale."""
        at = chunk + run * (3 * ENTRY) + 32
        return at, e.load(at + 2 * ENTRY, vec(I32, LANES))

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at, word = self._entry(e, chunk, run)
        signs = word & 0x0FFFFFFF
        folded = signs ^ signs.lsr(16)
        folded = folded ^ folded.lsr(8)
        folded = folded ^ folded.lsr(4)
        return [self.quads(e, at, (signs | (folded << 28)).bits(LEVELS))]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        _, word = self._entry(e, chunk, run)
        return [self.scaled(e, self.unit_of(e, chunk), word.lsr(28))]


class _TwoOfSixteen(_Two):
    """IQ2_XS and IQ2_S: two sub-blocks of 16 in 32 weights, their scales in a byte."""

    chunk_bytes, runs_at = 1696, 160
    span, run = 16, 2
    activations = Activations(CHUNK, 16, "start", 43)
    scales_from: int  # offset in the file's block

    def with_scale(self, e: Emitter, rows: list[Value], part: Value, signs: Value, chunk: Value) -> Value:
        """Scales have places of their own."""
        e.store(gather(e, [r + part for r in rows], self.scales_from, I8), chunk + part * LANES + 32)
        return signs

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (3 * ENTRY) + self.runs_at
        quads = self.quads(e, at, e.load(at + 2 * ENTRY, LEVELS))
        return [quads[:4], quads[4:]]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d, byte = self.unit_of(e, chunk), e.load(chunk + run * LANES + 32, vec(I8, LANES)).zext(I32)
        return [self.scaled(e, d, byte & 15), self.scaled(e, d, byte.lsr(4))]


class IQ2XS(_TwoOfSixteen):
    """256 weights of 2.3 bits: an index of 9 bits and a code of 7 signs for 8 weights."""

    type, block_bytes, scales_from = GGMLType.IQ2_XS, 74, 66

    def pick(self, e: Emitter, rows: list[Value], part: Value, group: int) -> tuple[list[Value], Value]:
        """Indices and signs."""
        at = [r + part * 8 for r in rows]
        indices = [e.load(r + (2 + 2 * group), I16).zext(I64) & 511 for r in at]
        return indices, _with_parity(gather(e, at, 2 + 2 * group, I16).zext(I32).lsr(9))


class IQ2S(_TwoOfSixteen):
    """256 weights of 2.5 bits: an index of 10 bits, two of them apart, and 8 signs for 8 weights."""

    type, block_bytes, scales_from = GGMLType.IQ2_S, 82, 74

    def pick(self, e: Emitter, rows: list[Value], part: Value, group: int) -> tuple[list[Value], Value]:
        """Indices and signs."""
        at = [r + part * 4 for r in rows]
        tops = [(_byte(e, r + part + 66).lsr(2 * group) & 3) << 8 for r in rows]
        indices = [_byte(e, r + (2 + group)) | top for r, top in zip(at, tops, strict=True)]
        return indices, gather(e, at, 34 + group, I8).zext(I32)


LATTICE_FORMATS: dict[str, KFormat] = {
    "IQ2_XXS": IQ2XXS(),
    "IQ2_XS": IQ2XS(),
    "IQ2_S": IQ2S(),
    "IQ3_XXS": IQ3XXS(),
    "IQ3_S": IQ3S(),
}
