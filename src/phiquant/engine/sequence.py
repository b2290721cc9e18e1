"""One text being computed: its tokens, how far the cache has got, and how it ends."""

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.cache import PageTable
from phiquant.engine.draft import Drafter, Odds
from phiquant.engine.logprobs import TokenLogprob
from phiquant.engine.sampler import LogitsProcessor, Sampler, TokenMask
from phiquant.engine.sampling import Sampling
from phiquant.errors import RequestError

__all__ = ["Finish", "Sequence"]

Finish = Literal["stop", "length", "cancelled"]


class Sequence:
    """A prompt and what is generated after it; the engine alone changes it.

    Attributes:
        ids: prompt, then generated tokens.
        prompt_length: how many of them are the prompt.
        shown: how many of them other threads may look at: whether the last of these ends it has been decided.
        max_tokens: generate at most this many; None for as many as the context holds.
        sampling: None for a sequence whose rows are wanted and that is not continued.
        sampler: chooses by it; None without it.
        end_ids: tokens that end it.
        mask: constrains what comes.
        processor: changes the logits that tokens are chosen from, before the sampler sees them.
        hidden: the rows that are wanted are hidden states after the last norm, not logits.
        logits: float32 [prompt, vocabulary], allocated by the engine; only without `sampling` and without `sink`.
        sink: is given rows as they are computed instead: position of the first row, and rows that are valid during
            the call. Positions before `first` are left out.
        first: see there; it grows as rows are given.
        hold: as long as it is set, nothing of it is computed, and others may have its place; whoever takes its rows
            sets it to keep up.
        reuse: take over what earlier sequences that began alike left in the cache.
        logprobs: how many alternatives to note with the log-probability of each generated token; None to note nothing.
        found: what was noted.
        listener: is called with the sequence, by the thread that computes, whenever tokens came or it ended. It must
            not wait for anything.
        cancelled: somebody asked for its end, and the engine is going to hear of it.
        computed: tokens whose keys and values are in the cache.
        shared: tokens that were taken from earlier sequences when it began.
        table: its pages; None while it waits.
        finish: why it ended: "stop" (an end token), "length" (max_tokens or the context), "cancelled"; None before.
        error: what went wrong with it; it has ended then.
        drafters: each with the odds of its guesses; the first that has a guess is asked.
        draft: tokens guessed to follow `ids`, computed with the last of them; `odds` of whoever guessed them.
        drafted, accepted: how many tokens were guessed so far, and how many of them were right.
        arrival: its place among all sequences of the engine.
        submitted, begun, first_token, last_token: when that was, in seconds of `time.perf_counter`; 0 before.
    """

    def __init__(
        self,
        prompt: Iterable[int],
        sampling: Sampling | None,
        *,
        max_tokens: int | None = None,
        end_ids: frozenset[int] = frozenset(),
        mask: TokenMask | None = None,
        processor: LogitsProcessor | None = None,
        drafters: Iterable[Drafter] = (),
        logprobs: int | None = None,
        reuse: bool = True,
        hidden: bool = False,
        sink: Callable[[int, NDArray[np.float32]], None] | None = None,
        first: int = 0,
        listener: "Callable[[Sequence], None] | None" = None,
    ) -> None:
        self.ids = [int(i) for i in prompt]
        self.prompt_length = self.shown = len(self.ids)
        if not self.ids:
            raise RequestError("the prompt is empty; give at least one token")
        if max_tokens is not None and not _is_count(max_tokens, 1):
            raise RequestError(f"max_tokens is {max_tokens!r:.80} and must be at least 1")
        self.max_tokens, self.sampling, self.end_ids = max_tokens, sampling, end_ids
        self.mask, self.processor = mask, processor
        if logprobs is not None and not _is_count(logprobs, 0):
            raise RequestError(f"logprobs is {logprobs!r:.80} and must be 0 or more")
        self.logprobs, self.found = logprobs, list[TokenLogprob]()
        self.sampler = None if sampling is None else Sampler(sampling)
        self.hidden, self.reuse = hidden, reuse
        self.logits: NDArray[np.float32] | None = None
        self.sink, self.first, self.hold = sink, first, False
        self.listener, self.cancelled = listener, False
        self.computed = self.shared = 0
        self.table: PageTable | None = None
        self.finish: Finish | None = None
        self.error: Exception | None = None
        self.drafters = [(drafter, Odds()) for drafter in drafters]
        self.draft: tuple[int, ...] = ()
        self.odds: Odds | None = None
        self.drafted = self.accepted = 0
        self.arrival = 0
        self.submitted = self.begun = self.first_token = self.last_token = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.finish is not None or self.error is not None

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.ids) - self.computed

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.ids[self.prompt_length :]

    @property
    def wants_all_logits(self) -> bool:
        """Whether the rows of every token (from `first` on) are wanted, not the logits of the last."""
        return self.sampling is None


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
