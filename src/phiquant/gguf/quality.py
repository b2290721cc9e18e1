"""What a file says of its own quality: how far its predictions are from those of the model that it was made from.

    phiquant.quality.kl_mean                float32, nats per token: mean of KL(reference ‖ file)
    phiquant.quality.kl_p999                float32: the value below which 99.9 % of the positions are
    phiquant.quality.top1                   float32, 0 to 1: how often both find the same token likeliest
    phiquant.quality.perplexity             float32: of the file on the text; reference_perplexity: of the reference
    phiquant.quality.tokens                 uint32: scored positions; context: tokens of a window; first_window: how
                                            many windows of the text were left out before, having been calibrated on
    phiquant.quality.text_sha256            string, 64 hexadecimal digits: of the text file
    phiquant.quality.reference, method      strings
    phiquant.quality.weights                string: the checksum (`gguf.checksum`) of the weights that were measured

All of them have a size that is known before anything is measured. Programs that rewrite a file copy keys they do not
know; `weights` tells whose figures they are.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from phiquant.errors import GGUFError
from phiquant.gguf import keys
from phiquant.gguf.checksum import DIGITS, PREFIX
from phiquant.gguf.describe import table_of
from phiquant.gguf.reader import GGUFFile
from phiquant.gguf.types import ValueType

__all__ = ["FIGURES", "Quality", "Standing", "is_quality_key", "shortened", "standing"]

Standing = Literal["of this file", "of another file"]

_FLOATS: Final = ("kl_mean", "kl_p999", "top1", "perplexity", "reference_perplexity")
_COUNTS: Final = ("tokens", "context", "first_window")
_TEXTS: Final = ("text_sha256", "reference", "method")
FIGURES: Final = (*_FLOATS, *_COUNTS, *_TEXTS)
_MAX_TEXT: Final = 255  # bytes of a name that are kept


@dataclass(frozen=True)
class Quality:
    """A file beside its reference on a text; the attributes are described in this module's head."""

    kl_mean: float
    kl_p999: float
    top1: float
    perplexity: float
    reference_perplexity: float
    tokens: int
    context: int
    first_window: int
    text_sha256: str
    reference: str
    method: str

    @classmethod
    def unknown(cls, *, text_sha256: str, reference: str, method: str) -> Self:
        """Before it is measured: as many bytes as it will have."""
        nothing = math.nan
        return cls(nothing, nothing, nothing, nothing, nothing, 0, 0, 0, text_sha256, shortened(reference), method)

    @classmethod
    def recorded(cls, gguf: GGUFFile) -> Self | None:
        """What a file says; None if it says nothing. GGUFError if a key is missing, of another kind or no figure."""
        if not any(is_quality_key(key) for key in gguf.fields):
            return None
        found: dict[str, Any] = {name: gguf.require(_key(name), float) for name in _FLOATS}
        found |= {name: gguf.require(_key(name), int) for name in _COUNTS}
        found |= {name: gguf.require(_key(name), str) for name in _TEXTS}
        for name in _FLOATS:
            if not math.isfinite(found[name]):
                raise GGUFError(f"{gguf.path} stores the key {_key(name)!r} as {found[name]}, which measures nothing.")
        return cls(**found)

    def pairs(self, weights: str = "0" * DIGITS) -> list[tuple[str, ValueType, Any]]:
        """Keys, kinds and values as a file has them; `weights`: the checksum of what was measured."""
        return [
            *((_key(name), ValueType.FLOAT32, getattr(self, name)) for name in _FLOATS),
            *((_key(name), ValueType.UINT32, getattr(self, name)) for name in _COUNTS),
            *((_key(name), ValueType.STRING, getattr(self, name)) for name in _TEXTS),
            (keys.QUALITY_WEIGHTS, ValueType.STRING, weights),
        ]


def shortened(text: str) -> str:
    """A name with at most 255 bytes, in valid Unicode."""
    return text.encode(errors="replace")[:_MAX_TEXT].decode(errors="ignore")


def is_quality_key(key: str) -> bool:
    """Whether a key is one of these."""
    return key.startswith(keys.QUALITY)


def standing(gguf: GGUFFile) -> Standing:
    """Whose figures a file has, as far as its header tells: names, shapes and types; `verify` reads the weights too."""
    weights, own = gguf.get(keys.QUALITY_WEIGHTS, str, ""), f"{PREFIX}{table_of(gguf)}:"
    checksum = gguf.get(keys.CHECKSUM, str, "")
    # A checksum of another table is one that was copied itself, and says nothing.
    same = weights.startswith(own) and (weights == checksum or not checksum.startswith(own))
    return "of this file" if same else "of another file"


def _key(name: str) -> str:
    return f"{keys.QUALITY}{name}"
