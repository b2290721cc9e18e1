"""What a report knows of its files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..eval.continuations import Continuation
from ..eval.statistics import Comparison, Perplexity

__all__ = ["FileFigures", "LayerError", "ReferenceFigures", "Report", "TensorError", "labels", "pareto", "placed"]

_BLOCK = re.compile(r"blk\.(\d{1,4})\.(.+)")


@dataclass(frozen=True)
class TensorError:
    """How far a weight of a file is from the reference's: `error` / `norm` is its relative squared error.

    Attributes:
        name: of the tensor.
        type: in the file.
        matrix: whether it has rows and columns.
        nbytes: in the file.
        error: sum of (importance times) squared differences; None if the reference has no such tensor.
        norm: the same sum of the reference's own squares.
        weighted: whether there was an importance for it.
    """

    name: str
    type: str
    matrix: bool
    nbytes: int
    error: float | None
    norm: float = 0.0
    weighted: bool = False

    @property
    def relative(self) -> float | None:
        """0 for the same weights; None if there is nothing to compare."""
        return None if self.error is None or not self.norm else self.error / self.norm


@dataclass(frozen=True)
class LayerError:
    """The relative squared error of all weights of a block, or of those before ("embedding") and after ("output")."""

    layer: str
    relative: float | None


@dataclass(frozen=True)
class ReferenceFigures:
    """The model that the others are compared with."""

    path: Path
    title: str
    file_type: str
    size: int
    perplexity: Perplexity
    samples: tuple[Continuation, ...]


@dataclass(frozen=True)
class FileFigures:
    """A file beside the reference.

    Attributes:
        label: a short name, different from the others'.
        title: what its metadata calls the model.
        made_here: whether phiquant wrote it.
        size: bytes of all of its parts.
        bits: of tensor data for each weight.
        by_position: mean divergence of each scored position.
        weights: of every tensor.
        samples: what it made of the prompts.
    """

    path: Path
    label: str
    title: str
    file_type: str
    made_here: bool
    size: int
    bits: float
    comparison: Comparison
    by_position: tuple[float, ...]
    weights: tuple[TensorError, ...]
    samples: tuple[Continuation, ...]

    @property
    def divergence(self) -> float:
        """Mean KL divergence from the reference, nats per token."""
        return self.comparison.divergence.mean

    @cached_property
    def layers(self) -> tuple[LayerError, ...]:
        """Errors of matrices in the order of the computation: embedding, blocks, output."""
        sums: dict[str, list[TensorError]] = {}
        for weight in self.weights:
            if weight.matrix:
                sums.setdefault(placed(weight.name)[0], []).append(weight)
        order = sorted(sums, key=lambda layer: (layer != "embedding", layer == "output", layer.zfill(4)))
        return tuple(LayerError(layer, _together(sums[layer])) for layer in order)


@dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
        text, text_sha256: name and hash of what was read.
        size, windows, first: tokens of a window, how many there were, the first scored position.
        weighted_by: the importance matrix by which errors of weights are weighted, or None.
        prompts: of the samples.
        remarks: what could not be done, in sentences.
    """

    reference: ReferenceFigures
    files: tuple[FileFigures, ...]
    text: str
    text_sha256: str
    size: int
    windows: int
    first: int
    weighted_by: str | None
    prompts: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def placed(tensor: str) -> tuple[str, str]:
    """Where a tensor belongs: ("3", "ffn_up.weight") of a block, ("embedding" or "output", its name) of the others."""
    match = _BLOCK.fullmatch(tensor)
    if match is not None:
        return match[1], match[2]
    return ("embedding" if tensor.startswith(("token_embd", "position_embd")) else "output"), tensor


def pareto(files: Sequence[FileFigures]) -> list[FileFigures]:
    """The files to which no other is superior, that is no larger and no farther off, and one of it less; by size."""
    front: list[FileFigures] = []
    for file in sorted(files, key=lambda one: (one.size, one.divergence)):
        last = front[-1] if front else file
        if file.divergence < last.divergence or (file.size, file.divergence) == (last.size, last.divergence):
            front.append(file)
    return front


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names: of the files, without what all of them begin with up to a hyphen; whole paths if these are equal."""
    stems = [path.stem for path in paths]
    if len(set(stems)) < len(stems):
        return [str(path) for path in paths]
    parts = [stem.split("-") for stem in stems]
    same = 0
    while len(stems) > 1 and all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return ["-".join(part[same:]) for part in parts]


def _together(weights: Sequence[TensorError]) -> float | None:
    """Of several matrices as one; if some are weighted, of these alone, since the sums of others have another unit."""
    known = [weight for weight in weights if weight.error is not None]
    known = [weight for weight in known if weight.weighted] or known
    norm = sum(weight.norm for weight in known)
    return sum(weight.error or 0.0 for weight in known) / norm if norm else None
