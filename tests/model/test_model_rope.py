"""Rotations against the definition in float64, and the regimes."""

from dataclasses import replace

import numpy as np
import pytest

from phiquant.arch import Phi3Config
from phiquant.model import Regime, Rope

CONFIG = Phi3Config(
    name="test",
    vocab_size=100,
    context_length=1024,
    original_context_length=128,
    embedding_length=64,
    feed_forward_length=96,
    block_count=2,
    head_count=4,
    head_count_kv=2,
    head_size=16,
    rope_dimension_count=12,
    rope_freq_base=10000.0,
    rms_epsilon=1e-5,
    sliding_window=0,
    rope_attention_factor=1.2,
    tied=True,
    rope_factors_short=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
    rope_factors_long=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
)


@pytest.mark.parametrize("regime", list(Regime))
def test_rotation_is_the_formula(regime: Regime) -> None:
    factors = CONFIG.rope_factors_short if regime is Regime.SHORT else CONFIG.rope_factors_long
    cos, sin = Rope(CONFIG.rotary).rotation(np.arange(5, 200, dtype=np.int32), regime)
    angles = np.arange(5, 200)[:, None] / (np.array(factors) * 10000.0 ** (np.arange(6) / 6))
    assert cos.dtype == sin.dtype == np.float32
    assert np.abs(cos - 1.2 * np.cos(angles)).max() < 2e-5
    assert np.abs(sin - 1.2 * np.sin(angles)).max() < 2e-5


def test_the_regime_follows_the_length_of_the_sequence() -> None:
    rope = Rope(CONFIG.rotary)
    assert [rope.regime(n) for n in (1, 128, 129)] == [Regime.SHORT, Regime.SHORT, Regime.LONG]


def test_models_without_longrope_have_one_regime() -> None:
    rope = Rope(replace(CONFIG, rope_factors_short=None, rope_factors_long=None).rotary)
    assert rope.regime(100_000) is Regime.SHORT
    cos, _ = rope.rotation(np.array([1], np.int32), Regime.SHORT)
    assert np.allclose(cos[0] / 1.2, np.cos(10000.0 ** -(np.arange(6) / 6)), atol=1e-6)
