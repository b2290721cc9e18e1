"""A mix in a file: TOML, to be read, edited and used again.

version = 1
budget = "2.2GB"                        what it was made for; everything but version and types may be left out
text = "calibration.txt"
predicted = 0.0123                      nats, as `Mix` has them
measured = 0.0127

[types]
"token_embd.weight" = "Q5_K"            # 90,310,656 bytes, 0.0041 nats
...
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from phiquant.calibrate.candidates import Weighted
from phiquant.calibrate.mix import Mix, weight_bytes
from phiquant.convert.filetypes import parse_tensor_type
from phiquant.errors import PhiquantError, RequestError
from phiquant.gguf import GGMLType
from phiquant.gguf.output import OutputFile

__all__ = ["PlanFile"]

_VERSION: Final = 1
_MAX_BYTES: Final = 1 << 24
_MAX_TEXT: Final = 1 << 12


@dataclass(frozen=True)
class PlanFile:
    """A mix, and what it was made for: the budget as it was written, and the text that it was measured on."""

    mix: Mix
    budget: str = ""
    text: str = ""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. RequestError, which names it and the place, if it cannot be read or is not such a plan."""
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            reason = getattr(error, "strerror", None) or str(error)
            raise RequestError(f"--plan {path} cannot be read: {reason}.") from error
        try:
            if len(data) > _MAX_BYTES:
                raise RequestError("it is too large")
            return cls.parse(data.decode())
        except (PhiquantError, ValueError, RecursionError) as error:
            reason = "it is not text" if isinstance(error, UnicodeDecodeError) else str(error).rstrip(".")
            raise RequestError(f"--plan {path} is not a plan that can be used: {reason}.") from error

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of a file; RequestError, ValueError or TypeNameError if it is not such a plan."""
        table = tomllib.loads(text)
        known = {"version": int, "budget": str, "text": str, "predicted": float, "measured": float, "types": dict}
        for key, value in table.items():
            if key not in known:
                raise RequestError(f"there is no setting {key!r}{_nearest(key, known)}")
            if not isinstance(value, known[key]) or isinstance(value, bool):
                raise RequestError(f"{key} is {str(value)[:60]!r} and must be a {_WORDS[known[key]]}")
            if isinstance(value, str) and len(value) > _MAX_TEXT:
                raise RequestError(f"{key} is too long")
        if table.get("version") != _VERSION:
            raise RequestError(f"it has to say `version = {_VERSION}`; a later version of phiquant may have made it")
        types = {name: _type(name, value) for name, value in table.get("types", {}).items()}
        if not types:
            raise RequestError("it has no [types]")
        mix = Mix(types, {}, table.get("predicted"), table.get("measured"))
        return cls(mix, table.get("budget", ""), table.get("text", ""))

    def matching(self, weights: Sequence[Weighted], others: Iterable[str]) -> Mapping[str, GGMLType]:
        """The types of a model's weights, all of them.

        `others`: names of its tensors that get no type. RequestError for what is no weight, is missing, or has rows
        that do not divide into the type's blocks.
        """
        types, names = self.mix.types, {weight.tensor.name for weight in weights}
        kept = set(others)
        for name in types:
            if name in kept:
                raise RequestError(f"the plan has a type for {name}, which stays as it is; remove the line")
            if name not in names:
                raise RequestError(
                    f"the plan has a type for {name[:80]!r}, and the model has no such weight{_nearest(name, names)}"
                )
        for weight in weights:
            name, columns = weight.tensor.name, weight.tensor.shape[-1]
            kind = types.get(name)
            if kind is None:
                missing = len(names - types.keys())
                raise RequestError(f"the plan has no type for {name} ({missing} of {len(names)} weights are missing)")
            if columns % kind.block_elements:
                fitting = [k.name for k in GGMLType if k in _USUAL and columns % k.block_elements == 0]
                raise RequestError(
                    f"{name} cannot be {kind.name}: its rows of {columns} do not divide into blocks of "
                    f"{kind.block_elements}; {', '.join(fitting)} are possible"
                )
        return types

    def written(self, weights: Sequence[Weighted]) -> str:
        """The text of a file; with bytes and predicted divergences beside the weights."""
        mix = self.mix
        lines = [
            "# A type for every weight; change them at will. `phiquant quantize IN OUT --plan FILE` uses them.",
            f"version = {_VERSION}",
        ]
        given = {"budget": self.budget, "text": self.text}
        lines += [f"{key} = {_quoted(value)}" for key, value in given.items() if value]
        figures = {"predicted": mix.predicted, "measured": mix.measured}
        lines += [f"{key} = {value:.6e}  # nats" for key, value in figures.items() if value is not None]
        lines += ["", "[types]"]
        for weight in weights:
            name = weight.tensor.name
            kind = mix.types[name]
            cost = f", {mix.costs[name]:.2e} nats" if name in mix.costs else ""
            lines.append(f"{_quoted(name)} = {_quoted(kind.name)}  # {weight_bytes(weight, kind):,} bytes{cost}")
        return "\n".join(lines) + "\n"

    def write(self, path: Path, weights: Sequence[Weighted], protect: Iterable[Path] = ()) -> None:
        """Write a file, under a temporary name until it is whole; OutputError if that is impossible."""
        data = self.written(weights).encode()
        file = OutputFile(path, overwrite=True, protect=protect)
        try:
            file.begin(len(data))
            file.put(memoryview(data), 0)
            file.commit()
        finally:
            file.abort()


_USUAL: Final = (GGMLType.F16, GGMLType.Q8_0, GGMLType.Q5_0, GGMLType.Q4_0, GGMLType.IQ4_NL)
_WORDS: Final = {int: "whole number", str: "text", float: "number with a point", dict: "table"}


def _type(name: str, value: Any) -> GGMLType:
    if not isinstance(value, str) or len(value) > 80:
        raise RequestError(f"the type of {name[:80]} is {str(value)[:60]!r} and must be a name such as 'Q4_K'")
    return parse_tensor_type(value)


def _quoted(text: str) -> str:
    """A basic string of TOML, which JSON's are but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""
