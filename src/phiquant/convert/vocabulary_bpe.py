"""Byte-level BPE vocabularies, as llama.cpp's converter writes them: tokens, merges, and a name for how words are cut.

They come from tokenizer.json; in older checkpoints from vocab.json and merges.txt; in Phi-3-small from a file of
tiktoken, which ranks tokens and has no merges, so that they are found by splitting each token with the better ones.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from phiquant.convert.checkpoint import read_json, read_text
from phiquant.convert.tokenizer_files import Pieces, TokenizerFiles, ids_of, merge_of, steps_of, vocabulary_of
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.text import AddedToken, TokenType, alphabet, pretokenizers

__all__ = ["added_by_class", "from_bytes", "is_byte_level"]

_CLASSES = re.compile(r"(GPT2|CodeGen)Tokenizer(Fast)?|Phi3SmallTokenizer")
_PHI3_SMALL = "Phi3SmallTokenizer"
_TIKTOKEN = "cl100k_base.tiktoken"


def is_byte_level(files: TokenizerFiles) -> bool:
    """Whether the checkpoint's vocabulary is byte-level; CheckpointError where its files contradict each other."""
    by_class = _CLASSES.fullmatch(files.tokenizer_class) is not None
    has_pieces = (files.directory / "tokenizer.model").is_file()
    if not files.tokenizer:
        if by_class and has_pieces:
            raise _two_kinds(f"tokenizer_config.json says {files.tokenizer_class}", "tokenizer.model")
        has_bytes = any((files.directory / name).is_file() for name in ("vocab.json", _TIKTOKEN))
        return by_class or (has_bytes and not has_pieces)
    parts = (files.tokenizer.get("pre_tokenizer"), files.tokenizer.get("decoder"))
    by_file = not files.model.get("byte_fallback") and any(
        step.get("type") == "ByteLevel" for part in parts for step in steps_of(part)
    )
    if by_file and has_pieces:
        raise _two_kinds("tokenizer.json", "tokenizer.model")
    if by_class and not by_file:
        raise _two_kinds(f"tokenizer_config.json says {files.tokenizer_class}", "tokenizer.json")
    return by_file


def _two_kinds(byte_level: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{byte_level}, which is byte-level, but {other} is not; they are of two vocabularies: delete what the model "
        "was not trained with, or take all files from the same repository."
    )


def from_bytes(files: TokenizerFiles, vocab_size: int) -> Pieces:
    """The table of a byte-level vocabulary, without added tokens."""
    if files.tokenizer:
        return _from_tokenizer_json(files, vocab_size)
    vocab = read_json(files.directory / "vocab.json")
    if vocab is not None:
        return _from_vocab_json(files.directory, vocab, vocab_size)
    ranks = read_text(files.directory / _TIKTOKEN)
    if ranks is not None:
        return _from_tiktoken(ranks, vocab_size)
    raise CheckpointError(
        f"{files.directory} has neither tokenizer.json nor vocab.json with merges.txt nor {_TIKTOKEN}; "
        "download one of them."
    )


def added_by_class(files: TokenizerFiles) -> list[AddedToken]:
    """The special tokens of Phi-3-small, which are named in its Python code and in none of its files."""
    if files.tokenizer_class != _PHI3_SMALL or files.tokenizer:
        return []
    named = {
        100257: "<|endoftext|>",
        100258: "<|fim_prefix|>",
        100259: "<|fim_middle|>",
        100260: "<|fim_suffix|>",
        100261: "<|system|>",
        100262: "<|user|>",
        100263: "<|assistant|>",
        100264: "<|dummy_id_0|>",
        100265: "<|dummy_id_1|>",
        100266: "<|end|>",
        100256: "<|dummy_id_2|>",
        **{100267 + i: f"<|dummy_id_{3 + i}|>" for i in range(9)},
        100276: "<|endofprompt|>",
        **{100277 + i: f"<|dummy_id_{12 + i}|>" for i in range(75)},
    }
    return [AddedToken(index, text, special=True) for index, text in sorted(named.items())]


