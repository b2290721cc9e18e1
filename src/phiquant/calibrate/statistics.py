"""Figures of an importance matrix, by which one sees how well a text has exercised a model.

All are of the mean squares a[i] of a weight's inputs, i over the N columns of the matrices that any token has reached,
and are llama-imatrix's (its README; the formulas are standard):

    entropy             -sum p log2 p  with p = a / sum a, in bits; normalized: divided by log2 N
    z-score density     the share of a that lie more than one standard deviation above their mean: ZD of "Layer-Wise
                        Quantization" (Dumitru et al. 2024, arXiv:2406.17415, section 3.1), there of weights
    cosine similarity   of the sums of squares with those of the same weight one block before

Means of a layer are weighted by N.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phiquant.convert.imatrix import ImportanceMatrix, Statistic

__all__ = ["LayerFigures", "TensorFigures", "layer_figures", "tensor_figures"]

_ACTIVE = 1e-5  # mean squares up to this count as not active
_BLOCK = re.compile(r"(.*?\bblk\.)(\d+)(\..*)")


@dataclass(frozen=True)
class TensorFigures:
    """Of one weight.

    Attributes:
        name: GGUF's.
        layer: number of its block; None outside of blocks.
        kind: the part of its name that says what it is, such as attn_qkv.
        total, minimum, maximum, mean, deviation: of the mean squares; the deviation is that of the population.
        active: share of them above 1e-5, 0 to 1.
        elements: N.
        entropy: in bits.
        normalized_entropy: 0 to 1.
        density: z-score density, 0 to 1.
        similarity: cosine similarity with the block before, 0 to 1; None if that has no such weight.
    """

    name: str
    layer: int | None
    kind: str
    total: float
    minimum: float
    maximum: float
    mean: float
    deviation: float
    active: float
    elements: int
    entropy: float
    normalized_entropy: float
    density: float
    similarity: float | None


@dataclass(frozen=True)
class LayerFigures:
    """Of the weights of one block, means weighted by their numbers of elements; a missing similarity counts as 0."""

    layer: int
    total: float
    density: float
    similarity: float


def tensor_figures(matrix: ImportanceMatrix) -> list[TensorFigures]:
    """Of every weight that any token reached, by kind, within a kind the largest total first."""
    made = []
    for name, entry in matrix.entries.items():
        reached = entry.counts > 0
        if reached.any():
            made.append(_figures(name, entry.importance[reached].astype(np.float64).reshape(-1), matrix))
    return sorted(made, key=lambda figures: (figures.kind, -figures.total))


def layer_figures(tensors: Iterable[TensorFigures]) -> list[LayerFigures]:
    """Of every block, in their order."""
    layers: dict[int, list[TensorFigures]] = {}
    for tensor in tensors:
        if tensor.layer is not None:
            layers.setdefault(tensor.layer, []).append(tensor)
    made = []
    for layer in sorted(layers):
        weights = np.array([t.elements for t in layers[layer]], np.float64)
        columns = [(t.total, t.density, t.similarity or 0.0) for t in layers[layer]]
        total, density, similarity = (weights @ np.array(columns)) / weights.sum()
        made.append(LayerFigures(layer, float(total), float(density), float(similarity)))
    return made


def _figures(name: str, a: NDArray[np.float64], matrix: ImportanceMatrix) -> TensorFigures:
    match = _BLOCK.fullmatch(name)
    total, mean, deviation = float(a.sum()), float(a.mean()), float(a.std())
    p = a[a > 0] / total if total > 0 else np.ones(1)
    entropy = float(-(p * np.log2(p)).sum()) + 0.0  # no -0
    return TensorFigures(
        name=name,
        layer=None if match is None else int(match[2]),
        kind=_kind(name),
        total=total,
        minimum=float(a.min()),
        maximum=float(a.max()),
        mean=mean,
        deviation=deviation,
        active=float((a > _ACTIVE).mean()),
        elements=a.size,
        entropy=entropy,
        normalized_entropy=entropy / math.log2(a.size) if a.size > 1 else 0.0,
        density=float((a > mean + deviation).mean()) if deviation > 0 else 0.0,
        similarity=None if match is None else _similarity(name, match, matrix),
    )


def _kind(name: str) -> str:
    parts = name.split(".")
    return parts[parts.index("weight") - 1] if "weight" in parts[1:] else name


def _similarity(name: str, match: re.Match[str], matrix: ImportanceMatrix) -> float | None:
    before = matrix.entries.get(f"{match[1]}{int(match[2]) - 1}{match[3]}")
    if before is None or before.sums.size != matrix.entries[name].sums.size:
        return None
    a, b = (_flat(entry) for entry in (matrix.entries[name], before))
    sizes = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / sizes if sizes > 0 else 0.0


def _flat(entry: Statistic) -> NDArray[np.float64]:
    return entry.sums.astype(np.float64).reshape(-1)
