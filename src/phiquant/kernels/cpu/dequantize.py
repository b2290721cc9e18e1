"""Dequantizers in vector code, for every blocked format: 16 consecutive elements of one block to a vector."""

from __future__ import annotations

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format, Plane

from .emit import I8, I16, I32, Emitter, Value, vec
from .simd import half_to_float

__all__ = ["DEQUANTIZABLE", "emit_dequantize"]

_LANES = 16

DEQUANTIZABLE = frozenset(
    (
        *(GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0),
        *(GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K),
    )
)
"""The blocked formats that `emit_dequantize` knows."""

_CENTRE = {GGMLType.Q4_0: 8, GGMLType.Q5_0: 16, GGMLType.Q3_K: 4, GGMLType.Q6_K: 32}


class _Block:
    """Fields of the block at an address."""

    def __init__(self, e: Emitter, entry: Format, address: Value) -> None:
        self.e, self.entry, self.address = e, entry, address

    def at(self, field: str, index: int = 0) -> Value:
        """The address of a byte of a field."""
        offset: int = self.entry.dtype.fields[field][1]  # type: ignore[index]
        return self.address + (offset + index)

    def half(self, field: str) -> Value:
        """A half-precision field as float32."""
        return half_to_float(self.e, self.e.load(self.at(field), I16))

    def byte(self, field: str, index: int) -> Value:
        """A byte as an unsigned int32."""
        return self.e.load(self.at(field, index), I8).zext(I32)

    def bits(self, plane: Plane, element: int) -> Value:
        """One plane's bits of 16 elements, in place in their levels."""
        e = self.e
        if plane.run == 1:  # consecutive elements lie in consecutive bits
            byte, _ = plane.place(element)
            word = e.load(self.at(plane.field, byte), I16).zext(I32)
            bits = e.splat(word, _LANES).lsr(e.const(vec(I32, _LANES), list(range(_LANES)))) & 1
            return bits << plane.shift
        byte, bit = plane.place(element)
        found = e.load(self.at(plane.field, byte), vec(I8, _LANES)).lsr(bit) & ((1 << plane.bits) - 1)
        return found.zext(I32) << plane.shift

    def levels(self, element: int) -> Value:
        """The levels of 16 elements."""
        total = self.bits(self.entry.planes[0], element)
        for plane in self.entry.planes[1:]:
            total = total | self.bits(plane, element)
        return total


def emit_dequantize(e: Emitter, entry: Format, data: Value, out: Value, blocks: Value) -> None:
    """out = the float32 values of `blocks` blocks at `data`; operations in the order of the reference."""
    with e.loop(0, blocks) as i:
        block = _Block(e, entry, data + i * entry.type.block_bytes)
        to = out + i * (4 * entry.type.block_elements)
        scales, offsets = _scales(block)
        per_scale = entry.type.block_elements // len(scales)
        for element in range(0, entry.type.block_elements, _LANES):
            j = element // per_scale
            if entry.type is GGMLType.Q8_0:
                level = e.load(block.at("qs", element), vec(I8, _LANES)).sext(I32)
            else:
                level = block.levels(element) - _CENTRE.get(entry.type, 0)
            value = e.splat(scales[j], _LANES) * level.to_float()
            if offsets:
                value = value + e.splat(offsets[j], _LANES)
            e.store(value, to + 4 * element)


def _scales(block: _Block) -> tuple[list[Value], list[Value]]:
    """Scale of every sub-block, and what is added (nothing for formats without offsets)."""
    type = block.entry.type
    d = block.half("d")
    if type.block_elements == 32:
        return [d], [block.half("m")] if type in (GGMLType.Q4_1, GGMLType.Q5_1) else []
    if type is GGMLType.Q6_K:
        e = block.e
        return [d * e.load(block.at("scales", j), I8).sext(I32).to_float() for j in range(16)], []
    if type is GGMLType.Q3_K:
        return [d * (_q3_k_scale(block, j) - 32).to_float() for j in range(16)], []
    if type is GGMLType.Q2_K:
        pairs = [(block.byte("scales", j) & 15, block.byte("scales", j).lsr(4)) for j in range(16)]
    else:
        pairs = [_pair(block, j) for j in range(8)]
    dmin = block.half("dmin")
    # adding the negative is subtracting, to the bit
    return [d * scale.to_float() for scale, _ in pairs], [-(dmin * offset.to_float()) for _, offset in pairs]


def _q3_k_scale(block: _Block, j: int) -> Value:
    low = block.byte("scales", j % 8).lsr(4 * (j // 8)) & 15
    return low | ((block.byte("scales", 8 + j % 4).lsr(2 * (j // 4)) & 3) << 4)


def _pair(block: _Block, j: int) -> tuple[Value, Value]:
    """Scale and offset of six bits of Q4_K and Q5_K."""
    if j < 4:
        return block.byte("scales", j) & 63, block.byte("scales", j + 4) & 63
    high, low, middle = (block.byte("scales", i) for i in (j + 4, j - 4, j))
    return (high & 15) | (low.lsr(6) << 4), high.lsr(4) | (middle.lsr(6) << 4)
