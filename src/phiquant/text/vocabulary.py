"""The vocabulary of a GGUF file: token texts, scores or merges, types, special ids and flags, checked at the border.

Nothing here reads a file: `Vocabulary.from_metadata` takes the plain key-value mapping that the GGUF reader gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant.errors import TokenizerError, UnsupportedError
from phiquant.gguf import keys

PREFIX = "tokenizer.ggml."
SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"  # values of tokenizer.ggml.model

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

    model: "llama" for SentencePiece BPE, "gpt2" for byte-level BPE.
    tokens: texts as the file has them: U+2581 for a space and `<0x0A>` for a byte, or in the byte alphabet.
    types: uint8, values of `TokenType`.
    scores: of SentencePiece: float32, the log probability or rank (higher merges first).
    merges: of byte-level BPE: "left right", the best first. pre: how text is cut into words, a key of
    `pretokenizers.BY_ID`. ignore_merges: a word that is a token becomes that token, whatever the merges say.
    end_ids: ids named by the eos, eot, eom and fim keys and by our own key, and those whose text is in `END_TEXTS`.
    add_space_prefix: SentencePiece only: a fragment begins with a space that the text does not have.
    notes: what the file does not say and was assumed, one sentence each.
    """

    model: str
    tokens: Sequence[str]
    types: npt.NDArray[np.uint8]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    scores: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    add_space_prefix: bool = False
    merges: Sequence[str] = ()
    pre: str = ""
    ignore_merges: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read and check the `tokenizer.ggml.*` keys.

        Raises TokenizerError for keys that are missing, of the wrong kind or contradictory, UnsupportedError for a
        tokenizer model or a pre-tokenizer that is not known.
        """
        model = _typed(metadata, "model", str, "a string")
        if model is None:
            raise TokenizerError("the file has no tokenizer (key tokenizer.ggml.model); convert the checkpoint again")
        if model not in (SENTENCEPIECE, BYTE_LEVEL):
            raise UnsupportedError(
                f"tokenizer model {model!r} is not supported; this version reads 'llama' (SentencePiece, as in Phi-3) "
                "and 'gpt2' (byte-level BPE, as in Phi-2 and Phi-4)"
            )
        tokens = metadata.get(PREFIX + "tokens")
        if not isinstance(tokens, list | tuple) or set(map(type, tokens)) != {str}:
            raise TokenizerError("tokenizer.ggml.tokens must be a non-empty array of strings")
        rest = _sentencepiece(metadata, len(tokens)) if model == SENTENCEPIECE else _byte_level(metadata, tokens)
        return cls(model=model, tokens=tokens, **_common(metadata, model, tokens), **rest)

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
        if "" in self.tokens:
            found.update(i for i, text in enumerate(self.tokens) if not text)
        return sorted(found)


def _common(metadata: Mapping[str, Any], model: str, tokens: Sequence[str]) -> dict[str, Any]:
    """Types, special ids and flags."""
    count = len(tokens)

    def token_id(key: str, default: int | None = None) -> int | None:
        value = _typed(metadata, key, int, "an integer")
        if value is None:
            return default if default is not None and default < count else None
        if not 0 <= value < count:
            raise TokenizerError(f"{PREFIX}{key} is {value}, but the vocabulary has {count} tokens")
        return int(value)

    # Without a key, SentencePiece files mean the ids that LLaMA's vocabulary gave them, as in llama.cpp. For byte-level
    # ones llama.cpp takes 11, which is a comma in GPT-2's vocabulary; here there is none then.
    unk, bos, eos = (0, 1, 2) if model == SENTENCEPIECE else (None, None, None)
    found = {"bos_id": token_id("bos_token_id", bos), "eos_id": token_id("eos_token_id", eos)}
    named = {found["eos_id"], *(token_id(key) for key in _END_KEYS[1:])}
    types = _types(metadata, model, tokens, {*named, found["bos_id"], token_id("padding_token_id")})
    marked = np.isin(types, (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN))
    ends = {i for i in np.flatnonzero(marked).tolist() if tokens[i] in END_TEXTS}
    return {
        **found,
        "types": types,
        "unk_id": token_id("unknown_token_id", unk),
        "end_ids": frozenset({*ends, *_ids(metadata, keys.END_IDS, count), *named} - {None}),
        "add_bos": _flag(metadata, "add_bos_token", model == SENTENCEPIECE),
        "add_eos": _flag(metadata, "add_eos_token", False),
    }


def _types(
    metadata: Mapping[str, Any], model: str, tokens: Sequence[str], named: set[int | None]
) -> npt.NDArray[np.uint8]:
    if model == BYTE_LEVEL and PREFIX + "token_type" not in metadata:
        types = np.full(len(tokens), TokenType.NORMAL, np.uint8)
        types[[i for i in named if i is not None]] = TokenType.CONTROL
        return types
    types = _numbers(metadata, "token_type", len(tokens), "iu")
    known = (types >= min(TokenType)) & (types <= max(TokenType))
    if not known.all():
        at = _first(~known)
        raise TokenizerError(f"tokenizer.ggml.token_type says {types[at]} of token {at}; the types are 1 to 6")
    return types.astype(np.uint8)


def _sentencepiece(metadata: Mapping[str, Any], count: int) -> dict[str, Any]:
    scores = _numbers(metadata, "scores", count, "fiu")
    if not np.isfinite(scores).all():
        raise TokenizerError(f"tokenizer.ggml.scores holds NaN or infinity at token {_first(~np.isfinite(scores))}")
    return {"scores": scores.astype(np.float32), "add_space_prefix": _flag(metadata, "add_space_prefix", True)}


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    from phiquant.text import pretokenizers

    merges = metadata.get(PREFIX + "merges")
    if merges is None:
        raise TokenizerError("the file lacks tokenizer.ggml.merges, which its vocabulary needs; convert it again")
    if not isinstance(merges, list | tuple) or set(map(type, merges)) - {str}:
        raise TokenizerError("tokenizer.ggml.merges must be an array of strings")
    # One space in each, counted all at once: there are 200,000.
    if " ".join(merges).count(" ") != max(2 * len(merges) - 1, 0):
        at = next((i for i, merge in enumerate(merges) if merge.count(" ") != 1), 0)
        raise TokenizerError(f"tokenizer.ggml.merges[{at}] is {merges[at]!r}; a merge is two texts and a space")
    pre = _typed(metadata, "pre", str, "a string")
    notes: tuple[str, ...] = ()
    if pre is None or pre == "default":
        said = "has no" if pre is None else "says 'default' for"
        pre = pretokenizers.recognize(tokens)
        notes = (
            f"the file {said} tokenizer.ggml.pre; {pre!r} is assumed, since its tokens are those of that vocabulary",
        )
    if pre not in pretokenizers.BY_ID:
        known = ", ".join(f"{key!r} ({value.name})" for key, value in pretokenizers.BY_ID.items())
        named = "missing, and the vocabulary is not a known one" if pre is None else repr(pre)
        raise UnsupportedError(
            f"the pre-tokenizer tokenizer.ggml.pre is {named}; this version knows {known}. "
            "If the model's tokenizer cuts words as one of these does, set the key to it"
        )
    value = metadata.get(keys.IGNORE_MERGES, False)
    if type(value) is not bool:
        raise TokenizerError(f"{keys.IGNORE_MERGES} must be true or false")
    return {"merges": merges, "pre": pre, "ignore_merges": value, "notes": notes}


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
        raise TokenizerError(f"the file lacks {PREFIX}{key}, which its vocabulary needs; convert it again")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise TokenizerError(f"{PREFIX}{key} must be an array of numbers")
    if len(array) != count:
        raise TokenizerError(f"{PREFIX}{key} has {len(array)} entries for {count} tokens")
    return array
