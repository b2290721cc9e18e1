"""Panels of Q1_0, Q2_0, TQ1_0 and TQ2_0: 16 rows of a block, its levels in a plane of one or two bits.

A plane of two bits is a row of entries: byte b of a row's 4 bytes in entry i holds, in its bits 2 t and 2 t + 1, weight
b of a group of 4; so one shift of an entry and one mask give a group of every row. Which group it is:

    Q2_0            block of 64    d 0, qs 32       entry i, turn t: weights 16 i + 4 t ...
    TQ1_0, TQ2_0    block of 256   d 0, qs 32       entry 8 h + i, turn t: weights 128 h + 32 t + 4 i ...
    Q1_0            block of 128   d 0, qs 32       entry i, bit t of eight: weights 32 i + 4 t ...

Offsets in bytes of a panel's block. TQ1_0, which the file holds in base 3, takes the form of TQ2_0, 1.22 times its
size; the others keep theirs. Levels of one bit are 0 and 2, so that the centre of all four is 1.
"""

from __future__ import annotations

from abc import abstractmethod

from .activations import CHUNK, Activations
from .emit import I8, I16, I32, Emitter, Value, vec
from .matmul_blocks import ENTRY, LEVELS, BlockFormat, halves, spread_bits
from .matmul_float import gather
from .matmul_tiles import LANES

__all__ = ["SMALL_FORMATS", "SmallFormat", "cells", "transposed"]

HEAD = 2 * LANES  # bytes of d


def cells(v: Value, left: int, mask: int) -> Value:
    """Bytes shifted left, or right if negative, as 16-bit lanes; the mask keeps what came from the byte itself."""
    wide = v.bits(vec(I16, v.lanes // 2))
    return (wide << left if left > 0 else wide.lsr(-left) if left else wide).bits(v.type) & mask


def transposed(word: Value) -> Value:
    """i32 lanes as matrices of 4 × 4 cells of two bits, transposed: cell e of byte q becomes cell q of byte e."""
    for distance, mask in ((6, 0x00CC00CC), (12, 0x0000F0F0)):
        swap = (word ^ word.lsr(distance)) & mask
        word = word ^ swap ^ (swap << distance)
    return word


class SmallFormat(BlockFormat):
    """Blocks with one scale and levels of few bits; a run is a block or half of one.

    Attributes:
        block: weights of a block.
        block_bytes: of a row's block in the file.
        entries: of a panel's block.
    """

    span = 32
    block: int
    block_bytes: int
    entries: int

    def __init__(self, group: int) -> None:
        self.activations = Activations(group, 32, "start", 1)
        self.panel_block_bytes = HEAD + self.entries * ENTRY
        self.chunk_bytes = CHUNK // self.block * self.panel_block_bytes

    def panel_bytes(self, columns: int) -> int:
        """Bytes of 16 rows."""
        return columns // self.block * self.panel_block_bytes

    def pack(self, e: Emitter, rows: list[Value], panel: Value, columns: Value) -> None:
        """Emit the interleaving of 16 rows."""
        with e.loop(0, columns.udiv(self.block)) as i:
            self.pack_block(e, [r + i * self.block_bytes for r in rows], panel + i * self.panel_block_bytes)

    @abstractmethod
    def pack_block(self, e: Emitter, rows: list[Value], to: Value) -> None:
        """Emit the interleaving of a block of 16 rows."""

    def _run(self, chunk: Value, run: Value) -> tuple[Value, Value]:
        """Addresses of the block that a run is of, and of the run's first entry."""
        runs = self.block // (self.span * self.run)
        if runs == 1:
            at = chunk + run * self.panel_block_bytes
            return at, at + HEAD
        at = chunk + run.udiv(runs) * self.panel_block_bytes
        return at, at + (run & (runs - 1)) * (self.entries // runs * ENTRY) + HEAD

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        return [halves(e, self._run(chunk, run)[0])] * self.run


class Q10(SmallFormat):
    """Blocks of 128 weights of one bit."""

    block, block_bytes, entries, run, below = 128, 18, 4, 4, 3

    def __init__(self) -> None:
        super().__init__(32)

    def pack_block(self, e: Emitter, rows: list[Value], to: Value) -> None:
        """Emit the interleaving of a block of 16 rows."""
        e.store(gather(e, rows, 0, I16), to)
        for i in range(self.entries):
            e.store(spread_bits(e, gather(e, rows, 2 + 4 * i, I32)), to + (HEAD + i * ENTRY))

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        _, at = self._run(chunk, run)
        entries = [e.load(at + i * ENTRY, LEVELS) for i in range(4)]
        return [[cells(v, 1 - t, 2) for t in range(8)] for v in entries]


class Q20(SmallFormat):
    """Blocks of 64 weights of two bits, neighbours in neighbouring bits."""

    block, block_bytes, entries, run, below = 64, 18, 4, 2, 4

    def __init__(self) -> None:
        super().__init__(32)

    def pack_block(self, e: Emitter, rows: list[Value], to: Value) -> None:
        """Emit the interleaving of a block of 16 rows."""
        e.store(gather(e, rows, 0, I16), to)
        for i in range(self.entries):
            e.store(transposed(gather(e, rows, 2 + 4 * i, I32)), to + (HEAD + i * ENTRY))

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        _, at = self._run(chunk, run)
        entries = [e.load(at + i * ENTRY, LEVELS) for i in range(4)]
        return [[cells(v, -2 * t, 3) for v in part for t in range(4)] for part in (entries[:2], entries[2:])]


class TQ20(SmallFormat):
    """Super-blocks of 256 weights of two bits."""

    block, block_bytes, entries, run, below = 256, 66, 16, 4, 4

    def __init__(self) -> None:
        super().__init__(CHUNK)

    def pack_block(self, e: Emitter, rows: list[Value], to: Value) -> None:
        """Emit the interleaving of a super-block of 16 rows."""
        e.store(gather(e, rows, 64, I16), to)
        for i in range(self.entries):
            e.store(gather(e, rows, 4 * i, I32), to + (HEAD + i * ENTRY))

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        _, at = self._run(chunk, run)
        entries = [e.load(at + i * ENTRY, LEVELS) for i in range(8)]
        return [[cells(v, -2 * t, 3) for v in entries] for t in range(4)]


class TQ10(TQ20):
    """Super-blocks of 256 digits of base 3, brought into the form of TQ2_0."""

    block_bytes = 54

    def pack_block(self, e: Emitter, rows: list[Value], to: Value) -> None:
        """Emit the interleaving of a super-block of 16 rows."""
        e.store(gather(e, rows, 52, I16), to)
        # Digit n of word w: word 0 to 7 hold five digits each of 32 bytes, 8 to 11 of 16 bytes, 12 four of the last.
        groups: list[Value] = []
        for first, count, digits in ((0, 8, 5), (8, 4, 5), (12, 1, 4)):
            words = [gather(e, rows, 4 * w, I32).bits(LEVELS).zext(I16) for w in range(first, first + count)]
            for n in range(digits):
                groups += [(((word * 3**n) & 255) * 3).lsr(8) for word in words]
        for h in range(2):
            for i in range(8):
                entry = groups[32 * h + i]
                for t in range(1, 4):
                    entry = entry | (groups[32 * h + 8 * t + i] << (2 * t))
                e.store(entry.trunc(I8), to + (HEAD + (8 * h + i) * ENTRY))


SMALL_FORMATS: dict[str, BlockFormat] = {"Q1_0": Q10(), "Q2_0": Q20(), "TQ1_0": TQ10(), "TQ2_0": TQ20()}
