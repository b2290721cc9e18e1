"""Tokens of one text, one after the other, however often the engine is called away to others in between."""

import math
import secrets
from collections.abc import Callable, Iterable, Sequence

from phiquant.compat.llama_cpp.constants import LLAMA_DEFAULT_SEED
from phiquant.compat.llama_cpp.processors import Hook
from phiquant.engine import Drafter, Engine, Sampler, Sampling, TokenLogprob, TokenMask
from phiquant.engine import Sequence as Job

__all__ = ["Generation", "chance", "penalties", "sampling"]

# The order of llama-cpp-python, which has no more steps; penalties come before them, in the hook.
_CHAIN = ("top_k", "typ_p", "top_p", "min_p", "temperature")


class Generation:
    """What is generated after a prompt.

    Between two tokens nothing has to go on: a job that was suspended, because another text was begun, is submitted
    again when somebody asks for its next token, and finds what it had computed in the cache.

    Args:
        engine: computes.
        prompt: token ids.
        chosen: how to choose.
        mask: constrains what comes.
        hook: changes the scores.
        drafters: make guesses for a job.
        limit: most tokens; None for as many as the context holds.
        logprobs: how many alternatives to note for each token; None for no such thing.
        stepwise: compute no token that nobody has asked for yet, so that the caller may put in tokens of his own.

    Attributes:
        ids: prompt, and the tokens that were taken.
        found: log-probabilities of the token that was taken last.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        chosen: Sampling,
        *,
        mask: TokenMask | None = None,
        hook: Hook | None = None,
        drafters: Callable[[], Iterable[Drafter]] = tuple,
        limit: int | None = None,
        logprobs: int | None = None,
        stepwise: bool = False,
    ) -> None:
        self.ids = [int(token) for token in prompt]
        self.found: TokenLogprob | None = None
        self._engine, self._sampling, self._sampler = engine, chosen, Sampler(chosen)
        self._mask, self._hook = mask, None if hook is None or hook.idle else hook
        self._drafters, self._logprobs, self._stepwise = drafters, logprobs, stepwise
        self._left = limit
        self._job: Job | None = None
        engine.check(self._make())

    def take(self) -> int | None:
        """The next token; None if the context is full, or the limit is reached. Raises what went wrong."""
        while True:
            at = len(self.ids)
            if at >= self._engine.context or self._left == 0:
                return None
            job = self._job
            if job is None:
                job = self._job = self._make()
                self._engine.submit(job)
            if at < job.shown:
                break
            if job.ended and job.error is None:  # suspended, or one step of several
                self._job = None
                continue
            self._engine.advance(job, at)
        token = job.ids[at]
        self.found = None if self._logprobs is None else job.found[at - job.prompt_length]
        self.ids.append(token)
        if self._left is not None:
            self._left -= 1
        return token

    def put(self, tokens: Iterable[int]) -> None:
        """Go on after these, which the caller has chosen; only for one that is stepwise."""
        self.ids += [int(token) for token in tokens]
        self.suspend()
        self._job = None

    def suspend(self) -> None:
        """Leave the engine to others; `take` goes on."""
        if self._job is not None:
            self._engine.cancel(self._job)

    def _make(self) -> Job:
        job = Job(
            self.ids,
            self._sampling,
            max_tokens=1 if self._stepwise else self._left,
            mask=self._mask,
            processor=self._hook,
            drafters=() if self._stepwise else self._drafters(),
            logprobs=self._logprobs,
        )
        job.sampler = self._sampler  # mirostat remembers what came before
        return job


def chance(seed: int) -> int:
    """A seed for the engine: the same, or a new one where none was chosen."""
    seed &= 0xFFFFFFFF
    return secrets.randbits(64) if seed == LLAMA_DEFAULT_SEED else seed


def sampling(
    seed: int,
    *,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float,
    temp: float,
    mirostat_mode: int,
    mirostat_tau: float,
    mirostat_eta: float,
) -> Sampling:
    """Parameters of llama-cpp-python as the engine's: values beyond a range mean its end, as there.

    A temperature of 0 takes the likeliest token; below, chance takes any token as the model says. Mirostat ignores it.
    """
    if temp < 0:
        return Sampling(temperature=1.0, samplers=(), seed=seed)
    if temp == 0:
        return Sampling(temperature=0.0, samplers=(), seed=seed)
    if mirostat_mode in (1, 2):
        return Sampling(
            temperature=1.0, mirostat=mirostat_mode, mirostat_tau=mirostat_tau, mirostat_eta=mirostat_eta, seed=seed
        )
    return Sampling(
        temperature=temp,
        top_k=max(0, top_k),
        top_p=_share(top_p),
        min_p=_share(min_p),
        typical_p=_share(typical_p),
        samplers=_CHAIN,
        seed=seed,
    )


def penalties(last_n: int, *, repeat: float, frequency: float, presence: float) -> Sampling:
    """The penalties alone, checked."""
    return Sampling(
        repeat_penalty=repeat, frequency_penalty=frequency, presence_penalty=presence, repeat_last_n=max(-1, last_n)
    )


def _share(value: float) -> float:
    return value if math.isnan(value) else min(max(value, 0.0), 1.0)
