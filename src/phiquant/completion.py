"""What a request may say and what comes back: options, counts, timings, text, and embeddings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from phiquant.engine import Finish, TokenLogprob, TokenMask
from phiquant.text.grammar import Grammar

__all__ = ["Completion", "CompletionChunk", "Embeddings", "Options", "Timings", "TokenLogprob", "Usage"]


class Options(TypedDict, total=False):
    """Keywords of `generate` and `chat`: what they mean is what llama.cpp means by them. All may be left out.

    How much:
        max_tokens: generate at most this many; None for as many as the context holds.
        min_tokens: so many tokens come before one that ends the text may.
        stop: texts that end the text and are not part of it.
        stop_ids: tokens that end it, besides those of the model.
        ignore_eos: the model's own end tokens never come.

    What may come:
        grammar: a `Grammar` that the text follows: a JSON schema, a regular expression, Lark or GBNF.
        mask: any other constraint, an `engine.TokenMask` made for this text alone.
        logit_bias: token id -> what is added to its logit; -inf forbids it.

    Chance:
        seed: of chance, from 0 to 2^64 - 1; None for a new one, which the Completion tells.
        temperature: 0 always takes the likeliest token; above, logits are divided by it. Default 0.8.
        dynatemp_range, dynatemp_exponent: the temperature is between it - and + the range, by how sure the model is.
        top_k: only the k likeliest tokens; 0 for all. Default 40.
        top_p: of these the fewest whose probabilities sum up to this. Default 0.95.
        min_p: of these the ones at least this fraction as likely as the likeliest. Default 0.05.
        typical_p: those whose surprise is nearest to the mean, until they have this probability; 1 for all.
        top_n_sigma: logits within this many standard deviations of the largest; 0 or below for all.
        xtc_probability, xtc_threshold: how often all but the last of the tokens at least so likely are left out.
        mirostat, mirostat_tau, mirostat_eta: 1 or 2 keep the surprise near tau bits, corrected at the rate eta.
        samplers: the steps in order, such as ("penalties", "top_k", "temperature") or "penalties;top_k;temperature".

    Repetition:
        repeat_penalty: above 1 makes recent tokens less likely.
        presence_penalty, frequency_penalty: taken from their logits, once, or for each time they came.
        repeat_last_n: how many tokens are recent; 0 for none, -1 for all. Default 64.
        dry_multiplier: 0 for none; else tokens that would make a repetition longer lose
            multiplier * base^(length - allowed length).
        dry_base, dry_allowed_length, dry_penalty_last_n: see there; how many tokens are looked at, -1 for all.
        dry_sequence_breakers: texts that repetitions do not reach across; by default line ends, ":", '"' and "*".

    Besides:
        logprobs: how many alternatives to tell, with log-probabilities, for every token; None for no such thing.
        cache_prompt: take over what was computed for earlier texts that began alike. Default True.
    """

    max_tokens: int | None
    min_tokens: int
    stop: str | Iterable[str]
    stop_ids: Iterable[int]
    ignore_eos: bool
    grammar: Grammar | None
    mask: TokenMask | None
    logit_bias: Mapping[int, float]
    seed: int | None
    temperature: float
    dynatemp_range: float
    dynatemp_exponent: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    samplers: str | Sequence[str]
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    repeat_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Iterable[str]
    logprobs: int | None
    cache_prompt: bool


@dataclass(frozen=True)
class Usage:
    """How many tokens: of the prompt, of these taken from earlier work instead of computed, and generated."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds, and tokens per second, of the prompt (up to the first token) and of what came after it.

    `drafted` tokens were guessed, `accepted` of them were right. `queue_seconds` were spent waiting before.
    """

    prompt_seconds: float
    decode_seconds: float
    prompt_per_second: float
    decode_per_second: float
    drafted: int = 0
    accepted: int = 0
    queue_seconds: float = 0.0


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        text: without special tokens, and cut where a stop text begins.
        ids: all generated tokens, an end token or those of a stop text included.
        finish_reason: "stop" (the model ended, or a stop text came), "length" (max_tokens, or the context is full),
            "cancelled" (somebody ended it from outside).
        usage: token counts.
        timings: seconds and speeds.
        seed: with it the same request gives the same text.
        stop: the stop text that ended it, if one did.
        logprobs: of each of `ids`, if they were asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: Finish
    usage: Usage
    timings: Timings
    seed: int
    stop: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class CompletionChunk:
    """A piece of a streamed completion: its text (whole characters, may be empty) and its tokens.

    `completion` is None but in the last chunk, where it is the whole. `logprobs` are those of `ids`, if asked for.
    """

    text: str
    ids: tuple[int, ...]
    completion: Completion | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What texts mean to the model, as vectors of length 1.

    Attributes:
        vectors: float32 [texts, width]; without pooling [tokens of all texts, width], text after text.
        tokens: how many tokens each text has.
        usage: token counts.
    """

    vectors: NDArray[np.float32]
    tokens: tuple[int, ...]
    usage: Usage
