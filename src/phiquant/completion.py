"""What a request may say and what comes back: options, counts, timings, and the text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

from phiquant.engine import Finish, TokenMask

__all__ = ["Completion", "CompletionChunk", "Options", "Timings", "Usage"]


class Options(TypedDict, total=False):
    """Keyword arguments that `LLM.generate` and `LLM.chat` share; `LLM.generate` explains them."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int | None
    stop: str | Iterable[str]
    mask: TokenMask | None
    ignore_eos: bool


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

    `drafted` tokens were guessed, `accepted` of them were right.
    """

    prompt_seconds: float
    decode_seconds: float
    prompt_per_second: float
    decode_per_second: float
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Completion:
    """What was generated.

    Attributes:
        text: without special tokens, and cut where a stop string begins.
        ids: all generated tokens, an end token or those of a stop string included.
        finish_reason: "stop" (the model ended, or a stop string came), "length" (max_tokens, or the context is full).
        usage: token counts.
        timings: seconds and speeds.
        seed: with it the same request gives the same text.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: Finish
    usage: Usage
    timings: Timings
    seed: int


@dataclass(frozen=True)
class CompletionChunk:
    """A piece of a streamed completion: its text (whole characters, may be empty) and its tokens.

    `completion` is None but in the last chunk, where it is the whole.
    """

    text: str
    ids: tuple[int, ...]
    completion: Completion | None = None
