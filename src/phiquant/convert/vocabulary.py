"""The keys `tokenizer.*`: tokens, scores and types of a SentencePiece vocabulary, special ids, chat templates.

Pieces come from tokenizer.model; a checkpoint with tokenizer.json alone gets scores from the order of its merges. Ids
without a piece are filled with `[PADi]` of type UNUSED, and added tokens overwrite pieces, as in llama.cpp's converter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from phiquant.convert.checkpoint import read_json
from phiquant.convert.entries import Entry, boolean, string, strings, uint32
from phiquant.convert.templates import chat_templates, template_keys
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.gguf import ValueType, keys
from phiquant.text import AddedToken, TokenType, added_tokens_from_hf, added_tokens_to_json

__all__ = ["Pieces", "TokenizerFiles", "build_pieces", "strips_whitespace", "tokenizer_keys"]


_PADDING_SCORE = -10000.0
_ADDED_SCORE = -1000.0
_SPECIALS = {  # Hugging Face's names, in written order
    "bos": keys.BOS_ID,
    "eos": keys.EOS_ID,
    "unk": keys.UNKNOWN_ID,
    "sep": keys.SEPARATOR_ID,
    "pad": keys.PADDING_ID,
    "cls": keys.CLS_ID,
    "mask": keys.MASK_ID,
}
_FLAGS = {"bos": keys.ADD_BOS, "eos": keys.ADD_EOS}
_TURN_ENDS = ("<|end|>", "<|im_end|>")


@dataclass
class Pieces:
    """A table of tokens under construction: text, score and type by id."""

    texts: list[str]
    scores: list[float]
    types: list[TokenType]

    @classmethod
    def padding(cls, size: int) -> "Pieces":
        """A table with nothing in it but `[PADi]`."""
        return cls([f"[PAD{i}]" for i in range(size)], [_PADDING_SCORE] * size, [TokenType.UNUSED] * size)

    def put(self, index: int, text: str, score: float, kind: TokenType, source: str) -> None:
        """Overwrite one id; CheckpointError if the model has no such id."""
        if not 0 <= index < len(self.texts):
            raise CheckpointError(
                f"{source} gives token {text!r} the id {index}, but config.json has vocab_size {len(self.texts)}."
            )
        self.texts[index], self.scores[index], self.types[index] = text, score, kind


@dataclass(frozen=True)
class TokenizerFiles:
    """The JSON files that describe a tokenizer; an absent file is an empty object."""

    directory: Path
    config: Mapping[str, Any]  # config.json
    tokenizer_config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    generation: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any]) -> "TokenizerFiles":
        """Read them from a checkpoint's directory."""
        names = ("tokenizer_config.json", "tokenizer.json", "generation_config.json")
        return cls(directory, config, *(read_json(directory / name) or {} for name in names))


def tokenizer_keys(files: TokenizerFiles, vocab_size: int) -> list[Entry]:
    """Every key `tokenizer.*`, then those of our own for what GGUF has no key."""
    pieces = build_pieces(files, vocab_size)
    added = _added_tokens(files, pieces)
    for token in added:
        kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        pieces.put(token.id, token.content, _ADDED_SCORE, kind, "tokenizer_config.json or tokenizer.json")
    ends = _end_ids(files, vocab_size)
    entries = [
        string(keys.TOKENIZER_MODEL, "llama"),
        string(keys.TOKENIZER_PRE, "default"),
        strings(keys.TOKENS, pieces.texts),
        Entry(keys.SCORES, ValueType.ARRAY, np.array(pieces.scores, np.float32), ValueType.FLOAT32),
        Entry(keys.TOKEN_TYPE, ValueType.ARRAY, np.array(pieces.types, np.int32), ValueType.INT32),
        *_special_keys(files, {token.content: token.id for token in added}, pieces, ends),
        *template_keys(chat_templates(files.directory, files.tokenizer_config)),
    ]
    if added:
        entries.append(string(keys.ADDED_TOKENS, added_tokens_to_json(added)))
    if ends:
        entries.append(Entry(keys.END_IDS, ValueType.ARRAY, np.array(ends, np.uint32), ValueType.UINT32))
    return entries


def strips_whitespace(files: TokenizerFiles) -> bool:
    """Whether the tokens of a chat, as Phi-3's, swallow the whitespace that follows them."""
    added = added_tokens_from_hf(files.tokenizer_config, files.tokenizer)
    return any(token.rstrip and token.special and token.content.startswith("<|") for token in added)


def build_pieces(files: TokenizerFiles, vocab_size: int) -> Pieces:
    """The table with the tokens of added_tokens.json, without those of tokenizer_config.json and tokenizer.json."""
    kind = files.tokenizer_config.get("tokenizer_class")
    model = files.directory / "tokenizer.model"
    if isinstance(kind, str) and kind.startswith("GPT2Tokenizer"):
        raise UnsupportedError(
            "Byte-level BPE vocabularies (phi-4, Phi-4-mini) are not supported by this version; Phi-3 and Phi-3.5 are."
        )
    if model.is_file():
        pieces = _from_sentencepiece(model, vocab_size)
    elif files.tokenizer:
        pieces = _from_tokenizer_json(files.tokenizer, vocab_size)
    else:
        raise CheckpointError(
            f"{files.directory} has neither tokenizer.model nor tokenizer.json; download one of them."
        )
    listed = read_json(files.directory / "added_tokens.json") or {}
    for text, index in listed.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise CheckpointError(f"added_tokens.json gives token {text!r} the id {index!r}, which is no id.")
        if index < vocab_size:  # others are ignored by llama.cpp, too
            pieces.put(index, text, _ADDED_SCORE, TokenType.USER_DEFINED, "added_tokens.json")
    return pieces


