"""The best mix of types within a budget: found from sensitivities, measured, corrected and found again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from phiquant.calibrate.allocate import Choice, allocate
from phiquant.calibrate.candidates import Weighted
from phiquant.calibrate.probe import Probe
from phiquant.calibrate.quantizing import Quantizer, quantized
from phiquant.calibrate.sensitivity import (
    DEFAULT_GROUPS,
    Sensitivities,
    Stage,
    Substitutes,
    closest,
    kind_of,
    measure,
)
from phiquant.convert.plan import padded
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType
from phiquant.kernels.ops import Weight

__all__ = ["DEFAULT_ROUNDS", "Mix", "find_mix", "smallest", "weight_bytes"]

DEFAULT_ROUNDS: Final = 2
"""How often a mix is corrected, at most."""

DEFAULT_TOLERANCE: Final = 0.2
"""What a prediction may be off. Within it corrections were measured to be of no use on other texts."""

_CORRECTION: Final = 4.0  # a kind's sensitivity is corrected by this factor at most
_GAIN: Final = 0.02  # of the divergence; what is less may be true of this text alone


@dataclass(frozen=True)
class Mix:
    """A type for every weight.

    Attributes:
        types: by name, in the file's order.
        costs: predicted divergence that each adds, in nats.
        predicted: divergence of the model with all of them.
        measured: the same, of the model that was computed so; None if it was not.
        first: what had been predicted for the first mix, and what was measured then.
    """

    types: Mapping[str, GGMLType]
    costs: Mapping[str, float] = field(default_factory=dict)
    predicted: float | None = None
    measured: float | None = None
    first: tuple[float, float] | None = None


def weight_bytes(weight: Weighted, kind: GGMLType) -> int:
    """Bytes of a weight in the file, with its padding."""
    return padded(weight.tensor.rows * kind.row_bytes(weight.tensor.shape[-1]))


def smallest(weights: Sequence[Weighted], types: Mapping[str, Sequence[GGMLType]]) -> int:
    """Bytes of all weights at their smallest types."""
    return sum(min(weight_bytes(weight, kind) for kind in types[weight.tensor.name]) for weight in weights)


def find_mix(
    probe: Probe,
    weights: Sequence[Weighted],
    types: Mapping[str, Sequence[GGMLType]],
    budget: int,
    *,
    quantizer: Quantizer = quantized,
    known: Sensitivities | None = None,
    groups: int = DEFAULT_GROUPS,
    rounds: int = DEFAULT_ROUNDS,
    tolerance: float = DEFAULT_TOLERANCE,
    factors: Mapping[str, float] = MappingProxyType({}),
    told: Stage = lambda what, done, total: None,
) -> Mix:
    """The types that make the model diverge least from itself, with at most `budget` bytes for these weights.

    Args:
        probe: the model that is measured.
        weights: those that may get a type, with their importance.
        types: of each weight those that it may have.
        budget: bytes, padding included.
        quantizer: what will quantize them.
        known: what weights cost, where that was measured before.
        groups: groups of weights that are measured on their own, at most.
        rounds: how often the mix is corrected by what is measured of it, at most; 0 measures it once.
        tolerance: what a prediction may be off, as a share of what was measured, before anything is corrected.
        factors: by `kind_of`, how much more some weights will cost beside the others in the file than by `quantizer`,
            where another one makes it. They change what is chosen, not what is predicted of it.
        told: is told how far it is.

    RequestError if the budget is below the smallest possible; others as `Probe.divergence` and the quantizer.
    """
    if smallest(weights, types) > budget:
        raise RequestError(f"the weights take {smallest(weights, types):,} bytes at least, more than {budget:,}")
    if known is None:
        known = measure(probe, weights, types, quantizer, groups=groups, told=told)
    substitutes = Substitutes(probe, weights, quantizer)
    chosen = _allocated(weights, types, known.scaled(factors), budget)
    made = substitutes.all(chosen)
    kinds = sorted({kind_of(name) for name in chosen})
    steps, done = 1 + rounds * (len(kinds) + 1), 0

    def measured(replaced: Mapping[str, Weight]) -> float:
        nonlocal done
        told("measuring the mix", done, steps)
        done += 1
        return probe.divergence(replaced)

    found = measured(made)
    first = (known.total(chosen), found)
    best, best_made = Mix(chosen, _costs(known, chosen), known.total(chosen), found, first), made
    exact = {weight.tensor.name: closest(weight) for weight in weights}
    for _ in range(rounds):
        if abs(found - known.total(chosen)) <= tolerance * found:
            break
        corrections = {}
        for kind in kinds:
            finer = {
                name: exact[name]
                for name in best.types
                if kind_of(name) == kind
                and known.distortions[name][exact[name]] < known.distortions[name][chosen[name]]
            }
            expected = sum(known.cost(name, chosen[name]) - known.cost(name, finer[name]) for name in finer)
            if not finer or expected <= 0:
                done += 1
                continue
            without = measured({**best_made, **substitutes.all(finer)})
            corrections[kind] = min(max((found - without) / expected, 1 / _CORRECTION), _CORRECTION)
        known = known.scaled(corrections)
        again = _allocated(weights, types, known.scaled(factors), budget)
        if again == chosen:
            best = Mix(chosen, _costs(known, chosen), known.total(chosen), found, first)
            break
        made = substitutes.all(again, best_made)
        found_again = measured(made)
        if found_again >= (1 - _GAIN) * found:
            break
        chosen, found, best_made = again, found_again, made
        best = Mix(chosen, _costs(known, chosen), known.total(chosen), found, first)
    told("measuring the mix", steps, steps)
    return best


def _costs(known: Sensitivities, types: Mapping[str, GGMLType]) -> dict[str, float]:
    return {name: known.cost(name, kind) for name, kind in types.items()}


def _allocated(
    weights: Sequence[Weighted], types: Mapping[str, Sequence[GGMLType]], known: Sensitivities, budget: int
) -> dict[str, GGMLType]:
    names = [weight.tensor.name for weight in weights]
    items = [
        [Choice(weight_bytes(weight, kind), known.cost(name, kind)) for kind in types[name]]
        for name, weight in zip(names, weights, strict=True)
    ]
    picked = allocate(items, budget)
    return {name: types[name][index] for name, index in zip(names, picked, strict=True)}
