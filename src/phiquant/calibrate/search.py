"""What error feedback does how often and by what: options with measured defaults."""

from dataclasses import dataclass, replace

from phiquant.calibrate import chunks
from phiquant.calibrate.curvature import Curvature
from phiquant.errors import RequestError
from phiquant.kernels import feedback

__all__ = ["Search"]

_MOST_DRAWN = 0.5


@dataclass(frozen=True)
class Search:
    """How blocks are sought.

    Attributes:
        damping: what is added to the diagonal of the moments of inputs, as a part of its mean.
        by_activation: columns are rounded in the order of the squares of their inputs; else in that of the file.
        rounds: how often scales and levels of a block are fitted to one another before the next one.
        sweeps: how often all blocks of a row are gone through once more.
        curvature_tokens: of how many tokens it is computed what errors of the residual stream cost; 0 for none: then
            all count alike, and an embedding that is not the output is rounded plainly. None: as the model is large.
        drawn: part of the chunks of a text in which tokens are drawn at random.
    """

    damping: float = feedback.DAMPING
    by_activation: bool = True
    rounds: int = feedback.ROUNDS
    sweeps: int = feedback.SWEEPS
    curvature_tokens: int | None = None
    drawn: float = chunks.DRAWN

    def __post_init__(self) -> None:
        """RequestError if a number makes no sense."""
        if not (0 < self.damping < float("inf")):
            raise RequestError(f"a damping of {self.damping:g} was asked for; it is a positive number, such as 0.03.")
        if not 0 <= self.drawn <= _MOST_DRAWN:
            raise RequestError(f"{self.drawn:g} of the text was to be drawn at random; 0 to {_MOST_DRAWN:g} can be.")
        for what, count in (("rounds", self.rounds), ("sweeps", self.sweeps), ("tokens", self.curvature_tokens)):
            if count is not None and count < 0:
                raise RequestError(f"{count} {what} were asked for; there cannot be fewer than none.")

    def settled(self, weights: int) -> "Search":
        """The same for a model of so many weights."""
        if self.curvature_tokens is not None:
            return self
        return replace(self, curvature_tokens=Curvature.default_tokens(weights))

    @property
    def of_blocks(self) -> str:
        """What is said of it where no text is read."""
        order = "by activation" if self.by_activation else "as in the file"
        return f"damping {self.damping:g}, columns {order}, {self.rounds} rounds, {self.sweeps} sweeps"

    def __str__(self) -> str:
        settled = self.curvature_tokens is not None
        tokens = f"{self.curvature_tokens} tokens" if settled else "as many tokens as suit the model"
        return f"{self.of_blocks}, curvature of {tokens}, {self.drawn:.2g} drawn"
