"""Which types a weight may have in a mix: those that the file's reader knows, its shape allows, importance supports."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from phiquant import quants
from phiquant.convert.mixture import needs_importance
from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType

__all__ = ["READERS", "Weighted", "candidates", "reader_types"]

_T = GGMLType
_FLOATS: Final = (_T.F32, _T.F16, _T.BF16)
_LLAMA_CPP: Final = frozenset(
    (
        *(_T.F32, _T.F16, _T.BF16, _T.Q8_0, _T.Q6_K, _T.Q5_K, _T.Q4_K, _T.Q3_K, _T.Q2_K),
        *(_T.Q5_1, _T.Q5_0, _T.Q4_1, _T.Q4_0, _T.IQ4_NL, _T.IQ4_XS, _T.IQ3_S, _T.IQ3_XXS),
        *(_T.IQ2_S, _T.IQ2_XS, _T.IQ2_XXS, _T.IQ1_M, _T.IQ1_S),
    )
)

READERS: Final = {"llama.cpp": _LLAMA_CPP, "ours": quants.QUANTIZABLE}
"""Types by the program that is to read the file.

llama.cpp: those that it has read since May 2024, and so what is built on it. It reads MXFP4, NVFP4, Q1_0, Q2_0, TQ1_0
and TQ2_0, too, of which older releases do not know some; the others are as small and nearer to the original.
"""


@dataclass(frozen=True)
class Weighted:
    """A weight that may get a type, and whether there is importance for it."""

    tensor: PlannedTensor
    importance: bool


def reader_types(reader: str, only: Collection[GGMLType] = ()) -> frozenset[GGMLType]:
    """The types of a reader, or of those `only` some; RequestError if there is no such reader, or none is left."""
    if reader not in READERS:
        raise RequestError(f"there is no reader {reader!r}; possible are {' and '.join(READERS)}")
    types = READERS[reader]
    for kind in only:
        if kind not in types:
            raise RequestError(f"files for {reader} hold no {kind.name} in a mix; leave it out of --mix-types")
    return frozenset(only) or types


def candidates(weight: Weighted, types: Collection[GGMLType]) -> list[GGMLType]:
    """The types that a weight may have, from the smallest: those that make it no larger, and its own."""
    tensor, columns = weight.tensor, weight.tensor.shape[-1]
    found = {tensor.source}
    for kind in types:
        if columns % kind.block_elements or kind.bits_per_weight >= tensor.source.bits_per_weight:
            continue
        if not weight.importance and (kind in quants.IMPORTANCE_REQUIRED or needs_importance(tensor.name, kind, None)):
            continue
        found.add(kind)
    return sorted(found, key=lambda kind: (kind.bits_per_weight, kind))
