"""Phi3ForCausalLM: its configuration, its GGUF keys, and where each GGUF tensor comes from.

Nothing is permuted on the way: qkv_proj keeps its rows Q, K, V and gate_up_proj its rows gate, up, which is the order
that llama.cpp expects in attn_qkv and ffn_up of architecture "phi3".
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phiquant.convert.entries import Entry, float32, uint32
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import ArchitectureError, CheckpointError, UnsupportedError
from phiquant.gguf import keys

__all__ = ["ARCHITECTURE", "KNOWN_ARCHITECTURES", "Settings", "architecture_keys", "check_architecture", "tensor_names"]

ARCHITECTURE = "phi3"
KNOWN_ARCHITECTURES = ("Phi3ForCausalLM",)

# far beyond any model; tables of this many tokens or layers are made before a tensor is looked at
_MAX_DIMENSION, _MAX_VOCABULARY, _MAX_LAYERS = 2**24, 2**20, 4096
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of config.json that matter, checked; one rotary table for every layer."""

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
        check_architecture(config)
        fields = _Fields(config)
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
        long, short, factor = _long_rope(rope, rotary // 2, context, original)
        return cls(
            vocab_size=fields.count("vocab_size", most=_MAX_VOCABULARY),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            layers=fields.count("num_hidden_layers", most=_MAX_LAYERS),
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


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise ArchitectureError unless config.json names a class that is known."""
    names = config.get("architectures")
    if names is None and config.get("model_type") == "phi3":
        return
    found = names[0] if isinstance(names, list) and names else config.get("model_type")
    if found not in KNOWN_ARCHITECTURES:
        shown = repr(found)[:80] if found is not None else "(none named in config.json)"
        raise ArchitectureError(
            f"The architecture {shown} is not supported; known are {', '.join(KNOWN_ARCHITECTURES)}."
        )


def architecture_keys(settings: Settings) -> list[Entry]:
    """The keys `phi3.*` that llama.cpp's converter writes, in its order."""
    key = keys.ArchitectureKeys(ARCHITECTURE)
    entries = [
        uint32(key.context_length, settings.context),
        uint32(key.rope_scaling_original_context_length, settings.original_context),
        uint32(key.embedding_length, settings.hidden_size),
        uint32(key.feed_forward_length, settings.intermediate_size),
        uint32(key.block_count, settings.layers),
        uint32(key.head_count, settings.heads),
        uint32(key.head_count_kv, settings.kv_heads),
        float32(key.layer_norm_rms_epsilon, settings.rms_epsilon),
        uint32(key.rope_dimension_count, settings.rotary_dimensions),
        float32(key.rope_freq_base, settings.rope_theta),
        uint32(key.sliding_window, settings.sliding_window),
    ]
    if settings.attention_factor is not None:
        entries.append(float32(key.rope_scaling_attn_factor, settings.attention_factor))
    return entries


def tensor_names(settings: Settings, stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Return checkpoint name -> GGUF name, in the checkpoint's order.

    CheckpointError if a tensor is missing, has no place in the model, or has another shape than config.json says.
    """
    expected = _expected(settings)
    names: dict[str, str] = {}
    for name, tensor in stored.items():
        if name.endswith(_IGNORED_SUFFIXES) or (settings.tied and name == "lm_head.weight"):
            continue  # a tied model uses the embedding, whatever else is stored
        if name not in expected:
            raise CheckpointError(
                f"Tensor {name!r} of {tensor.file} has no place in a Phi3ForCausalLM of {settings.layers} layers."
            )
        gguf_name, shape = expected[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"Tensor {name} of {tensor.file} has shape {list(tensor.shape)}, config.json asks for {list(shape)}."
            )
        names[name] = gguf_name
    for name in expected:
        if name not in names:
            raise CheckpointError(f"The checkpoint lacks tensor {name}; download its weights again.")
    return names


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


def _long_rope(
    rope: "_Fields", pairs: int, context: int, original: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, float | None]:
    """The two factor lists and the attention factor, as transformers reads them; None thrice without LongRoPE.

    "su" (the first release) and "yarn" are older names of "longrope" for this architecture. The attention factor is
    sqrt(1 + ln(s) / ln(original)), s = context / original, unless given.
    """
    kind = rope.values.get("rope_type", rope.values.get("type"))
    if kind in (None, "default"):
        return None, None, None
    if kind not in ("longrope", "su", "yarn"):
        raise UnsupportedError(
            f"config.json: rope type {kind!r} is not supported for Phi-3; known are default, longrope, su, yarn."
        )
    long, short = rope.factors("long_factor", pairs), rope.factors("short_factor", pairs)
    if "attention_factor" in rope.values and rope.values["attention_factor"] is not None:
        return long, short, rope.number("attention_factor", 1.0)
    scale = context / original
    if rope.values.get("factor") is not None:
        scale = rope.number("factor", 1.0)
    if scale <= 1.0:
        return long, short, 1.0
    if original < 2:
        raise CheckpointError(f"config.json: original_max_position_embeddings {original} is too small for LongRoPE.")
    return long, short, math.sqrt(1 + math.log(scale) / math.log(original))


class _Fields:
    """Typed access to config.json, or to its rope part with the top level behind it."""

    def __init__(self, values: Mapping[str, Any], outer: Mapping[str, Any] | None = None) -> None:
        self.values = values
        self._outer = outer or {}

    def rope(self) -> "_Fields":
        """The rope part: rope_scaling of the older style if it is set, else rope_parameters; empty if neither."""
        part = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        if not isinstance(part, dict):
            raise CheckpointError("config.json: rope_parameters or rope_scaling is not an object.")
        return _Fields(part, self.values)

    def _get(self, key: str, top: bool) -> object:
        value = self.values.get(key)
        return self._outer.get(key) if value is None and top else value

    def count(self, key: str, default: int | None = None, *, top: bool = False, most: int = _MAX_DIMENSION) -> int:
        value = self._get(key, top)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json lacks {key}.")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise CheckpointError(f"config.json: {key} is {_short(value)}, not a whole number from 1 to {most:,}.")
        return value

    def number(self, key: str, default: float, *, top: bool = False, most: float = 1e30) -> float:
        value = self._get(key, top)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= most:
            raise CheckpointError(f"config.json: {key} is {_short(value)}, not a positive number of at most {most:g}.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {_short(value)}, not true or false.")
        return value

    def factors(self, key: str, count: int) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != count:
            found = f"has {len(value)} entries" if isinstance(value, list) else "is not a list"
            raise CheckpointError(
                f"config.json: {key} {found}; LongRoPE needs {count}, one for each pair of rotated channels."
            )
        for factor in value:
            if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 1e30:
                raise CheckpointError(f"config.json: {key} holds {_short(factor)}, not a positive number.")
        return tuple(float(factor) for factor in value)


def _short(value: object) -> str:
    return repr(value)[:60]
