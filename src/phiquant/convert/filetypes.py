"""Names of file types and tensor types, as users and llama.cpp write them."""

import difflib
from dataclasses import dataclass

from phiquant.errors import TypeNameError, UnsupportedError
from phiquant.gguf.types import FileType, GGMLType

__all__ = ["COPY", "DEFAULT_TYPES", "SUPPORTED_TENSOR_TYPES", "Target", "parse_file_type", "parse_tensor_type"]

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
}
SUPPORTED_TENSOR_TYPES = frozenset(DEFAULT_TYPES.values())

_ALIASES = {"Q3_K": FileType.Q3_K_M, "Q4_K": FileType.Q4_K_M, "Q5_K": FileType.Q5_K_M}
_NOT_FILE_TYPES = (FileType.GUESSED, FileType.NVFP4)  # not offered by llama-quantize either


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
    """Read a file type: its name in any case, llama.cpp's number, an alias (Q3_K, Q4_K, Q5_K) or COPY.

    TypeNameError offers the nearest name; UnsupportedError if llama.cpp knows the type and this version does not.
    """
    name = text.strip().upper()
    known = {kind.name: kind for kind in FileType if kind not in _NOT_FILE_TYPES}
    if name == "COPY":
        return COPY
    found = known.get(name, _ALIASES.get(name))
    if found is None and name.isascii() and name.isdecimal():
        found = next((kind for kind in known.values() if str(int(kind)) == name), None)
        if found is None:
            raise TypeNameError(f"{text} is not the number of a file type; known are {_numbers()}.")
    if found is None:
        raise TypeNameError(
            f"{text!r} is not a file type{_nearest(name, [*_names(), *known])}; known are {', '.join(_names())}."
        )
    if found not in DEFAULT_TYPES:
        raise UnsupportedError(
            f"File type {found.name} of llama.cpp is not made by this version; {', '.join(_names())} are."
        )
    return Target(found)


def parse_tensor_type(text: str) -> GGMLType:
    """Read the type of one tensor, in any case; errors as `parse_file_type`."""
    name = text.strip().upper()
    supported = [kind.name for kind in GGMLType if kind in SUPPORTED_TENSOR_TYPES]
    if name in supported:
        return GGMLType[name]
    if name in GGMLType.__members__:
        raise UnsupportedError(f"Tensors of type {name} are not made by this version; {', '.join(supported)} are.")
    raise TypeNameError(f"{text!r} is not a tensor type{_nearest(name, supported)}; known are {', '.join(supported)}.")


def _names() -> list[str]:
    return [*(kind.name for kind in DEFAULT_TYPES), *_ALIASES, "COPY"]


def _numbers() -> str:
    return ", ".join(f"{int(kind)} ({kind.name})" for kind in sorted(DEFAULT_TYPES))


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""
