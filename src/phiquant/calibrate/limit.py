"""How large a file may be, as users write it: 2.2GB, 900 MiB, 4.25bpw, 30%."""

import re
from dataclasses import dataclass
from math import prod
from typing import Final, Self

from phiquant.convert.plan import Plan, padded
from phiquant.errors import RequestError

__all__ = ["Limit"]

_UNITS: Final = {
    "": 1,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
}
_WRITTEN: Final = re.compile(r"([0-9]{1,18}(?:[.][0-9]{1,18})?) ?([a-z]{0,5}|%)", re.ASCII)


@dataclass(frozen=True)
class Limit:
    """A size: `number` bytes (`unit` empty), bits of tensor data for each parameter (bpw), or percent of the source."""

    number: float
    unit: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a size; RequestError if it is none."""
        match = _WRITTEN.fullmatch(text.strip().lower())
        number, unit = (float(match[1]), match[2]) if match else (0.0, "")
        if number <= 0 or not (unit in _UNITS or unit in ("bpw", "%")):
            raise RequestError(
                f"--budget takes a size such as 2.2GB, 900MiB, 4.25bpw (bits per weight) or 30% (of the source), "
                f"not {text!r}."
            )
        if unit in _UNITS:
            return cls(float(int(number * _UNITS[unit])), "", text.strip())
        return cls(number, unit, text.strip())

    @property
    def label(self) -> str:
        """The size in a file's name."""
        return self.text.replace(" ", "").replace("%", "pct")

    def file_bytes(self, plan: Plan) -> int:
        """Bytes that an output may have, whose plan this is but for the types."""
        if self.unit == "%":
            return int(self.number / 100 * sum(file.stat().st_size for file in plan.source.files))
        if self.unit == "bpw":
            header = plan.size - sum(padded(tensor.nbytes) for tensor in plan.tensors)
            return header + int(self.number * sum(prod(tensor.shape) for tensor in plan.tensors) / 8)
        return int(self.number)
