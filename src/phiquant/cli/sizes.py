"""Numbers of bytes as users write them: 500M, 1.5G, 2000000."""

import re
from typing import Final

from phiquant.errors import RequestError

__all__ = ["parse_size"]

_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(option: str, text: str) -> int:
    """The bytes that `text` names, units being powers of 1000; RequestError, naming the option, if it does not."""
    match = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?)([KMGT]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match and len(match[1]) < 20 else 0
    if count <= 0:
        raise RequestError(f"{option} takes a size such as 500M or 1.5G, not {text!r}.")
    return count
