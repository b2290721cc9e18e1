"""The options of mixes; apart, because a file type is all that most quantizations need, and no engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phiquant.convert import Options, Target, parse_tensor_type
from phiquant.convert.entries import Entry
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType

__all__ = ["DEFAULT_TOKENS", "Choice", "MixOptions"]

DEFAULT_TOKENS: Final = 1536
"""Three chunks, tokens of one being drawn at random."""


@dataclass(frozen=True)
class Choice:
    """What types weights get, by a file type and the options that choose types; what the metadata says of it."""

    target: Target
    recipe: Options
    entries: Sequence[Entry] = ()


@dataclass(frozen=True)
class MixOptions:
    """The options of mixes as they are written."""

    budget: str | None = None
    plan: Path | None = None
    plan_only: bool = False
    save_plan: Path | None = None
    reader: str = "llama.cpp"
    mix_types: str | None = None
    sensitivity_tokens: int = DEFAULT_TOKENS

    @property
    def wanted(self) -> bool:
        """Whether types come from a mix, not from a file type."""
        return self.budget is not None or self.plan is not None

    def check(self) -> None:
        """Before anything is read: RequestError for options that make no sense together."""
        if self.budget is not None and self.plan is not None:
            raise RequestError("--budget finds a mix and --plan reads one; choose one of them.")
        for name, given in (
            ("--plan-only", self.plan_only),
            ("--save-plan", self.save_plan is not None),
            ("--mix-types", self.mix_types is not None),
        ):
            if given and self.budget is None:
                raise RequestError(f"{name} belongs to a mix that is found for a size; pass --budget SIZE, too.")
        if self.sensitivity_tokens < 1:
            raise RequestError(f"--sensitivity-tokens is {self.sensitivity_tokens} and must be at least 1.")

    def types(self) -> frozenset[GGMLType]:
        """The types that a mix may have. RequestError, UnsupportedError or TypeNameError if they make no sense."""
        from phiquant.calibrate.candidates import reader_types  # loads the engine, which quantizing does without

        names = [] if self.mix_types is None else self.mix_types.split(",")
        return reader_types(self.reader, [parse_tensor_type(name) for name in names])
