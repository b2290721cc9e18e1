"""One metadata entry on its way into a GGUF file, and short ways to make one."""

from typing import Any, NamedTuple

from phiquant.gguf.types import ValueType

__all__ = ["Entry", "boolean", "float32", "int32", "string", "strings", "uint32"]


class Entry(NamedTuple):
    """A key with its value and the types it is stored as; `item_type` for arrays only."""

    key: str
    type: ValueType
    value: Any
    item_type: ValueType | None = None


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
