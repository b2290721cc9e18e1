"""The IQ formats: levels from a table of 16 (IQ4), or points of a lattice for every 8 or 4 weights (IQ1 to IQ3).

value of an element, with the scale s of its sub-block (of n weights) and g a component of its group's point:

    IQ4_NL              d * T[q]                        n = 32
    IQ4_XS              d * (s - 32) * T[q]             n = 32, s of 6 bits
    IQ2_XXS             d * (s + 1/2) / 4 * g * sign    n = 32, s of 4 bits
    IQ2_XS, IQ2_S       d * (s + 1/2) / 4 * g * sign    n = 16
    IQ3_XXS             d * (s + 1/2) / 2 * g * sign    n = 32
    IQ3_S               d * (2 s + 1) * g * sign        n = 32
    IQ1_S               d * (2 s + 1) * (g +- 1/8)      n = 32, s of 3 bits; the sign of 1/8 for 32 weights
    IQ1_M               d * (2 s + 1) * (g +- 1/8)      n = 16; the sign of 1/8 for 8 weights

Where only 7 signs are stored for a group of 8, the number of negative ones is even.
"""

from functools import partial

import numpy as np
import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Bytes, Floats, Format, Levels, Plane, split
from phiquant.quants.grids import points
from phiquant.quants.iq1 import write_iq1_m, write_iq1_s
from phiquant.quants.nonlinear import write_nonlinear

__all__ = [
    "FORMATS",
    "IQ1_M",
    "IQ1_S",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ3_S",
    "IQ3_XXS",
    "IQ4_NL",
    "IQ4_TABLE",
    "IQ4_XS",
    "SIGNS",
]

IQ4_TABLE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
"""What the 16 levels of IQ4_NL and IQ4_XS stand for."""

_SEVEN = np.arange(128, dtype=np.uint8)
SIGNS: Bytes = (_SEVEN | (np.bitwise_count(_SEVEN) & 1) << 7).astype(np.uint8)
"""The eight signs (bit i: value i is negative) that a code of seven stands for."""

# qs: byte j holds element j in its low and element j + 16 in its high nibble
IQ4_NL = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
# scale of sub-block j: low four bits in nibble j of scales_l, top two in bits 2 j of scales_h; qs as IQ4_NL for each 32
IQ4_XS = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])
# qs, for each 32 weights:  four bytes, the points of its groups of 8; then
#                           bits 31 ... 28  27 ... 21  20 ... 14  13 ... 7  6 ... 0
#                                scale      sign codes of groups 3 ... 0
IQ2_XXS = np.dtype([("d", "<f2"), ("qs", "<u4", (8, 2))])
# qs, for each group of 8:  bits 15 ... 9   8 ... 0         scales: low nibble for the first 16 of each 32
#                              sign code   point
IQ2_XS = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
# qs: low 8 bits of the points; qh: top two of group l of 32 weights in bits 2 l; signs: one bit for each weight
IQ2_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])
# qs: points of groups of 4; signs, for each 32 weights, as the second word of IQ2_XXS
IQ3_XXS = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("signs", "<u4", 8)])
# qs: low 8 bits of the points; qh: top bit of point k of 32 weights in bit k; scales: a nibble for each 32
IQ3_S = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])
# qh, for each 32 weights:  bit 15: the shift is negative;  14 13 12: scale;  3 l ... 3 l + 2: top bits of point l
IQ1_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
# qh: a nibble for each group of 8: top three bits of its point, then the sign of the shift
# scales, word i:  bits 15 ... 12 11 10 9  8 7 6  5 4 3  2 1 0
#                  bits 4 i ... of d     scales of sub-blocks 4 i + 3 ... 4 i
IQ1_M = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])

NIBBLES = (Plane("qs", bits=4, run=16),)


def _float(blocks: Blocks, field: str) -> Floats:
    values: Floats = blocks[field].astype(np.float32)
    return values


