"""Phi-3: hyperparameters and tensors of Phi-3, Phi-3.5, Phi-4 and Phi-4-mini as a GGUF file carries them.

Shapes in NumPy order, with E embedding, H heads, K key/value heads, D head size, F feed-forward, V vocabulary and R
rotated channels of a head:

    token_embd            [V, E]              blk.N.attn_norm      [E]
    output_norm           [E]                 blk.N.attn_qkv       [(H + 2 K) D, E]    rows: Q, then K, then V
    output                [V, E]  or tied     blk.N.attn_output    [E, H D]
    rope_factors_long     [R / 2] or absent   blk.N.ffn_norm       [E]
    rope_factors_short    [R / 2] or absent   blk.N.ffn_up         [2 F, E]            rows: gate, then up
                                              blk.N.ffn_down       [E, F]
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
    MAX_FEED_FORWARD,
    Reading,
    attention_factor,
)
from phiquant.gguf import GGUFFile
from phiquant.gguf.keys import ArchitectureKeys

__all__ = ["Phi3Config"]

ARCHITECTURE: Final = "phi3"
KEYS: Final = ArchitectureKeys(ARCHITECTURE)


@dataclass(frozen=True)
class Phi3Config:
    """What the forward pass of a Phi-3 must know, checked so that shapes computed from it fit the file's tensors.

    Lengths count elements, `context_length` and `original_context_length` tokens. `sliding_window` is 0 where attention
    is unlimited. `rope_attention_factor` multiplies both cosine and sine. `tied`: `token_embd` makes the logits too.
    `rope_factors_short` and `rope_factors_long` divide the inverse frequencies, one factor for each pair of rotated
    channels; both are None for models without LongRoPE.
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
    rope_dimension_count: int
    rope_freq_base: float
    rms_epsilon: float
    sliding_window: int
    rope_attention_factor: float
    tied: bool
    rope_factors_short: tuple[float, ...] | None
    rope_factors_long: tuple[float, ...] | None

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> "Phi3Config":
        """Read and check; GGUFError or UnsupportedError names the key or the tensor."""
        r = Reading(gguf, ARCHITECTURE)
        embedding = r.integer(KEYS.embedding_length, 1, MAX_EMBEDDING)
        blocks = r.integer(KEYS.block_count, 1, MAX_BLOCKS)
        heads, heads_kv = r.heads(embedding)
        head_size = embedding // heads
        for key in (KEYS.key_length, KEYS.value_length):
            if r.integer(key, 1, MAX_EMBEDDING, default=head_size) != head_size:
                r.fail(f"the key {key!r} must be {head_size}, the embedding length divided by the heads")
        rotated = r.rotated_channels(head_size)
        context = r.integer(KEYS.context_length, 1, MAX_CONTEXT)
        original = r.integer(KEYS.rope_scaling_original_context_length, 1, MAX_CONTEXT, default=context)
        r.refuse_scaling_other_than("longrope")
        short, long = r.rope_factors(rotated // 2)
        derived = 1.0 if long is None else attention_factor(context, original)
        config = cls(
            name=r.name(),
            vocab_size=r.vocabulary(),
            context_length=context,
            original_context_length=original,
            embedding_length=embedding,
            feed_forward_length=r.integer(KEYS.feed_forward_length, 1, MAX_FEED_FORWARD),
            block_count=blocks,
            head_count=heads,
            head_count_kv=heads_kv,
            head_size=head_size,
            rope_dimension_count=rotated,
            rope_freq_base=r.positive(KEYS.rope_freq_base, 1e12, default=10000.0),
            rms_epsilon=r.positive(KEYS.layer_norm_rms_epsilon, 1.0),
            sliding_window=r.integer(KEYS.sliding_window, 0, (1 << 32) - 1, default=0),
            rope_attention_factor=r.positive(KEYS.rope_scaling_attn_factor, MAX_ATTENTION_FACTOR, default=derived),
            tied=names.OUTPUT not in gguf.tensors,
            rope_factors_short=short,
            rope_factors_long=long,
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
            self.rope_attention_factor,
            self.rope_attention_factor,
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Nothing: a file says all that this architecture needs."""
        return ()

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape (NumPy order) of every tensor of this model, in the order of llama.cpp's converter."""
        if self.rope_factors_long is not None:
            yield names.ROPE_FACTORS_LONG, (self.rope_dimension_count // 2,)
            yield names.ROPE_FACTORS_SHORT, (self.rope_dimension_count // 2,)
        embedding, hidden = self.embedding_length, self.feed_forward_length
        if not self.tied:
            yield names.OUTPUT, (self.vocab_size, embedding)
        yield names.TOKEN_EMBD, (self.vocab_size, embedding)
        for block in range(self.block_count):
            yield names.attn_norm(block), (embedding,)
            yield names.ffn_down(block), (embedding, hidden)
            yield names.ffn_up(block), (2 * hidden, embedding)
            yield names.ffn_norm(block), (embedding,)
            yield names.attn_output(block), (embedding, self.head_count * self.head_size)
            yield names.attn_qkv(block), ((self.head_count + 2 * self.head_count_kv) * self.head_size, embedding)
        yield names.OUTPUT_NORM, (embedding,)
