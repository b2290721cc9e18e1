"""The header of a GGUF file: read in place from the mapped file, every field checked before anything is believed.

Layout (all numbers little-endian; versions 2 and 3 are the same):

    "GGUF"  version u32  tensors i64  pairs i64
    pairs:    key string, value type i32, value
    tensors:  name string, dimensions u32, extents i64[], type i32, offset u64
    zeros up to the alignment, then each tensor's bytes, each padded with zeros to the alignment

    string:   length u64, UTF-8          array:   item type i32, count u64, items

A hostile file may not cost memory: counts are compared with the bytes that are left before anything is allocated,
numbers are the only values kept at opening, and strings and arrays are checked in place and become Python objects on
first use.
"""

import math
import mmap
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import GGUFError
from phiquant.gguf.strings import BadString, check_strings, check_utf8, read_strings
from phiquant.gguf.types import GGMLType, ValueType

__all__ = ["Field", "Header", "TensorInfo"]

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_DIMENSIONS: Final = 4
MAX_TENSOR_NAME: Final = 63  # bytes; the C reader keeps 64 with the terminator
MAX_STRING: Final = 1 << 30  # bytes
MAX_ITEMS: Final = 1 << 30
# A pair or a tensor costs some 500 bytes of Python for as little as 14 or 25 of the file, so their number and the
# length of a key have limits of their own, far above any model (512 blocks of 60 tensors).
MAX_KEY: Final = 1024  # bytes
MAX_PAIRS: Final = 16384
MAX_TENSORS: Final = 32768
_MIN_PAIR: Final = 14  # bytes: a key of one letter and a value of one byte
_MIN_TENSOR: Final = 25  # bytes: a name of one letter and no extents
_MAX_I64: Final = (1 << 63) - 1

SCALARS: Final = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
DTYPES: Final[dict[ValueType, np.dtype[Any]]] = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
_U32: Final = SCALARS[ValueType.UINT32]
_I32: Final = SCALARS[ValueType.INT32]
_U64: Final = SCALARS[ValueType.UINT64]
_I64: Final = SCALARS[ValueType.INT64]


class Field:
    """One metadata value: its type as stored, and the value, which is read from the file on first use.

    `type` is the value's type, `item_type` the type of an array's items (None for all others), `count` the number of
    items of an array (1 for all others).
    """

    __slots__ = ("_load", "_value", "count", "item_type", "type")

    def __init__(
        self,
        type: ValueType,
        item_type: ValueType | None,
        count: int,
        load: Callable[[int], Any] | None,
        value: Any = None,
    ) -> None:
        self.type = type
        self.item_type = item_type
        self.count = count
        self._load = load
        self._value = value

    @property
    def value(self) -> Any:
        """The value: int, float, bool or str; an array of numbers as a NumPy array, one of strings as list[str].

        Strings and arrays are read here the first time, so the file must still be open then.
        """
        load = self._load  # a local name, since another thread may finish the same work meanwhile
        if load is not None:
            self._value = load(self.count)
            self._load = None
        return self._value

    def head(self, count: int) -> Any:
        """At most the first `count` items of an array, without reading the others."""
        if self.type is not ValueType.ARRAY:
            raise ValueError("only an array has items")
        load = self._load
        return self._value[:count] if load is None else load(min(count, self.count))

    def __repr__(self) -> str:
        if self.type is ValueType.ARRAY and self.item_type is not None:
            return f"Field({self.type.name} of {self.count} {self.item_type.name})"
        return f"Field({self.type.name}, {self.value!r:.80})"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One line of the tensor table.

    `shape` is in NumPy order (the contiguous extent last; GGUF stores it first), `offset` counts from the start of the
    data section and `nbytes` is the size without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


