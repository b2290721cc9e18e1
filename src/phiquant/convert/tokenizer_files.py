"""What a checkpoint says of its tokenizer, and the table of tokens that is made of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phiquant.convert.checkpoint import read_json
from phiquant.errors import CheckpointError
from phiquant.text import TokenType
from phiquant.text.pretokenizers import PreTokenizer

__all__ = ["ADDED_SCORE", "Pieces", "TokenizerFiles", "vocabulary_of"]

ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0


@dataclass
class Pieces:
    """A table of tokens under construction: text, score and type by id.

    merges: of a byte-level vocabulary, as GGUF has them; words: how it cuts text, if its files say so; ignore_merges:
    see `phiquant.text.Vocabulary`.
    """

    texts: list[str]
    scores: list[float]
    types: list[TokenType]
    merges: list[str] | None = None
    words: PreTokenizer | None = None
    ignore_merges: bool = False

    @classmethod
    def padding(cls, size: int) -> "Pieces":
        """A table with nothing in it but `[PADi]`."""
        return cls([f"[PAD{i}]" for i in range(size)], [_PADDING_SCORE] * size, [TokenType.UNUSED] * size)

    def put(self, index: int, text: str, score: float, kind: TokenType, source: str) -> None:
        """Overwrite one id; CheckpointError if the model has no such id."""
        if not 0 <= index < len(self.texts):
            raise CheckpointError(
                f"{source} gives token {text!r} the id {index}, but config.json has vocab_size {len(self.texts)}; "
                "take both from the same repository."
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

    @property
    def model(self) -> Mapping[str, Any]:
        """The `model` of tokenizer.json, empty if there is none."""
        model = self.tokenizer.get("model")
        return model if isinstance(model, dict) else {}

    @property
    def tokenizer_class(self) -> str:
        """What tokenizer_config.json calls the tokenizer's class, empty if nothing."""
        name = self.tokenizer_config.get("tokenizer_class")
        return name if isinstance(name, str) else ""


def vocabulary_of(model: Mapping[str, Any]) -> tuple[dict[str, int], list[Any]] | None:
    """Vocabulary and merges of a BPE model in tokenizer.json; None if it is something else."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type", "BPE") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        return None
    for text, index in vocab.items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise CheckpointError(f"tokenizer.json gives token {text!r} the id {index!r}, which is no id.")
    return vocab, merges
