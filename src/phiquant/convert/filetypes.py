"""Names of file types and tensor types, as users and llama.cpp write them."""

import difflib
from dataclasses import dataclass

from phiquant.errors import TypeNameError, UnsupportedError
from phiquant.gguf.types import FileType, GGMLType

__all__ = ["COPY", "DEFAULT_TYPES", "TENSOR_TYPES", "Target", "parse_file_type", "parse_tensor_type"]

# the type that most tensors of a file type have
DEFAULT_TYPES = {
    FileType.F32: GGMLType.F32,
    FileType.F16: GGMLType.F16,
    FileType.BF16: GGMLType.BF16,
    FileType.Q8_0: GGMLType.Q8_0,
    FileType.Q4_0: GGMLType.Q4_0,
    FileType.Q4_1: GGMLType.Q4_1,
    FileType.Q5_0: GGMLType.Q5_0,
    FileType.Q5_1: GGMLType.Q5_1,
    FileType.Q2_K: GGMLType.Q2_K,
    FileType.Q2_K_S: GGMLType.Q2_K,
    FileType.Q3_K_S: GGMLType.Q3_K,
    FileType.Q3_K_M: GGMLType.Q3_K,
    FileType.Q3_K_L: GGMLType.Q3_K,
    FileType.Q4_K_S: GGMLType.Q4_K,
    FileType.Q4_K_M: GGMLType.Q4_K,
    FileType.Q5_K_S: GGMLType.Q5_K,
    FileType.Q5_K_M: GGMLType.Q5_K,
    FileType.Q6_K: GGMLType.Q6_K,
    FileType.IQ1_S: GGMLType.IQ1_S,
    FileType.IQ1_M: GGMLType.IQ1_M,
    FileType.IQ2_XXS: GGMLType.IQ2_XXS,
    FileType.IQ2_XS: GGMLType.IQ2_XS,
    FileType.IQ2_S: GGMLType.IQ2_XS,
    FileType.IQ2_M: GGMLType.IQ2_S,
    FileType.IQ3_XXS: GGMLType.IQ3_XXS,
    FileType.IQ3_XS: GGMLType.IQ3_S,
    FileType.IQ3_S: GGMLType.IQ3_S,
    FileType.IQ3_M: GGMLType.IQ3_S,
    FileType.IQ4_NL: GGMLType.IQ4_NL,
    FileType.IQ4_XS: GGMLType.IQ4_XS,
    FileType.Q1_0: GGMLType.Q1_0,
    FileType.Q2_0: GGMLType.Q2_0,
    FileType.TQ1_0: GGMLType.TQ1_0,
    FileType.TQ2_0: GGMLType.TQ2_0,
    FileType.MXFP4_MOE: GGMLType.MXFP4,
    FileType.NVFP4: GGMLType.NVFP4,  # llama.cpp reads such files; llama-quantize does not offer to make them
}
TENSOR_TYPES = frozenset(DEFAULT_TYPES.values())

_ALIASES = {
    "Q3_K": FileType.Q3_K_M,
    "Q4_K": FileType.Q4_K_M,
    "Q5_K": FileType.Q5_K_M,
    "MXFP4": FileType.MXFP4_MOE,
}


@dataclass(frozen=True)
class Target:
    """What a file is to become: a file type, or None to copy every tensor as it is."""

    file_type: FileType | None

    @property
    def name(self) -> str:
        """The name, in capitals."""
        return "COPY" if self.file_type is None else self.file_type.name

    @property
    def default(self) -> GGMLType | None:
        """The type of most tensors; None to copy."""
        return None if self.file_type is None else DEFAULT_TYPES[self.file_type]


COPY = Target(None)


def parse_file_type(text: str) -> Target:
    """Read a file type: its name in any case, llama.cpp's number, an alias (Q3_K, Q4_K, Q5_K, MXFP4) or COPY.

    TypeNameError offers the nearest name.
    """
    name = text.strip().upper()
    if name == "COPY":
        return COPY
    known = {kind.name: kind for kind in DEFAULT_TYPES} | _ALIASES
    found = known.get(name)
    if found is None and name.isascii() and name.isdecimal():
        found = next((kind for kind in DEFAULT_TYPES if str(int(kind)) == name), None)
        if found is None:
            raise TypeNameError(f"{text} is not the number of a file type; known are {_numbers()}.")
    if found is None:
        raise TypeNameError(f"{text!r} is not a file type{_nearest(name, _names())}; known are {', '.join(_names())}.")
    return Target(found)


def parse_tensor_type(text: str) -> GGMLType:
    """Read the type of one tensor, in any case.

    TypeNameError offers the nearest name; UnsupportedError if it is a type that weights are not stored as.
    """
    name = text.strip().upper()
    known = [kind.name for kind in GGMLType if kind in TENSOR_TYPES]
    if name in known:
        return GGMLType[name]
    if name in GGMLType.__members__:
        raise UnsupportedError(f"Weights are not stored as {name}; {', '.join(known)} are possible.")
    raise TypeNameError(f"{text!r} is not a tensor type{_nearest(name, known)}; known are {', '.join(known)}.")


def _names() -> list[str]:
    return [*(kind.name for kind in DEFAULT_TYPES), *_ALIASES, "COPY"]


def _numbers() -> str:
    return ", ".join(f"{int(kind)} ({kind.name})" for kind in sorted(DEFAULT_TYPES))


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""
