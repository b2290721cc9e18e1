"""How a sequence chooses its tokens: parameters with llama.cpp's names, meaning and defaults, checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from phiquant.errors import RequestError

__all__ = ["CHAIN", "SAMPLERS", "Breaker", "Sampling", "parse_chain"]

CHAIN: Final = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
"""The order of the steps unless another is asked for."""

SAMPLERS: Final = {
    **{name: name for name in CHAIN},
    "typical_p": "typ_p",
    "typical": "typ_p",
    "nucleus": "top_p",
    "temp": "temperature",
}
"""Every name of a step and what it stands for; hyphens may replace underscores."""

Breaker = tuple[int, tuple[int, ...]]
"""A token with which a breaker of repetitions begins, and the tokens that follow to complete it."""


@dataclass(frozen=True)
class Sampling:
    """How to choose.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_k: keep the k likeliest; 0 for all.
        top_p: of these keep the fewest whose probabilities reach this sum; 1 for all.
        min_p: of these keep those at least this fraction as likely as the likeliest.
        repeat_penalty: logits of recent tokens are divided by it (multiplied where not positive); 1 for none.
        seed: of the random choice, from 0 to 2^64 - 1.
        repeat_last_n: how many tokens are recent, for the three penalties; 0 for none, -1 for all.
        presence_penalty: taken from the logits of recent tokens, once each.
        frequency_penalty: the same for each time.
        typical_p: keep those whose surprise is nearest to the mean, until they have this probability; 1 for all.
        top_n_sigma: keep logits within this many standard deviations of the largest; 0 or below for all.
        xtc_probability: how often the likeliest tokens are left out: of those at least `xtc_threshold` likely, all but
            the last.
        xtc_threshold: above 0.5 there are never two.
        dynatemp_range: the temperature is between `temperature` - and + this, by how sure the model is.
        dynatemp_exponent: of the normalised entropy, by which it goes from the one to the other.
        dry_multiplier: 0 for none; else a token that would make a repetition of n tokens longer loses
            multiplier * base^(n - allowed length).
        dry_base, dry_allowed_length: see there; shorter repetitions are free.
        dry_penalty_last_n: how many tokens are looked at; 0 for none, -1 for all.
        dry_breakers: repetitions do not reach across these.
        mirostat: 1 or 2 keep the surprise of the text near `mirostat_tau` and replace all steps but penalties and
            temperature; 0 for none.
        mirostat_tau, mirostat_eta: the aim, in bits, and how fast it is corrected.
        logit_bias: (token, what is added to its logit); -inf forbids it.
        samplers: the steps, in order, by their names in `SAMPLERS`.
        min_tokens: so many tokens come before one that ends the sequence may.

    Raises:
        RequestError: a value that makes no sense.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_breakers: tuple[Breaker, ...] = ()
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    samplers: tuple[str, ...] = CHAIN
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "dynatemp_range", "dynatemp_exponent", "dry_multiplier", "dry_base"):
            self._require(name, "0 or more", 0 <= self._number(name) < math.inf)
        for name in ("top_p", "min_p", "typical_p", "xtc_probability", "xtc_threshold"):
            self._require(name, "from 0 to 1", 0 <= self._number(name) <= 1)
        for name in ("presence_penalty", "frequency_penalty", "top_n_sigma"):
            self._require(name, "a finite number", math.isfinite(self._number(name)))
        for name in ("repeat_penalty", "mirostat_tau", "mirostat_eta"):
            self._require(name, "above 0", 0 < self._number(name) < math.inf)
        for name in ("top_k", "dry_allowed_length", "min_tokens"):
            self._require(name, "0 or more", self._whole(name) and getattr(self, name) >= 0)
        for name in ("repeat_last_n", "dry_penalty_last_n"):
            self._require(name, "-1 or more", self._whole(name) and getattr(self, name) >= -1)
        self._require("mirostat", "0, 1 or 2", self._whole("mirostat") and self.mirostat in (0, 1, 2))
        self._require("seed", "from 0 to 2^64 - 1", self._whole("seed") and 0 <= self.seed < 1 << 64)
        self._require("samplers", f"some of {', '.join(CHAIN)}", set(self.samplers) <= set(CHAIN))
        for token, bias in self.logit_bias:
            good = isinstance(token, int) and token >= 0 and isinstance(bias, int | float) and bias < math.inf
            self._require("logit_bias", "pairs of a token id and a number", good)

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        self._require(name, "a number", isinstance(value, int | float) and not isinstance(value, bool))
        return float(value)

    def _whole(self, name: str) -> bool:
        return isinstance(getattr(self, name), int) and not isinstance(getattr(self, name), bool)

    def _require(self, name: str, expected: str, good: bool) -> None:
        if not good:
            raise RequestError(f"{name} is {getattr(self, name)!r:.80} and must be {expected}")


def parse_chain(names: str | Sequence[str]) -> tuple[str, ...]:
    """The steps of a chain such as "penalties;top_k;temperature". RequestError names one that there is not."""
    found = []
    for name in names.split(";") if isinstance(names, str) else names:
        key = str(name).strip().lower().replace("-", "_")
        if not key:
            continue
        if key not in SAMPLERS:
            raise RequestError(f"there is no sampler {name!r:.60}; there are {', '.join(CHAIN)}")
        found.append(SAMPLERS[key])
    return tuple(found)
