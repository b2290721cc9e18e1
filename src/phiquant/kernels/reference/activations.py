"""The rounding of activations to 8 bits that precedes a product with a quantized matrix."""

import numpy as np
from numpy.typing import NDArray

from phiquant.gguf.types import GGMLType

__all__ = ["activation_block", "round_activations"]


def activation_block(type: GGMLType) -> int:
    """How many activations share a scale in a product with weights of this type; 0 where they are not rounded."""
    if not type.is_quantized:
        return 0
    return 256 if type.block_elements == 256 else 32


def round_activations(x: NDArray[np.float32], block: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers [n, width] and scales [n, width / block] with x ≈ integers * scale, as llama.cpp rounds them.

    Blocks of 32 (its Q8_0): scale = max|x| / 127. Blocks of 256 (its Q8_K): scale = -m / 127 with m the value of
    largest magnitude, the first one of equals, so that m itself becomes -127. The scale stays float32.
    """
    parts = x.reshape(len(x), -1, block)
    if block == 32:
        peak = np.abs(parts).max(axis=2)
    else:
        first = np.abs(parts).argmax(axis=2)[:, :, None]
        peak = -np.take_along_axis(parts, first, axis=2)[:, :, 0]
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / peak
    inverse = np.where(np.isfinite(inverse), inverse, np.float32(0))  # a block of zeros, or nearly
    levels = np.rint(parts * inverse[:, :, None])
    scale = peak / np.float32(127)
    return np.clip(levels, -127, 127).astype(np.int8).reshape(x.shape), scale.astype(np.float32)
