"""Drafts by llama-cpp-python's names: whatever guesses tokens, what comes out is the same, only sooner.

Without a `draft_model` the engine guesses from what the text repeats, where that pays.
"""

import abc
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.speed import mean

__all__ = ["Drafts", "LlamaDraftModel", "LlamaPromptLookupDecoding"]


class LlamaDraftModel(abc.ABC):
    """Guesses what follows."""

    @abc.abstractmethod
    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: Any) -> NDArray[np.intc]:
        """Tokens that may follow `input_ids`; none if there is no clue."""


class LlamaPromptLookupDecoding(LlamaDraftModel):
    """Guesses that what followed the last tokens the first time they came follows again.

    max_ngram_size: most tokens that must be the same; fewer are tried if these came only once.
    num_pred_tokens: most tokens of a guess.
    """

    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        self.max_ngram_size, self.num_pred_tokens = max_ngram_size, num_pred_tokens

    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: Any) -> NDArray[np.intc]:
        """See `LlamaDraftModel`."""
        length = len(input_ids)
        for size in range(min(self.max_ngram_size, length - 1), 0, -1):
            same = np.ones(length - size, bool)  # where the last `size` tokens also begin
            for i in range(size):
                same &= input_ids[i : length - size + i] == input_ids[length - size + i]
            if same.any():
                begin = int(same.argmax()) + size
                return input_ids[begin : begin + self.num_pred_tokens]
        return np.empty(0, np.intc)


class Drafts:
    """Such a model as the engine's `Drafter`."""

    def __init__(self, model: LlamaDraftModel, vocabulary: int) -> None:
        self._model, self._vocabulary = model, vocabulary
        self.seconds = 0.0

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """At most `most` tokens; what is no token ends them."""
        begin = time.perf_counter()
        guessed = np.asarray(self._model(np.array(ids, np.intc)), np.int64).reshape(-1)[:most]
        self.seconds = mean(self.seconds, time.perf_counter() - begin)
        bad = np.flatnonzero((guessed < 0) | (guessed >= self._vocabulary))
        found: list[int] = guessed[: bad[0] if len(bad) else len(guessed)].tolist()
        return found
