"""A small model of every architecture, for tests of what is done stage by stage."""

import numpy as np

from phiquant.arch import Config, LlamaConfig, Phi2Config, Phi3Config, Phi3SmallConfig, PhiMoEConfig
from phiquant.gguf import GGMLType
from phiquant.kernels.ops import Weight
from phiquant.quants import quantize

SHARED = {
    "name": "test",
    "vocab_size": 100,
    "context_length": 1024,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "block_count": 2,
    "head_count": 4,
    "head_count_kv": 2,
    "head_size": 16,
    "rope_freq_base": 10000.0,
}
LONG = {"original_context_length": 1024, "rope_factors_short": None, "rope_factors_long": None}
CONFIGS: dict[str, Config] = {
    "phi2": Phi2Config(**SHARED, rope_dimension_count=6, norm_epsilon=1e-5, fused=False),  # type: ignore[arg-type]
    "phi3": Phi3Config(  # type: ignore[arg-type]
        **SHARED,
        **LONG,
        rope_dimension_count=12,
        rms_epsilon=1e-5,
        sliding_window=5,
        rope_attention_factor=1.0,
        tied=False,
    ),
    "phi3small": Phi3SmallConfig(  # type: ignore[arg-type]
        **SHARED,
        **LONG,
        norm_epsilon=1e-5,
        embedding_scale=10.0,
        attention_scale=1 / 16,
        logit_scale=1 / 8,
        gate_limit=20.0,
        sparse_layers=(True, False),
        sparse_block_size=64,
        sparse_local_blocks=16,
        sparse_vertical_stride=8,
        rope_attention_factor_short=1.0,
        rope_attention_factor_long=1.0,
    ),
    "phimoe": PhiMoEConfig(  # type: ignore[arg-type]
        **SHARED,
        **LONG,
        expert_count=5,
        rope_dimension_count=16,
        norm_epsilon=1e-5,
        sliding_window=0,
        router_jitter=0.05,
        rope_attention_factor_short=1.25,
        rope_attention_factor_long=1.5,
        fused_qkv=False,
        attention_bias=True,
        output_bias=True,
    ),
    "llama": LlamaConfig(  # type: ignore[arg-type]
        **SHARED,
        **LONG,
        rms_epsilon=1e-5,
        sliding_window=0,
        rope_attention_factor=1.0,
        tied=False,
        fused=False,
        qkv_bias=False,
        output_bias=False,
        ffn_bias=False,
    ),
}


def weights_of(config: Config, type: GGMLType = GGMLType.F32) -> dict[str, Weight]:
    """Weights at random, the matrices of a type but for routers."""
    rng, weights = np.random.default_rng(3), {}
    for name, shape in config.tensor_shapes():
        values = rng.normal(0, 0.3, shape).astype("<f4")
        own = type if len(shape) > 1 and "ffn_gate_inp" not in name else GGMLType.F32
        data = quantize(values, own) if own is not GGMLType.F32 else values.view(np.uint8)
        weights[name] = Weight(name, own, shape, data.reshape(-1))
    return weights
