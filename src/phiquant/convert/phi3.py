"""Phi3ForCausalLM: its configuration, its GGUF keys, and where each GGUF tensor comes from.

Nothing is permuted on the way: qkv_proj keeps its rows Q, K, V and gate_up_proj its rows gate, up, which is the order
that llama.cpp expects in attn_qkv and ffn_up of architecture "phi3".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from phiquant.convert.assembly import Assembly, match
from phiquant.convert.entries import Entry, float32, uint32
from phiquant.convert.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from phiquant.convert.longrope import factor_tensors, long_rope
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.gguf import keys

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of config.json that matter, checked; one rotary table for every layer."""

    architecture: ClassVar[str] = "phi3"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    original_context: int
    rotary_dimensions: int
    rope_theta: float
    rms_epsilon: float
    sliding_window: int  # 0: none
    tied: bool
    long_factors: tuple[float, ...] | None  # one per rotated pair
    short_factors: tuple[float, ...] | None
    attention_factor: float | None  # on cos and sin; only with factors

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read config.json in the newer style (rope_parameters) or the older (rope_theta, rope_scaling).

        Absent fields take transformers' defaults for the class; whatever is present is checked.
        """
        fields = Fields(config)
        rope = fields.rope()
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        kv_heads = fields.count("num_key_value_heads", heads)
        if hidden % heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}."
            )
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        head_size = hidden // heads
        if fields.count("head_dim", head_size) != head_size:
            raise UnsupportedError(
                f"config.json: head_dim {config['head_dim']} is not hidden_size / num_attention_heads = {head_size}, "
                "which architecture phi3 of GGUF cannot express."
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedError(f"config.json: hidden_act {activation!r} is not supported; Phi-3 uses silu.")
        rotary = int(rope.number("partial_rotary_factor", 1.0, top=True, most=1.0) * head_size)
        if rotary < 2 or rotary % 2:
            raise CheckpointError(
                f"config.json: {rotary} rotated channels of a head of {head_size}; they must be a positive even number."
            )
        context = fields.count("max_position_embeddings", 4096)
        original = rope.count("original_max_position_embeddings", 4096, top=True)
        long, short, factor = long_rope(rope, rotary // 2, context, original)
        return cls(
            vocab_size=fields.count("vocab_size", most=MAX_VOCABULARY),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            layers=fields.count("num_hidden_layers", most=MAX_LAYERS),
            heads=heads,
            kv_heads=kv_heads,
            context=context,
            original_context=original,
            rotary_dimensions=rotary,
            rope_theta=rope.number("rope_theta", 10000.0, top=True),
            rms_epsilon=fields.number("rms_norm_eps", 1e-5, most=1.0),
            sliding_window=0 if config.get("sliding_window") is None else fields.count("sliding_window"),
            tied=fields.flag("tie_word_embeddings", False),
            long_factors=long,
            short_factors=short,
            attention_factor=factor,
        )

    def entries(self) -> list[Entry]:
        """The keys `phi3.*` that llama.cpp's converter writes, in its order."""
        key = keys.ArchitectureKeys(self.architecture)
        entries = [
            uint32(key.context_length, self.context),
            uint32(key.rope_scaling_original_context_length, self.original_context),
            uint32(key.embedding_length, self.hidden_size),
            uint32(key.feed_forward_length, self.intermediate_size),
            uint32(key.block_count, self.layers),
            uint32(key.head_count, self.heads),
            uint32(key.head_count_kv, self.kv_heads),
            float32(key.layer_norm_rms_epsilon, self.rms_epsilon),
            uint32(key.rope_dimension_count, self.rotary_dimensions),
            float32(key.rope_freq_base, self.rope_theta),
            uint32(key.sliding_window, self.sliding_window),
        ]
        if self.attention_factor is not None:
            entries.append(float32(key.rope_scaling_attn_factor, self.attention_factor))
        return entries

    def constants(self) -> dict[str, np.ndarray]:
        """LongRoPE's factors."""
        return factor_tensors(self.long_factors, self.short_factors)

    def assemble(self, stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
        """Every tensor as it is stored, under GGUF's name."""
        expected = _expected(self)
        shapes = {name: shape for name, (_, shape) in expected.items()}
        # A tied model uses the embedding, whatever else is stored.
        unused = ("lm_head.weight",) if self.tied else ()
        found = match(shapes, stored, f"a Phi3ForCausalLM of {self.layers} layers", unused=unused)
        return {expected[name][0]: Assembly.whole(stored[name]) for name in found}


def _expected(settings: Settings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Checkpoint name -> (GGUF name, shape with rows first)."""
    hidden, ffn = settings.hidden_size, settings.intermediate_size
    kv = settings.kv_heads * settings.head_size
    table = {
        "model.embed_tokens.weight": ("token_embd.weight", (settings.vocab_size, hidden)),
        "model.norm.weight": ("output_norm.weight", (hidden,)),
    }
    if not settings.tied:
        table["lm_head.weight"] = ("output.weight", (settings.vocab_size, hidden))
    for layer in range(settings.layers):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        table |= {
            f"{theirs}.input_layernorm.weight": (f"{ours}.attn_norm.weight", (hidden,)),
            f"{theirs}.self_attn.qkv_proj.weight": (f"{ours}.attn_qkv.weight", (hidden + 2 * kv, hidden)),
            f"{theirs}.self_attn.o_proj.weight": (f"{ours}.attn_output.weight", (hidden, hidden)),
            f"{theirs}.post_attention_layernorm.weight": (f"{ours}.ffn_norm.weight", (hidden,)),
            f"{theirs}.mlp.gate_up_proj.weight": (f"{ours}.ffn_up.weight", (2 * ffn, hidden)),
            f"{theirs}.mlp.down_proj.weight": (f"{ours}.ffn_down.weight", (hidden, ffn)),
        }
    return table
