"""What every architecture's configuration has, whatever else it needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

__all__ = ["Config", "Rotary"]


@dataclass(frozen=True)
class Rotary:
    """How the heads of a model are rotated.

    Attributes:
        dimension_count: leading channels of a head that are rotated, in pairs of channel i with i + half of them.
        freq_base: theta.
        original_context_length: tokens up to which a sequence has the short factors.
        factors_short, factors_long: divide the inverse frequencies, one for each pair; both None without LongRoPE.
        attention_factor_short, attention_factor_long: multiply cosine and sine, under either factors.
    """

    dimension_count: int
    freq_base: float
    original_context_length: int
    factors_short: tuple[float, ...] | None = None
    factors_long: tuple[float, ...] | None = None
    attention_factor_short: float = 1.0
    attention_factor_long: float = 1.0


class Config(Protocol):
    """The checked hyperparameters of a model in a GGUF file."""

    architecture: ClassVar[str]

    @property
    def name(self) -> str:
        """The model's, as the file gives it."""

    @property
    def vocab_size(self) -> int:
        """Tokens."""

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence."""

    @property
    def embedding_length(self) -> int:
        """Width of the hidden states."""

    @property
    def rotary(self) -> Rotary:
        """Rotation of the heads."""

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the file does not say and was therefore assumed, a sentence each."""

    def tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The name and shape (NumPy order) of every tensor of this model, in the order of llama.cpp's converter."""
