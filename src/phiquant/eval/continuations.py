"""Texts that two models make of the same prompt, and where they part."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from ..completion import Completion, Options, TokenLogprob
from ..errors import RequestError
from ..llm import LLM

__all__ = ["Candidate", "Continuation", "Parting", "continued", "parting", "text_parting"]

_KEPT: Final = 20  # likeliest tokens of every place
_SHOWN: Final = 5  # of each model, where they part


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt.

    Attributes:
        prompt: token ids of the prompt.
        ids: generated tokens, an end token included.
        pieces: the text of each of them; together they are the text.
        places: of each of them the model's likeliest tokens with their log-probabilities, best first, before sampling.
        names: how tokens in `places` read.
        finish_reason: "stop" or "length", as `Completion` has it.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    places: tuple[TokenLogprob, ...]
    names: dict[int, str]
    finish_reason: str

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Candidate:
    """A token where two texts part, and how likely both models find it, 0 to 1.

    None: less likely than the 20 likeliest of that model.
    """

    token: int
    text: str
    left: float | None
    right: float | None


@dataclass(frozen=True)
class Parting:
    """Where two texts part.

    Attributes:
        tokens: how many are the same before.
        left, right: the tokens that come there; None where the text is at its end.
        candidates: the likeliest tokens there of both models.
    """

    tokens: int
    left: int | None
    right: int | None
    candidates: tuple[Candidate, ...]


def continued(
    llm: LLM,
    prompt: Sequence[int],
    advanced: Callable[[int], None] = lambda tokens: None,
    options: Options | None = None,
) -> Continuation:
    """Continue a prompt; `advanced` is told how many tokens there are. Errors as `LLM.generate`."""
    count = 0
    found: Completion | None = None
    chosen: Options = {**(options or {}), "logprobs": _KEPT}
    with closing(llm.generate([*prompt], stream=True, **chosen)) as chunks:  # type: ignore[type-var]
        for chunk in chunks:
            count += len(chunk.ids)
            advanced(count)
            found = chunk.completion or found
    if found is None or found.logprobs is None:
        raise RequestError("the model gave no text")
    stream = llm.tokenizer.stream(continuation=llm.tokenizer.continues(prompt))
    pieces = [stream.push(token) for token in found.ids]
    if pieces:
        pieces[-1] += stream.finish()
    named = {token for place in found.logprobs for token in (place.token, *(token for token, _ in place.top))}
    names = {token: llm.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in named}
    return Continuation(tuple(prompt), found.ids, tuple(pieces), found.logprobs, names, found.finish_reason)


def parting(left: Continuation, right: Continuation) -> Parting | None:
    """Where two continuations of the same token ids part; None if they do not."""
    if left.ids == right.ids:
        return None
    same = _common(left.ids, right.ids)
    places = [one.places[same] if same < len(one.places) else None for one in (left, right)]
    wanted: list[int] = []
    for place in places:
        if place is not None:
            wanted += [place.token, *(token for token, _ in place.top[:_SHOWN])]
    found = [
        Candidate(token, {**right.names, **left.names}[token], *(_probability(place, token) for place in places))
        for token in dict.fromkeys(wanted)
    ]
    found.sort(key=lambda c: (-max(c.left or 0, c.right or 0), c.token))
    tokens = [None if place is None else place.token for place in places]
    return Parting(same, tokens[0], tokens[1], tuple(found))


def text_parting(left: str, right: str) -> int | None:
    """How many characters two texts have in common at the beginning; None if they are the same."""
    return None if left == right else _common(left, right)


def _common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many items are the same at the beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))


def _probability(place: TokenLogprob | None, token: int) -> float | None:
    if place is None:
        return None
    if place.token == token:
        return math.exp(place.logprob)
    return next((math.exp(log) for known, log in place.top if known == token), None)
