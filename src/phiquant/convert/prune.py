"""`--prune-layers`: a model without some of its blocks; the others move up, and the count of blocks with them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from phiquant.convert.entries import Entry, uint32
from phiquant.convert.mixture import block_of
from phiquant.errors import RequestError
from phiquant.gguf import ValueType, keys

__all__ = ["Pruning", "parse_layers"]


def parse_layers(text: str) -> tuple[int, ...]:
    """Read L0,L1,...: numbers of layers, in ascending order and each once; RequestError if it is not that."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise RequestError(f"--prune-layers {text!r} is not a list of layers such as 7,20,21.")
    return tuple(sorted({int(part) for part in parts}))


@dataclass(frozen=True)
class Pruning:
    """Layers to leave out of a model of `blocks`; RequestError if it has no such layer, or none would stay."""

    layers: tuple[int, ...]
    blocks: int

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer >= self.blocks:
                raise RequestError(
                    f"--prune-layers {layer}: the model has {self.blocks} layers, which are counted from 0."
                )
        if len(self.layers) >= self.blocks:
            raise RequestError("--prune-layers names all layers; at least one has to stay.")

    @property
    def kept(self) -> list[int]:
        """The layers that stay, by their old numbers."""
        return [layer for layer in range(self.blocks) if layer not in self.layers]

    def names(self, names: Iterable[str]) -> dict[str, str]:
        """Old name -> new name of the tensors that stay."""
        new = {old: place for place, old in enumerate(self.kept)}
        result = {}
        for name in names:
            layer = block_of(name)
            if layer not in self.layers:
                result[name] = name if layer < 0 else re.sub(r"^blk\.\d+", f"blk.{new.get(layer, layer)}", name)
        return result

    def entries(self, entries: Sequence[Entry], architecture: str) -> list[Entry]:
        """The metadata with the new count of blocks; lists with a number for each layer lose those that go."""
        count = keys.ArchitectureKeys(architecture).block_count
        result = []
        for entry in entries:
            if entry.key == count:
                entry = uint32(count, len(self.kept))
            elif (
                entry.type is ValueType.ARRAY
                and entry.key.startswith(f"{architecture}.")
                and len(entry.value) == self.blocks
            ):
                entry = entry._replace(value=np.asarray(entry.value)[self.kept])
            result.append(entry)
        return result
