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

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, NoReturn

import numpy as np

from phiquant.arch import names
from phiquant.errors import GGUFError, UnsupportedError
from phiquant.gguf import GGMLType, GGUFFile, ValueType
from phiquant.gguf import keys as general_keys
from phiquant.gguf.keys import ArchitectureKeys

__all__ = ["Phi3Config"]

ARCHITECTURE: Final = "phi3"
KEYS: Final = ArchitectureKeys(ARCHITECTURE)

# Far above every published model; they keep sizes that are computed from a file within what arithmetic and memory bear.
MAX_BLOCKS: Final = 512
MAX_EMBEDDING: Final = 1 << 16
MAX_FEED_FORWARD: Final = 1 << 20
MAX_HEADS: Final = 1024
MAX_HEAD_SIZE: Final = 1024
MAX_CONTEXT: Final = 1 << 28
MAX_VOCABULARY: Final = 1 << 22
MAX_ATTENTION_FACTOR: Final = 1e3

# Types that hold weights; the others are integers of index tables, or formats of activations only.
_NO_WEIGHTS: Final = frozenset(
    {GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64, GGMLType.F64, GGMLType.Q8_1, GGMLType.Q8_K}
)


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
        embedding = _integer(gguf, KEYS.embedding_length, 1, MAX_EMBEDDING)
        blocks = _integer(gguf, KEYS.block_count, 1, MAX_BLOCKS)
        heads = _integer(gguf, KEYS.head_count, 1, MAX_HEADS)
        heads_kv = _integer(gguf, KEYS.head_count_kv, 1, MAX_HEADS, default=heads)
        if embedding % heads:
            _fail(
                gguf, f"the key {KEYS.head_count!r} is {heads}, which does not divide the embedding length {embedding}"
            )
        if heads % heads_kv:
            _fail(gguf, f"the key {KEYS.head_count_kv!r} is {heads_kv}, which does not divide the {heads} heads")
        head_size = embedding // heads
        if head_size > MAX_HEAD_SIZE:
            _fail(gguf, f"the key {KEYS.head_count!r} is {heads}, so a head has {head_size} > {MAX_HEAD_SIZE} channels")
        for key in (KEYS.key_length, KEYS.value_length):
            if _integer(gguf, key, 1, MAX_EMBEDDING, default=head_size) != head_size:
                _fail(gguf, f"the key {key!r} must be {head_size}, the embedding length divided by the heads")
        rotated = _integer(gguf, KEYS.rope_dimension_count, 2, head_size, default=head_size)
        if rotated % 2:
            _fail(gguf, f"the key {KEYS.rope_dimension_count!r} is {rotated} and must be even")
        context = _integer(gguf, KEYS.context_length, 1, MAX_CONTEXT)
        original = _integer(gguf, KEYS.rope_scaling_original_context_length, 1, MAX_CONTEXT, default=context)
        _refuse_other_scaling(gguf)
        short = _factors(gguf, names.ROPE_FACTORS_SHORT, rotated // 2)
        long = _factors(gguf, names.ROPE_FACTORS_LONG, rotated // 2)
        if (short is None) != (long is None):
            absent = names.ROPE_FACTORS_SHORT if short is None else names.ROPE_FACTORS_LONG
            _fail(gguf, f"the tensor {absent!r} is missing although the other rope factors are there")
        derived = 1.0 if long is None else attention_factor(context, original)
        config = cls(
            name=gguf.get(general_keys.NAME, str, "") or gguf.path.stem,
            vocab_size=_vocabulary(gguf),
            context_length=context,
            original_context_length=original,
            embedding_length=embedding,
            feed_forward_length=_integer(gguf, KEYS.feed_forward_length, 1, MAX_FEED_FORWARD),
            block_count=blocks,
            head_count=heads,
            head_count_kv=heads_kv,
            head_size=head_size,
            rope_dimension_count=rotated,
            rope_freq_base=_positive(gguf, KEYS.rope_freq_base, 1e12, default=10000.0),
            rms_epsilon=_positive(gguf, KEYS.layer_norm_rms_epsilon, 1.0),
            sliding_window=_integer(gguf, KEYS.sliding_window, 0, (1 << 32) - 1, default=0),
            rope_attention_factor=_positive(gguf, KEYS.rope_scaling_attn_factor, MAX_ATTENTION_FACTOR, default=derived),
            tied=names.OUTPUT not in gguf.tensors,
            rope_factors_short=short,
            rope_factors_long=long,
        )
        _check_tensors(gguf, dict(config.tensor_shapes()))
        return config

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


def attention_factor(context: int, original: int) -> float:
    """LongRoPE's factor on cosine and sine for a model extended from `original` to `context` tokens.

    sqrt(1 + ln(context / original) / ln(original)), and 1 where nothing was extended; as in transformers' longrope.
    """
    if context <= original or original == 1:
        return 1.0
    return math.sqrt(1.0 + math.log(context / original) / math.log(original))


def _fail(gguf: GGUFFile, reason: str) -> NoReturn:
    raise GGUFError(f"{gguf.path} is not a usable {ARCHITECTURE} model: {reason}.")


def _integer(gguf: GGUFFile, key: str, least: int, most: int, default: int | None = None) -> int:
    value = gguf.require(key, int) if default is None else gguf.get(key, int, default)
    if not least <= value <= most:
        _fail(gguf, f"the key {key!r} is {value} and must be from {least} to {most}")
    return value


def _positive(gguf: GGUFFile, key: str, most: float, default: float | None = None) -> float:
    value = gguf.require(key, float) if default is None else gguf.get(key, float, default)
    if not 0.0 < value <= most:  # NaN fails too
        _fail(gguf, f"the key {key!r} is {value} and must be above 0 and at most {most:g}")
    return value


def _refuse_other_scaling(gguf: GGUFFile) -> None:
    """Rotary scalings that Phi-3 was never trained with would be computed wrongly without a word."""
    kind = gguf.get(KEYS.rope_scaling_type, str, "none")
    factor = gguf.get(KEYS.rope_scaling_factor, float, 1.0)
    if kind not in ("none", "longrope") or (kind == "none" and factor not in (0.0, 1.0)):
        raise UnsupportedError(
            f"{gguf.path} asks by {KEYS.rope_scaling_type!r} for the rotary scaling {kind!r:.40} by {factor:g}; phi3 "
            "models have none but LongRoPE, so convert the model again without it."
        )


def _factors(gguf: GGUFFile, name: str, length: int) -> tuple[float, ...] | None:
    info = gguf.tensors.get(name)
    if info is None:
        return None
    if info.type is not GGMLType.F32:
        _fail(gguf, f"the tensor {name!r} is {info.type.name} and must be F32")
    if info.shape != (length,):
        _fail(
            gguf, f"the tensor {name!r} has the shape {info.shape} and must have ({length},), half the rotated channels"
        )
    # A copy, because an alignment key may put a tensor anywhere.
    factors = np.frombuffer(gguf.data(name).tobytes(), "<f4")
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        _fail(gguf, f"the tensor {name!r} holds factors that are not finite and positive")
    return tuple(factors.tolist())


def _vocabulary(gguf: GGUFFile) -> int:
    """The number of tokens, on which the embedding, the token list and an explicit key must agree."""
    info = gguf.tensors.get(names.TOKEN_EMBD)
    if info is None:
        _fail(gguf, f"the tensor {names.TOKEN_EMBD!r} is missing")
    if len(info.shape) != 2 or not 1 <= info.shape[0] <= MAX_VOCABULARY:
        _fail(gguf, f"the tensor {names.TOKEN_EMBD!r} has the shape {info.shape} and must have (vocabulary, embedding)")
    rows = info.shape[0]
    tokens = gguf.fields.get(general_keys.TOKENS)
    if tokens is not None:
        if tokens.item_type is not ValueType.STRING:
            _fail(gguf, f"the key {general_keys.TOKENS!r} must be an array of strings")
        if tokens.count != rows:
            _fail(
                gguf, f"the key {general_keys.TOKENS!r} lists {tokens.count} tokens and the embedding has {rows} rows"
            )
    if gguf.get(KEYS.vocab_size, int, rows) != rows:
        _fail(gguf, f"the key {KEYS.vocab_size!r} differs from the {rows} rows of {names.TOKEN_EMBD!r}")
    return rows


def _check_tensors(gguf: GGUFFile, expected: dict[str, tuple[int, ...]]) -> None:
    """Every tensor there, with exactly the shape that the hyperparameters imply, and no tensor besides."""
    for name, shape in expected.items():
        info = gguf.tensors.get(name)
        if info is None:
            _refuse_split_projection(gguf, name)
            _fail(gguf, f"the tensor {name!r} is missing")
        if info.shape != shape:
            _fail(gguf, f"the tensor {name!r} has the shape {info.shape} and must have {shape}")
        if len(shape) == 1 and info.type is not GGMLType.F32:
            _fail(gguf, f"the tensor {name!r} is {info.type.name} and must be F32")
        if info.type in _NO_WEIGHTS:
            _fail(gguf, f"the tensor {name!r} is {info.type.name}, which is no type of weights")
    for name in gguf.tensors:
        if name not in expected:
            _fail(gguf, f"it holds the tensor {name!r:.80}, for which {ARCHITECTURE} has no place")


def _refuse_split_projection(gguf: GGUFFile, missing: str) -> None:
    block = int(missing.split(".")[1]) if missing.startswith("blk.") else 0
    if missing == names.attn_qkv(block):
        parts = (names.attn_q(block), names.attn_k(block), names.attn_v(block))
        if any(part in gguf.tensors for part in parts):
            raise UnsupportedError(
                f"{gguf.path} stores queries, keys and values apart ({parts[0]!r} …), where this version needs the "
                f"fused {missing!r}; convert the checkpoint with `phiquant convert`."
            )
