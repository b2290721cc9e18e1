"""The vocabulary of a GGUF file: token texts, scores, types, special ids and flags, checked at the border.

Nothing here reads a file: `Vocabulary.from_metadata` takes the plain key-value mapping that the GGUF reader gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant.errors import TokenizerError, UnsupportedError
from phiquant.gguf import keys

PREFIX = "tokenizer.ggml."
SUPPORTED_MODELS = ("llama",)

# A token with one of these texts ends a turn or a document (the part of llama.cpp's list that Phi has).
END_TEXTS = frozenset({"<|end|>", "<|endoftext|>", "<|im_end|>", "</s>"})
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")


class TokenType(IntEnum):
    """What GGUF's `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens and what belongs to them; every array has one entry per token id.

    tokens: texts as the file has them (U+2581 for a space, `<0x0A>` for a byte).
    scores: float32, the SentencePiece log probability or rank (higher merges first).
    types: uint8, values of `TokenType`.
    end_ids: ids named by the eos, eot, eom and fim keys and by our own key, and those whose text is in `END_TEXTS`.
    """

    model: str
    tokens: Sequence[str]
    scores: npt.NDArray[np.float32]
    types: npt.NDArray[np.uint8]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read and check the `tokenizer.ggml.*` keys.

        Raises TokenizerError for keys that are missing, of the wrong kind or contradictory, UnsupportedError for a
        tokenizer model other than SentencePiece BPE ("llama").
        """
        model = _typed(metadata, "model", str, "a string")
        if model is None:
            raise TokenizerError("the file has no tokenizer (key tokenizer.ggml.model); convert the checkpoint again")
        if model not in SUPPORTED_MODELS:
            raise UnsupportedError(
                f"tokenizer model {model!r} is not supported; this version reads 'llama' (SentencePiece, as in Phi-3)"
            )
        tokens = metadata.get(PREFIX + "tokens")
        if not isinstance(tokens, list | tuple) or not tokens or not all(type(token) is str for token in tokens):
            raise TokenizerError("tokenizer.ggml.tokens must be a non-empty array of strings")
        count = len(tokens)
        scores = _numbers(metadata, "scores", count, "fiu")
        types = _numbers(metadata, "token_type", count, "iu")
        if not np.isfinite(scores).all():
            raise TokenizerError(f"tokenizer.ggml.scores holds NaN or infinity at token {_first(~np.isfinite(scores))}")
        known = (types >= min(TokenType)) & (types <= max(TokenType))
        if not known.all():
            at = _first(~known)
            raise TokenizerError(f"tokenizer.ggml.token_type says {types[at]} of token {at}; the types are 1 to 6")
        types = types.astype(np.uint8)

        def token_id(key: str, default: int | None = None) -> int | None:
            value = _typed(metadata, key, int, "an integer")
            if value is None:
                return default if default is not None and default < count else None
            if not 0 <= value < count:
                raise TokenizerError(f"{PREFIX}{key} is {value}, but the vocabulary has {count} tokens")
            return int(value)

        # Without a key, SentencePiece files mean the ids that LLaMA's vocabulary gave them, as in llama.cpp.
        eos_id = token_id("eos_token_id", 2)
        ends = {eos_id, *(token_id(key) for key in _END_KEYS[1:])}
        texts_count = np.isin(types, (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN))
        ends.update(int(i) for i in np.flatnonzero(texts_count) if tokens[i] in END_TEXTS)
        ends.update(_ids(metadata, keys.END_IDS, count))
        return cls(
            model=model,
            tokens=tokens,
            scores=scores.astype(np.float32),
            types=types,
            bos_id=token_id("bos_token_id", 1),
            eos_id=eos_id,
            unk_id=token_id("unknown_token_id", 0),
            end_ids=frozenset(i for i in ends if i is not None),
            add_bos=_flag(metadata, "add_bos_token", True),
            add_eos=_flag(metadata, "add_eos_token", False),
            add_space_prefix=_flag(metadata, "add_space_prefix", True),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def of_type(self, *types: TokenType) -> list[int]:
        """Ids of all tokens of these types, ascending."""
        ids: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return ids

    def padding(self) -> list[int]:
        """Ids that only fill up the table, ascending: type UNUSED, no text, or `[PADi]` typed UNKNOWN as once usual."""
        found = {i for i in self.of_type(TokenType.UNKNOWN) if self.tokens[i] == f"[PAD{i}]"}
        found.update(self.of_type(TokenType.UNUSED))
        found.update(i for i, text in enumerate(self.tokens) if not text)
        return sorted(found)


def _first(mask: npt.NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))


def _typed(metadata: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
    value = metadata.get(PREFIX + key)
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and type(value) is not kind:
        raise TokenizerError(f"{PREFIX}{key} must be {name}, not {type(value).__name__}")
    return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = _typed(metadata, key, bool, "true or false")
    return default if value is None else bool(value)


def _ids(metadata: Mapping[str, Any], key: str, count: int) -> list[int]:
    """The token ids under `key`, if it is there."""
    value = metadata.get(key)
    if value is None:
        return []
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iu":
        raise TokenizerError(f"{key} must be an array of integers")
    if value.size and not (int(value.min()) >= 0 and int(value.max()) < count):
        raise TokenizerError(f"{key} names an id outside the vocabulary of {count} tokens")
    return [int(i) for i in value]


def _numbers(metadata: Mapping[str, Any], key: str, count: int, kinds: str) -> npt.NDArray[Any]:
    """The array under `key`, one-dimensional, `count` long, of a NumPy dtype whose kind is in `kinds`."""
    value = metadata.get(PREFIX + key)
    if value is None:
        raise TokenizerError(f"the file lacks {PREFIX}{key}, which a SentencePiece vocabulary needs; convert it again")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise TokenizerError(f"{PREFIX}{key} must be an array of numbers")
    if len(array) != count:
        raise TokenizerError(f"{PREFIX}{key} has {len(array)} entries for {count} tokens")
    return array
