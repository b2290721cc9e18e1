"""Reading hyperparameters from a file's keys and tensors, refusing by name what makes no model."""

import math
from typing import Final, NoReturn

import numpy as np

from phiquant.arch import names
from phiquant.errors import GGUFError, UnsupportedError
from phiquant.gguf import GGMLType, GGUFFile, ValueType
from phiquant.gguf import keys as general_keys
from phiquant.gguf.keys import ArchitectureKeys

__all__ = [
    "MAX_ATTENTION_FACTOR",
    "MAX_BLOCKS",
    "MAX_CONTEXT",
    "MAX_EMBEDDING",
    "MAX_EXPERTS",
    "MAX_FEED_FORWARD",
    "MAX_HEAD_SIZE",
    "Reading",
    "attention_factor",
]

# Far above every published model; they keep sizes that are computed from a file within what arithmetic and memory bear.
MAX_BLOCKS: Final = 512
MAX_EMBEDDING: Final = 1 << 16
MAX_FEED_FORWARD: Final = 1 << 20
MAX_HEADS: Final = 1024
MAX_HEAD_SIZE: Final = 1024
MAX_CONTEXT: Final = 1 << 28
MAX_VOCABULARY: Final = 1 << 22
MAX_EXPERTS: Final = 1024
MAX_ATTENTION_FACTOR: Final = 1e3

# Types that hold weights; the others are integers of index tables, or formats of activations only.
_NO_WEIGHTS: Final = frozenset(
    {GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64, GGMLType.F64, GGMLType.Q8_1, GGMLType.Q8_K}
)


