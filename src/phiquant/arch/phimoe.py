"""PhiMoE: hyperparameters and tensors of Phi-3.5-MoE, Phi-mini-MoE and Phi-tiny-MoE as a GGUF file carries them.

Shapes in NumPy order, with E embedding, H heads, K key/value heads, D head size, F feed-forward of one expert,
X experts, V vocabulary and R rotated channels of a head:

    token_embd           [V, E]                blk.N.attn_norm       [E]      + bias
    output_norm          [E]  + bias           blk.N.attn_q          [H D, E] + bias    \\  or fused, rows Q, K, V:
    output               [V, E]  + bias        blk.N.attn_k, attn_v  [K D, E] + bias    /   attn_qkv [(H + 2 K) D, E]
    rope_factors_long    [R / 2] or absent     blk.N.attn_output     [E, H D] + bias
    rope_factors_short   [R / 2] or absent     blk.N.ffn_norm        [E]      + bias
                                               blk.N.ffn_gate_inp    [X, E]
                                               blk.N.ffn_gate_exps, ffn_up_exps [X, F, E]
                                               blk.N.ffn_down_exps   [X, E, F]

All biases but those of the norms may be absent. The norms subtract the mean, whatever the key of their epsilon is
called. Files of llama.cpp say nothing of norms, routing and what LongRoPE multiplies cosine and sine with, because it
computes all three otherwise; they are taken for the released model's, and `assumptions` says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from phiquant.arch import names
from phiquant.arch.config import Rotary
from phiquant.arch.reading import (
    MAX_ATTENTION_FACTOR,
    MAX_BLOCKS,
    MAX_CONTEXT,
    MAX_EMBEDDING,
    MAX_EXPERTS,
    MAX_FEED_FORWARD,
    MAX_HEAD_SIZE,
    Reading,
    attention_factor,
)
from phiquant.errors import UnsupportedError
from phiquant.gguf import GGUFFile
from phiquant.gguf import keys as general_keys
from phiquant.gguf.keys import ArchitectureKeys

__all__ = ["PhiMoEConfig"]

ARCHITECTURE: Final = "phimoe"
KEYS: Final = ArchitectureKeys(ARCHITECTURE)

EXPERTS_USED: Final = 2
"""Sparsemixer chooses two."""

# What Phi-3.5-MoE has; the factor is sqrt(1 + ln 64 / ln 2048) and stands in its config.json.
_RELEASED_LENGTHS: Final = (131072, 4096)
_RELEASED_ATTENTION_FACTOR: Final = 1.243163121016122
_RELEASED_JITTER: Final = 0.01


@dataclass(frozen=True)
class PhiMoEConfig:
    """What the forward pass of a PhiMoE must know, checked so that shapes computed from it fit the file's tensors.

    Lengths count elements, `context_length` and `original_context_length` tokens; `feed_forward_length` is that of one
    expert. `sliding_window` is 0 where attention is unlimited. `fused_qkv`: one tensor projects to queries, keys and
    values; `attention_bias`, `output_bias`: whether the projections around the attention, and that to the logits, have
    biases. `router_jitter` is that of `kernels.ops.Route`. The factors divide the inverse frequencies, one for each
    pair of rotated channels, and are None without LongRoPE; the attention factors multiply cosine and sine.
    """

    architecture: ClassVar[str] = ARCHITECTURE

    name: str
    vocab_size: int
    context_length: int
    original_context_length: int
    embedding_length: int
    feed_forward_length: int
    block_count: int
    head_count: int
    head_count_kv: int
    head_size: int
    expert_count: int
    rope_dimension_count: int
    rope_freq_base: float
    norm_epsilon: float
    sliding_window: int
    router_jitter: float
    rope_attention_factor_short: float
    rope_attention_factor_long: float
    fused_qkv: bool
    attention_bias: bool
    output_bias: bool
    rope_factors_short: tuple[float, ...] | None
    rope_factors_long: tuple[float, ...] | None
    assumptions: tuple[str, ...] = ()

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> "PhiMoEConfig":
        """Read and check; GGUFError or UnsupportedError names the key or the tensor."""
        r = Reading(gguf, ARCHITECTURE)
        embedding = r.integer(KEYS.embedding_length, 1, MAX_EMBEDDING)
        heads, heads_kv, head_size = _heads(r, embedding)
        rotated = r.rotated_channels(head_size)
        context = r.integer(KEYS.context_length, 1, MAX_CONTEXT)
        original = r.integer(KEYS.rope_scaling_original_context_length, 1, MAX_CONTEXT, default=context)
        r.refuse_scaling_other_than("longrope")
        short, long = r.rope_factors(rotated // 2)
        if r.integer(KEYS.expert_used_count, 1, MAX_EXPERTS) != EXPERTS_USED:
            r.fail(f"the key {KEYS.expert_used_count!r} must be {EXPERTS_USED}, the experts that sparsemixer chooses")
        assumed: list[str] = []
        jitter = _routing(r, assumed)
        if long is None:
            factors = 1.0, 1.0
        else:
            factors = _attention_factors(r, context, original, assumed)
        fused = names.attn_qkv(0) in gguf.tensors
        config = cls(
            name=r.name(),
            vocab_size=r.vocabulary(),
            context_length=context,
            original_context_length=original,
            embedding_length=embedding,
            feed_forward_length=r.integer(KEYS.feed_forward_length, 1, MAX_FEED_FORWARD),
            block_count=r.integer(KEYS.block_count, 1, MAX_BLOCKS),
            head_count=heads,
            head_count_kv=heads_kv,
            head_size=head_size,
            expert_count=r.integer(KEYS.expert_count, EXPERTS_USED, MAX_EXPERTS),
            rope_dimension_count=rotated,
            rope_freq_base=r.positive(KEYS.rope_freq_base, 1e12, default=10000.0),
            norm_epsilon=r.positive(KEYS.layer_norm_rms_epsilon, 1.0),
            sliding_window=r.integer(KEYS.sliding_window, 0, (1 << 32) - 1, default=0),
            router_jitter=jitter,
            rope_attention_factor_short=factors[0],
            rope_attention_factor_long=factors[1],
            fused_qkv=fused,
            attention_bias=names.bias(names.attn_output(0)) in gguf.tensors,
            output_bias=names.bias(names.OUTPUT) in gguf.tensors,
            rope_factors_short=short,
            rope_factors_long=long,
            assumptions=tuple(assumed),
        )
        r.check_tensors(dict(config.tensor_shapes()))
        return config

    @property
    def rotary(self) -> Rotary:
        """Rotation of the heads."""
        return Rotary(
            self.rope_dimension_count,
            self.rope_freq_base,
            self.original_context_length,
            self.rope_factors_short,
            self.rope_factors_long,
            self.rope_attention_factor_short,
            self.rope_attention_factor_long,
        )

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape (NumPy order) of every tensor of this model, in the order of llama.cpp's converter."""
        if self.rope_factors_long is not None:
            yield names.ROPE_FACTORS_LONG, (self.rope_dimension_count // 2,)
            yield names.ROPE_FACTORS_SHORT, (self.rope_dimension_count // 2,)
        embedding, hidden, experts = self.embedding_length, self.feed_forward_length, self.expert_count
        yield from _biased(names.OUTPUT, (self.vocab_size, embedding), self.output_bias)
        yield names.TOKEN_EMBD, (self.vocab_size, embedding)
        queries, keys = self.head_count * self.head_size, self.head_count_kv * self.head_size
        for block in range(self.block_count):
            yield names.ffn_gate_exps(block), (experts, hidden, embedding)
            yield names.ffn_down_exps(block), (experts, embedding, hidden)
            yield names.ffn_up_exps(block), (experts, hidden, embedding)
            yield names.ffn_gate_inp(block), (experts, embedding)
            yield from _biased(names.attn_norm(block), (embedding,))
            yield from _biased(names.ffn_norm(block), (embedding,))
            if self.fused_qkv:
                yield from _biased(names.attn_qkv(block), (queries + 2 * keys, embedding), self.attention_bias)
            else:
                yield from _biased(names.attn_k(block), (keys, embedding), self.attention_bias)
                yield from _biased(names.attn_q(block), (queries, embedding), self.attention_bias)
                yield from _biased(names.attn_v(block), (keys, embedding), self.attention_bias)
            yield from _biased(names.attn_output(block), (embedding, queries), self.attention_bias)
        yield from _biased(names.OUTPUT_NORM, (embedding,))


def _biased(weight: str, shape: tuple[int, ...], there: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A weight and, if there is one, its bias: a value for each of its rows, or for each of a norm's."""
    if there:
        yield names.bias(weight), shape[:1]
    yield weight, shape


def _heads(r: Reading, embedding: int) -> tuple[int, int, int]:
    """Query heads, key and value heads, and their size: in Phi-tiny-MoE not the embedding's share of a head."""
    if KEYS.key_length not in r.gguf.fields:
        heads, heads_kv = r.heads(embedding)
        return heads, heads_kv, embedding // heads
    heads, heads_kv = r.heads()
    size = r.integer(KEYS.key_length, 1, MAX_HEAD_SIZE)
    if r.integer(KEYS.value_length, 1, MAX_HEAD_SIZE, default=size) != size:
        r.fail(f"the key {KEYS.value_length!r} must be {size}, as {KEYS.key_length!r} is")
    return heads, heads_kv, size


def _routing(r: Reading, assumed: list[str]) -> float:
    """The router's jitter. UnsupportedError for norms or a routing that PhiMoE does not have."""
    for key, known in ((general_keys.NORM, "layer"), (general_keys.ROUTER, "sparsemixer")):
        value = r.gguf.get(key, str, known)
        if value != known:
            raise UnsupportedError(
                f"{r.gguf.path} asks by {key!r} for {value!r:.40}; PhiMoE is computed with {known!r}, so convert the "
                "model again."
            )
    if general_keys.ROUTER_JITTER not in r.gguf.fields:
        assumed.append(
            "the file does not say how experts are chosen: as in the released model, by sparsemixer with a jitter of "
            f"{_RELEASED_JITTER:g}, after norms that subtract the mean"
        )
    return r.positive(general_keys.ROUTER_JITTER, 1.0, default=_RELEASED_JITTER)


def _attention_factors(r: Reading, context: int, original: int, assumed: list[str]) -> tuple[float, float]:
    """What cosine and sine are multiplied with under the short and under the long factors."""
    short, long = general_keys.ROPE_ATTENTION_FACTOR_SHORT, general_keys.ROPE_ATTENTION_FACTOR_LONG
    if (short in r.gguf.fields) != (long in r.gguf.fields):
        r.fail(f"the keys {short!r} and {long!r} belong together and one is missing")
    if short in r.gguf.fields:
        return r.positive(short, MAX_ATTENTION_FACTOR), r.positive(long, MAX_ATTENTION_FACTOR)
    if (context, original) == _RELEASED_LENGTHS:
        factor, like = _RELEASED_ATTENTION_FACTOR, "as in Phi-3.5-MoE, which has the same lengths of context"
    else:
        derived = attention_factor(context, original)
        factor = r.positive(KEYS.rope_scaling_attn_factor, MAX_ATTENTION_FACTOR, default=derived)
        like = "as LongRoPE gives it; no released model has these lengths of context, so convert the checkpoint again"
    assumed.append(
        f"the file has neither short_mscale nor long_mscale: cosine and sine are multiplied by {factor:.7g}, {like}"
    )
    return factor, factor
