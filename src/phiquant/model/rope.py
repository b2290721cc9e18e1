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

from phiquant.arch import Phi3Config

__all__ = ["Regime", "Rope"]

Floats = NDArray[np.float32]


class Regime(Enum):
    """Which factors a sequence is rotated with; models without LongRoPE have the short regime only."""

    SHORT = "short"
    LONG = "long"


class Rope:
    """Cosines and sines of one model."""

    def __init__(self, config: Phi3Config) -> None:
        self._frequencies = {Regime.SHORT: _frequencies(config, config.rope_factors_short)}
        if config.rope_factors_long is not None:
            self._frequencies[Regime.LONG] = _frequencies(config, config.rope_factors_long)
        self._border = config.original_context_length
        self._attention_factor = np.float32(config.rope_attention_factor)

    def regime(self, length: int) -> Regime:
        """The regime of a sequence of `length` tokens."""
        return Regime.LONG if Regime.LONG in self._frequencies and length > self._border else Regime.SHORT

    def rotation(self, positions: NDArray[np.int32], regime: Regime) -> tuple[Floats, Floats]:
        """Cosines and sines, each float32 [positions, rotary / 2], attention factor included."""
        angles = positions.astype(np.float32)[:, None] * self._frequencies[regime]
        return np.cos(angles) * self._attention_factor, np.sin(angles) * self._attention_factor


def _frequencies(config: Phi3Config, factors: tuple[float, ...] | None) -> Floats:
    d = config.rope_dimension_count
    exponents = np.arange(0, d, 2).astype(np.float32) / np.float32(d)
    powers = np.power(np.float32(config.rope_freq_base), exponents)
    factor = np.ones(d // 2, np.float32) if factors is None else np.array(factors, np.float32)
    frequencies: Floats = np.float32(1) / (factor * powers)
    return frequencies