class Reading:
    """The keys of one architecture in one file. Whatever is wrong becomes a GGUFError or UnsupportedError."""

    def __init__(self, gguf: GGUFFile, architecture: str) -> None:
        self.gguf, self.architecture, self.keys = gguf, architecture, ArchitectureKeys(architecture)

    def fail(self, reason: str) -> NoReturn:
        """Refuse the file."""
        raise GGUFError(f"{self.gguf.path} is not a usable {self.architecture} model: {reason}.")

    def name(self) -> str:
        """The model's name, or that of the file."""
        return self.gguf.get(general_keys.NAME, str, "") or self.gguf.path.stem

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """A whole number within bounds; required where there is no default."""
        value = self.gguf.require(key, int) if default is None else self.gguf.get(key, int, default)
        if not least <= value <= most:
            self.fail(f"the key {key!r} is {value} and must be from {least} to {most}")
        return value

    def positive(self, key: str, most: float, default: float | None = None) -> float:
        """A number above zero; required where there is no default."""
        value = self.gguf.require(key, float) if default is None else self.gguf.get(key, float, default)
        if not 0.0 < value <= most:  # NaN fails too
            self.fail(f"the key {key!r} is {value} and must be above 0 and at most {most:g}")
        return value

    def heads(self, embedding: int = 0) -> tuple[int, int]:
        """Query heads, and key and value heads, which divide them; and they the `embedding`, where it is given."""
        key = self.keys.head_count
        heads = self.integer(key, 1, MAX_HEADS)
        if embedding % heads:
            self.fail(f"the key {key!r} is {heads}, which does not divide the embedding length {embedding}")
        if embedding // heads > MAX_HEAD_SIZE:
            self.fail(f"the key {key!r} is {heads}, so a head has {embedding // heads} > {MAX_HEAD_SIZE} channels")
        heads_kv = self.integer(self.keys.head_count_kv, 1, MAX_HEADS, default=heads)
        if heads % heads_kv:
            self.fail(f"the key {self.keys.head_count_kv!r} is {heads_kv}, which does not divide the {heads} heads")
        return heads, heads_kv

    def rotated_channels(self, head_size: int) -> int:
        """Rotated channels of a head; all without a key."""
        rotated = self.integer(self.keys.rope_dimension_count, 2, head_size, default=head_size)
        if rotated % 2:
            self.fail(f"the key {self.keys.rope_dimension_count!r} is {rotated} and must be even")
        return rotated

    def refuse_scaling_other_than(self, *known: str) -> None:
        """Rotary scalings that a model was never trained with would be computed wrongly without a word."""
        kind = self.gguf.get(self.keys.rope_scaling_type, str, "none")
        factor = self.gguf.get(self.keys.rope_scaling_factor, float, 1.0)
        if kind not in ("none", *known) or (kind == "none" and factor not in (0.0, 1.0)):
            had = " or ".join(("none", *known)).replace("longrope", "LongRoPE")
            raise UnsupportedError(
                f"{self.gguf.path} asks by {self.keys.rope_scaling_type!r} for the rotary scaling {kind!r:.40} by "
                f"{factor:g}; {self.architecture} models have {had}, so convert the model again."
            )

    def rope_factors(self, length: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """The short and the long factors of LongRoPE, `length` each; None twice without them."""
        short = self.factors(names.ROPE_FACTORS_SHORT, length)
        long = self.factors(names.ROPE_FACTORS_LONG, length)
        if (short is None) != (long is None):
            absent = names.ROPE_FACTORS_SHORT if short is None else names.ROPE_FACTORS_LONG
            self.fail(f"the tensor {absent!r} is missing although the other rope factors are there")
        return short, long

    def factors(self, name: str, length: int) -> tuple[float, ...] | None:
        """The positive numbers of an F32 tensor; None if there is no such tensor."""
        info = self.gguf.tensors.get(name)
        if info is None:
            return None
        if info.type is not GGMLType.F32:
            self.fail(f"the tensor {name!r} is {info.type.name} and must be F32")
        if info.shape != (length,):
            self.fail(
                f"the tensor {name!r} has the shape {info.shape} and must have ({length},), half the rotated channels"
            )
        # A copy, because an alignment key may put a tensor anywhere.
        factors = np.frombuffer(self.gguf.data(name).tobytes(), "<f4")
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            self.fail(f"the tensor {name!r} holds factors that are not finite and positive")
        return tuple(factors.tolist())

    def vocabulary(self) -> int:
        """The number of tokens, on which the embedding, the token list and an explicit key must agree."""
        gguf, key = self.gguf, self.keys.vocab_size
        info = gguf.tensors.get(names.TOKEN_EMBD)
        if info is None:
            self.fail(f"the tensor {names.TOKEN_EMBD!r} is missing")
        if len(info.shape) != 2 or not 1 <= info.shape[0] <= MAX_VOCABULARY:
            self.fail(
                f"the tensor {names.TOKEN_EMBD!r} has the shape {info.shape} and must have (vocabulary, embedding)"
            )
        rows = info.shape[0]
        tokens = gguf.fields.get(general_keys.TOKENS)
        if tokens is not None:
            if tokens.item_type is not ValueType.STRING:
                self.fail(f"the key {general_keys.TOKENS!r} must be an array of strings")
            if tokens.count != rows:
                self.fail(
                    f"the key {general_keys.TOKENS!r} lists {tokens.count} tokens and the embedding has {rows} rows"
                )
        if gguf.get(key, int, rows) != rows:
            self.fail(f"the key {key!r} differs from the {rows} rows of {names.TOKEN_EMBD!r}")
        return rows

    def check_tensors(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Every tensor there, with exactly the shape that the hyperparameters imply, and no tensor besides."""
        for name, shape in expected.items():
            info = self.gguf.tensors.get(name)
            if info is None:
                self._refuse_split_projection(name)
                self.fail(f"the tensor {name!r} is missing")
            if info.shape != shape:
                self.fail(f"the tensor {name!r} has the shape {info.shape} and must have {shape}")
            if len(shape) == 1 and info.type is not GGMLType.F32:
                self.fail(f"the tensor {name!r} is {info.type.name} and must be F32")
            if info.type in _NO_WEIGHTS:
                self.fail(f"the tensor {name!r} is {info.type.name}, which is no type of weights")
        for name in self.gguf.tensors:
            if name not in expected:
                self.fail(f"it holds the tensor {name!r:.80}, for which {self.architecture} has no place")

    def _refuse_split_projection(self, missing: str) -> None:
        block = int(missing.split(".")[1]) if missing.startswith("blk.") else 0
        if missing == names.attn_qkv(block):
            parts = (names.attn_q(block), names.attn_k(block), names.attn_v(block))
            if any(part in self.gguf.tensors for part in parts):
                raise UnsupportedError(
                    f"{self.gguf.path} stores queries, keys and values apart ({parts[0]!r} …), where "
                    f"{self.architecture} needs the fused {missing!r}; convert the checkpoint with `phiquant convert`."
                )


def attention_factor(context: int, original: int) -> float:
    """LongRoPE's factor on cosine and sine for a model extended from `original` to `context` tokens.

    sqrt(1 + ln(context / original) / ln(original)), and 1 where nothing was extended; as in transformers' longrope.
    """
    if context <= original or original == 1:
        return 1.0
    return math.sqrt(1.0 + math.log(context / original) / math.log(original))
