"""What each weight costs at each type: measured at one, scaled to the others.

Where errors are small, the divergence of a model with several rounded weights is the sum of those with one, and grows
with the square of the error. So a weight is measured at one type of some 3.4 bits, and its divergence at any other is
that times the ratio of the distortions. Of a large model, weights of one kind in neighbouring layers are measured
together, but for the first and the last layer, which are like no other.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from phiquant.calibrate.candidates import Weighted, candidates
from phiquant.calibrate.probe import Probe
from phiquant.calibrate.quantizing import Bytes, Quantizer, distortions
from phiquant.convert.mixture import block_of
from phiquant.gguf import GGMLType
from phiquant.kernels.ops import Weight

__all__ = ["DEFAULT_GROUPS", "Sensitivities", "Stage", "Substitutes", "grouped", "kind_of", "measure"]

DEFAULT_GROUPS: Final = 40
"""Groups of weights that are measured, at most."""

_ANCHOR_BITS: Final = 3.4375
_BLOCK: Final = re.compile(r"^blk\.\d+\.")

Stage = Callable[[str, int, int], None]
"""Told what is going on, how many steps of it are done, and of how many."""


class _Stored(Protocol):
    """Where the bytes of weights come from."""

    @property
    def weights(self) -> Mapping[str, Weight]:
        """By name, as stored."""


class Substitutes:
    """Weights of a model with other types, made when they are first asked for."""

    def __init__(self, stored: _Stored, weights: Sequence[Weighted], quantizer: Quantizer) -> None:
        self._stored, self._quantizer = stored.weights, quantizer
        self._tensors = {weight.tensor.name: weight.tensor for weight in weights}

    def data(self, name: str) -> Bytes:
        """The bytes of a weight as stored."""
        return self._stored[name].data

    def make(self, name: str, kind: GGMLType) -> Weight:
        """One weight at a type."""
        stored, tensor = self._stored[name], replace(self._tensors[name], type=kind)
        if kind is tensor.source:
            return stored
        return Weight(name, kind, stored.shape, self._quantizer(tensor, stored.data))

    def all(self, types: Mapping[str, GGMLType], kept: Mapping[str, Weight] | None = None) -> dict[str, Weight]:
        """Many at theirs; those of `kept` that have the type already are taken from there."""
        found = {}
        for name, kind in types.items():
            there = kept.get(name) if kept else None
            found[name] = there if there is not None and there.type is kind else self.make(name, kind)
        return found


@dataclass(frozen=True)
class Sensitivities:
    """What weights cost.

    Attributes:
        slopes: of each weight, nats for each unit of its distortion.
        distortions: of each weight at each type that it may have.
        floor: nats that quantized weights cost however exact they are, since what meets them is rounded to 8 bits.
    """

    slopes: Mapping[str, float]
    distortions: Mapping[str, Mapping[GGMLType, float]]
    floor: float = 0.0

    def cost(self, name: str, kind: GGMLType) -> float:
        """Predicted divergence that one weight at a type adds."""
        return self.slopes[name] * self.distortions[name][kind]

    def total(self, types: Mapping[str, GGMLType]) -> float:
        """Predicted divergence of the model with all its weights at some types."""
        return self.floor + sum(self.cost(name, kind) for name, kind in types.items())

    def scaled(self, factors: Mapping[str, float]) -> "Sensitivities":
        """With the slopes of all weights of a kind (`kind_of`) times a factor."""
        return replace(self, slopes={n: slope * factors.get(kind_of(n), 1.0) for n, slope in self.slopes.items()})


def kind_of(name: str) -> str:
    """A weight's name without its layer."""
    return _BLOCK.sub("", name)


def grouped(names: Sequence[str], groups: int = DEFAULT_GROUPS) -> list[list[str]]:
    """Weights that are measured together: of one kind in neighbouring layers, as few as `groups` groups allow.

    The first and the last of a kind are alone. No groups are larger than all the rest of a kind, whatever `groups` is.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=block_of):
        kinds.setdefault(kind_of(name), []).append(name)
    size = 1
    while (parts := [part for members in kinds.values() for part in _parts(members, size)]) and size < len(names):
        if len(parts) <= groups:
            break
        size += 1
    return parts


def _parts(members: list[str], size: int) -> list[list[str]]:
    inner = members[1:-1]
    between = [inner[i : i + size] for i in range(0, len(inner), size)]
    return [members[:1], *between, members[-1:]] if len(members) > 1 else [members]


def measure(
    probe: Probe,
    weights: Sequence[Weighted],
    types: Mapping[str, Sequence[GGMLType]],
    quantizer: Quantizer,
    *,
    groups: int = DEFAULT_GROUPS,
    told: Stage = lambda what, done, total: None,
) -> Sensitivities:
    """Measure a model's sensitivities with its probe; `types`: of each weight those that it may have.

    The model is computed once for the floor and once for each group, all other weights being as near to their own as a
    quantized type is: that is faster than with floats. Errors: as `Probe.divergence` and the quantizer.
    """
    substitutes = Substitutes(probe, weights, quantizer)
    anchors = {weight.tensor.name: anchor(weight) for weight in weights}
    exact = {weight.tensor.name: closest(weight) for weight in weights}
    found: dict[str, dict[GGMLType, float]] = {}
    for done, weight in enumerate(weights):
        told("comparing types", done, len(weights))
        name = weight.tensor.name
        wanted = {*types[name], anchors[name], exact[name]}
        found[name] = distortions(weight.tensor, substitutes.data(name), sorted(wanted), quantizer)
    slopes: dict[str, float] = {}
    parts = grouped([weight.tensor.name for weight in weights], groups)
    told("measuring weights", 0, len(parts) + 1)
    background = substitutes.all(exact)
    least = probe.divergence(background)
    for done, names in enumerate(parts, 1):
        told("measuring weights", done, len(parts) + 1)
        replaced = substitutes.all({name: anchors[name] for name in names})
        diverged = probe.divergence({**background, **replaced}) - least
        moved = sum(found[name][anchors[name]] - found[name][exact[name]] for name in names)
        slopes.update(dict.fromkeys(names, max(diverged, 0.0) / moved if moved > 0 else 0.0))
    told("measuring weights", len(parts) + 1, len(parts) + 1)
    unfloored = Sensitivities(slopes, found)
    return replace(unfloored, floor=max(least - unfloored.total(exact), 0.0))


def anchor(weight: Weighted) -> GGMLType:
    """The type at which a weight is measured."""
    return min(_quantized(weight), key=lambda kind: (abs(kind.bits_per_weight - _ANCHOR_BITS), kind))


def closest(weight: Weighted) -> GGMLType:
    """The quantized type that is nearest to the weight as it is."""
    return max(_quantized(weight), key=lambda kind: kind.bits_per_weight)


def _quantized(weight: Weighted) -> Iterator[GGMLType]:
    kinds = [kind for kind in candidates(weight, MEASURED) if kind.is_quantized]
    return iter(kinds or [weight.tensor.source])


MEASURED: Final = (
    *(GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q5_K, GGMLType.Q4_K, GGMLType.Q3_K, GGMLType.Q2_K),
    *(GGMLType.Q5_0, GGMLType.Q4_0),
)
"""Types at which weights may be measured: soon made, and near to every size."""
