"""Panels of Q2_K to Q6_K: 16 rows of a super-block of 256 weights, interleaved by groups of 4 bytes.

Offsets in bytes of a panel's chunk; `x 16` means once for each row:

    Q2_K   d 0, dmin 32, scales 64 (words of two bytes x 16: sub-blocks 2 j and 2 j + 1), qs 320
    Q3_K   d 0, scales 32 (int8 x 16 for each sub-block, bias taken off), qs 288, hmask 1312
    Q4_K   d 0, dmin 32, scales 64 (uint8 x 16 for each sub-block), mins 192 (pairs of uint8 x 16), qs 320
    Q5_K   as Q4_K, qh 2368
    Q6_K   d 0, scales 32 (int8 x 16 for each sub-block), ql 288, qh 2336
"""

from __future__ import annotations

from .activations import CHUNK, Activations
from .emit import I8, I16, I32, Emitter, Value, vec
from .matmul_blocks import ENTRY, LEVELS, BlockFormat, halves, nibbles
from .matmul_float import gather
from .matmul_tiles import LANES

__all__ = ["K_FORMATS", "KFormat"]


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

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        raise NotImplementedError


def _words(e: Emitter, rows: list[Value], source: int, chunk: Value, target: int, count: int) -> None:
    """Interleave `count` groups of 4 bytes."""
    with e.loop(0, count) as i:
        e.store(gather(e, [r + i * 4 for r in rows], source, I32), chunk + i * ENTRY + target)


def _bytes(word: Value) -> list[Value]:
    """The 4 bytes of i32 lanes, lowest first, each as i32 lanes."""
    return [word.lsr(8 * i) & 255 for i in range(4)]


def _integer_scale(e: Emitter, at: Value, signed: bool) -> Value:
    raw = e.load(at, vec(I8, LANES))
    return (raw.sext(I32) if signed else raw.zext(I32)).to_float()


class _Signed(KFormat):
    """Q3_K and Q6_K: 16 sub-blocks, levels biased by a centre, signed scales at offset 32."""

    span, run = 16, 8

    def __init__(self, centre: int, below: int) -> None:
        self.below = below
        self.activations = Activations(CHUNK, 16, "start", centre)

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d = halves(e, chunk)
        at = chunk + run * (8 * LANES) + 32
        return [d * _integer_scale(e, at + s * LANES, signed=True) for s in range(8)]


