"""SentencePiece vocabularies, from tokenizer.model or, where that is absent, from tokenizer.json.

A checkpoint with tokenizer.json alone gets scores from the order of its merges.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from phiquant.convert.tokenizer_files import Pieces, TokenizerFiles, merge_of, vocabulary_of
from phiquant.errors import CheckpointError, UnsupportedError
from phiquant.text import TokenType

__all__ = ["from_pieces"]


def from_pieces(files: TokenizerFiles, vocab_size: int) -> Pieces:
    """The table of a SentencePiece vocabulary, without added tokens."""
    model = files.directory / "tokenizer.model"
    if model.is_file():
        pieces = _from_sentencepiece(model, vocab_size)
        _compare(pieces, files)
        return pieces
    if files.tokenizer:
        return _from_tokenizer_json(files.model, vocab_size)
    raise CheckpointError(f"{files.directory} has neither tokenizer.model nor tokenizer.json; download one of them.")


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


def _compare(pieces: Pieces, files: TokenizerFiles) -> None:
    """CheckpointError where tokenizer.json, which transformers would run, names another piece than tokenizer.model."""
    found = vocabulary_of(files.model)
    for text, index in found[0].items() if found is not None else ():
        if 0 <= index < len(pieces.texts) and pieces.types[index] is not TokenType.UNUSED:
            if pieces.texts[index] != text:
                raise CheckpointError(
                    f"tokenizer.model names token {index} {pieces.texts[index]!r} and tokenizer.json {text!r}: "
                    "they are of two vocabularies; delete the one that the model was not trained with."
                )


def _from_tokenizer_json(model: Mapping[str, Any], vocab_size: int) -> Pieces:
    """Texts by id; the score of a piece is minus the place of its merges among all merges.

    SentencePiece merges the adjacent pair whose joined piece scores highest, tokenizer.json the pair that is listed
    first. Both do the same when all merges into one piece stand together, which holds for every tokenizer.json that was
    made from a SentencePiece model; otherwise no scores exist and the file is refused.
    """
    found = vocabulary_of(model)
    if found is None:
        raise UnsupportedError("tokenizer.json holds no BPE model with a vocabulary and merges; Phi's does.")
    vocab, merges = found
    if not model.get("byte_fallback"):
        raise UnsupportedError(
            "tokenizer.json holds a vocabulary that is neither made from SentencePiece nor byte-level; Phi's are."
        )
    pieces = Pieces.padding(vocab_size)
    order = [piece for piece, _ in groupby("".join(merge_of(merge)) for merge in merges)]
    scores = {piece: -float(place) for place, piece in enumerate(order)}
    if len(scores) != len(order):
        raise UnsupportedError(
            "tokenizer.json orders its merges in a way that no scores express; add the checkpoint's tokenizer.model."
        )
    unmerged = -float(len(order))
    for text, index in vocab.items():
        kind, score = TokenType.NORMAL, scores.get(text, unmerged)
        if text == model.get("unk_token"):
            kind, score = TokenType.UNKNOWN, 0.0
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind, score = TokenType.BYTE, 0.0
        pieces.put(index, text, score, kind, "tokenizer.json")
    return pieces
