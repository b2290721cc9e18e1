"""Dequantizers in vector code, for every blocked format: 16 consecutive elements of one block to a vector.

Here are the legacy and the K formats; `dequantize_levels` has the other formats whose levels are bits in planes or
digits, `dequantize_lattice` those with points of a lattice.
"""

from __future__ import annotations

from collections.abc import Callable

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format

from .dequantize_block import LANES, Block
from .dequantize_lattice import LATTICE_EMITTERS
from .dequantize_levels import LEVEL_EMITTERS
from .emit import I8, I32, Emitter, Value, vec

__all__ = ["DEQUANTIZABLE", "emit_dequantize"]

_CENTRE = {GGMLType.Q4_0: 8, GGMLType.Q5_0: 16, GGMLType.Q3_K: 4, GGMLType.Q6_K: 32}


def emit_dequantize(e: Emitter, entry: Format, data: Value, out: Value, blocks: Value) -> None:
    """out = the float32 values of `blocks` blocks at `data`; operations in the order of the reference."""
    with e.loop(0, blocks) as i:
        block = Block(e, entry, data + i * entry.type.block_bytes)
        _EMITTERS[entry.type](block, out + i * (4 * entry.type.block_elements))


def _by_scales(block: Block, to: Value) -> None:
    """The legacy and K formats: scale times level, and for some plus an offset."""
    e, entry = block.e, block.entry
    scales, offsets = _scales(block)
    per_scale = entry.type.block_elements // len(scales)
    for element in range(0, entry.type.block_elements, LANES):
        j = element // per_scale
        if entry.type is GGMLType.Q8_0:
            level = e.load(block.at("qs", element), vec(I8, LANES)).sext(I32)
        else:
            level = block.levels(element) - _CENTRE.get(entry.type, 0)
        value = e.splat(scales[j], LANES) * level.to_float()
        if offsets:
            value = value + e.splat(offsets[j], LANES)
        e.store(value, to + 4 * element)


def _scales(block: Block) -> tuple[list[Value], list[Value]]:
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


def _q3_k_scale(block: Block, j: int) -> Value:
    low = block.byte("scales", j % 8).lsr(4 * (j // 8)) & 15
    return low | ((block.byte("scales", 8 + j % 4).lsr(2 * (j // 4)) & 3) << 4)


def _pair(block: Block, j: int) -> tuple[Value, Value]:
    """Scale and offset of six bits of Q4_K and Q5_K."""
    if j < 4:
        return block.byte("scales", j) & 63, block.byte("scales", j + 4) & 63
    high, low, middle = (block.byte("scales", i) for i in (j + 4, j - 4, j))
    return (high & 15) | (low.lsr(6) << 4), high.lsr(4) | (middle.lsr(6) << 4)


_EMITTERS: dict[GGMLType, Callable[[Block, Value], None]] = {
    **dict.fromkeys((GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0), _by_scales),
    **dict.fromkeys((GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K), _by_scales),
    **LEVEL_EMITTERS,
    **LATTICE_EMITTERS,
}

DEQUANTIZABLE = frozenset(_EMITTERS)
"""The blocked formats that `emit_dequantize` knows."""