def _from_tokenizer_json(files: TokenizerFiles, vocab_size: int) -> Pieces:
    found = vocabulary_of(files.model)
    if found is None:
        raise UnsupportedError("tokenizer.json holds no BPE model with a vocabulary and merges; Phi's does.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if files.model.get(name):
            raise UnsupportedError(f"tokenizer.json sets {name} to {files.model[name]!r}, which no Phi model does.")
    if files.tokenizer.get("normalizer") is not None:
        raise UnsupportedError("tokenizer.json normalizes text before it cuts it into words, which no Phi model does.")
    vocab, listed = found
    merges = [_merge(item) for item in listed]
    pieces = _table(vocab, merges, vocab_size, "tokenizer.json")
    pieces.words = _words(files.tokenizer.get("pre_tokenizer"))
    pieces.ignore_merges = files.model.get("ignore_merges") is True
    return pieces


def _from_vocab_json(directory: Path, vocab: Mapping[str, Any], vocab_size: int) -> Pieces:
    text = read_text(directory / "merges.txt")
    if text is None:
        raise CheckpointError(f"{directory} has vocab.json but no merges.txt; download it, or tokenizer.json.")
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
    return _table(ids_of(vocab, "vocab.json"), [_merge(line.strip("\r")) for line in lines], vocab_size, "vocab.json")


def _from_tiktoken(text: str, vocab_size: int) -> Pieces:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(filter(None, text.splitlines()), 1):
        parts = line.split()
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError, IndexError) as exc:
            raise CheckpointError(f"{_TIKTOKEN}, line {number}, is no token with a rank; download it again.") from exc
        ranks[token] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{_TIKTOKEN} does not rank its {len(ranks)} tokens from 0 on; download it again.")
    merges = _merges_of(ranks)
    vocab = {alphabet.spell(token): rank for token, rank in ranks.items()}
    pieces = _table(vocab, merges, vocab_size, _TIKTOKEN)
    pieces.words = pretokenizers.CL100K
    # tiktoken looks for the whole word first, which only matters for a token that no merges lead to.
    pieces.ignore_merges = len(merges) < sum(len(token) > 1 for token in ranks)
    return pieces


def _merges_of(ranks: Mapping[bytes, int]) -> list[str]:
    """The last merge of every token: what is left of it once better ranked tokens have been merged, if that is two."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            better = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(better)
            if best >= rank:
                break
            at = better.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(alphabet.spell, parts)))
    return merges


def _table(vocab: Mapping[str, int], merges: list[str], vocab_size: int, source: str) -> Pieces:
    missing = [byte for character, byte in alphabet.BYTES.items() if character not in vocab]
    if missing:
        raise UnsupportedError(
            f"{source} has no token for {len(missing)} of the 256 bytes, the first is {missing[0]:#04x}; "
            "byte-level vocabularies have all."
        )
    for merge in merges:
        if merge.replace(" ", "", 1) not in vocab:
            raise CheckpointError(f"{source} has no token for what the merge {merge!r} makes; download it again.")
    pieces = Pieces.padding(vocab_size)
    for text, index in vocab.items():
        pieces.put(index, text, 0.0, TokenType.NORMAL, source)
    pieces.merges = merges
    return pieces


def _merge(item: object) -> str:
    """A merge as GGUF has it, "left right"; a space within a part is written as the alphabet does."""
    return " ".join(part.replace(" ", alphabet.CHARACTERS[0x20]) for part in merge_of(item))


def _words(step: object) -> pretokenizers.PreTokenizer:
    """How text is cut, by tokenizer.json's `pre_tokenizer`: a Split and a ByteLevel step, or the latter alone."""
    patterns = []
    for part in steps_of(step):
        kind = part.get("type")
        if kind == "ByteLevel":
            if part.get("add_prefix_space"):
                raise UnsupportedError("tokenizer.json puts a space before every text, which no byte-level Phi does.")
            if part.get("use_regex", True):
                patterns.append(pretokenizers.GPT2.pattern)
        elif kind == "Split" and isinstance(part.get("pattern"), dict):
            patterns.append(str(part["pattern"].get("Regex")))
        else:
            patterns.append(f"a step of type {kind}")
    known = pretokenizers.by_pattern(patterns[0]) if len(patterns) == 1 else None
    if known is None:
        names = ", ".join(dict.fromkeys(each.name for each in pretokenizers.BY_ID.values()))
        raise UnsupportedError(
            f"tokenizer.json cuts text into words by a rule that this version does not know ({patterns}); "
            f"it knows those of {names}. Take tokenizer.json from the model's first publisher."
        )
    return known
