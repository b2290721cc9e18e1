"""The microscaling formats: 4-bit floats (E2M1) with an 8-bit float as scale.

MXFP4   32 weights, scale a power of two (E8M0)         value 2**(e - 128) * M[q]
NVFP4   4 x 16 weights, scale UE4M3 for each 16         value u(d) / 2 * M[q]

M holds twice the values of E2M1, which are whole numbers then; so the scales are halved.
"""

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Bytes, Floats, Format, Plane, split

__all__ = ["E2M1", "FORMATS", "MXFP4", "NVFP4", "scale_e8m0", "scale_ue4m3"]

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


FORMATS = (
    Format(GGMLType.MXFP4, MXFP4, _read_mxfp4, None, NIBBLES),
    Format(GGMLType.NVFP4, NVFP4, _read_nvfp4, None, SHORT_NIBBLES),
)
