"""One metadata entry on its way into a GGUF file, and short ways to make one."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from phiquant.errors import CheckpointError
from phiquant.gguf.types import ValueType

__all__ = ["Entry", "boolean", "check_entries", "float32", "int32", "string", "strings", "uint32"]


_MAX_KEY = 255
_MAX_TEXT = 2**24


class Entry(NamedTuple):
    """A key with its value and the types it is stored as; `item_type` for arrays only."""

    key: str
    type: ValueType
    value: Any
    item_type: ValueType | None = None


def check_entries(entries: Iterable[Entry], origin: str) -> None:
    """Raise CheckpointError for a key or text that GGUF cannot hold: no Unicode (a lone surrogate), or too long."""
    for entry in entries:
        texts = entry.value if entry.item_type is ValueType.STRING else [entry.value] * (entry.type is ValueType.STRING)
        try:
            longest = max((len(text.encode()) for text in texts), default=0)
        except UnicodeEncodeError as exc:
            raise CheckpointError(f"{origin} gives {entry.key[:60]} a text that is not valid Unicode.") from exc
        if len(entry.key) > _MAX_KEY or longest > _MAX_TEXT:
            raise CheckpointError(f"{origin} gives {entry.key[:60]} a name or text too long for GGUF.")


def string(key: str, value: str) -> Entry:
    """A UTF-8 string."""
    return Entry(key, ValueType.STRING, value)


def uint32(key: str, value: int) -> Entry:
    """An unsigned 32-bit number."""
    return Entry(key, ValueType.UINT32, value)


def int32(key: str, value: int) -> Entry:
    """A signed 32-bit number."""
    return Entry(key, ValueType.INT32, value)


def float32(key: str, value: float) -> Entry:
    """A 32-bit floating-point number."""
    return Entry(key, ValueType.FLOAT32, value)


def boolean(key: str, value: bool) -> Entry:
    """True or false."""
    return Entry(key, ValueType.BOOL, value)


def strings(key: str, value: list[str]) -> Entry:
    """An array of strings."""
    return Entry(key, ValueType.ARRAY, value, ValueType.STRING)
