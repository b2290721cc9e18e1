"""`--override-kv KEY=TYPE:VALUE`: metadata set by hand, in llama.cpp's syntax."""

import math
from collections.abc import Iterable, Sequence

from phiquant.convert.entries import Entry, boolean, float32, string, uint32
from phiquant.errors import RequestError
from phiquant.gguf.types import ValueType

__all__ = ["apply_overrides", "parse_override"]

_MAX_KEY = 127  # llama.cpp's limit
_KINDS = {
    ValueType.STRING: "str",
    ValueType.BOOL: "bool",
    ValueType.FLOAT32: "float",
    ValueType.FLOAT64: "float",
    ValueType.ARRAY: "array",
}


def parse_override(text: str) -> Entry:
    """Read KEY=TYPE:VALUE, TYPE one of int, float, bool, str; RequestError says what is malformed.

    Whole numbers are stored as unsigned 32-bit ones, as llama-quantize does.
    """
    if not text.isascii() and text.encode(errors="replace").decode() != text:  # bytes of argv that are not UTF-8
        raise RequestError(f"--override-kv {text!r} is not valid Unicode.")
    key, equals, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    if not key or not equals or not colon or len(key.encode()) > _MAX_KEY:
        raise RequestError(f"--override-kv {text!r} is not KEY=TYPE:VALUE, such as phi3.context_length=int:8192.")
    if kind == "str":
        return string(key, value)
    if kind == "bool" and value in ("true", "false"):
        return boolean(key, value == "true")
    try:
        if kind == "int" and 0 <= int(value) < 2**32:
            return uint32(key, int(value))
        if kind == "float" and math.isfinite(float(value)) and abs(float(value)) < 3.4e38:
            return float32(key, float(value))
    except ValueError:
        pass
    expected = {
        "int": "a whole number from 0 to 4294967295",
        "float": "a number that fits 32 bits",
        "bool": "true or false",
    }.get(kind)
    if expected is None:
        raise RequestError(f"--override-kv {text!r}: {kind!r} is not a type; known are int, float, bool, str.")
    raise RequestError(f"--override-kv {text!r}: {value!r} is not {expected}.")


def apply_overrides(entries: Sequence[Entry], overrides: Iterable[Entry]) -> list[Entry]:
    """Replace entries where they stand, append new ones; RequestError if a value's kind would change."""
    result = {entry.key: entry for entry in entries}
    for override in overrides:
        old = result.get(override.key)
        kind = _KINDS.get(override.type, "int")
        if old is not None and _KINDS.get(old.type, "int") != kind:
            held = _KINDS.get(old.type, "int")
            raise RequestError(f"--override-kv {override.key}: the file holds {held} there, not {kind}.")
        if override.key == "general.alignment":
            raise RequestError("--override-kv general.alignment: the alignment of a file cannot be overridden.")
        result[override.key] = override
    return list(result.values())
