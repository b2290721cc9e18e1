"""How a text is chosen, from options with llama.cpp's names to those of the API."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RequestError
from .failures import WrongUsage

if TYPE_CHECKING:
    from ..completion import Options
    from ..text.grammar import Grammar

__all__ = ["SamplingOptions"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options of `phiquant run` that choose tokens, as they were given; `commands.run` says what they mean."""

    n_predict: int = -1
    ignore_eos: bool = False
    seed: int = -1
    samplers: str | None = None
    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exp: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_lr: float = 0.1
    mirostat_ent: float = 5.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breaker: tuple[str, ...] | None = None
    logit_bias: tuple[str, ...] = ()
    grammar: str | None = None
    grammar_file: Path | None = None
    json_schema: str | None = None
    json_schema_file: Path | None = None

    def sampling(self) -> Options:
        """What `LLM.generate` takes.

        Raises:
            WrongUsage: two constraints, or a bias that cannot be read. GrammarError, RequestError, OSError: a
                constraint that cannot be read.
        """
        options: Options = {
            "max_tokens": None if self.n_predict < 0 else self.n_predict,
            "ignore_eos": self.ignore_eos,
            "seed": None if self.seed < 0 else self.seed,
            "temperature": self.temperature,
            "dynatemp_range": self.dynatemp_range,
            "dynatemp_exponent": self.dynatemp_exp,
            "top_k": max(self.top_k, 0),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "typical_p": self.typical,
            "top_n_sigma": self.top_n_sigma,
            "xtc_probability": self.xtc_probability,
            "xtc_threshold": self.xtc_threshold,
            "mirostat": self.mirostat,
            "mirostat_eta": self.mirostat_lr,
            "mirostat_tau": self.mirostat_ent,
            "repeat_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repeat_last_n": self.repeat_last_n,
            "dry_multiplier": self.dry_multiplier,
            "dry_base": self.dry_base,
            "dry_allowed_length": self.dry_allowed_length,
            "dry_penalty_last_n": self.dry_penalty_last_n,
            "logit_bias": dict(map(_bias, self.logit_bias)),
            "grammar": self._constraint(),
        }
        if self.samplers is not None:
            options["samplers"] = self.samplers
        if self.dry_sequence_breaker is not None:
            options["dry_sequence_breakers"] = _breakers(self.dry_sequence_breaker)
        return options

    def _constraint(self) -> Grammar | None:
        given = {
            "--grammar": self.grammar,
            "--grammar-file": self.grammar_file,
            "--json-schema": self.json_schema,
            "--json-schema-file": self.json_schema_file,
        }
        named = [(name, value) for name, value in given.items() if value is not None]
        if not named:
            return None
        if len(named) > 1:
            raise WrongUsage(f"{named[0][0]} and {named[1][0]} are two constraints; give one")
        from ..text.grammar import Grammar
        from .reading import text_of  # with a progress bar's imports

        name, value = named[0]
        text = text_of(value) if isinstance(value, Path) else value
        return Grammar.json_schema(text) if "json" in name else Grammar("gbnf", text)


def _breakers(given: tuple[str, ...]) -> list[str]:
    r"""As llama-cli has it: the first replaces the usual ones, "none" stands for none, \n and \t may be written so."""
    texts = [text.replace("\\n", "\n").replace("\\t", "\t") for text in given if text != "none"]
    if not all(texts):
        raise RequestError("--dry-sequence-breaker is empty; give a text, or none for no breakers")
    return texts


def _bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d{1,9})([+-](?:\d+\.?\d*|\.\d+|inf))", text.strip())
    if match is None:
        raise WrongUsage(f"--logit-bias takes TOKEN+BIAS or TOKEN-BIAS, such as 15043+1 or 2-inf, not {text!r}")
    return int(match[1]), float(match[2])
