"""The microscaling formats: 4-bit floats (E2M1) with an 8-bit float as scale.

MXFP4   32 weights, scale a power of two (E8M0)         value 2**(e - 128) * M[q]
NVFP4   4 x 16 weights, scale UE4M3 for each 16         value u(d) / 2 * M[q]

M holds twice the values of E2M1, which are whole numbers then; so the scales are halved.
"""

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Bytes, Floats, Format, Levels, Plane, join, split

__all__ = ["E2M1", "FORMATS", "MXFP4", "NVFP4", "UE4M3_LARGEST", "scale_e8m0", "scale_ue4m3"]

UE4M3_LARGEST = 448.0
"""What the byte 0x7E stands for, the largest scale."""

E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the values of the 16 floats of 4 bits: sign, two bits of exponent, one of mantissa."""

MXFP4 = np.dtype([("e", "u1"), ("qs", "u1", 16)])  # qs: element j in the low, j + 16 in the high nibble of byte j
NVFP4 = np.dtype([("d", "u1", 4), ("qs", "u1", 32)])  # qs, for each 16: element j low, j + 8 high in byte j of 8

NIBBLES = (Plane("qs", bits=4, run=16),)
SHORT_NIBBLES = (Plane("qs", bits=4, run=8),)


def scale_e8m0(e: Bytes) -> Floats:
    """Half of the power of two that an E8M0 byte stands for, 2**(e - 128) (0 and 1 give subnormal numbers)."""
    wide = e.astype(np.uint32)
    bits = np.where(wide < 2, np.uint32(0x00200000) << np.minimum(wide, 1), (wide - 1) << 23)
    return bits.astype(np.uint32).view(np.float32)


def scale_ue4m3(d: Bytes) -> Floats:
    """Half of what a UE4M3 byte stands for: four bits of exponent (bias 7), three of mantissa.

    The top bit is ignored; 0x7F (NaN) gives 0, as in ggml.
    """
    exponent, mantissa = (d >> 3 & 15).astype(np.int32), (d & 7).astype(np.float32)
    subnormal = mantissa * np.float32(2.0**-9)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 7).astype(np.float32)
    value = np.where(exponent == 0, subnormal, normal) * np.float32(0.5)
    return np.where((d == 0) | (d == 0x7F), np.float32(0), value).astype(np.float32)


def _read_mxfp4(blocks: Blocks) -> Floats:
    values: Floats = scale_e8m0(blocks["e"])[:, None] * E2M1[split(blocks, NIBBLES)].astype(np.float32)
    return values


def _read_nvfp4(blocks: Blocks) -> Floats:
    scale = np.repeat(scale_ue4m3(blocks["d"]), 16, axis=1)
    values: Floats = scale * E2M1[split(blocks, SHORT_NIBBLES)].astype(np.float32)
    return values


def _nearest(x: Floats, scale: Floats) -> Levels:
    """The levels whose values are nearest to x [..., n] at the scale [...]; of two as near the smaller magnitude."""
    magnitude = np.abs(x)
    error = magnitude
    level = np.zeros(x.shape, np.int32)
    for i in range(1, 8):
        tried = np.abs(np.float32(E2M1[i]) * scale[..., None] - magnitude)
        level = np.where(tried < error, i, level)
        error = np.minimum(tried, error)
    return np.where((x < 0) & (level > 0), level + 8, level)


def exponent_e8m0(peak: Floats) -> Bytes:
    """floor(log2(peak)) + 125 as a byte, 0 for a peak of 0 or below 2**-125.

    The logarithm is rounded to float32 first, as the C library's: of numbers just below a power of two that is the
    exponent of the power.
    """
    exponent = np.floor(np.log2(peak.astype(np.float64)).astype(np.float32))
    return np.where(peak > 0, np.maximum(exponent + np.float32(125), np.float32(0)), np.float32(0)).astype(np.uint8)


def byte_ue4m3(scale: Floats) -> Bytes:
    """The UE4M3 byte nearest to scale >= 0, halves up; but 0x7E (448) for all that reach 256, as ggml does."""
    bits = np.minimum(scale, np.float32(UE4M3_LARGEST)).view(np.uint32)
    exponent = (bits >> 23).astype(np.int32) - 120
    normal = (exponent << 3 | (bits >> 20 & 7).astype(np.int32)) + (bits >> 19 & 1).astype(np.int32)
    subnormal = np.minimum((scale * np.float32(512) + np.float32(0.5)).astype(np.int32), 7)
    return np.where(exponent <= 0, subnormal, np.where(normal >= 0x78, 0x7E, normal)).astype(np.uint8)


def _write_mxfp4(x: Floats, importance: Floats | None) -> Blocks:
    values = x.reshape(-1, 32)
    blocks = np.zeros(len(values), MXFP4)
    blocks["e"] = exponent_e8m0(np.abs(values).max(axis=1))
    join(blocks, NIBBLES, _nearest(values, scale_e8m0(blocks["e"])))
    return blocks.reshape(len(x), -1)


def _write_nvfp4(x: Floats, importance: Floats | None) -> Blocks:
    values = x.reshape(-1, 4, 16)
    blocks = np.zeros(len(values), NVFP4)
    blocks["d"] = byte_ue4m3(np.abs(values).max(axis=2) / np.float32(6))
    join(blocks, SHORT_NIBBLES, _nearest(values, scale_ue4m3(blocks["d"])).reshape(-1, 64))
    return blocks.reshape(len(x), -1)


FORMATS = (
    Format(GGMLType.MXFP4, MXFP4, _read_mxfp4, _write_mxfp4, NIBBLES),
    Format(GGMLType.NVFP4, NVFP4, _read_nvfp4, _write_nvfp4, SHORT_NIBBLES),
)
