"""Callables of a script that have a say in what comes: they see tokens and scores as NumPy arrays."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from phiquant.engine import Sampling
from phiquant.engine.repetition import LARGEST, penalize

__all__ = [
    "Hook",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StoppingCriteria",
    "StoppingCriteriaList",
]

Ids = NDArray[np.intc]
Scores = NDArray[np.single]

LogitsProcessor = Callable[[Ids, Scores], Scores]
"""Gets the tokens so far, int32 [tokens], and scores of the next, float32 [vocabulary], which it may change; gives
scores."""

StoppingCriteria = Callable[[Ids, Scores], bool]
"""Gets the same, the scores as the model gave them, and says whether the text is to end before the next token."""


class LogitsProcessorList(list[LogitsProcessor]):
    """Several, one after the other."""

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        """What they make of scores."""
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(list[StoppingCriteria]):
    """Several; all are asked, and one that says yes is enough."""

    def __call__(self, input_ids: Ids, logits: Scores) -> bool:
        """Whether one says so."""
        answers = [criterion(input_ids, logits) for criterion in self]  # one may count how often it is asked
        return any(answers)


class MinTokensLogitsProcessor:
    """Forbids the end before so many tokens were generated."""

    def __init__(self, min_tokens: int, token_eos: int) -> None:
        self.min_tokens, self.token_eos = min_tokens, token_eos
        self.prompt_tokens: int | None = None

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        """Scores without that of the end, if need be."""
        if self.prompt_tokens is None:
            self.prompt_tokens = len(input_ids)
        if len(input_ids) - self.prompt_tokens < self.min_tokens:
            scores[self.token_eos] = -np.inf
        return scores


class Hook:
    """What happens to the scores of one text before the engine chooses, in llama-cpp-python's order.

    processors: first.
    bias: token -> what is added then.
    penalties: of repetitions, last. They count generated tokens and not those of the prompt, which there is no part of
        what the sampler has seen.
    prompt: how many tokens the prompt has.
    see: is told the position and the scores of every row, as the model gave them.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        bias: dict[int, float],
        penalties: Sampling,
        prompt: int,
        see: Callable[[int, Scores], None] | None,
    ) -> None:
        self._processors, self._bias, self._penalties = processors, bias, penalties
        self._prompt, self._see = prompt, see

    @property
    def idle(self) -> bool:
        """Whether it does nothing at all."""
        s = self._penalties
        penalties = (s.repeat_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0)
        return not (self._processors or self._bias or penalties or self._see)

    def __call__(self, ids: Sequence[int], logits: Scores, /) -> Scores:
        """See `engine.LogitsProcessor`."""
        if self._see is not None:
            self._see(len(ids) - 1, logits)
        scores = logits.copy()
        if self._processors:
            given = np.array(ids, np.intc)
            for processor in self._processors:
                scores = np.asarray(processor(given, scores), np.float32)
            scores = np.minimum(scores, LARGEST)  # one that forces a token gives it infinity
        for token, value in self._bias.items():
            scores[token] += value
        penalize(scores, ids[self._prompt :], self._penalties)
        return scores
