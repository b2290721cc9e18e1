"""Panels of IQ1_S and IQ1_M: 16 rows of a super-block of 256, its lattice points unrolled to digits of two bits.

A component of a point is -1, 0 or 1, a digit 0 to 2 with centre 1; an eighth is added or taken away for 32 weights
(IQ1_S) or 8 (IQ1_M). The points are looked up once, when the weight is packed. Offsets in bytes of a panel's chunk;
`x 16` means once for each row:

    IQ1_S   d 0, for each half a word of 4 nibbles x 16 at 32 (bits 0 to 2 scale, 3 the shift is negative), digits 96
    IQ1_M   d 0, for each quarter a word of 4 scales of 3 bits x 16 at 32, shifts 160, digits 224

    digits  runs of entries of 64 bytes; byte b of a row's 4 bytes in entry i of a run holds in its bits 2 t, 2 t + 1
            the digit of weight 4 i + b of sub-block t of the run
    shifts  32 groups of 8 weights: a word whose bit r says that the shift of row r is positive

IQ1_S: the dot product with the digits is scaled, and what the centre and the shift add, (8 -+ 1) / 8 times the sum of
the activations, is a minimum, as that of Q4_K. IQ1_M, where 8 weights share a shift: it is part of the level, eight
times the digit, plus 2 where the shift is positive, with centre 9.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import numpy as np

from ...gguf.types import GGMLType
from ...quants.grids import codes
from .activations import CHUNK, Activations
from .emit import BOOL, I8, I16, I32, I64, Emitter, Value, vec
from .matmul_blocks import ENTRY, LEVELS, halves
from .matmul_float import gather
from .matmul_kquants import KFormat
from .matmul_small import cells, transposed
from .matmul_tiles import LANES

__all__ = ["POINT_FORMATS"]

WORDS = vec(I32, LANES)


@cache
def _points() -> bytes:
    """Of every point, the 8 digits in a word, the first one in the lowest bits."""
    digits = codes(GGMLType.IQ1_S).astype(np.uint16)
    return bytes(np.bitwise_or.reduce(digits << np.arange(0, 16, 2, dtype=np.uint16), axis=1).astype("<u2"))


def _look_up(e: Emitter, table: Value, index: Value) -> Value:
    """The digits of the points of 16 rows, as i32 lanes."""
    out = e.const(WORDS, 0)
    for lane in range(LANES):
        found = e.load(table + index.lane(lane).zext(I64) * 2, I16, align=2)
        out = out.with_lane(lane, found.zext(I32))
    return out


class _Points(KFormat):
    """What both have in common: runs of 4 sub-blocks of digits."""

    run = 4
    low: int  # offset of the low bytes of the points in a row's block
    digits: int  # offset in the panel's chunk

    def _pack_digits(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Emit the looking up and interleaving of all points."""
        table, groups = e.table(_points()), self.span // 8
        with e.loop(0, CHUNK // (self.span * self.run)) as run:
            words = []
            for t in range(self.run):
                sub = run * self.run + t
                low = [r + sub * groups for r in rows]
                for g, high in enumerate(self._tops(e, rows, sub)):
                    index = gather(e, low, self.low + g, I8).zext(I32) | high << 8
                    words.append(_look_up(e, table, index))
            for i in range(self.span // 4):
                four = e.const(WORDS, 0)
                for t in range(self.run):
                    four = four | ((words[t * groups + i // 2].lsr(8 * (i % 2)) & 255) << (8 * t))
                at = chunk + run * (self.span // 4 * ENTRY) + (self.digits + i * ENTRY)
                e.store(transposed(four), at)

    @abstractmethod
    def _tops(self, e: Emitter, rows: list[Value], sub: Value) -> list[Value]:
        """The top three bits of the points of a sub-block, as i32 lanes."""

    def _entries(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        count = self.span // 4
        at = chunk + run * (count * ENTRY) + self.digits
        return [e.load(at + i * ENTRY, LEVELS) for i in range(count)]


class IQ1S(_Points):
    """8 sub-blocks of 32 weights."""

    span, below, pairs = 32, 3, 4
    chunk_bytes, block_bytes, digits, low = 1120, 50, 96, 2
    activations = Activations(CHUNK, 32, "pairs")

    def _tops(self, e: Emitter, rows: list[Value], sub: Value) -> list[Value]:
        word = gather(e, [r + sub * 2 for r in rows], 34, I16).zext(I32)
        return [word.lsr(3 * g) & 7 for g in range(4)]

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        e.store(gather(e, rows, 0, I16), chunk)
        for run in range(2):
            nibbles = e.const(WORDS, 0)
            for t in range(4):
                word = gather(e, rows, 34 + 2 * (4 * run + t), I16).zext(I32)
                nibbles = nibbles | (word.lsr(12) << (4 * t))
            e.store(nibbles.trunc(I16), chunk + (32 + run * 2 * LANES))
        self._pack_digits(e, rows, chunk)

    @staticmethod
    def _nibbles(e: Emitter, chunk: Value, run: Value) -> list[Value]:
        word = e.load(chunk + run * (2 * LANES) + 32, vec(I16, LANES)).zext(I32)
        return [word.lsr(4 * t) & 15 for t in range(4)]

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        entries = self._entries(e, chunk, run)
        return [[cells(v, -2 * t, 3) for v in entries] for t in range(4)]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d = halves(e, chunk)
        return [d * (((n & 7) << 1) | 1).to_float() for n in self._nibbles(e, chunk, run)]

    def mins(self, e: Emitter, chunk: Value) -> tuple[list[Value], Value | None]:
        """Pairs of integer minimums, in eighths of the scale, and their unit."""
        made = []
        for run in range(2):
            for n in self._nibbles(e, chunk, e.integer(run)):
                scale = ((n & 7) << 1) | 1
                made.append((scale << 3) + e.where(n >= 8, scale, -scale))
        pairs = [(a | b << 16).bits(vec(I16, 2 * LANES)) for a, b in zip(made[::2], made[1::2], strict=True)]
        return pairs, halves(e, chunk) * 0.125


class IQ1M(_Points):
    """16 sub-blocks of 16 weights; levels are eighths."""

    span, below = 16, 19
    chunk_bytes, block_bytes, digits, low = 1248, 56, 224, 0
    activations = Activations(CHUNK, 16, "start", 9)

    def _tops(self, e: Emitter, rows: list[Value], sub: Value) -> list[Value]:
        byte = gather(e, [r + sub for r in rows], 32, I8).zext(I32)
        return [byte & 7, byte.lsr(4) & 7]

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        unit = e.const(WORDS, 0)
        for run in range(4):
            word = gather(e, rows, 48 + 2 * run, I16).zext(I32)
            unit = unit | (word.lsr(12) << (4 * run))
            e.store((word & 0xFFF).trunc(I16), chunk + (32 + run * 2 * LANES))
        e.store(unit.trunc(I16), chunk)
        with e.loop(0, 16) as sub:
            byte = gather(e, [r + sub for r in rows], 32, I8)
            for g in range(2):
                positive = (byte & (8 << (4 * g))) == 0
                e.store(positive.bits(I16), chunk + sub * 4 + (160 + 2 * g))
        self._pack_digits(e, rows, chunk)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        entries, zero = self._entries(e, chunk, run), e.const(WORDS, 0)
        made = []
        for t in range(4):
            at = chunk + run * 16 + (160 + 4 * t)
            masks = [e.load(at + 2 * g, I16).bits(vec(BOOL, LANES)) for g in range(2)]
            twos = [e.where(m, e.const(WORDS, 0x02020202), zero).bits(LEVELS) for m in masks]
            made.append([cells(v, 3 - 2 * t, 0x18) | twos[i // 2] for i, v in enumerate(entries)])
        return made

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run, of levels in eighths."""
        eighth = halves(e, chunk) * 0.125
        word = e.load(chunk + run * (2 * LANES) + 32, vec(I16, LANES)).zext(I32)
        return [eighth * (((word.lsr(3 * t) & 7) << 1) | 1).to_float() for t in range(4)]


POINT_FORMATS: dict[str, KFormat] = {"IQ1_S": IQ1S(), "IQ1_M": IQ1M()}