class _Shaped(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...


def parameter_count(tensors: Iterable[_Shaped]) -> int:
    """Numbers in all these tensors."""
    return sum(math.prod(tensor.shape) for tensor in tensors)


class Header:
    """The header as it is read: a position in the mapping that only moves over bytes that exist."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.map = mapped
        self.size = len(mapped)
        self.at = 4
        if mapped[:4] != MAGIC:
            raise GGUFError(f"{path} is not a GGUF file: it starts with {mapped[:4]!r} and not with {MAGIC!r}.")
        self.version = self._number(_U32, "the version")
        if self.version & 0xFFFF == 0 and self.version:
            raise GGUFError(f"{path} is a big-endian GGUF file, which is not supported; convert the model again.")
        if self.version not in VERSIONS:
            raise GGUFError(
                f"{path} is GGUF version {self.version}; versions 2 and 3 can be read, so convert it again."
            )
        tensors = self._number(_I64, "the number of tensors")
        pairs = self._number(_I64, "the number of keys")
        self._check_count(pairs, _MIN_PAIR, MAX_PAIRS, "keys")
        self._check_count(tensors, _MIN_TENSOR, MAX_TENSORS, "tensors")
        self.fields: dict[str, Field] = {}
        for index in range(pairs):
            self._pair(index)
        self.alignment = self._alignment()
        self._check_count(tensors, _MIN_TENSOR, MAX_TENSORS, "tensors")
        self.tensors: dict[str, TensorInfo] = {}
        end = 0
        for index in range(tensors):
            end = self._tensor(index, end)
        self.data_offset = self._padded(self.at) if tensors else self.at
        for info in self.tensors.values():
            if self.data_offset + info.offset + info.nbytes > self.size:
                self._fail(
                    f"tensor {_show(info.name)} ends beyond the end of the file; it is truncated, so fetch it again"
                )

    def _fail(self, reason: str) -> NoReturn:
        raise GGUFError(f"{self.path} is not valid GGUF: {reason}.")

    def _check_count(self, count: int, least: int, limit: int, what: str) -> None:
        if not 0 <= count <= (self.size - self.at) // least:
            self._fail(f"it announces {count} {what}, more than its {self.size} bytes can hold")
        if count > limit:
            self._fail(f"it announces {count} {what}, and more than {limit} are refused")

    def _skip(self, count: int, what: str) -> int:
        """Move over `count` bytes and return where they start."""
        start = self.at
        if count > self.size - start:
            self._fail(f"the file ends within {what}")
        self.at = start + count
        return start

    def _number(self, kind: struct.Struct, what: str) -> Any:
        return kind.unpack_from(self.map, self._skip(kind.size, what))[0]

    def _string(self, limit: int, what: str) -> tuple[int, int]:
        """Move over a string and return where its text starts and ends."""
        length = self._number(_U64, what)
        if length > limit:
            self._fail(f"{what} is {length} bytes long, and more than {limit} are refused")
        start = self._skip(length, what)
        return start, self.at

    def _name(self, limit: int, what: str) -> str:
        start, end = self._string(limit, what)
        try:
            name = self.map[start:end].decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not valid UTF-8")
        if not name:
            self._fail(f"{what} is empty")
        return name

    def _pair(self, index: int) -> None:
        key = self._name(MAX_KEY, f"the name of key {index}")
        if key in self.fields:
            self._fail(f"the key {_show(key)} occurs twice")
        what = f"the value of the key {_show(key)}"
        kind = self._value_type(what)
        if kind is ValueType.ARRAY:
            self.fields[key] = self._array(what)
        elif kind is ValueType.STRING:
            mapped = self.map
            start, end = self._string(MAX_STRING, what)
            if not check_utf8(mapped, start, end):
                self._fail(f"{what} is not valid UTF-8")
            self.fields[key] = Field(kind, None, 1, lambda _: mapped[start:end].decode())
        else:
            value = self._number(SCALARS[kind], what)
            if kind is ValueType.BOOL:
                if value > 1:
                    self._fail(f"{what} is {value} where a bool is 0 or 1")
                value = value == 1
            self.fields[key] = Field(kind, None, 1, None, value)

    def _value_type(self, what: str) -> ValueType:
        number = self._number(_I32, what)
        try:
            return ValueType(number)
        except ValueError:
            self._fail(f"{what} has the unknown type {number}")

    def _array(self, what: str) -> Field:
        item = self._value_type(what)
        if item is ValueType.ARRAY:
            self._fail(f"{what} is an array of arrays, which GGUF readers refuse")
        count = self._number(_U64, what)
        least = 8 if item is ValueType.STRING else SCALARS[item].size
        if count > (self.size - self.at) // least:
            self._fail(f"{what} announces {count} items, more than the file can hold")
        if count > MAX_ITEMS:
            self._fail(f"{what} announces {count} items, and more than {MAX_ITEMS} are refused")
        start = self.at
        mapped = self.map
        if item is ValueType.STRING:
            try:
                self.at = check_strings(mapped, start, count, MAX_STRING)
            except BadString as error:
                self._fail(f"{what} is broken: {error}")
            return Field(ValueType.ARRAY, item, count, lambda count: read_strings(mapped, start, count))
        dtype = DTYPES[item]
        self._skip(count * dtype.itemsize, what)
        if item is ValueType.BOOL and count and np.frombuffer(mapped, np.uint8, count, start).max() > 1:
            self._fail(f"{what} holds a bool that is neither 0 nor 1")
        return Field(ValueType.ARRAY, item, count, lambda count: _read_numbers(mapped, dtype, start, count))

    def _alignment(self) -> int:
        field = self.fields.get("general.alignment")
        if field is None:
            return 32
        if field.type is not ValueType.UINT32:
            self._fail(f"the key 'general.alignment' is {field.type.name} and must be UINT32")
        alignment = int(field.value)
        if alignment == 0 or alignment & (alignment - 1):
            self._fail(f"the key 'general.alignment' is {alignment} and must be a power of two")
        return alignment

    def _padded(self, count: int) -> int:
        return -(-count // self.alignment) * self.alignment

    def _tensor(self, index: int, expected: int) -> int:
        """Read one line of the table, whose data must start at `expected`; returns where the next one's must."""
        name = self._name(MAX_TENSOR_NAME, f"the name of tensor {index}")
        if name in self.tensors:
            self._fail(f"the tensor {_show(name)} occurs twice")
        what = f"tensor {_show(name)}"
        dimensions = self._number(_U32, what)
        if dimensions > MAX_DIMENSIONS:
            self._fail(f"{what} has {dimensions} dimensions, and more than {MAX_DIMENSIONS} are refused")
        extents = [int(self._number(_I64, what)) for _ in range(dimensions)]
        if min(extents, default=1) < 0:
            self._fail(f"{what} has the negative extent {min(extents)}")
        if math.prod(extent or 1 for extent in extents) > _MAX_I64:
            self._fail(f"{what} has more elements than 63 bits can count")
        number = self._number(_I32, what)
        try:
            kind = GGMLType(number)
        except ValueError:
            self._fail(f"{what} has the unknown type {number}")
        row = extents[0] if extents else 1
        if row % kind.block_elements:
            self._fail(f"{what} has rows of {row}, not a multiple of {kind.name}'s block of {kind.block_elements}")
        nbytes = kind.row_bytes(row) * math.prod(extents[1:])
        offset = self._number(_U64, what)
        if offset % self.alignment:
            self._fail(f"{what} starts at {offset}, not a multiple of the alignment {self.alignment}")
        if offset != expected:
            self._fail(f"{what} starts at {offset} where the tensors before it end at {expected}")
        if nbytes > self.size:
            self._fail(f"{what} is {nbytes} bytes long, more than the whole file; it is truncated, so fetch it again")
        self.tensors[name] = TensorInfo(name, tuple(reversed(extents)), kind, offset, nbytes)
        return self._padded(offset + nbytes)


def _show(name: str) -> str:
    """A name from a file, safe to print: escaped and of bounded length."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _read_numbers(mapped: mmap.mmap, dtype: np.dtype[Any], start: int, count: int) -> NDArray[Any]:
    """A copy of an array of numbers: aligned, and independent of the file."""
    return np.frombuffer(mapped, dtype, count, start).copy()
