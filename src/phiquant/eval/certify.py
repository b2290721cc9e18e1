"""Certification: a file's predictions beside those of transformers on the checkpoint that it was made from.

A model is read at the lengths where it changes its ways. With LongRoPE a sequence of exactly the original context (the
short factors) and one that is longer (the long factors, for all of it); with a sliding window one that is longer than
the window. Divergence is given for ranges of positions, which such a border always divides.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, RequestError
from .measure import Base, Block
from .rows import compare
from .statistics import Divergence

__all__ = ["Borders", "Certificate", "Part", "Range", "certify", "compared", "default_text", "lengths"]

_EDGES: Final = (256, 1024, 4096, 16384, 65536)
_LEAST: Final = 1024  # tokens of the longest sequence, if the model has so many
_BEYOND: Final = 256  # tokens beyond a border
_LONG_ROPE: Final = ("longrope", "su", "yarn")  # names of one thing, as Phi's configurations came to have them


@dataclass(frozen=True)
class Borders:
    """Lengths at which a model changes its ways, in tokens.

    Attributes:
        context: most tokens of a sequence.
        original: up to which LongRoPE has the short factors; 0 without it.
        window: how many tokens attention sees; 0 if all.
    """

    context: int
    original: int = 0
    window: int = 0

    @classmethod
    def of_checkpoint(cls, folder: Path) -> "Borders":
        """From config.json. CheckpointError if it cannot be read."""
        path = folder / "config.json"
        try:
            return cls._of(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(
                f"{folder} is no checkpoint: config.json cannot be read ({error.strerror})"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} does not tell max_position_embeddings, rope_scaling and sliding_window as a model of this "
                "family has them; fetch the checkpoint again"
            ) from error

    @classmethod
    def _of(cls, config: Mapping[str, Any]) -> "Borders":
        context = int(config["max_position_embeddings"])
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        original = 0
        if (rope.get("rope_type") or rope.get("type")) in _LONG_ROPE:
            found = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
            original = int(found or 0)
        window = int(config.get("sliding_window") or 0)
        return cls(context, original if original < context else 0, window if window < context else 0)


@dataclass(frozen=True)
class Range:
    """Divergence at positions `start` to `stop` - 1."""

    start: int
    stop: int
    divergence: Divergence


@dataclass(frozen=True)
class Part:
    """One sequence: its tokens, LongRoPE's factors for it ("short", "long", or none), ranges, and all together."""

    tokens: int
    factors: str | None
    ranges: tuple[Range, ...]
    divergence: Divergence


@dataclass(frozen=True)
class Certificate:
    """What was found.

    Attributes:
        about: names and versions, for the reader.
        borders: of the model.
        parts: one for each sequence.
        divergence: over all positions of all sequences.
    """

    about: Mapping[str, str]
    borders: Borders
    parts: tuple[Part, ...]
    divergence: Divergence

    def json(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def rows(self) -> Iterator[tuple[str, str, Divergence]]:
        """Sequence, positions and divergence, for a table; the last row is the whole."""
        for part in self.parts:
            name = f"{part.tokens} tokens" + (f", {part.factors} factors" if part.factors else "")
            for found in part.ranges:
                yield name, f"{found.start} to {found.stop - 1}", found.divergence
                name = ""
        yield "all", "", self.divergence

    def markdown(self) -> str:
        """As a page."""
        lines = [f"# {self.about['checkpoint']}: phiquant beside transformers", ""]
        lines += [f"- {name}: {value}" for name, value in self.about.items()]
        lines += [
            "",
            "Divergence of next-token distributions from those of transformers in float32, nats per token.",
            "",
            "| sequence | positions | mean KL | largest | same top token |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {sequence} | {positions} | {d.mean:.1e} | {d.maximum:.1e} | {100 * d.top1:.2f} % |"
            for sequence, positions, d in self.rows()
        ]
        return "\n".join([*lines, ""])


def default_text() -> str:
    """What is read unless another text is given: the beginnings of three English novels, 64 KB."""
    return (resources.files(__package__) / "text.txt").read_text(encoding="utf-8")


def lengths(borders: Borders, longest: int | None = None) -> tuple[int, ...]:
    """Tokens of the sequences that show a model at its borders; the last has `longest`, by default what that takes.

    RequestError if that is more than the context.
    """
    if longest is None:
        wanted = [_LEAST, *(border + _BEYOND for border in (borders.original, borders.window) if border)]
        longest = min(max(wanted), borders.context)
    if not 0 < longest <= borders.context:
        raise RequestError(f"a sequence of {longest} tokens does not fit the context of {borders.context}")
    if borders.original and longest > borders.original:
        return borders.original, longest
    return (longest,)


def compared(
    base: Base, blocks: Iterator[Block], tokens: Sequence[int]
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Of each sequence, divergence and whether the likeliest token is the same, at all of its positions.

    RequestError if the vocabularies are not of one size, or a position is missing.
    """
    values = [np.full(count, np.nan) for count in tokens]
    same = [np.zeros(count, np.bool_) for count in tokens]
    for index, position, logits in blocks:
        rows = base.take(index, position, len(logits))
        if base.vocabulary != logits.shape[1]:
            raise RequestError(
                f"the checkpoint has {base.vocabulary} tokens and the file {logits.shape[1]}; they cannot be compared"
            )
        found = compare(rows, logits)
        at = slice(position, position + len(logits))
        values[index][at], same[index][at] = found.divergence, found.same
    if any(np.isnan(each).any() for each in values):
        raise RequestError("the model gave no logits for some positions")
    return list(zip(values, same, strict=True))


def certify(
    about: Mapping[str, str],
    borders: Borders,
    found: Sequence[tuple[NDArray[np.float64], NDArray[np.bool_]]],
) -> Certificate:
    """The certificate for what `compared` gave."""
    parts = []
    for values, same in found:
        length = len(values)
        edges = sorted({0, length, *(e for e in (*_EDGES, borders.original, borders.window) if 0 < e < length)})
        ranges = tuple(
            Range(start, stop, Divergence.of(values[start:stop], same[start:stop]))
            for start, stop in itertools.pairwise(edges)
        )
        factors = None if not borders.original else "short" if length <= borders.original else "long"
        parts.append(Part(length, factors, ranges, Divergence.of(values, same)))
    whole = Divergence.of(np.concatenate([v for v, _ in found]), np.concatenate([s for _, s in found]))
    return Certificate(about, borders, tuple(parts), whole)
