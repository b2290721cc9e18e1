"""Phi-3-small: hyperparameters and tensors as a GGUF file carries them (`docs/formats/phi3small.md`).

Shapes in NumPy order, with E embedding, H heads, K key/value heads, D head size, F feed-forward and V vocabulary; every
weight but the embedding has a bias, a vector of its first extent:

    token_embd            [V, E]              blk.N.attn_norm      [E]
    output_norm           [E]                 blk.N.attn_qkv       [(H + 2 K) D, E]    rows: Q, then K, then V
    rope_factors_long     [D / 2] or absent   blk.N.attn_output    [E, H D]
    rope_factors_short    [D / 2] or absent   blk.N.ffn_norm       [E]
                                              blk.N.ffn_up         [2 F, E]            rows: gate, then linear
                                              blk.N.ffn_down       [E, F]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np

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
from phiquant.gguf import GGUFFile, keys
from phiquant.gguf.keys import ArchitectureKeys, Phi3SmallKeys

__all__ = ["Phi3SmallConfig"]

ARCHITECTURE: Final = "phi3small"
KEYS: Final = ArchitectureKeys(ARCHITECTURE)
OWN: Final = Phi3SmallKeys(ARCHITECTURE)
MAX_SCALE: Final = 1e6


@dataclass(frozen=True)
class Phi3SmallConfig:
    """What the forward pass of a Phi-3-small must know, checked so that shapes computed from it fit the tensors.

    Lengths count elements, `context_length` and `original_context_length` tokens. `embedding_scale` multiplies the rows
    of the embedding, `attention_scale` the scores, `logit_scale` the logits. `gate_limit`: of `ops.GeGELU`.
    `sparse_layers`: whether each block attends by the pattern of `ops.BlockSparse`, whose three numbers follow; the
    others see every token. Rotation as in Phi3Config, all channels of a head, a factor for each regime.
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
    norm_epsilon: float
    embedding_scale: float
    attention_scale: float
    logit_scale: float
    gate_limit: float
    sparse_layers: tuple[bool, ...]
    sparse_block_size: int
    sparse_local_blocks: int
    sparse_vertical_stride: int
    rope_factors_short: tuple[float, ...] | None
    rope_factors_long: tuple[float, ...] | None
    rope_attention_factor_short: float
    rope_attention_factor_long: float

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> "Phi3SmallConfig":
        """Read and check; GGUFError or UnsupportedError names the key or the tensor."""
        r = Reading(gguf, ARCHITECTURE)
        embedding = r.integer(KEYS.embedding_length, 1, MAX_EMBEDDING)
        blocks = r.integer(KEYS.block_count, 1, MAX_BLOCKS)
        heads, heads_kv = r.heads(embedding)
        head_size = embedding // heads
        if r.rotated_channels(head_size) != head_size:
            r.fail(f"the key {KEYS.rope_dimension_count!r} must be {head_size}, all channels of a head")
        context = r.integer(KEYS.context_length, 1, MAX_CONTEXT)
        original = r.integer(KEYS.rope_scaling_original_context_length, 1, MAX_CONTEXT, default=context)
        r.refuse_scaling_other_than("longrope")
        short, long = r.rope_factors(head_size // 2)
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
            rope_freq_base=r.positive(KEYS.rope_freq_base, 1e12),
            norm_epsilon=r.positive(KEYS.layer_norm_epsilon, 1.0),
            embedding_scale=r.positive(KEYS.embedding_scale, MAX_SCALE),
            attention_scale=r.positive(KEYS.attention_scale, MAX_SCALE),
            logit_scale=r.positive(KEYS.logit_scale, MAX_SCALE),
            gate_limit=r.positive(OWN.gate_limit, MAX_SCALE),
            sparse_layers=_flags(r, OWN.layers, blocks),
            sparse_block_size=r.integer(OWN.block_size, 1, MAX_CONTEXT),
            sparse_local_blocks=r.integer(OWN.local_blocks, 1, MAX_CONTEXT),
            sparse_vertical_stride=r.integer(OWN.vertical_stride, 1, MAX_CONTEXT),
            rope_factors_short=short,
            rope_factors_long=long,
            rope_attention_factor_short=r.positive(
                keys.ROPE_ATTENTION_FACTOR_SHORT, MAX_ATTENTION_FACTOR, default=derived
            ),
            rope_attention_factor_long=r.positive(
                keys.ROPE_ATTENTION_FACTOR_LONG, MAX_ATTENTION_FACTOR, default=derived
            ),
        )
        r.check_tensors(dict(config.tensor_shapes()))
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
            self.rope_attention_factor_short,
            self.rope_attention_factor_long,
        )

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Nothing: a file says all that this architecture needs."""
        return ()

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape (NumPy order) of every tensor of this model, each weight before its bias."""
        if self.rope_factors_long is not None:
            yield names.ROPE_FACTORS_LONG, (self.head_size // 2,)
            yield names.ROPE_FACTORS_SHORT, (self.head_size // 2,)
        embedding, hidden = self.embedding_length, self.feed_forward_length
        yield names.TOKEN_EMBD, (self.vocab_size, embedding)
        weights: dict[str, tuple[int, ...]] = {}
        for block in range(self.block_count):
            weights |= {
                names.attn_norm(block): (embedding,),
                names.attn_qkv(block): ((self.head_count + 2 * self.head_count_kv) * self.head_size, embedding),
                names.attn_output(block): (embedding, self.head_count * self.head_size),
                names.ffn_norm(block): (embedding,),
                names.ffn_up(block): (2 * hidden, embedding),
                names.ffn_down(block): (embedding, hidden),
            }
        weights[names.OUTPUT_NORM] = (embedding,)
        for name, shape in weights.items():
            yield name, shape
            yield names.bias(name), shape[:1]


def _flags(r: Reading, key: str, count: int) -> tuple[bool, ...]:
    """A list of `count` times true or false."""
    value = r.gguf.require(key, np.ndarray)
    if value.dtype != np.bool_ or len(value) != count:
        r.fail(f"the key {key!r} must list true or false for each of the {count} blocks")
    return tuple(value.tolist())
