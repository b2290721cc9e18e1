"""Rotary position embedding: cosine and sine of each position, under the short or the long factors of LongRoPE.

    frequency[i] = 1 / (factor[i] * base^(2i / d))      i = 0 ... d/2 - 1, d rotated channels of a head
    cos[p, i] = attention_factor * cos(p * frequency[i])      and sin likewise

All in float32, because the model was trained on what float32 gives: at position 100,000 an angle is 0.004 off.

The factors are a property of a sequence: the short ones hold while it is at most `original_context_length` tokens long,
the long ones for the whole of it once it is longer, as in transformers.
"""

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from phiquant.arch import Rotary

__all__ = ["Regime", "Rope"]

Floats = NDArray[np.float32]


class Regime(Enum):
    """Which factors a sequence is rotated with; models without LongRoPE have the short regime only."""

    SHORT = "short"
    LONG = "long"


class Rope:
    """Cosines and sines of one model."""

    def __init__(self, rotary: Rotary) -> None:
        self._frequencies = {Regime.SHORT: _frequencies(rotary, rotary.factors_short)}
        if rotary.factors_long is not None:
            self._frequencies[Regime.LONG] = _frequencies(rotary, rotary.factors_long)
        self._border = rotary.original_context_length
        self._attention_factors = {
            Regime.SHORT: np.float32(rotary.attention_factor_short),
            Regime.LONG: np.float32(rotary.attention_factor_long),
        }

    def regime(self, length: int) -> Regime:
        """The regime of a sequence of `length` tokens."""
        return Regime.LONG if Regime.LONG in self._frequencies and length > self._border else Regime.SHORT

    def rotation(self, positions: NDArray[np.int32], regime: Regime) -> tuple[Floats, Floats]:
        """Cosines and sines, each float32 [positions, rotary / 2], attention factor included."""
        angles = positions.astype(np.float32)[:, None] * self._frequencies[regime]
        factor = self._attention_factors[regime]
        return np.cos(angles) * factor, np.sin(angles) * factor


def _frequencies(rotary: Rotary, factors: tuple[float, ...] | None) -> Floats:
    d = rotary.dimension_count
    exponents = np.arange(0, d, 2).astype(np.float32) / np.float32(d)
    powers = np.power(np.float32(rotary.freq_base), exponents)
    factor = np.ones(d // 2, np.float32) if factors is None else np.array(factors, np.float32)
    frequencies: Floats = np.float32(1) / (factor * powers)
    return frequencies