def _from_sentencepiece(path: Path, vocab_size: int) -> Pieces:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as exc:
        raise CheckpointError(f"{path} is not a SentencePiece model; download it again.") from exc
    pieces = Pieces.padding(vocab_size)
    for index in range(model.vocab_size()):
        kind = TokenType.NORMAL
        if model.is_unknown(index):
            kind = TokenType.UNKNOWN
        elif model.is_control(index):
            kind = TokenType.CONTROL
        elif model.is_unused(index):
            kind = TokenType.UNUSED
        elif model.is_byte(index):
            kind = TokenType.BYTE
        pieces.put(index, model.id_to_piece(index), model.get_score(index), kind, path.name)
    return pieces


def _from_tokenizer_json(tokenizer: Mapping[str, Any], vocab_size: int) -> Pieces:
    """Texts by id; the score of a piece is minus the place of its merges among all merges.

    SentencePiece merges the adjacent pair whose joined piece scores highest, tokenizer.json the pair that is listed
    first. Both do the same when all merges into one piece stand together, which holds for every tokenizer.json that was
    made from a SentencePiece model; otherwise no scores exist and the file is refused.
    """
    model = tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        raise UnsupportedError("tokenizer.json holds no BPE model with a vocabulary and merges; Phi-3's does.")
    if not model.get("byte_fallback"):
        raise UnsupportedError(
            "tokenizer.json holds a byte-level vocabulary, not one made from SentencePiece; Phi-3's is made so."
        )
    pieces = Pieces.padding(vocab_size)
    order = [piece for piece, _ in groupby(_joined(merge) for merge in merges)]
    scores = {piece: -float(place) for place, piece in enumerate(order)}
    if len(scores) != len(order):
        raise UnsupportedError(
            "tokenizer.json orders its merges in a way that no scores express; add the checkpoint's tokenizer.model."
        )
    unmerged = -float(len(order))
    for text, index in vocab.items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise CheckpointError(f"tokenizer.json gives token {text!r} the id {index!r}, which is no id.")
        kind, score = TokenType.NORMAL, scores.get(text, unmerged)
        if text == model.get("unk_token"):
            kind, score = TokenType.UNKNOWN, 0.0
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind, score = TokenType.BYTE, 0.0
        pieces.put(index, text, score, kind, "tokenizer.json")
    return pieces


def _joined(merge: object) -> str:
    """The piece that a merge makes; merges are "left right" or [left, right]."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"tokenizer.json lists {merge!r} as a merge; a merge has two parts.")
    return "".join(parts)


def _added_tokens(files: TokenizerFiles, pieces: Pieces) -> list[AddedToken]:
    """Added tokens with their attributes; those that only added_tokens.json has, with none."""
    added = added_tokens_from_hf(files.tokenizer_config, files.tokenizer)
    known = {token.id for token in added}
    only_listed = (i for i, kind in enumerate(pieces.types) if kind is TokenType.USER_DEFINED and i not in known)
    return sorted([*added, *(AddedToken(i, pieces.texts[i]) for i in only_listed)], key=lambda token: token.id)


def _special_keys(files: TokenizerFiles, added: Mapping[str, int], pieces: Pieces, ends: list[int]) -> list[Entry]:
    config = files.tokenizer_config
    ids: dict[str, int] = {}
    for name in _SPECIALS:
        text = config.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        found = added.get(text) if isinstance(text, str) else None
        if found is None:
            found = files.config.get(f"{name}_token_id")
        if isinstance(found, list) and found:  # several ends of turn: the first is the end of text
            found = found[0]
        if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(pieces.texts):
            ids[name] = found
    entries = [uint32(_SPECIALS[name], value) for name, value in ids.items()]
    turn_ends = sorted((i for i in ends if i != ids.get("eos")), key=lambda i: pieces.texts[i] not in _TURN_ENDS)
    if turn_ends:
        entries.append(uint32(keys.EOT_ID, turn_ends[0]))
    flags = {
        name: config[f"add_{name}_token"]
        for name in ("bos", "eos")
        if isinstance(config.get(f"add_{name}_token"), bool)
    }
    flags |= _post_processor_flags(files)
    return entries + [boolean(_FLAGS[name], value) for name, value in flags.items()]


def _post_processor_flags(files: TokenizerFiles) -> dict[str, bool]:
    """Whether tokenizer.json's TemplateProcessing puts bos first or eos last; it overrules tokenizer_config.json."""
    outer = files.tokenizer.get("post_processor")
    if not isinstance(outer, dict):
        return {}
    flags: dict[str, bool] = {}
    for processor in outer.get("processors", [outer]):
        single = processor.get("single") if isinstance(processor, dict) else None
        if processor.get("type") != "TemplateProcessing" or not isinstance(single, list) or len(single) < 2:
            continue
        for name, item in (("bos", single[0]), ("eos", single[-1])):
            special = item.get("SpecialToken") if isinstance(item, dict) else None
            if isinstance(special, dict):
                text = files.tokenizer_config.get(f"{name}_token")
                flags[name] = special.get("id") == (text.get("content") if isinstance(text, dict) else text)
    return flags


def _end_ids(files: TokenizerFiles, vocab_size: int) -> list[int]:
    """The ids that end a turn by generation_config.json (one or a list), else by config.json."""
    value = files.generation.get("eos_token_id", files.config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for index in ids:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < vocab_size:
            raise CheckpointError(
                f"generation_config.json or config.json: eos_token_id {index!r} is not an id below {vocab_size}."
            )
    return list(dict.fromkeys(ids))
