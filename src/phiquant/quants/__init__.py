"""Block formats: their layouts, the reference quantizers and dequantizers in NumPy.

This is the definition that the compiled quantizers are tested against; it is vectorised across blocks and needs some
microseconds a block.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.quants import iquants, kquants, lattice, legacy, microscaling, small
from phiquant.quants.block import Blocks, Bytes, Floats, Format, Plane

__all__ = [
    "IMPORTANCE_IGNORED",
    "IMPORTANCE_REQUIRED",
    "QUANTIZABLE",
    "READABLE",
    "Format",
    "Plane",
    "block_dtype",
    "check_importance",
    "dequantize",
    "format_of",
    "quantize",
]

_FAMILIES = (legacy.FORMATS, kquants.FORMATS, iquants.FORMATS, small.FORMATS, microscaling.FORMATS)
# The lattice quantizers read their formats' layouts, so they are joined to them here.
_FORMATS = {
    entry.type: replace(entry, quantize=lattice.QUANTIZERS.get(entry.type, entry.quantize))
    for family in _FAMILIES
    for entry in family
}

IMPORTANCE_IGNORED: frozenset[GGMLType] = frozenset(
    (
        GGMLType.F32,
        GGMLType.F16,
        GGMLType.BF16,
        GGMLType.Q8_0,
        GGMLType.Q1_0,
        GGMLType.Q2_0,
        GGMLType.TQ1_0,
        GGMLType.TQ2_0,
        GGMLType.MXFP4,
        GGMLType.NVFP4,
    )
)
"""Types whose bytes do not depend on the importance."""

IMPORTANCE_REQUIRED: frozenset[GGMLType] = frozenset((GGMLType.IQ1_S, GGMLType.IQ2_XXS, GGMLType.IQ2_XS))
"""Types that are not quantized without an importance."""

READABLE: frozenset[GGMLType] = frozenset(_FORMATS)
"""Types that `dequantize` knows, the plain float types included."""

QUANTIZABLE: frozenset[GGMLType] = frozenset(kind for kind, entry in _FORMATS.items() if entry.quantize)
"""Types that `quantize` knows, the plain float types included."""


def format_of(type: GGMLType) -> Format:
    """Layout, bit planes and conversions of a type; UnsupportedError if this version does not read it."""
    if type not in _FORMATS:
        known = ", ".join(entry.name for entry in sorted(_FORMATS))
        raise UnsupportedError(f"tensors of type {GGMLType(type).name} are not supported; use one of {known}")
    return _FORMATS[type]


def block_dtype(type: GGMLType) -> np.dtype[np.void]:
    """The structured dtype of one block of the type, fields in file order."""
    return format_of(type).dtype


def dequantize(data: Bytes, type: GGMLType, shape: Sequence[int]) -> Floats:
    """Values of a tensor as float32 of the given shape, from its bytes (uint8, any shape, contiguous)."""
    entry = format_of(type)
    count = int(np.prod(shape, dtype=np.int64))
    row = int(shape[-1]) if len(shape) else 1
    if row % type.block_elements or data.size != count // type.block_elements * type.block_bytes:
        raise WeightsError(f"{data.size} bytes are not a {type.name} tensor of shape {tuple(shape)}")
    blocks: Blocks = np.ascontiguousarray(data).reshape(-1).view(entry.dtype)
    with np.errstate(all="ignore"):  # overflow and NaN are the file's own
        return entry.dequantize(blocks).reshape(tuple(shape))


def quantize(x: Floats, type: GGMLType, importance: Floats | None = None) -> Bytes:
    """Bytes uint8 [..., row_bytes] of float32 values [..., n], optionally weighted by an importance [n] of columns.

    The bytes equal llama.cpp's. Types of `IMPORTANCE_IGNORED` take no importance and ignore it; those of
    `IMPORTANCE_REQUIRED` are refused without (WeightsError). Values must be finite.
    """
    entry = format_of(type)
    if entry.quantize is None:
        raise UnsupportedError(f"weights cannot be quantized to {type.name} by this version")
    x = np.asarray(x, np.float32)
    if x.ndim == 0 or x.shape[-1] % type.block_elements:
        raise WeightsError(
            f"rows of {x.shape[-1:] or 'no'} values do not fill {type.name} blocks of {type.block_elements}"
        )
    n = x.shape[-1]
    importance = check_importance(type, importance, n)
    if not x.size:
        return np.zeros((*x.shape[:-1], type.row_bytes(n)), np.uint8)
    with np.errstate(all="ignore"):
        blocks = entry.quantize(np.ascontiguousarray(x).reshape(-1, n), importance)
    return blocks.view(np.uint8).reshape(*x.shape[:-1], type.row_bytes(n))


def check_importance(type: GGMLType, importance: Floats | None, n: int) -> Floats | None:
    """The importance as the quantizer of the type takes it: contiguous float32 [n], or None if it is not used.

    WeightsError if it does not fit rows of n values, or lacks where the type needs one.
    """
    if importance is None:
        if type in IMPORTANCE_REQUIRED:
            raise WeightsError(
                f"{type.name} is not quantized without an importance of the columns; give one (an importance matrix)"
            )
        return None
    weights = np.ascontiguousarray(importance, np.float32)
    if weights.shape != (n,):
        raise WeightsError(f"importance of shape {weights.shape} does not fit rows of {n} values")
    return None if type in IMPORTANCE_IGNORED else weights
