"""From what a caller asks to a sequence of the engine, and from its tokens back to text."""

import difflib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import numpy as np

from phiquant.completion import Completion, CompletionChunk, Options, Timings, TokenLogprob, Usage
from phiquant.engine import Drafter, Finish, Sampling, parse_chain
from phiquant.engine import Sequence as Job
from phiquant.errors import RequestError
from phiquant.text import Message, StopStrings, Tokenizer, chat
from phiquant.text.breakers import BREAKERS, breakers
from phiquant.text.grammar import Constraints, Grammar

__all__ = ["Prompt", "Request", "Requests", "prompts_of"]

Prompt = str | Sequence[int]

# Options that Sampling has under the same name, as they are.
_PLAIN: Final = (
    *("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "presence_penalty"),
    *("frequency_penalty", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "dynatemp_range"),
    *("dynatemp_exponent", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "mirostat"),
    *("mirostat_tau", "mirostat_eta", "min_tokens"),
)
_KNOWN: Final = frozenset(Options.__annotations__)
_OWN: Final = ("messages", "bos_token", "eos_token", "tokenizer")  # what a template's arguments must not be called
MOST_STOPS: Final = 256
LONGEST_STOP: Final = 1024  # characters
MOST_CHOICES: Final = 128


class Request:
    """One text that is being generated: its sequence, and the text of its tokens as far as they have come.

    Attributes:
        job: the engine's sequence.
        seed: of its chance.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job, seed: int, stop: Iterable[str]) -> None:
        self.job, self.seed = job, seed
        self._stops = StopStrings(stop)
        self._stream = tokenizer.stream(continuation=tokenizer.continues(job.ids))
        self._pieces: list[str] = []
        self._used = job.prompt_length  # tokens that became text; a step that guessed right may have brought more
        self.completion: Completion | None = None

    @property
    def seen(self) -> int:
        """Tokens that `pull` has seen, those of the prompt included."""
        return self._used

    @property
    def has_stops(self) -> bool:
        """Whether its text may end it."""
        return self._stops.has_any

    def pull(self) -> CompletionChunk | None:
        """The next piece: one token, or the end; None if it has not come yet, or after the end.

        Raises what went wrong with the sequence, once all that came before has been pulled.
        """
        job = self.job
        if self.completion is not None:
            return None
        there = job.shown
        ended = job.ended  # after the tokens: those that are shown have had their say in it
        if ended:
            there = len(job.ids)
        new = tuple(job.ids[self._used : min(self._used + 1, there)])
        if not new and not ended:
            return None
        if not new and job.error is not None:
            raise job.error
        self._used += len(new)
        written = [token for token in new if token not in job.end_ids]  # some vocabularies have a text for end tokens
        text, done = self._stops.push("".join(map(self._stream.push, written)))
        if ended and job.error is None and self._used == there and not done:
            rest, done = self._stops.push(self._stream.finish())
            text += rest if done else rest + self._stops.finish()
            done = True
        self._pieces.append(text)
        logprobs = self._logprobs(self._used - len(new), self._used)
        if done:
            self.completion = self._whole()
        return CompletionChunk(text, new, self.completion, logprobs)

    def _logprobs(self, start: int, stop: int) -> tuple[TokenLogprob, ...] | None:
        job = self.job
        if job.logprobs is None:
            return None
        return tuple(job.found[start - job.prompt_length : stop - job.prompt_length])

    def _whole(self) -> Completion:
        job, stopped = self.job, self._stops.stopped
        finish: Finish = "stop" if stopped is not None else job.finish or "cancelled"
        ids = tuple(job.ids[job.prompt_length : self._used])
        prompt_seconds = job.first_token - job.begun if job.first_token else 0.0
        decode_seconds = job.last_token - job.first_token
        timings = Timings(
            prompt_seconds=prompt_seconds,
            decode_seconds=decode_seconds,
            prompt_per_second=_speed(job.prompt_length - job.shared, prompt_seconds),
            decode_per_second=_speed(len(job.ids) - job.prompt_length - 1, decode_seconds),
            drafted=job.drafted,
            accepted=job.accepted,
            queue_seconds=max(job.begun - job.submitted, 0.0) if job.begun else 0.0,
        )
        return Completion(
            text="".join(self._pieces),
            ids=ids,
            finish_reason=finish,
            usage=Usage(job.prompt_length, job.shared, len(ids)),
            timings=timings,
            seed=self.seed,
            stop=stopped,
            logprobs=self._logprobs(job.prompt_length, self._used),
        )


class Requests:
    """Makes requests for one tokenizer; safe to share between threads.

    `vocabulary`: width of the model's logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self.tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._constraints = Constraints(tokenizer)
        self._breakers = lru_cache(16)(lambda texts: breakers(tokenizer, texts))

    def make(
        self, prompt: Prompt, options: Options, *, count: int = 1, drafters: Callable[[], Iterable[Drafter]] = tuple
    ) -> list[Request]:
        """Requests for `count` texts after one prompt, with the seeds seed, seed + 1 and so on.

        Raises:
            TypeError: there is no such option.
            RequestError: an option makes no sense. GrammarError: the grammar cannot be used.
        """
        _check_names(options)
        if not _is_whole(count) or not 1 <= count <= MOST_CHOICES:
            raise RequestError(f"n is {count!r:.80} and must be from 1 to {MOST_CHOICES}")
        grammar, mask = options.get("grammar"), options.get("mask")
        if grammar is not None and not isinstance(grammar, Grammar):
            raise RequestError(f"grammar is of type {type(grammar).__name__} and must be a Grammar")
        if mask is not None and (grammar is not None or count > 1):
            raise RequestError("a mask is for one text, and beside a grammar there is none; give a grammar alone")
        seed = options.get("seed")
        sampling = self._sampling(options, secrets.randbits(64) if seed is None else seed)
        ids = self.ids(prompt)
        stops, ends = _stops(options.get("stop", ())), self._ends(options)
        found = []
        for i in range(count):
            chosen = replace(sampling, seed=(sampling.seed + i) % (1 << 64)) if i else sampling
            job = Job(
                ids,
                chosen,
                max_tokens=options.get("max_tokens"),
                end_ids=ends,
                mask=mask if grammar is None else self._constraints.constraint(grammar),
                drafters=drafters(),
                logprobs=options.get("logprobs"),
                reuse=options.get("cache_prompt", True),
            )
            found.append(Request(self.tokenizer, job, chosen.seed, stops))
        return found

    def ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: of a text, in which special tokens are parsed, or as they are given."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            good = all(int(i) == i for i in prompt)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise RequestError("a prompt is a text or a list of token ids")
        return [int(i) for i in prompt]

    def chat_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation by the model's template."""
        extra = dict(template_arguments or {})
        for name in extra:
            if name in _OWN or not isinstance(name, str):
                raise RequestError(f"template_arguments must not have {name!r:.80}, which is set by other means")
        if tools:
            extra["tools"] = list(tools)
        return chat.encode(self.tokenizer, messages, **extra)

    def _ends(self, options: Options) -> frozenset[int]:
        try:
            stop_ids = frozenset(options.get("stop_ids", ()))
        except TypeError:
            raise RequestError("stop_ids must be token ids") from None
        for token in stop_ids:
            if not _is_whole(token) or not 0 <= token < self._vocabulary:
                raise RequestError(f"stop_ids has {token!r:.80}, which is no token id below {self._vocabulary}")
        return stop_ids if options.get("ignore_eos", False) else stop_ids | self.tokenizer.eog_ids

    def _sampling(self, options: Options, seed: int) -> Sampling:
        given: dict[str, Any] = {name: value for name, value in options.items() if name in _PLAIN}
        bias = self._bias(options.get("logit_bias", {}))
        if options.get("ignore_eos", False):
            bias |= {token: -math.inf for token in self.tokenizer.eog_ids if token < self._vocabulary}
        samplers = options.get("samplers")
        if samplers is not None:
            given["samplers"] = parse_chain(samplers)
        if options.get("dry_multiplier", 0):
            texts = options.get("dry_sequence_breakers", BREAKERS)
            if isinstance(texts, str):
                raise RequestError("dry_sequence_breakers must be a list of texts")
            texts = tuple(texts)
            if not all(isinstance(text, str) for text in texts):
                raise RequestError("dry_sequence_breakers must be a list of texts")
            given["dry_breakers"] = self._breakers(texts)
        return Sampling(**given, seed=seed, logit_bias=tuple(sorted(bias.items())))

    def _bias(self, given: Mapping[int, float]) -> dict[int, float]:
        if not isinstance(given, Mapping):
            raise RequestError("logit_bias must be an object: token id -> number")
        for token, value in given.items():
            if not _is_whole(token) or not 0 <= token < self._vocabulary:
                raise RequestError(f"logit_bias names {token!r:.80}, which is no token id below {self._vocabulary}")
            if not isinstance(value, int | float) or math.isnan(value):
                raise RequestError(f"logit_bias of token {token} is {value!r:.80} and must be a number")
        return dict(given)


def prompts_of(prompt: Prompt | Sequence[Prompt]) -> list[Prompt] | None:
    """The prompts of a batch; None if it is a single prompt."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or len(prompt) == 0:
        return None
    return list(prompt) if isinstance(prompt[0], str | Sequence | np.ndarray) else None  # type: ignore[arg-type]


def _check_names(options: Mapping[str, object]) -> None:
    for name in options:
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=1)
            raise TypeError(f"there is no option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))


def _stops(stop: str | Iterable[str] | None) -> list[str]:
    found = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(text, str) for text in found):
        raise RequestError("stop must be a text or a list of texts")
    if len(found) > MOST_STOPS:
        raise RequestError(f"stop has {len(found)} texts; {MOST_STOPS} are the most")
    if any(len(text) > LONGEST_STOP for text in found):
        raise RequestError(f"a text of stop is too long; {LONGEST_STOP:,} characters are the most")
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _speed(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
