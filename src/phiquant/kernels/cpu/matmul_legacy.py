"""Panels of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: 16 rows of a block of 32 weights, interleaved by groups of 4 bytes.

Offsets in bytes of a panel's block:

    Q4_0, Q4_1   d 0, (minimum 32,) qs 32 or 64
    Q5_0, Q5_1   the same, then the top bits: 4 bytes x 16; bit i of byte b belongs to weight 4 i + b
    Q8_0         d 0, levels 32, biased by 128
"""

from __future__ import annotations

from .activations import CHUNK, Activations
from .emit import I16, I32, Emitter, Value, vec
from .matmul_blocks import ENTRY, LEVELS, BlockFormat, WideLevels, halves, nibbles, spread_bits
from .matmul_float import gather
from .matmul_tiles import LANES

__all__ = ["LEGACY_FORMATS", "LegacyFormat"]

BLOCK = 32  # weights


class LegacyFormat(BlockFormat):
    """Levels of 4, 5 or 8 bits, with a minimum in each block or a fixed centre."""

    span, run = BLOCK, 1

    def __init__(self, bits: int, minimum: bool) -> None:
        self.bits, self.minimum = bits, minimum
        self.below = 1 << bits
        sums = Activations(BLOCK, BLOCK, "scaled") if minimum else Activations(BLOCK, BLOCK, "start", self.below // 2)
        self.activations = sums
        self.head = 2 * (1 + minimum)  # bytes of d and the minimum
        self.block_bytes = self.head + BLOCK // 8 * bits
        self.chunk_bytes = CHUNK // BLOCK * LANES * self.block_bytes

    def panel_bytes(self, columns: int) -> int:
        """Bytes of 16 rows."""
        return columns // BLOCK * LANES * self.block_bytes

    def pack(self, e: Emitter, rows: list[Value], panel: Value, columns: Value) -> None:
        """Emit the interleaving of 16 rows."""
        with e.loop(0, columns.udiv(BLOCK)) as i:
            here, to = [r + i * self.block_bytes for r in rows], panel + i * (LANES * self.block_bytes)
            for j in range(self.head // 2):
                e.store(gather(e, here, 2 * j, I16), to + j * 2 * LANES)
            to = to + self.head * LANES
            top = 4 if self.bits == 5 else 0
            for j in range(8 if self.bits == 8 else 4):
                word = gather(e, here, self.head + top + 4 * j, I32)
                e.store(word ^ -0x7F7F7F80 if self.bits == 8 else word, to + j * ENTRY)
            if top:
                e.store(spread_bits(e, gather(e, here, self.head, I32)), to + 4 * ENTRY)

    def _block(self, chunk: Value, run: Value) -> Value:
        return chunk + run * (LANES * self.block_bytes)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = self._block(chunk, run) + self.head * LANES
        if self.bits == 8:
            return [[e.load(at + j * ENTRY, LEVELS) for j in range(8)]]
        split = [nibbles(e.load(at + j * ENTRY, LEVELS)) for j in range(4)]
        quads = [low for low, _ in split] + [high for _, high in split]
        if self.bits == 5:
            top = e.load(at + 4 * ENTRY, vec(I16, 32))
            moved = [top << (4 - j) if j < 4 else top.lsr(j - 4) for j in range(8)]
            quads = [q | (m.bits(LEVELS) & 16) for q, m in zip(quads, moved, strict=True)]
        return [quads]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        return [halves(e, self._block(chunk, run))]

    def minimums(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Minimums of the blocks of a run."""
        return [halves(e, self._block(chunk, run) + 2 * LANES)]


class Q8(WideLevels, LegacyFormat):
    """Q8_0."""

    def __init__(self) -> None:
        super().__init__(8, minimum=False)


LEGACY_FORMATS: dict[str, LegacyFormat] = {
    "Q4_0": LegacyFormat(4, minimum=False),
    "Q4_1": LegacyFormat(4, minimum=True),
    "Q5_0": LegacyFormat(5, minimum=False),
    "Q5_1": LegacyFormat(5, minimum=True),
    "Q8_0": Q8(),
}
