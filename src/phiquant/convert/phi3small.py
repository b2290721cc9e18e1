"""Phi3SmallForCausalLM: its configuration, its GGUF keys, and where each GGUF tensor comes from.

Two projections change the order of their rows on the way, weights and biases alike; the numbers stay as they are:

    query_key_value     for each key/value head its query heads, its key, its value  ->  all queries, keys, values
    up_proj             gate and linear part in turn, row by row                     ->  all of the gate, all linear
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from phiquant.convert.assembly import Assembly, Rows, match
from phiquant.convert.entries import Entry, float32, uint32
from phiquant.convert.fields import MAX_LAYERS, MAX_VOCABULARY, Fields, short
from phiquant.convert.longrope import factor_tensors, long_rope
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.gguf import ValueType, keys

__all__ = ["Settings"]

_ARCHITECTURE: Final = "phi3small"


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of config.json that matter, checked."""

    architecture: ClassVar[str] = _ARCHITECTURE

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    original_context: int
    rope_theta: float
    norm_epsilon: float
    embedding_scale: float
    attention_scale: float
    logit_scale: float
    gate_limit: float
    sparse_layers: tuple[bool, ...]
    sparse_block: int  # positions
    sparse_local: int  # blocks
    sparse_stride: int  # blocks
    long_factors: tuple[float, ...] | None  # one per rotated pair
    short_factors: tuple[float, ...] | None
    attention_factor_short: float | None  # on cos and sin; only with factors
    attention_factor_long: float | None

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.heads

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read config.json. Absent fields take the defaults of the class; whatever is present is checked."""
        fields = Fields(config)
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        kv_heads = fields.count("num_key_value_heads", heads)
        if hidden % heads or hidden // heads % 2:
            raise CheckpointError(
                f"config.json: hidden_size {hidden} is no even multiple of num_attention_heads {heads}."
            )
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        _refuse_variants(fields, heads)
        head_size = hidden // heads
        layers = fields.count("num_hidden_layers", most=MAX_LAYERS)
        rope = fields.rope()
        context = fields.count("max_position_embeddings", 8192)
        original = rope.count("original_max_position_embeddings", context, top=True)
        long, short_factors, factor = long_rope(rope, head_size // 2, context, original)
        scale = head_size**-0.5
        if fields.flag("mup_use_scaling", True):
            scale = fields.number("mup_attn_multiplier", 1.0, most=1e6) / head_size
        return cls(
            vocab_size=fields.count("vocab_size", most=MAX_VOCABULARY),
            hidden_size=hidden,
            intermediate_size=fields.count("ff_intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            context=context,
            original_context=original,
            rope_theta=fields.number("rope_embedding_base", 1e6),
            norm_epsilon=fields.number("layer_norm_epsilon", 1e-5, most=1.0),
            embedding_scale=_multiplier(fields, "mup_embedding_multiplier", 10.0),
            attention_scale=scale,
            logit_scale=1.0 / _multiplier(fields, "mup_width_multiplier", 8.0),
            gate_limit=fields.number("gegelu_limit", 20.0, most=1e6),
            sparse_layers=_sparse_layers(fields, layers),
            sparse_block=fields.count("blocksparse_block_size", 64),
            sparse_local=fields.count("blocksparse_num_local_blocks", 16),
            sparse_stride=fields.count("blocksparse_vert_stride", 8),
            long_factors=long,
            short_factors=short_factors,
            attention_factor_short=None if factor is None else rope.number("short_mscale", factor, most=1e3),
            attention_factor_long=None if factor is None else rope.number("long_mscale", factor, most=1e3),
        )

    def entries(self) -> list[Entry]:
        """The keys `phi3small.*`, and what multiplies cosine and sine."""
        key, own = keys.ArchitectureKeys(self.architecture), keys.Phi3SmallKeys(self.architecture)
        entries = [
            uint32(key.context_length, self.context),
            uint32(key.rope_scaling_original_context_length, self.original_context),
            uint32(key.embedding_length, self.hidden_size),
            uint32(key.feed_forward_length, self.intermediate_size),
            uint32(key.block_count, self.layers),
            uint32(key.head_count, self.heads),
            uint32(key.head_count_kv, self.kv_heads),
            float32(key.layer_norm_epsilon, self.norm_epsilon),
            uint32(key.rope_dimension_count, self.head_size),
            float32(key.rope_freq_base, self.rope_theta),
            float32(key.embedding_scale, self.embedding_scale),
            float32(key.attention_scale, self.attention_scale),
            float32(key.logit_scale, self.logit_scale),
            float32(own.gate_limit, self.gate_limit),
            uint32(own.block_size, self.sparse_block),
            uint32(own.local_blocks, self.sparse_local),
            uint32(own.vertical_stride, self.sparse_stride),
            Entry(own.layers, ValueType.ARRAY, np.array(self.sparse_layers, np.bool_), ValueType.BOOL),
        ]
        for name, factor in (
            (keys.ROPE_ATTENTION_FACTOR_SHORT, self.attention_factor_short),
            (keys.ROPE_ATTENTION_FACTOR_LONG, self.attention_factor_long),
        ):
            if factor is not None:
                entries.append(float32(name, factor))
        return entries

    def constants(self) -> dict[str, np.ndarray]:
        """LongRoPE's factors."""
        return factor_tensors(self.long_factors, self.short_factors)

    def assemble(self, stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
        """Every tensor by GGUF's name; the rows of the two fused projections in GGUF's order."""
        expected = _expected(self)
        shapes = {name: shape for name, (_, shape) in expected.items()}
        # The embedding makes the logits too, whatever else is stored.
        found = match(shapes, stored, f"a Phi3SmallForCausalLM of {self.layers} layers", unused=("lm_head.weight",))
        return {expected[name][0]: self._made(expected[name][0], stored[name]) for name in found}

    def _made(self, name: str, tensor: StoredTensor) -> Assembly:
        if ".attn_qkv." in name:
            return Assembly(tensor.shape, _by_kind(tensor, self.heads // self.kv_heads, self.kv_heads, self.head_size))
        if ".ffn_up." in name:
            gate, linear = (Rows(tensor, first, self.intermediate_size, step=2) for first in (0, 1))
            return Assembly(tensor.shape, (gate, linear))
        return Assembly.whole(tensor)


def _by_kind(tensor: StoredTensor, queries: int, groups: int, head_size: int) -> Sequence[Rows]:
    """Queries, keys and values of a tensor in which each group has `queries` query heads, a key and a value."""
    stride = (queries + 2) * head_size
    return [
        Rows(tensor, group * stride + first * head_size, heads * head_size)
        for first, heads in ((0, queries), (queries, 1), (queries + 1, 1))
        for group in range(groups)
    ]


def _multiplier(fields: Fields, key: str, default: float) -> float:
    """A scale; null and 0 mean none."""
    value = fields.values.get(key, default)
    none = value is None or (value == 0 and not isinstance(value, bool))
    return 1.0 if none else fields.number(key, default, most=1e6)


def _sparse_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """One layer of so many attends to all tokens, the last of them; the others, or with null all, by blocks."""
    if fields.values.get("dense_attention_every_n_layers", 2) is None:
        return (True,) * layers
    every = fields.count("dense_attention_every_n_layers", 2)
    return tuple((layer + 1) % every != 0 for layer in range(layers))


def _refuse_variants(fields: Fields, heads: int) -> None:
    """What no released model has and the pattern or the gate of this architecture cannot express."""
    values = fields.values
    activation, limit = values.get("hidden_act", "gegelu"), values.get("gegelu_limit", 20.0)
    if activation != "gegelu" or limit is None:
        raise UnsupportedError(
            f"config.json: hidden_act {short(activation)} with gegelu_limit {short(limit)} is not supported; "
            "Phi-3-small uses gegelu with a limit."
        )
    if fields.number("rope_position_scale", 1.0) != 1.0:
        raise UnsupportedError(
            f"config.json: rope_position_scale {short(values['rope_position_scale'])} is not supported; "
            "Phi-3-small has 1."
        )
    if fields.flag("blocksparse_homo_head_pattern", False):
        raise UnsupportedError("config.json: blocksparse_homo_head_pattern is not supported; Phi-3-small's is false.")
    stride = fields.count("blocksparse_vert_stride", 8)
    if stride >= 2 * heads:
        raise UnsupportedError(
            f"config.json: blocksparse_vert_stride {stride} is not supported for {heads} heads, whose patterns would "
            "be more than a block apart; Phi-3-small has 8 for 32."
        )
    if not fields.flag("tie_word_embeddings", True):
        raise UnsupportedError("config.json: tie_word_embeddings is false; Phi-3-small uses its embedding twice.")


def _expected(settings: Settings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Checkpoint name -> (GGUF name, shape with rows first)."""
    hidden, ffn = settings.hidden_size, settings.intermediate_size
    weights: dict[str, tuple[str, tuple[int, ...]]] = {"model.final_layernorm": ("output_norm", (hidden,))}
    for layer in range(settings.layers):
        ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
        fused = hidden + 2 * settings.kv_heads * settings.head_size
        weights |= {
            f"{theirs}.input_layernorm": (f"{ours}.attn_norm", (hidden,)),
            f"{theirs}.self_attn.query_key_value": (f"{ours}.attn_qkv", (fused, hidden)),
            f"{theirs}.self_attn.dense": (f"{ours}.attn_output", (hidden, hidden)),
            f"{theirs}.post_attention_layernorm": (f"{ours}.ffn_norm", (hidden,)),
            f"{theirs}.mlp.up_proj": (f"{ours}.ffn_up", (2 * ffn, hidden)),
            f"{theirs}.mlp.down_proj": (f"{ours}.ffn_down", (hidden, ffn)),
        }
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    table["model.embed_tokens.weight"] = ("token_embd.weight", (settings.vocab_size, hidden))
    for name, (gguf_name, shape) in weights.items():
        table[f"{name}.weight"] = (f"{gguf_name}.weight", shape)
        table[f"{name}.bias"] = (f"{gguf_name}.bias", shape[:1])
    return table
