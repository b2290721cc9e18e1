"""PhiMoEForCausalLM: its configuration, its GGUF keys, and where each GGUF tensor comes from.

A released checkpoint has three matrices of its own for each expert, w1 (gate), w2 (down) and w3 (up); one that
transformers saved anew (PhimoeForCausalLM) may have those of a layer stacked, gate and up in one. GGUF has them stacked
and gate and up apart. Rows keep their order on the way.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from phiquant.arch import names
from phiquant.convert.assembly import Assembly, Rows, match
from phiquant.convert.entries import Entry, float32, string, uint32
from phiquant.convert.fields import MAX_LAYERS, MAX_VOCABULARY, Fields
from phiquant.convert.longrope import factor_tensors, long_rope
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.gguf import keys

__all__ = ["Settings"]

Shape = tuple[int, ...]

EXPERTS_USED: Final = 2
_MAX_EXPERTS: Final = 1024


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of config.json that matter, checked; `intermediate_size` is that of one expert."""

    architecture: ClassVar[str] = "phimoe"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    context: int
    original_context: int
    rope_theta: float
    norm_epsilon: float
    sliding_window: int  # 0: none
    router_jitter: float
    attention_bias: bool
    output_bias: bool
    long_factors: tuple[float, ...] | None  # one per rotated pair
    short_factors: tuple[float, ...] | None
    long_mscale: float  # on cos and sin; 1 without factors
    short_mscale: float
    attention_factor: float | None  # what llama.cpp multiplies cos and sin with instead; only with factors

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read config.json as it was released, or as transformers 5 saves it (rope_parameters).

        Absent fields take transformers' defaults for the class; whatever is present is checked.
        """
        fields = Fields(config)
        rope = fields.rope()
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        kv_heads = fields.count("num_key_value_heads", heads)
        if config.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}."
            )
        head_size = fields.count("head_dim", hidden // heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}."
            )
        if head_size % 2:
            raise CheckpointError(f"config.json: a head of {head_size} channels cannot be rotated in pairs.")
        _refuse_what_no_phimoe_has(config, rope)
        context = fields.count("max_position_embeddings", 131072)
        original = rope.count("original_max_position_embeddings", 4096, top=True)
        long, short, factor = long_rope(rope, head_size // 2, context, original)
        return cls(
            vocab_size=fields.count("vocab_size", most=MAX_VOCABULARY),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            layers=fields.count("num_hidden_layers", most=MAX_LAYERS),
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            experts=fields.count("num_local_experts", 16, most=_MAX_EXPERTS),
            context=context,
            original_context=original,
            rope_theta=rope.number("rope_theta", 1e6, top=True),
            norm_epsilon=fields.number("rms_norm_eps", 1e-5, most=1.0),
            sliding_window=0 if config.get("sliding_window") is None else fields.count("sliding_window"),
            router_jitter=fields.number("router_jitter_noise", 0.01, most=1.0),
            attention_bias=fields.flag("attention_bias", False),
            output_bias=fields.flag("lm_head_bias", False),
            long_factors=long,
            short_factors=short,
            long_mscale=_mscale(rope, "long_mscale") if long else 1.0,
            short_mscale=_mscale(rope, "short_mscale") if long else 1.0,
            attention_factor=factor,
        )

    def entries(self) -> list[Entry]:
        """The keys `phimoe.*` that llama.cpp's converter writes, in its order, then those that it has no words for."""
        key = keys.ArchitectureKeys(self.architecture)
        entries = [
            uint32(key.context_length, self.context),
            uint32(key.rope_scaling_original_context_length, self.original_context),
            uint32(key.embedding_length, self.hidden_size),
            uint32(key.feed_forward_length, self.intermediate_size),
            uint32(key.block_count, self.layers),
            uint32(key.head_count, self.heads),
            uint32(key.head_count_kv, self.kv_heads),
            float32(key.layer_norm_rms_epsilon, self.norm_epsilon),
            uint32(key.rope_dimension_count, self.head_size),
            float32(key.rope_freq_base, self.rope_theta),
            uint32(key.sliding_window, self.sliding_window),
            uint32(key.expert_used_count, EXPERTS_USED),
            uint32(key.expert_count, self.experts),
        ]
        if self.heads * self.head_size != self.hidden_size:
            entries += [uint32(key.key_length, self.head_size), uint32(key.value_length, self.head_size)]
        if self.attention_factor is not None:
            entries += [
                float32(key.rope_scaling_attn_factor, self.attention_factor),
                float32(keys.ROPE_ATTENTION_FACTOR_SHORT, self.short_mscale),
                float32(keys.ROPE_ATTENTION_FACTOR_LONG, self.long_mscale),
            ]
        return [
            *entries,
            string(keys.NORM, "layer"),
            string(keys.ROUTER, "sparsemixer"),
            float32(keys.ROUTER_JITTER, self.router_jitter),
        ]

    def constants(self) -> dict[str, np.ndarray]:
        """LongRoPE's factors."""
        return factor_tensors(self.long_factors, self.short_factors)

    def assemble(self, stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
        """Every tensor under GGUF's name; the experts of a layer stand where the checkpoint has the last of them."""
        stacked = any(".mlp.experts." in name for name in stored)
        single = dict(self._single("mlp.router" if stacked else "block_sparse_moe.gate"))
        experts = dict(self._stacked_experts() if stacked else self._single_experts())
        shapes = {name: shape for name, (_, shape) in single.items()}
        shapes |= {name: shape for name, (_, shape) in experts.items()}
        found = match(shapes, stored, f"a PhiMoEForCausalLM of {self.layers} layers and {self.experts} experts")
        left = [sum(layer == n for layer, _ in experts.values()) for n in range(self.layers)]
        made: dict[str, Assembly] = {}
        for name in found:
            if name in single:
                made[single[name][0]] = Assembly.whole(stored[name])
                continue
            layer = experts[name][0]
            left[layer] -= 1
            if not left[layer]:
                made |= (self._from_stacked if stacked else self._from_single)(layer, stored)
        return made

    def _single(self, router: str) -> Iterator[tuple[str, tuple[str, Shape]]]:
        """All but the experts: checkpoint name, GGUF name and shape."""
        hidden, queries, kv = self.hidden_size, self.heads * self.head_size, self.kv_heads * self.head_size
        yield from _pair("model.embed_tokens", names.TOKEN_EMBD, (self.vocab_size, hidden), False)
        yield from _pair("model.norm", names.OUTPUT_NORM, (hidden,), True)
        yield from _pair("lm_head", names.OUTPUT, (self.vocab_size, hidden), self.output_bias)
        for n in range(self.layers):
            layer, biased = f"model.layers.{n}", self.attention_bias
            yield from _pair(f"{layer}.input_layernorm", names.attn_norm(n), (hidden,), True)
            yield from _pair(f"{layer}.post_attention_layernorm", names.ffn_norm(n), (hidden,), True)
            yield from _pair(f"{layer}.self_attn.q_proj", names.attn_q(n), (queries, hidden), biased)
            yield from _pair(f"{layer}.self_attn.k_proj", names.attn_k(n), (kv, hidden), biased)
            yield from _pair(f"{layer}.self_attn.v_proj", names.attn_v(n), (kv, hidden), biased)
            yield from _pair(f"{layer}.self_attn.o_proj", names.attn_output(n), (hidden, queries), biased)
            yield from _pair(f"{layer}.{router}", names.ffn_gate_inp(n), (self.experts, hidden), False)

    def _single_experts(self) -> Iterator[tuple[str, tuple[int, Shape]]]:
        """Layer and shape of each expert's matrices, as released."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        for layer in range(self.layers):
            for expert in range(self.experts):
                for part, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
                    yield _expert(layer, expert, part), (layer, shape)

    def _stacked_experts(self) -> Iterator[tuple[str, tuple[int, Shape]]]:
        """Layer and shape of a layer's experts, as transformers 5 has them."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        for layer in range(self.layers):
            yield f"model.layers.{layer}.mlp.experts.gate_up_proj", (layer, (self.experts, 2 * ffn, hidden))
            yield f"model.layers.{layer}.mlp.experts.down_proj", (layer, (self.experts, hidden, ffn))

    def _from_single(self, layer: int, stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
        made = {}
        for part, name in (("w1", names.ffn_gate_exps), ("w2", names.ffn_down_exps), ("w3", names.ffn_up_exps)):
            parts = [stored[_expert(layer, expert, part)] for expert in range(self.experts)]
            rows = parts[0].shape[0]
            made[name(layer)] = Assembly((self.experts, *parts[0].shape), [Rows(t, 0, rows) for t in parts])
        return made

    def _from_stacked(self, layer: int, stored: Mapping[str, StoredTensor]) -> dict[str, Assembly]:
        both = stored[f"model.layers.{layer}.mlp.experts.gate_up_proj"]
        ffn = self.intermediate_size
        shape = (self.experts, ffn, self.hidden_size)
        gate, up = ([Rows(both, 2 * ffn * expert + first, ffn) for expert in range(self.experts)] for first in (0, ffn))
        return {
            names.ffn_gate_exps(layer): Assembly(shape, gate),
            names.ffn_down_exps(layer): Assembly.whole(stored[f"model.layers.{layer}.mlp.experts.down_proj"]),
            names.ffn_up_exps(layer): Assembly(shape, up),
        }


def _pair(theirs: str, ours: str, shape: Shape, biased: bool) -> Iterator[tuple[str, tuple[str, Shape]]]:
    """A weight and, if it has one, its bias."""
    yield f"{theirs}.weight", (ours, shape)
    if biased:
        yield f"{theirs}.bias", (names.bias(ours), shape[:1])


def _expert(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"


def _refuse_what_no_phimoe_has(config: Mapping[str, Any], rope: Fields) -> None:
    fields = Fields(config)
    used = fields.count("num_experts_per_tok", EXPERTS_USED)
    if used != EXPERTS_USED:
        raise UnsupportedError(
            f"config.json: num_experts_per_tok is {used}; sparsemixer chooses {EXPERTS_USED} experts, and no other "
            "number is supported."
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"config.json: hidden_act {activation!r} is not supported; PhiMoE uses silu.")
    if fields.flag("tie_word_embeddings", False):
        raise UnsupportedError(
            "config.json: tie_word_embeddings is not supported for PhiMoE; save the model with a weight of its own "
            "for lm_head."
        )
    partial = rope.number("partial_rotary_factor", 1.0, top=True)
    if partial != 1.0:
        raise UnsupportedError(
            f"config.json: partial_rotary_factor {partial:g} is not supported; PhiMoE rotates whole heads."
        )


def _mscale(rope: Fields, key: str) -> float:
    if rope.values.get(key) is None:
        raise CheckpointError(
            f"config.json lacks {key} beside LongRoPE's factors; take config.json from the model's repository."
        )
    return rope.number(key, 1.0, most=1e3)
