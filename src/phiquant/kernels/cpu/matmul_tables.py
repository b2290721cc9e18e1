"""Panels of IQ4_NL, IQ4_XS, MXFP4 and NVFP4: nibbles that stand for one of 16 values, looked up in a register.

16 rows of a block, interleaved by groups of 4 bytes; a nibble becomes its value by one shuffle of bytes. Offsets in
bytes of a panel's block; `x 16` means once for each row:

    IQ4_NL   32 weights    d 0 (half x 16), qs 32
    MXFP4    32 weights    e 0 (byte x 16), qs 16
    NVFP4    64 weights    d 0 (byte x 16 for each 16 weights, 0 for NaN), qs 64
    IQ4_XS   256 weights   d 0 (half x 16), low bits of the scales 32 (byte x 16 for each 64 weights), high bits 96
                           (word x 16), qs 128

All have the size of the file. Levels are the values biased by a centre, as unsigned bytes: 12 for the floats of 4 bits
(twice their values are whole numbers), 128 for IQ4.
"""

from __future__ import annotations

from ...quants.iquants import IQ4_TABLE
from ...quants.microscaling import E2M1
from .activations import CHUNK, Activations
from .emit import F32, I8, I16, I32, Emitter, Value, vec
from .matmul_blocks import ENTRY, LEVELS, BlockFormat, WideLevels, halves, nibbles
from .matmul_float import gather
from .matmul_kquants import KFormat, split_bytes, words
from .matmul_tiles import LANES
from .simd import half_to_float, lookup

__all__ = ["TABLE_FORMATS"]

IQ4_LEVELS = [int(v) + 128 for v in IQ4_TABLE]
E2M1_LEVELS = [int(v) + 12 for v in E2M1]


def _looked_up(e: Emitter, table: list[int], at: Value, count: int) -> list[list[Value]]:
    """Levels of the low and of the high nibbles of `count` entries."""
    both = [nibbles(e.load(at + j * ENTRY, LEVELS)) for j in range(count)]
    return [[lookup(e, table, pair[half]) for pair in both] for half in range(2)]


class _Block(BlockFormat):
    """Blocks whose activations have a scale for 32: a head of scales, then nibbles."""

    block: int  # weights
    head: int  # bytes of a row
    table: list[int]

    @property
    def block_bytes(self) -> int:
        """Bytes of a row's block, in the file as in a panel."""
        return self.head + self.block // 2

    @property
    def chunk_bytes(self) -> int:  # type: ignore[override]
        """Bytes of a panel for 256 columns."""
        return CHUNK // self.block * LANES * self.block_bytes

    def panel_bytes(self, columns: int) -> int:
        """Bytes of 16 rows."""
        return columns // self.block * LANES * self.block_bytes

    def pack(self, e: Emitter, rows: list[Value], panel: Value, columns: Value) -> None:
        """Emit the interleaving of 16 rows."""
        with e.loop(0, columns.udiv(self.block)) as i:
            here, to = [r + i * self.block_bytes for r in rows], panel + i * (LANES * self.block_bytes)
            self.pack_head(e, here, to)
            for j in range(self.block // 8):
                e.store(gather(e, here, self.head + 4 * j, I32), to + (self.head * LANES + j * ENTRY))

    def pack_head(self, e: Emitter, rows: list[Value], to: Value) -> None:
        """Emit the interleaving of a block's scales."""
        e.store(gather(e, rows, 0, I16 if self.head == 2 else I8), to)

    def at(self, chunk: Value, run: Value) -> Value:
        """Address of a block; a run is a block."""
        return chunk + run * (LANES * self.block_bytes)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at, each = self.at(chunk, run) + self.head * LANES, self.span // 8
        found = (_looked_up(e, self.table, at + s * each * ENTRY, each) for s in range(self.run))
        return [low + high for low, high in found]


class IQ4NL(WideLevels, _Block):
    """Blocks of 32 with a half-precision scale."""

    block, head, span, run = 32, 2, 32, 1
    table = IQ4_LEVELS
    activations = Activations(32, 32, "start", 128)

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the blocks of a run."""
        return [halves(e, self.at(chunk, run))]


class MXFP4(_Block):
    """Blocks of 32 whose scale is a power of two, 2 ** (e - 128)."""

    block, head, span, run, below = 32, 1, 32, 1, 25
    table = E2M1_LEVELS
    activations = Activations(32, 32, "start", 12)

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the blocks of a run."""
        exponent = e.load(self.at(chunk, run), vec(I8, LANES)).zext(I32)
        subnormal, normal = (exponent + 1) << 21, (exponent - 1) << 23
        return [e.where(exponent < 2, subnormal, normal).bits(vec(F32, LANES))]


class NVFP4(_Block):
    """Blocks of 64, with a float of 8 bits (UE4M3) for each 16 weights; half of it is the scale."""

    block, head, span, run, below = 64, 4, 16, 4, 25
    table = E2M1_LEVELS
    activations = Activations(32, 16, "start", 12)

    def pack_head(self, e: Emitter, rows: list[Value], to: Value) -> None:
        """Emit the interleaving of a block's scales; NaN (0x7F alone, as in ggml) and the top bit are taken out."""
        for s, byte in enumerate(split_bytes(gather(e, rows, 0, I32))):
            value = e.where(byte == 0x7F, e.const(byte.type, 0), byte & 0x7F)
            e.store(value.trunc(I8), to + s * LANES)

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        # As half precision the same bits, one exponent bit further down, are 2 ** -8 of the value, subnormals included.
        at = self.at(chunk, run)
        bits = [e.load(at + s * LANES, vec(I8, LANES)).zext(I16) << 7 for s in range(4)]
        return [half_to_float(e, b) * 128.0 for b in bits]


class IQ4XS(WideLevels, KFormat):
    """256 weights, 8 sub-blocks with signed scales of 6 bits."""

    chunk_bytes, block_bytes = 2176, 136
    span, run = 32, 2
    activations = Activations(CHUNK, 32, "start", 128)

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        both = gather(e, rows, 0, I32)
        e.store(both.trunc(I16), chunk)
        e.store(both.lsr(16).trunc(I16), chunk + 96)
        for i, byte in enumerate(split_bytes(gather(e, rows, 4, I32))):
            e.store(byte.trunc(I8), chunk + (32 + i * LANES))
        words(e, rows, 8, chunk, 128, 32)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (8 * ENTRY) + 128
        found = (_looked_up(e, IQ4_LEVELS, at + s * 4 * ENTRY, 4) for s in range(2))
        return [low + high for low, high in found]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d = halves(e, chunk)
        low = e.load(chunk + run * LANES + 32, vec(I8, LANES)).zext(I32)
        high = e.load(chunk + 96, vec(I16, LANES)).lsr((run * 4).trunc(I16)).zext(I32)
        first, second = (low & 15) | ((high & 3) << 4), low.lsr(4) | ((high & 12) << 2)
        return [d * (first - 32).to_float(), d * (second - 32).to_float()]


TABLE_FORMATS: dict[str, BlockFormat] = {"IQ4_NL": IQ4NL(), "IQ4_XS": IQ4XS(), "MXFP4": MXFP4(), "NVFP4": NVFP4()}
