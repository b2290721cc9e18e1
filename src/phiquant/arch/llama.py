"""Llama: hyperparameters and tensors of Phi checkpoints that were rewritten as Llama or Mistral, as GGUF carries them.

Shapes in NumPy order, with E embedding, H heads, K key/value heads, D head size, F feed-forward and V vocabulary:

    token_embd            [V, E]              blk.N.attn_norm      [E]
    output_norm           [E]                 blk.N.attn_q         [H D, E]        rows of a head: see below
    output                [V, E]  or tied     blk.N.attn_k         [K D, E]        likewise
    rope_freqs            [D / 2] or absent   blk.N.attn_v         [K D, E]        or all three as attn_qkv
    rope_factors_long     [D / 2] or absent   blk.N.attn_output    [E, H D]
    rope_factors_short    [D / 2] or absent   blk.N.ffn_norm       [E]
                                              blk.N.ffn_gate       [F, E]
                                              blk.N.ffn_up         [F, E]
                                              blk.N.ffn_down       [E, F]

Each of the seven matrices of a block may have a bias. All channels of a head are rotated. Files of this architecture,
and of it alone among those here, hold the rows of a head's queries and keys so that rows 2i and 2i + 1 are rotated with
one another; in a checkpoint these are rows i and i + D / 2.
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
from phiquant.gguf.keys import ArchitectureKeys

__all__ = ["LlamaConfig"]

ARCHITECTURE: Final = "llama"
KEYS: Final = ArchitectureKeys(ARCHITECTURE)
OLD_LINEAR_KEY: Final = "llama.rope.scale_linear"  # of files from before there were several kinds of scaling

Factors = tuple[float, ...] | None


@dataclass(frozen=True)
class LlamaConfig:
    """What the forward pass of a Llama must know, checked so that shapes computed from it fit the file's tensors.

    Lengths count elements, `context_length` and `original_context_length` tokens. `sliding_window` is 0 where attention
    is unlimited. `tied`: `token_embd` makes the logits too. `fused`: queries, keys and values come from one matrix. The
    three `..._bias` say which matrices have one: of queries, keys and values; of the attention's output; of the
    feed-forward network. `rope_factors_short` divide the inverse frequencies, one factor for each pair of channels, and
    `rope_factors_long` do in sequences beyond `original_context_length`; None where there are none. For linear scaling,
    and for that of Llama 3, there are short factors alone.
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
    rope_freq_base: float
    rms_epsilon: float
    sliding_window: int
    rope_attention_factor: float
    tied: bool
    fused: bool
    qkv_bias: bool
    output_bias: bool
    ffn_bias: bool
    rope_factors_short: Factors
    rope_factors_long: Factors

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> "LlamaConfig":
        """Read and check; GGUFError or UnsupportedError names the key or the tensor."""
        r = Reading(gguf, ARCHITECTURE)
        if r.integer(KEYS.expert_count, 0, MAX_EXPERTS, default=0):
            raise UnsupportedError(f"{gguf.path} is a mixture of experts of the architecture llama; no Phi is one.")
        embedding = r.integer(KEYS.embedding_length, 1, MAX_EMBEDDING)
        explicit = KEYS.key_length in gguf.fields
        heads, heads_kv = r.heads(0 if explicit else embedding)
        head_size = r.integer(KEYS.key_length, 2, MAX_HEAD_SIZE) if explicit else embedding // heads
        if r.integer(KEYS.value_length, 1, MAX_HEAD_SIZE, default=head_size) != head_size:
            r.fail(f"the key {KEYS.value_length!r} must be {head_size}, the channels of a head")
        if r.rotated_channels(head_size) != head_size:
            r.fail(f"the key {KEYS.rope_dimension_count!r} must be {head_size}, because llama rotates whole heads")
        context = r.integer(KEYS.context_length, 1, MAX_CONTEXT)
        original = r.integer(KEYS.rope_scaling_original_context_length, 1, MAX_CONTEXT, default=context)
        short, long = _factors(r, head_size // 2)
        derived = 1.0 if long is None else attention_factor(context, original)
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
            rope_freq_base=r.positive(KEYS.rope_freq_base, 1e12, default=10000.0),
            rms_epsilon=r.positive(KEYS.layer_norm_rms_epsilon, 1.0),
            sliding_window=r.integer(KEYS.sliding_window, 0, (1 << 32) - 1, default=0),
            rope_attention_factor=r.positive(KEYS.rope_scaling_attn_factor, MAX_ATTENTION_FACTOR, default=derived),
            tied=names.OUTPUT not in gguf.tensors,
            fused=fused,
            qkv_bias=names.bias(names.attn_qkv(0) if fused else names.attn_q(0)) in gguf.tensors,
            output_bias=names.bias(names.attn_output(0)) in gguf.tensors,
            ffn_bias=names.bias(names.ffn_up(0)) in gguf.tensors,
            rope_factors_short=short,
            rope_factors_long=long,
        )
        shapes = dict(config.tensor_shapes())
        if names.ROPE_FREQS in gguf.tensors and long is None:
            shapes[names.ROPE_FREQS] = (head_size // 2,)  # was read into the factors, and is no weight
        r.check_tensors(shapes)
        return config

    @property
    def rotary(self) -> Rotary:
        """Rotation of the heads."""
        return Rotary(
            self.head_size,
            self.rope_freq_base,
            self.original_context_length,
            self.rope_factors_short,
            self.rope_factors_long,
            self.rope_attention_factor,
            self.rope_attention_factor,
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Nothing: a file says all that this architecture needs."""
        return ()

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape (NumPy order) of every tensor of this model, in the order of llama.cpp's converter."""
        embedding, hidden = self.embedding_length, self.feed_forward_length
        q, kv = self.head_count * self.head_size, self.head_count_kv * self.head_size
        if self.rope_factors_long is not None:
            yield names.ROPE_FACTORS_LONG, (self.head_size // 2,)
            yield names.ROPE_FACTORS_SHORT, (self.head_size // 2,)
        if not self.tied:
            yield names.OUTPUT, (self.vocab_size, embedding)
        yield names.TOKEN_EMBD, (self.vocab_size, embedding)
        for block in range(self.block_count):
            yield names.attn_norm(block), (embedding,)
            yield from _matrix(names.ffn_down(block), (embedding, hidden), self.ffn_bias)
            yield from _matrix(names.ffn_gate(block), (hidden, embedding), self.ffn_bias)
            yield from _matrix(names.ffn_up(block), (hidden, embedding), self.ffn_bias)
            yield names.ffn_norm(block), (embedding,)
            if self.fused:
                yield from _matrix(names.attn_qkv(block), (q + 2 * kv, embedding), self.qkv_bias)
            else:
                yield from _matrix(names.attn_k(block), (kv, embedding), self.qkv_bias)
            yield from _matrix(names.attn_output(block), (embedding, q), self.output_bias)
            if not self.fused:
                yield from _matrix(names.attn_q(block), (q, embedding), self.qkv_bias)
                yield from _matrix(names.attn_v(block), (kv, embedding), self.qkv_bias)
        yield names.OUTPUT_NORM, (embedding,)


def _matrix(weight: str, shape: tuple[int, int], biased: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    if biased:
        yield names.bias(weight), shape[:1]
    yield weight, shape


def _factors(r: Reading, pairs: int) -> tuple[Factors, Factors]:
    """Short and long factors on the inverse frequencies.

    As llama.cpp reads them: scaling is linear where a file does not say its kind, a factor of 0 is none at all, and the
    factors of `rope_freqs` come on top of it; LongRoPE has both lists of its own.
    """
    kind = r.gguf.get(KEYS.rope_scaling_type, str, "linear")
    if kind == "longrope":
        short, long = r.rope_factors(pairs)
        if long is None:
            r.fail(
                f"the key {KEYS.rope_scaling_type!r} says longrope and the tensor {names.ROPE_FACTORS_LONG!r} is "
                "missing, so convert the checkpoint with `phiquant convert`"
            )
        return short, long
    if kind not in ("none", "linear"):
        raise UnsupportedError(
            f"{r.gguf.path} asks by {KEYS.rope_scaling_type!r} for the rotary scaling {kind!r:.40}, which is not "
            "supported for the architecture llama; none, linear and longrope are."
        )
    factor = 1.0
    if kind == "linear":
        key = KEYS.rope_scaling_factor if KEYS.rope_scaling_factor in r.gguf.fields else OLD_LINEAR_KEY
        factor = r.gguf.get(key, float, 0.0) or 1.0
        if not 0 < factor <= 1e6:
            r.fail(f"the key {key!r} is {factor} and must be from 0 to 1000000")
    freqs = r.factors(names.ROPE_FREQS, pairs)
    if freqs is None and factor == 1.0:
        return None, None
    return tuple(factor * freq for freq in freqs or (1.0,) * pairs), None
