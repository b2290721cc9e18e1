"""Dequantizers of the formats of few bits with one scale, the IQ4 and the microscaling formats."""

from __future__ import annotations

from collections.abc import Callable

from phiquant.gguf.types import GGMLType
from phiquant.quants.iquants import IQ4_TABLE
from phiquant.quants.microscaling import E2M1

from .dequantize_block import LANES, Block
from .emit import F32, I8, I16, I32, Value, vec
from .simd import lookup

__all__ = ["LEVEL_EMITTERS"]

_IQ4 = [int(v) & 255 for v in IQ4_TABLE]
_E2M1 = [int(v) & 255 for v in E2M1]


def _store(block: Block, to: Value, scales: list[Value], levels: Callable[[int], Value]) -> None:
    """Scale times level, from the levels i32 × 16 at an element."""
    elements = block.entry.type.block_elements
    per_scale = elements // len(scales)
    for element in range(0, elements, LANES):
        value = block.e.splat(scales[element // per_scale], LANES) * levels(element).to_float()
        block.e.store(value, to + 4 * element)


def _q1_0(block: Block, to: Value) -> None:
    _store(block, to, [block.half("d")], lambda element: block.levels(element) * 2 - 1)


def _centred(block: Block, to: Value) -> None:
    """Q2_0 and TQ2_0."""
    _store(block, to, [block.half("d")], lambda element: block.levels(element) - 1)


def _tq1_0(block: Block, to: Value) -> None:
    """Digit n of a byte: multiplied by 3**n it stands before the point of byte / 256 * 3."""
    e = block.e

    def levels(element: int) -> Value:
        if element < 240:
            start, width = (0, 32) if element < 160 else (160, 16)
            turn, byte = divmod(element - start, width)
            held = e.load(block.at("qs", (0 if start == 0 else 32) + byte), vec(I8, LANES))
            powers = e.const(held.type, 3**turn)
        else:
            held = e.splat(e.load(block.at("qh"), I32), 4).bits(vec(I8, LANES))
            powers = e.const(held.type, [3**turn for turn in range(4) for _ in range(4)])
        return ((held * powers).zext(I32) * 3).lsr(8) - 1

    _store(block, to, [block.half("d")], levels)


def _table(block: Block, table: list[int]) -> Callable[[int], Value]:
    """Levels that are entries of a table of signed bytes."""
    return lambda element: lookup(block.e, table, block.levels(element).trunc(I8)).sext(I32)


def _iq4_nl(block: Block, to: Value) -> None:
    _store(block, to, [block.half("d")], _table(block, _IQ4))


def _iq4_xs(block: Block, to: Value) -> None:
    d, tops = block.half("d"), block.e.load(block.at("scales_h"), I16).zext(I32)
    scales = [
        d * ((block.byte("scales_l", j // 2).lsr(j % 2 * 4) & 15 | ((tops.lsr(2 * j) & 3) << 4)) - 32).to_float()
        for j in range(8)
    ]
    _store(block, to, scales, _table(block, _IQ4))


def _mxfp4(block: Block, to: Value) -> None:
    e, power = block.e, block.byte("e", 0)
    subnormal = e.const(I32, 0x00200000) << power
    scale = e.where(power < 2, subnormal, (power - 1) << 23).bits(F32)
    _store(block, to, [scale], _table(block, _E2M1))


def _nvfp4(block: Block, to: Value) -> None:
    _store(block, to, [_ue4m3(block, j) for j in range(4)], _table(block, _E2M1))


def _ue4m3(block: Block, j: int) -> Value:
    """Half of the value of byte j."""
    e, byte = block.e, block.byte("d", j)
    exponent, mantissa = byte.lsr(3) & 15, byte & 7
    normal = (((exponent + 119) << 23) | (mantissa << 20)).bits(F32)
    value = e.where(exponent == 0, mantissa.to_float() * 2.0**-10, normal)
    return e.where(byte == 0x7F, 0.0, value)


LEVEL_EMITTERS: dict[GGMLType, Callable[[Block, Value], None]] = {
    GGMLType.Q1_0: _q1_0,
    GGMLType.Q2_0: _centred,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _centred,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.NVFP4: _nvfp4,
}