def _nibbles(data: Bytes) -> Levels:
    """Two numbers of four bits from each byte [n, b], the low one first: [n, 2 b]."""
    both: Levels = (data[..., None] >> np.array([0, 4], np.uint8) & 15).reshape(len(data), -1).astype(np.int32)
    return both


def _signs(bits: Bytes) -> Floats:
    """1 or -1 for each bit of bytes [n, b], lowest first: [n, 8 b]."""
    negative = np.unpackbits(np.ascontiguousarray(bits), axis=-1, bitorder="little")
    return np.float32(1) - np.float32(2) * negative.astype(np.float32)


def _on_grid(type: GGMLType, index: npt.NDArray[np.integer]) -> Floats:
    """Components [n, 256] of the points [n, groups]."""
    components: Floats = points(type)[index].reshape(len(index), -1).astype(np.float32)
    return components


def _spread(scale: Floats) -> Floats:
    return np.repeat(scale, 256 // scale.shape[1], axis=1)


def scales_iq4_xs(blocks: Blocks) -> Levels:
    """Signed scales [n, 8]."""
    tops = (blocks["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    scale: Levels = (_nibbles(blocks["scales_l"]) | (tops.astype(np.int32) << 4)) - 32
    return scale


def d_iq1_m(blocks: Blocks) -> npt.NDArray[np.float16]:
    """The half-precision scale [n] whose bits lie in the top nibbles of the words of scales."""
    bits = np.zeros(len(blocks), np.uint16)
    for i in range(4):
        bits |= blocks["scales"][:, i] >> 12 << (4 * i)
    return bits.view(np.float16)


def _read_iq4_nl(blocks: Blocks) -> Floats:
    values: Floats = _float(blocks, "d")[:, None] * IQ4_TABLE[split(blocks, NIBBLES)].astype(np.float32)
    return values


def _read_iq4_xs(blocks: Blocks) -> Floats:
    scale = _float(blocks, "d")[:, None] * scales_iq4_xs(blocks).astype(np.float32)
    values: Floats = _spread(scale) * IQ4_TABLE[split(blocks, NIBBLES)].astype(np.float32)
    return values


def _half_steps(blocks: Blocks, scale: Levels, part: float) -> Floats:
    """d * (1/2 + scale) * part, rounded in this order."""
    values: Floats = _float(blocks, "d")[:, None] * (np.float32(0.5) + scale.astype(np.float32)) * np.float32(part)
    return values


def _coded_signs(words: npt.NDArray[np.uint32]) -> tuple[Levels, Floats]:
    """Scales [n, 8] and signs [n, 256] from the words [n, 8] of IQ2_XXS and IQ3_XXS."""
    code = (words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32)) & 127
    return (words >> 28).astype(np.int32), _signs(SIGNS[code].reshape(len(words), -1))


def _read_iq2_xxs(blocks: Blocks) -> Floats:
    words = blocks["qs"]
    scale, signs = _coded_signs(words[..., 1])
    index = np.ascontiguousarray(words[..., 0]).view(np.uint8)
    return _spread(_half_steps(blocks, scale, 0.25)) * _on_grid(GGMLType.IQ2_XXS, index) * signs


def _read_iq2_xs(blocks: Blocks) -> Floats:
    words = blocks["qs"]
    scale = _spread(_half_steps(blocks, _nibbles(blocks["scales"]), 0.25))
    return scale * _on_grid(GGMLType.IQ2_XS, words & 511) * _signs(SIGNS[words >> 9])


def _read_iq2_s(blocks: Blocks) -> Floats:
    scale = _spread(_half_steps(blocks, _nibbles(blocks["scales"]), 0.25))
    return scale * _on_grid(GGMLType.IQ2_S, indices(blocks, GGMLType.IQ2_S)) * _signs(blocks["signs"])


def _read_iq3_xxs(blocks: Blocks) -> Floats:
    scale, signs = _coded_signs(blocks["signs"])
    return _spread(_half_steps(blocks, scale, 0.5)) * _on_grid(GGMLType.IQ3_XXS, blocks["qs"]) * signs


def _read_iq3_s(blocks: Blocks) -> Floats:
    scale = _float(blocks, "d")[:, None] * (1 + 2 * _nibbles(blocks["scales"])).astype(np.float32)
    return _spread(scale) * _on_grid(GGMLType.IQ3_S, indices(blocks, GGMLType.IQ3_S)) * _signs(blocks["signs"])


def indices(blocks: Blocks, type: GGMLType) -> npt.NDArray[np.uint16]:
    """Points [n, 32] or [n, 64] of IQ2_S, IQ3_S, IQ1_S or IQ1_M blocks, whose top bits are apart."""
    high = blocks["qh"]
    shifts, width = {
        GGMLType.IQ2_S: (range(0, 8, 2), 3),
        GGMLType.IQ3_S: (range(8), 1),
        GGMLType.IQ1_S: (range(0, 12, 3), 7),
        GGMLType.IQ1_M: (range(0, 8, 4), 7),
    }[type]
    tops = (high[..., None] >> np.array(shifts, high.dtype) & width).reshape(len(blocks), -1)
    index: npt.NDArray[np.uint16] = blocks["qs"].astype(np.uint16) | tops.astype(np.uint16) << 8
    return index


def _shifts(negative: npt.NDArray[np.bool_]) -> Floats:
    """The shift of every element [n, 256] from which groups have a negative one."""
    return np.repeat(np.where(negative, np.float32(-0.125), np.float32(0.125)), 256 // negative.shape[1], axis=1)


def _read_iq1_s(blocks: Blocks) -> Floats:
    high = blocks["qh"]
    scale = _float(blocks, "d")[:, None] * (2 * (high >> 12 & 7) + 1).astype(np.float32)
    levels = _on_grid(GGMLType.IQ1_S, indices(blocks, GGMLType.IQ1_S)) + _shifts(high >= 0x8000)
    return _spread(scale) * levels


def _read_iq1_m(blocks: Blocks) -> Floats:
    scales = (blocks["scales"][..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(len(blocks), -1)
    scale = d_iq1_m(blocks).astype(np.float32)[:, None] * (2 * scales + 1).astype(np.float32)
    levels = _on_grid(GGMLType.IQ1_M, indices(blocks, GGMLType.IQ1_M)) + _shifts(_nibbles(blocks["qh"]) >= 8)
    return _spread(scale) * levels


FORMATS = (
    Format(
        GGMLType.IQ4_NL,
        IQ4_NL,
        _read_iq4_nl,
        partial(write_nonlinear, GGMLType.IQ4_NL, IQ4_NL, NIBBLES, IQ4_TABLE),
        NIBBLES,
    ),
    Format(
        GGMLType.IQ4_XS,
        IQ4_XS,
        _read_iq4_xs,
        partial(write_nonlinear, GGMLType.IQ4_XS, IQ4_XS, NIBBLES, IQ4_TABLE),
        NIBBLES,
    ),
    Format(GGMLType.IQ2_XXS, IQ2_XXS, _read_iq2_xxs, None),
    Format(GGMLType.IQ2_XS, IQ2_XS, _read_iq2_xs, None),
    Format(GGMLType.IQ2_S, IQ2_S, _read_iq2_s, None),
    Format(GGMLType.IQ3_XXS, IQ3_XXS, _read_iq3_xxs, None),
    Format(GGMLType.IQ3_S, IQ3_S, _read_iq3_s, None),
    Format(GGMLType.IQ1_S, IQ1_S, _read_iq1_s, partial(write_iq1_s, IQ1_S)),
    Format(GGMLType.IQ1_M, IQ1_M, _read_iq1_m, partial(write_iq1_m, IQ1_M)),
)
