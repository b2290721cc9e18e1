"""Phi-2: hyperparameters and tensors of Phi-1, Phi-1.5 and Phi-2 as a GGUF file carries them.

Shapes in NumPy order, with E embedding, H heads, K key/value heads, D head size, F feed-forward and V vocabulary. Every
tensor has a weight of the given shape and a bias of its first extent, but for the embedding, which has no bias:

    token_embd      [V, E]        blk.N.attn_norm      [E]           one norm for attention and feed-forward network
    output_norm     [E]           blk.N.attn_q         [H D, E]
    output          [V, E]        blk.N.attn_k, attn_v [K D, E]      or attn_qkv [(H + 2 K) D, E] in older files
                                  blk.N.attn_output    [E, H D]
                                  blk.N.ffn_up         [F, E]
                                  blk.N.ffn_down       [E, F]
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from phiquant.arch import names
from phiquant.arch.config import Rotary
from phiquant.arch.reading import MAX_BLOCKS, MAX_CONTEXT, MAX_EMBEDDING, MAX_FEED_FORWARD, Reading
from phiquant.gguf import GGUFFile
from phiquant.gguf.keys import ArchitectureKeys

__all__ = ["Phi2Config"]

ARCHITECTURE: Final = "phi2"
KEYS: Final = ArchitectureKeys(ARCHITECTURE)


@dataclass(frozen=True)
class Phi2Config:
    """What the forward pass of a Phi-2 must know, checked so that shapes computed from it fit the file's tensors.

    Lengths count elements, `context_length` tokens. `fused`: queries, keys and values come from one matrix.
    """

    architecture: ClassVar[str] = ARCHITECTURE

    name: str
    vocab_size: int
    context_length: int
    embedding_length: int
    feed_forward_length: int
    block_count: int
    head_count: int
    head_count_kv: int
    head_size: int
    rope_dimension_count: int
    rope_freq_base: float
    norm_epsilon: float
    fused: bool

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> "Phi2Config":
        """Read and check; GGUFError or UnsupportedError names the key or the tensor."""
        r = Reading(gguf, ARCHITECTURE)
        embedding = r.integer(KEYS.embedding_length, 1, MAX_EMBEDDING)
        heads, heads_kv = r.heads(embedding)
        head_size = embedding // heads
        for key in (KEYS.key_length, KEYS.value_length):
            if r.integer(key, 1, MAX_EMBEDDING, default=head_size) != head_size:
                r.fail(f"the key {key!r} must be {head_size}, the embedding length divided by the heads")
        r.refuse_scaling_other_than()
        config = cls(
            name=r.name(),
            vocab_size=r.vocabulary(),
            context_length=r.integer(KEYS.context_length, 1, MAX_CONTEXT),
            embedding_length=embedding,
            feed_forward_length=r.integer(KEYS.feed_forward_length, 1, MAX_FEED_FORWARD),
            block_count=r.integer(KEYS.block_count, 1, MAX_BLOCKS),
            head_count=heads,
            head_count_kv=heads_kv,
            head_size=head_size,
            rope_dimension_count=r.rotated_channels(head_size),
            rope_freq_base=r.positive(KEYS.rope_freq_base, 1e12, default=10000.0),
            norm_epsilon=r.positive(KEYS.layer_norm_epsilon, 1.0),
            fused=names.attn_qkv(0) in gguf.tensors,
        )
        r.check_tensors(dict(config.tensor_shapes()))
        return config

    @property
    def rotary(self) -> Rotary:
        """Rotation of the heads."""
        return Rotary(self.rope_dimension_count, self.rope_freq_base, self.context_length)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Nothing: a file says all that this architecture needs."""
        return ()

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape (NumPy order) of every tensor of this model, in the order of llama.cpp's converter."""
        embedding, hidden = self.embedding_length, self.feed_forward_length
        q, kv = self.head_count * self.head_size, self.head_count_kv * self.head_size
        yield from _with_bias(names.OUTPUT, (self.vocab_size, embedding))
        yield names.TOKEN_EMBD, (self.vocab_size, embedding)
        yield from _with_bias(names.OUTPUT_NORM, (embedding,))
        for block in range(self.block_count):
            yield from _with_bias(names.attn_norm(block), (embedding,))
            yield from _with_bias(names.ffn_up(block), (hidden, embedding))
            yield from _with_bias(names.ffn_down(block), (embedding, hidden))
            yield from _with_bias(names.attn_output(block), (embedding, q))
            if self.fused:
                yield from _with_bias(names.attn_qkv(block), (q + 2 * kv, embedding))
            else:
                yield from _with_bias(names.attn_k(block), (kv, embedding))
                yield from _with_bias(names.attn_q(block), (q, embedding))
                yield from _with_bias(names.attn_v(block), (kv, embedding))


def _with_bias(weight: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield names.bias(weight), shape[:1]
    yield weight, shape
