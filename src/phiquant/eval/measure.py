"""Reading windows of a text with a model and scoring it, on its own or beside a base.

Nothing is held that grows with the vocabulary times the length: rows of logits are scored as they come, and a few
numbers are kept of each.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from .kl import LogitsSource
from .rows import Distributions, LogitRows, compare, losses
from .saved import SavedWriter
from .statistics import Comparison, Perplexity
from .windows import Windows

__all__ = ["Base", "Block", "Done", "Measurement", "RowsBase", "StreamingSource", "stream"]

Block = tuple[int, int, NDArray[np.float32]]
"""Index of a window, position of the first row, rows of logits."""


@runtime_checkable
class StreamingSource(Protocol):
    """A model that gives logits of many sequences as they are computed; `phiquant.LLM` is one."""

    def stream_logits(self, sequences: Iterable[Sequence[int]], *, first: int = 0) -> Iterator[Block]:
        """As `LLM.stream_logits`."""
        ...


class Base(Protocol):
    """What a model is compared with."""

    @property
    def vocabulary(self) -> int | None:
        """Tokens that it knows; None before it is known."""
        ...

    def take(self, window: int, position: int, count: int) -> Distributions:
        """Distributions of `count` positions of a window, asked for in the order in which a model computes them."""
        ...


class RowsBase:
    """A base whose logits come as a stream, in the same order as they are asked for, or nearly."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self.vocabulary: int | None = None
        self._blocks = blocks
        self._early: dict[int, Block] = {}  # by window: what came before it was asked for

    def take(self, window: int, position: int, count: int) -> LogitRows:
        """Distributions of `count` positions. RequestError if the stream ends before them."""
        parts: list[NDArray[np.float32]] = []
        while count:
            found = self._early.pop(window, None)
            while found is None or found[0] != window:
                found = next(self._blocks, None)
                if found is None:
                    raise RequestError(f"the base has no logits of position {position} of window {window + 1}")
                if found[0] != window:
                    self._keep(*found)
            _, start, rows = found
            if start != position:
                raise RequestError(f"the base gives position {start} of window {window + 1} where {position} is due")
            if len(rows) > count:
                self._early[window] = (window, start + count, rows[count:])
                rows = rows[:count]
            parts.append(rows)
            position += len(rows)
            count -= len(rows)
        self.vocabulary = parts[0].shape[1]
        return LogitRows(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _keep(self, window: int, position: int, rows: NDArray[np.float32]) -> None:
        before = self._early.get(window)
        joined = (window, position, rows) if before is None else (window, before[1], np.concatenate([before[2], rows]))
        self._early[window] = joined


@dataclass(frozen=True)
class Done:
    """How far a measurement is.

    Attributes:
        windows: how many are read whole.
        positions: how many are scored.
        perplexity: of these; `base` that of the base, and `divergence` the mean from it, if there is one.
    """

    windows: int
    positions: int
    perplexity: float
    base: float | None = None
    divergence: float | None = None


class Measurement:
    """One reading of a text: `run` it, then take `perplexity`, and `comparison` if there is a base.

    Args:
        model: what predicts; `StreamingSource`s read several windows at once and hold no whole one.
        windows: what it reads.
        base: what it is compared with.
        save: is given the logits.
    """

    def __init__(
        self, model: LogitsSource, windows: Windows, *, base: Base | None = None, save: SavedWriter | None = None
    ) -> None:
        self._model, self._windows, self._base, self._save = model, windows, base, save
        shape = (len(windows), windows.scored)
        self._losses = np.full(shape, np.nan)
        self._base_losses, self._divergences = (np.full(shape if base else (0, 0), np.nan) for _ in range(2))
        self._same = np.zeros(shape if base else (0, 0), np.bool_)

    def run(self) -> Iterator[Done]:
        """Read and score; how far it is after each block of rows. Raises what the model raises."""
        windows, base = self._windows, self._base
        scored = np.zeros(len(windows), np.int64)
        sums, count, whole = [0.0, 0.0, 0.0], 0, 0
        for window, position, logits in stream(self._model, (windows.read(w) for w in range(len(windows))), windows):
            rows = slice(position - windows.first, position - windows.first + len(logits))
            targets = windows.targets(window, position, position + len(logits))
            if base is None:
                self._losses[window, rows] = losses(logits, targets)
            else:
                found = compare(self._matching(base, window, position, logits), logits, targets)
                self._divergences[window, rows], self._same[window, rows] = found.divergence, found.same
                self._losses[window, rows], self._base_losses[window, rows] = found.losses, found.base_losses
                sums[1] += found.base_losses.sum()
                sums[2] += found.divergence.sum()
            sums[0] += self._losses[window, rows].sum()
            if self._save is not None:
                self._save.add(window, position, logits)
            scored[window] += len(logits)
            count += len(logits)
            while whole < len(windows) and scored[whole] == windows.scored:
                whole += 1
            beside = (math.exp(sums[1] / count), sums[2] / count) if base is not None else (None, None)
            yield Done(whole, count, math.exp(sums[0] / count), *beside)

    @property
    def perplexity(self) -> Perplexity:
        """Of all positions."""
        return Perplexity.of(self._losses.reshape(-1))

    @property
    def comparison(self) -> Comparison:
        """Of all positions; only with a base."""
        return Comparison.of(
            self._losses.reshape(-1),
            self._base_losses.reshape(-1),
            self._divergences.reshape(-1),
            self._same.reshape(-1),
        )

    @property
    def by_position(self) -> NDArray[np.float64]:
        """Mean divergence of each scored position of a window, over all windows; only with a base."""
        mean: NDArray[np.float64] = self._divergences.mean(axis=0)
        return mean

    def running(self, windows: int) -> Perplexity:
        """Of the first windows, which have been read."""
        return Perplexity.of(self._losses[:windows].reshape(-1))

    @staticmethod
    def _matching(base: Base, window: int, position: int, logits: NDArray[np.float32]) -> Distributions:
        rows = base.take(window, position, len(logits))
        if base.vocabulary != logits.shape[1]:
            raise RequestError(
                f"the base has a vocabulary of {base.vocabulary} tokens and the model one of {logits.shape[1]}; "
                "they cannot be compared"
            )
        return rows


def stream(model: LogitsSource, sequences: Iterable[NDArray[np.int32]], windows: Windows) -> Iterator[Block]:
    """Logits of the scored positions of windows, as the model computes them."""
    last = windows.size - 1  # predicts what comes after the window
    if isinstance(model, StreamingSource):
        blocks = model.stream_logits((ids.tolist() for ids in sequences), first=windows.first)
    else:
        blocks = ((i, windows.first, model.logits(ids.tolist())[windows.first :]) for i, ids in enumerate(sequences))
    for window, position, rows in blocks:
        rows = rows[: last - position]
        if len(rows):
            yield window, position, rows
