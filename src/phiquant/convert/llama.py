"""Phi checkpoints rewritten as Llama or Mistral: their configuration, GGUF keys, and where each GGUF tensor comes from.

GGUF's architecture "llama" rotates neighbouring rows of a head with one another, transformers row i with i + D / 2 (D
rows of a head). So the rows of q_proj and k_proj change places: row i of a head becomes row 2i, row i + D / 2 becomes
row 2i + 1. All else is as it is stored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from phiquant.arch import names
from phiquant.convert.assembly import Assembly, Rows, match
from phiquant.convert.entries import Entry, float32, string, uint32
from phiquant.convert.fields import MAX_LAYERS, MAX_VOCABULARY, Fields, short
from phiquant.convert.longrope import factor_tensors, long_rope
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.gguf import keys

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of config.json that matter, checked.

    `head_size` is that of the heads, `explicit_head_size` whether config.json gave it. `linear_factor` divides all
    frequencies, `frequency_factors` each its own (Llama 3), the long and short ones by the length of a sequence.
    """

    architecture: ClassVar[str] = "llama"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    explicit_head_size: bool
    context: int
    original_context: int
    rope_theta: float
    rms_epsilon: float
    sliding_window: int  # 0: none
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    linear_factor: float | None
    frequency_factors: tuple[float, ...] | None
    long_factors: tuple[float, ...] | None  # one per rotated pair
    short_factors: tuple[float, ...] | None
    attention_factor: float | None  # on cos and sin; only with factors

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read the config.json of a LlamaForCausalLM, which has no sliding window whatever its config.json says."""
        fields = Fields(config)
        return cls._read(
            config,
            kv_heads=fields.count("num_key_value_heads", fields.count("num_attention_heads")),
            context=fields.count("max_position_embeddings", 2048),
            sliding_window=0,
            attention_bias=fields.flag("attention_bias", False),
            mlp_bias=fields.flag("mlp_bias", False),
        )

    @classmethod
    def from_mistral(cls, config: Mapping[str, Any]) -> "Settings":
        """Read the config.json of a MistralForCausalLM; its window is 4,096 tokens unless it says otherwise."""
        fields = Fields(config)
        unlimited = config.get("sliding_window", 4096) is None
        return cls._read(
            config,
            kv_heads=fields.count("num_key_value_heads", 8),
            context=fields.count("max_position_embeddings", 131072),
            sliding_window=0 if unlimited else fields.count("sliding_window", 4096),
            attention_bias=False,
            mlp_bias=False,
        )

    @classmethod
    def _read(
        cls,
        config: Mapping[str, Any],
        *,
        kv_heads: int,
        context: int,
        sliding_window: int,
        attention_bias: bool,
        mlp_bias: bool,
    ) -> "Settings":
        fields = Fields(config)
        rope = fields.rope()
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        explicit = config.get("head_dim") is not None
        if not explicit and hidden % heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}."
            )
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        head_size = fields.count("head_dim", max(hidden // heads, 1))
        if head_size % 2:
            raise CheckpointError(f"config.json: {head_size} channels of a head cannot be rotated in pairs.")
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedError(f"config.json: hidden_act {short(activation)} is not supported; Llama uses silu.")
        if rope.number("partial_rotary_factor", 1.0, top=True, most=1.0) != 1.0:
            raise UnsupportedError(
                "config.json: partial_rotary_factor is not 1; Llama rotates whole heads, so convert the model's own "
                "Phi3ForCausalLM checkpoint instead."
            )
        theta = rope.number("rope_theta", 10000.0, top=True)
        original = fields.count(
            "original_max_position_embeddings", rope.count("original_max_position_embeddings", context)
        )
        kind = rope.kind
        if kind not in (None, "default", "linear", "llama3", "longrope"):
            raise UnsupportedError(
                f"config.json: rope type {short(kind)} is not supported for Llama; known are default, linear, llama3, "
                "longrope."
            )
        long, short_, factor = (None, None, None)
        if kind == "longrope":
            long, short_, factor = long_rope(rope, head_size // 2, context, original)
        return cls(
            vocab_size=fields.count("vocab_size", most=MAX_VOCABULARY),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            layers=fields.count("num_hidden_layers", most=MAX_LAYERS),
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            explicit_head_size=explicit,
            context=context,
            original_context=original,
            rope_theta=theta,
            rms_epsilon=fields.number("rms_norm_eps", 1e-6, most=1.0),
            sliding_window=sliding_window,
            tied=fields.flag("tie_word_embeddings", False),
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            linear_factor=_required(rope, "factor") if kind == "linear" else None,
            frequency_factors=_llama3_factors(rope, head_size, theta, original) if kind == "llama3" else None,
            long_factors=long,
            short_factors=short_,
            attention_factor=factor,
        )

    def entries(self) -> list[Entry]:
        """The keys `llama.*` that llama.cpp's converter writes, in its order; then the window and what LongRoPE needs.

        llama.cpp's converter drops the window, and llama.cpp computes without; of LongRoPE it keeps the name alone, but
        reads the rest where it is there.
        """
        key = keys.ArchitectureKeys(self.architecture)
        entries = [
            uint32(key.block_count, self.layers),
            uint32(key.context_length, self.context),
            uint32(key.embedding_length, self.hidden_size),
            uint32(key.feed_forward_length, self.intermediate_size),
            uint32(key.head_count, self.heads),
            uint32(key.head_count_kv, self.kv_heads),
        ]
        if self.linear_factor is not None:
            entries += [string(key.rope_scaling_type, "linear"), float32(key.rope_scaling_factor, self.linear_factor)]
        if self.long_factors is not None:
            entries.append(string(key.rope_scaling_type, "longrope"))
        entries += [
            float32(key.rope_freq_base, self.rope_theta),
            float32(key.layer_norm_rms_epsilon, self.rms_epsilon),
        ]
        if self.explicit_head_size:
            entries += [uint32(key.key_length, self.head_size), uint32(key.value_length, self.head_size)]
        entries += [uint32(key.vocab_size, self.vocab_size), uint32(key.rope_dimension_count, self.head_size)]
        if self.sliding_window:
            entries.append(uint32(key.sliding_window, self.sliding_window))
        if self.attention_factor is not None:
            entries += [
                uint32(key.rope_scaling_original_context_length, self.original_context),
                float32(key.rope_scaling_attn_factor, self.attention_factor),
            ]
        return entries

    def constants(self) -> dict[str, np.ndarray]:
        """The factors of LongRoPE, or of Llama 3."""
        made = factor_tensors(self.long_factors, self.short_factors)
        if self.frequency_factors is not None:
            made[names.ROPE_FREQS] = np.array(self.frequency_factors, "<f4")
        return made

    def assemble(self, stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
        """Every tensor under GGUF's name, rows of queries and keys in pairs."""
        expected = _expected(self)
        shapes = {name: shape for name, (_, shape) in expected.items()}
        # A tied model uses the embedding, whatever else is stored.
        unused = ("lm_head.weight",) if self.tied else ()
        made = {}
        for name in match(shapes, stored, f"a Llama of {self.layers} layers", unused=unused):
            rotated = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
            tensor = stored[name]
            made[expected[name][0]] = _in_pairs(tensor, self.head_size) if rotated else Assembly.whole(tensor)
        return made


