"""What a checkpoint says of its tokenizer, and the table of tokens that is made of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phiquant.convert.checkpoint import read_json
from phiquant.errors import CheckpointError
from phiquant.text import TokenType
from phiquant.text.pretokenizers import PreTokenizer

__all__ = ["ADDED_SCORE", "Pieces", "TokenizerFiles", "ids_of", "merge_of", "steps_of", "vocabulary_of"]

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
    return ids_of(vocab, "tokenizer.json"), merges


def ids_of(vocab: Mapping[str, Any], source: str) -> dict[str, int]:
    """Ids by text, of a file; CheckpointError for what is no id."""
    for text, index in vocab.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise CheckpointError(f"{source} gives token {text!r} the id {index!r}, which is no id; download it again.")
    return dict(vocab)


def merge_of(item: object) -> tuple[str, str]:
    """The two parts of a merge, which is "left right" or [left, right]."""
    parts = item.split(" ") if isinstance(item, str) else item
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(f"the tokenizer lists {item!r} as a merge; a merge has two parts.")
    return parts[0], parts[1]


def steps_of(step: object) -> Iterator[Mapping[str, Any]]:
    """A step of tokenizer.json's pipeline, or each of a sequence of them."""
    if not isinstance(step, dict):
        return
    if step.get("type") != "Sequence":
        yield step
        return
    for name in ("pretokenizers", "decoders", "processors"):
        parts = step.get(name)
        for part in parts if isinstance(parts, list) else []:
            yield from steps_of(part)