class Q6K(_Signed):
    """256 weights of 6 bits: low nibbles in two halves of 64 bytes, high pairs of bits in two of 32."""

    chunk_bytes, block_bytes = 3360, 210

    def __init__(self) -> None:
        super().__init__(32, 64)

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        e.store(gather(e, rows, 208, I16), chunk)
        for i in range(4):
            for j, byte in enumerate(_bytes(gather(e, rows, 192 + 4 * i, I32))):
                e.store(byte.trunc(I8), chunk + (32 + (4 * i + j) * LANES))
        _words(e, rows, 0, chunk, 288, 32)
        _words(e, rows, 128, chunk, 2336, 16)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        low_at, high_at = chunk + run * (16 * ENTRY) + 288, chunk + run * (8 * ENTRY) + 2336
        low = [e.load(low_at + i * ENTRY, LEVELS) for i in range(16)]
        high = [e.load(high_at + i * ENTRY, LEVELS) for i in range(8)]
        subs = []
        for turn in range(4):
            quads = []
            for i in range(8):
                nibble = nibbles(low[i + 8 * (turn % 2)])[turn // 2]
                quads.append(nibble | (_moved(high[i], 4 - 2 * turn) & 0x30))
            subs += [quads[:4], quads[4:]]
        return subs


class Q3K(_Signed):
    """256 weights of 3 bits: low pairs of bits in two halves of 32 bytes, top bits in 32 bytes, 8 to a byte."""

    chunk_bytes, block_bytes = 1824, 110

    def __init__(self) -> None:
        super().__init__(4, 8)

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        e.store(gather(e, rows, 108, I16), chunk)
        words = [gather(e, rows, 96 + 4 * i, I32) for i in range(3)]
        tops = _bytes(words[2])
        for j in range(16):
            byte = (words[j // 4 % 2].lsr(8 * (j % 4)) & 255).lsr(4 * (j // 8)) & 15
            top = tops[j % 4].lsr(2 * (j // 4)) & 3
            e.store(((byte | (top << 4)) - 32).trunc(I8), chunk + (32 + j * LANES))
        _words(e, rows, 32, chunk, 288, 16)
        _words(e, rows, 0, chunk, 1312, 8)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (8 * ENTRY) + 288
        low = [e.load(at + i * ENTRY, LEVELS) for i in range(8)]
        # Bits 4 run ... 4 run + 3 of the masks belong to this half.
        shift = (run * 4).trunc(I16)
        masks = [e.load(chunk + (1312 + i * ENTRY), vec(I16, 32)).lsr(shift).bits(LEVELS) for i in range(8)]
        subs = []
        for turn in range(4):
            quads = [(_moved(low[i], -2 * turn) & 3) | (_moved(masks[i], 2 - turn) & 4) for i in range(8)]
            subs += [quads[:4], quads[4:]]
        return subs


def _moved(v: Value, left: int) -> Value:
    """Bytes shifted left, or right if negative, as 16-bit lanes."""
    wide = v.bits(vec(I16, v.lanes // 2))
    return (wide << left if left > 0 else wide.lsr(-left) if left else wide).bits(v.type)


class Q4K(KFormat):
    """256 weights of 4 bits (or 5, with a plane of top bits), 8 sub-blocks with scale and minimum of 6 bits."""

    span, run, pairs = 32, 2, 4
    activations = Activations(CHUNK, 32, "pairs")

    def __init__(self, five: bool) -> None:
        self.five = five
        self.chunk_bytes, self.block_bytes = (2880, 176) if five else (2368, 144)
        self.below = 32 if five else 16

    def pack_block(self, e: Emitter, rows: list[Value], chunk: Value) -> None:
        """Interleave one super-block of 16 rows."""
        both = gather(e, rows, 0, I32)
        e.store(both.trunc(I16), chunk)
        e.store(both.lsr(16).trunc(I16), chunk + 32)
        low, middle, high = (_bytes(gather(e, rows, 4 + 4 * i, I32)) for i in range(3))
        scales = [v & 63 for v in low] + [(h & 15) | (v.lsr(6) << 4) for v, h in zip(low, high, strict=True)]
        mins = [v & 63 for v in middle] + [h.lsr(4) | (v.lsr(6) << 4) for v, h in zip(middle, high, strict=True)]
        for j in range(8):
            e.store(scales[j].trunc(I8), chunk + (64 + j * LANES))
        for j in range(4):
            e.store((mins[2 * j] | (mins[2 * j + 1] << 8)).trunc(I16), chunk + (192 + j * 2 * LANES))
        _words(e, rows, 48 if self.five else 16, chunk, 320, 32)
        if self.five:
            _words(e, rows, 16, chunk, 2368, 8)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (8 * ENTRY) + 320
        low, high = [], []
        for i in range(8):
            a, b = nibbles(e.load(at + i * ENTRY, LEVELS))
            if self.five:
                # Bits 2 run and 2 run + 1 of the plane; shifted so that they stand at 0 and 1.
                top = e.load(chunk + (2368 + i * ENTRY), vec(I16, 32)).lsr((run * 2).trunc(I16)).bits(LEVELS)
                a, b = a | (_moved(top, 4) & 16), b | (_moved(top, 3) & 16)
            low.append(a)
            high.append(b)
        return [low, high]

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d, at = halves(e, chunk), chunk + run * (2 * LANES) + 64
        return [d * _integer_scale(e, at + s * LANES, signed=False) for s in range(2)]

    def mins(self, e: Emitter, chunk: Value) -> tuple[list[Value], Value]:
        """Pairs of integer minimums and their unit."""
        at = chunk + 192
        pairs = [e.load(at + j * 2 * LANES, vec(I8, 2 * LANES)).zext(I16) for j in range(4)]
        return pairs, halves(e, chunk + 32)


class Q2K(KFormat):
    """256 weights of 2 bits, 16 sub-blocks with scale (low nibble) and minimum (high nibble) in a byte."""

    chunk_bytes, block_bytes = 1344, 84
    span, run, below, pairs = 16, 8, 4, 8
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
        _words(e, rows, 16, chunk, 320, 16)

    def levels(self, e: Emitter, chunk: Value, run: Value) -> list[list[Value]]:
        """Levels of the sub-blocks of a run."""
        at = chunk + run * (8 * ENTRY) + 320
        packed = [e.load(at + i * ENTRY, LEVELS) for i in range(8)]
        subs = []
        for turn in range(4):
            quads = [_moved(v, -2 * turn) & 3 for v in packed]
            subs += [quads[:4], quads[4:]]
        return subs

    def scales(self, e: Emitter, chunk: Value, run: Value) -> list[Value]:
        """Scales of the sub-blocks of a run."""
        d, at = halves(e, chunk), chunk + run * (8 * LANES) + 64
        words = [e.load(at + i * 2 * LANES, vec(I16, LANES)) for i in range(4)]
        return [d * (words[s // 2].lsr(8 * (s % 2)) & 15).zext(I32).to_float() for s in range(8)]

    def mins(self, e: Emitter, chunk: Value) -> tuple[list[Value], Value]:
        """Pairs of integer minimums and their unit."""
        at = chunk + 64
        pairs = [nibbles(e.load(at + j * 2 * LANES, vec(I8, 2 * LANES)))[1].zext(I16) for j in range(8)]
        return pairs, halves(e, chunk + 32)


K_FORMATS: dict[str, KFormat] = {"Q2_K": Q2K(), "Q3_K": Q3K(), "Q4_K": Q4K(False), "Q5_K": Q4K(True), "Q6_K": Q6K()}