def _in_pairs(tensor: StoredTensor, head_size: int) -> Assembly:
    """The rows of each head in the order 0, D / 2, 1, D / 2 + 1 …"""
    heads = range(0, tensor.shape[0], head_size)
    return Assembly(tensor.shape, [Rows(tensor, first, head_size, turns=2) for first in heads])


def _required(rope: Fields, key: str) -> float:
    if rope.values.get(key) is None:
        raise CheckpointError(f"config.json: its rope part lacks {key}.")
    return rope.number(key, 1.0, most=1e6)


def _llama3_factors(rope: Fields, head_size: int, theta: float, original: int) -> tuple[float, ...]:
    """What divides each frequency: 1 for short waves, `factor` for long ones, and a smooth passage between.

    With w the wave's length in tokens and L the original context length: 1 where w < L / high, factor where
    w > L / low, else 1 / ((1 - s) / factor + s), s = (L / w - low) / (high - low). In float32, as in training.
    """
    factor, low, high = (np.float32(_required(rope, key)) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if not low < high:
        raise CheckpointError("config.json: low_freq_factor is not below high_freq_factor.")
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    length = np.float32(2 * math.pi) / (np.float32(1) / np.power(np.float32(theta), exponents))
    smooth = (np.float32(original) / length - low) / (high - low)
    passage = np.float32(1) / ((np.float32(1) - smooth) / factor + smooth)
    short_wave, long_wave = length < np.float32(original) / high, length > np.float32(original) / low
    factors: list[float] = np.where(short_wave, np.float32(1), np.where(long_wave, factor, passage)).tolist()
    return tuple(factors)


def _expected(settings: Settings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Checkpoint name -> (GGUF name, shape with rows first)."""
    hidden, ffn = settings.hidden_size, settings.intermediate_size
    q, kv = settings.heads * settings.head_size, settings.kv_heads * settings.head_size
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (settings.vocab_size, hidden)),
        "model.norm.weight": ("output_norm.weight", (hidden,)),
    }
    if not settings.tied:
        table["lm_head.weight"] = ("output.weight", (settings.vocab_size, hidden))
    for layer in range(settings.layers):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        table |= {
            f"{theirs}.input_layernorm.weight": (f"{ours}.attn_norm.weight", (hidden,)),
            f"{theirs}.post_attention_layernorm.weight": (f"{ours}.ffn_norm.weight", (hidden,)),
        }
        for part, name, shape, biased in (
            ("self_attn.q_proj", "attn_q", (q, hidden), settings.attention_bias),
            ("self_attn.k_proj", "attn_k", (kv, hidden), settings.attention_bias),
            ("self_attn.v_proj", "attn_v", (kv, hidden), settings.attention_bias),
            ("self_attn.o_proj", "attn_output", (hidden, q), settings.attention_bias),
            ("mlp.gate_proj", "ffn_gate", (ffn, hidden), settings.mlp_bias),
            ("mlp.up_proj", "ffn_up", (ffn, hidden), settings.mlp_bias),
            ("mlp.down_proj", "ffn_down", (hidden, ffn), settings.mlp_bias),
        ):
            table[f"{theirs}.{part}.weight"] = (f"{ours}.{name}.weight", shape)
            if biased:
                table[f"{theirs}.{part}.bias"] = (f"{ours}.{name}.bias", shape[:1])
    return table
