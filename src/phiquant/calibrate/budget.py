"""A model's weights and what they may become, between a plan for a file and a search for the best mix."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

from phiquant.arch import names
from phiquant.calibrate.candidates import Weighted, candidates
from phiquant.calibrate.limit import Limit
from phiquant.calibrate.mix import Mix, smallest, weight_bytes
from phiquant.convert.entries import Entry, float32, string
from phiquant.convert.filetypes import DEFAULT_TYPES, Target
from phiquant.convert.mixture import is_embedding
from phiquant.convert.plan import Plan
from phiquant.convert.recipes import Options, PlannedTensor, TypePattern, may_quantize
from phiquant.convert.source import Source
from phiquant.convert.weighing import Importance, weigh
from phiquant.errors import RequestError
from phiquant.gguf import FileType, GGMLType, keys

__all__ = ["Menu", "Planner", "mix_entries", "room_for"]

Planner = Callable[[Target, Options, Sequence[Entry]], Plan]
"""The plan of a file from its type, the options that choose types, and further metadata."""

EMBEDDING: Final = 2.0
"""How much more an embedding that is the output too, or that decides what routers choose, costs beside other weights
where error feedback makes the file: it gains less than they do, any other embedding as much. Best of 1, 2, 4 and 8 for
the size of Q4_K_M (docs/log.md)."""

# The mixture whose name llama.cpp gives to a file by the type that most of it has.
_NAMED = {
    GGMLType.Q2_K: FileType.Q2_K,
    GGMLType.Q3_K: FileType.Q3_K_M,
    GGMLType.Q4_K: FileType.Q4_K_M,
    GGMLType.Q5_K: FileType.Q5_K_M,
    GGMLType.IQ2_S: FileType.IQ2_M,
    GGMLType.IQ3_S: FileType.IQ3_S,
}


@dataclass(frozen=True)
class Menu:
    """What the weights of a model may become.

    Attributes:
        weights: those that may get a type, in the file's order, with their importance.
        types: of each, those that it may have, from the smallest.
        others: names of the tensors that stay as they are.
        options: those of the user.
    """

    weights: Sequence[Weighted]
    types: Mapping[str, Sequence[GGMLType]]
    others: Sequence[str]
    options: Options

    @classmethod
    def of(
        cls,
        source: Source,
        planned: Planner,
        options: Options,
        importance: Importance | None,
        allowed: Collection[GGMLType],
    ) -> Self:
        """From a source; weights for which the options name a type may have no other.

        ImportanceError if the matrix is of another model; whatever `planned` refuses.
        """
        tensors = planned(Target(FileType.Q4_K_M), options, ()).tensors
        may = [tensor for tensor in source.tensors if may_quantize(tensor, options)]
        names = {tensor.name for tensor in may}
        weights = [_unplanned(tensor) for tensor in tensors if tensor.name in names]
        if importance is not None:
            weights, _ = weigh(weights, importance, [tensor.name for tensor in source.tensors])
        weighted = [Weighted(tensor, tensor.importance is not None) for tensor in weights]
        pinned = {weight.tensor.name: _pinned(weight.tensor.name, options) for weight in weighted}
        types = {}
        for weight in weighted:
            kind = pinned[weight.tensor.name]
            types[weight.tensor.name] = candidates(weight, allowed) if kind is None else [kind]
        return cls(weighted, types, [t.name for t in tensors if t.name not in names], options)

    def chosen(self, types: Mapping[str, GGMLType]) -> tuple[Target, Options]:
        """The file type and the options with which a plan has these types."""
        exact = tuple(TypePattern(re.compile(f"^{re.escape(name)}$"), kind) for name, kind in types.items())
        options = replace(self.options, tensor_types=exact, output_tensor_type=None, token_embedding_type=None)
        size = Counter[GGMLType]()
        for weight in self.weights:
            kind = types[weight.tensor.name]
            size[kind] += weight_bytes(weight, kind)
        most = next((kind for kind, _ in size.most_common() if kind.is_quantized), GGMLType.Q8_0)
        named = _NAMED.get(most) or next(file for file, kind in DEFAULT_TYPES.items() if kind is most)
        return Target(named), options

    @property
    def feedback_factors(self) -> dict[str, float]:
        """For `find_mix`, where error feedback makes the file."""
        found = {*(weight.tensor.name for weight in self.weights), *self.others}
        tied, routed = names.OUTPUT not in found, any(len(weight.tensor.shape) > 2 for weight in self.weights)
        return {names.TOKEN_EMBD: EMBEDDING} if tied or routed else {}

    def plan(self, planned: Planner, types: Mapping[str, GGMLType], entries: Sequence[Entry]) -> Plan:
        """The plan of a file with these types. Errors as `planned`."""
        target, options = self.chosen(types)
        return planned(target, options, entries)

    def bytes(self, types: Mapping[str, GGMLType]) -> int:
        """Of all weights, padding included."""
        return sum(weight_bytes(weight, types[weight.tensor.name]) for weight in self.weights)


def room_for(menu: Menu, planned: Planner, limit: Limit, text: str) -> int:
    """Bytes that the weights may have for the file to keep the limit.

    RequestError, which names the smallest or the largest size that makes sense, for one that cannot be kept or keeps
    everything as it is. Whatever `planned` refuses.
    """
    least = {name: types[0] for name, types in menu.types.items()}
    largest = {name: types[-1] for name, types in menu.types.items()}
    entries = mix_entries(Mix(least, {}, 0.0, 0.0), limit, text)
    plan, whole = menu.plan(planned, least, entries), menu.plan(planned, largest, entries)
    # Of several parts each has a header, and larger types may need more parts.
    fixed = max(plan.size - menu.bytes(least), whole.size - menu.bytes(largest))
    budget = limit.file_bytes(plan)
    if fixed + smallest(menu.weights, menu.types) > budget:
        raise RequestError(
            f"--budget {limit.text} is {budget:,} bytes, and the smallest possible file has {plan.size:,} "
            f"({plan.bits_per_weight:.2f}bpw); choose a larger one"
        )
    if whole.size <= budget:
        raise RequestError(
            f"--budget {limit.text} is {budget:,} bytes, and the model as it is takes only {whole.size:,}; choose a "
            "smaller one, or copy the model with COPY"
        )
    return budget - fixed


def mix_entries(mix: Mix, limit: Limit, text: str) -> list[Entry]:
    """What the file says of how its types were chosen."""
    found = [string(keys.MIX_BUDGET, limit.text), string(keys.MIX_TEXT, text)]
    if mix.predicted is not None:
        found.append(float32(keys.MIX_PREDICTED, mix.predicted))
    if mix.measured is not None:
        found.append(float32(keys.MIX_MEASURED, mix.measured))
    return found


def _unplanned(tensor: PlannedTensor) -> PlannedTensor:
    """With a type that importance matters to, and that it does not have: what it will get is not known yet."""
    kind = GGMLType.Q5_0 if tensor.source is GGMLType.Q4_0 else GGMLType.Q4_0
    return replace(tensor, type=kind, fallback=None, importance=None)


def _pinned(name: str, options: Options) -> GGMLType | None:
    if is_embedding(name) and options.token_embedding_type is not None:
        return options.token_embedding_type
    if name == "output.weight" and options.output_tensor_type is not None:
        return options.output_tensor_type
    return next((entry.type for entry in options.tensor_types if entry.pattern.search(name)), None)
