"""Opening GGUF files: mapped, checked, and read by key and by tensor name."""

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any, Final, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import GGUFError
from phiquant.gguf.closing import Closing
from phiquant.gguf.header import Field, Header, TensorInfo
from phiquant.gguf.types import ValueType

__all__ = ["GGUFFile"]

_INTEGERS: Final = frozenset(ValueType) - {
    ValueType.FLOAT32,
    ValueType.FLOAT64,
    ValueType.BOOL,
    ValueType.STRING,
    ValueType.ARRAY,
}
_FLOATS: Final = frozenset({ValueType.FLOAT32, ValueType.FLOAT64})

T = TypeVar("T", int, float, bool, str, list[str], NDArray[Any])


class _Metadata(Mapping[str, Any]):
    """The plain values of a file's fields, by key, in the file's order."""

    __slots__ = ("_fields",)

    def __init__(self, fields: dict[str, Field]) -> None:
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class GGUFFile(Closing):
    """A GGUF file, mapped and checked; `GGUFFile.open` makes one.

    Attributes: `path`, `version` (2 or 3), `alignment` and `data_offset` in bytes, `size` of the file in bytes,
    `byte_order` ("little"), `fields` (key -> Field), `metadata` (key -> plain value), `tensors` (name -> TensorInfo),
    the last three in the file's order. Strings and arrays are read on first use: not after `close`. One part of a split
    model is a file like any other here; `open_model` presents all parts as one.
    """

    byte_order: Final = "little"

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.size = len(mapped)
        self._map: mmap.mmap | None = mapped
        header = Header(path, mapped)
        self.version = header.version
        self.alignment = header.alignment
        self.data_offset = header.data_offset
        self.fields = header.fields
        self.tensors = header.tensors
        self.metadata: Mapping[str, Any] = _Metadata(self.fields)
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(mapped, np.uint8)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GGUFFile":
        """Map the file and check its whole header; GGUFError says which field is wrong."""
        path = Path(path)
        try:
            # Not opened before it is known to be a file: opening a pipe waits for its other end.
            if not stat.S_ISREG(path.stat().st_mode):
                raise GGUFError(f"{path} is not a file; give the path of a .gguf file.")
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < 24:
                    raise GGUFError(
                        f"{path} is not a GGUF file: it is shorter than GGUF's smallest header of 24 bytes."
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise GGUFError(f"{path} cannot be opened: {reason}.") from error
        try:
            return cls(path, mapped)
        except BaseException:
            with contextlib.suppress(BufferError):
                mapped.close()
            raise

    @property
    def parts(self) -> "tuple[GGUFFile, ...]":
        """The files that hold the tensors, in order: this one, if the model is not split."""
        return (self,)

    def locate(self, name: str) -> "tuple[GGUFFile, int]":
        """The file that holds a tensor, and where in it its bytes start; GGUFError if there is none such."""
        return self, self.data_offset + self._info(name).offset

    def _info(self, name: str) -> TensorInfo:
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(f"{self.path} has no tensor {name!r}.")
        return info

    def close(self) -> None:
        """Forget the mapping; arrays that `data` gave out keep it alive until they go."""
        mapped, self._map, self._bytes = self._map, None, None
        if mapped is not None:
            with contextlib.suppress(BufferError):  # the last array unmaps it
                mapped.close()

    def __repr__(self) -> str:
        return f"GGUFFile({str(self.path)!r}, {len(self.fields)} keys, {len(self.tensors)} tensors)"

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor: uint8 [nbytes], a read-only view of the mapped file; GGUFError if it has none such."""
        info = self._info(name)
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        start = self.data_offset + info.offset
        return self._bytes[start : start + info.nbytes]

    @overload
    def get(self, key: str, kind: type[T], default: T | EllipsisType = ...) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: None) -> T | None: ...
    def get(self, key: str, kind: type[T], default: T | EllipsisType | None = ...) -> T | None:
        """A value of a given kind: int, float, bool, str, list (of strings) or np.ndarray (of numbers or bools).

        A missing key gives `default`. GGUFError, naming the key, if there is none or the value is of another kind; an
        integer of any width is an int, and no integer is a float or a bool.
        """
        field = self.fields.get(key)
        if field is None:
            if default is ...:
                raise GGUFError(f"{self.path} lacks the key {key!r}; it is incomplete, so convert the model again.")
            return default
        if kind is int:
            good = field.type in _INTEGERS
        elif kind is float:
            good = field.type in _FLOATS
        elif kind is bool:
            good = field.type is ValueType.BOOL
        elif kind is str:
            good = field.type is ValueType.STRING
        elif kind is list:
            good = field.item_type is ValueType.STRING
        elif kind is np.ndarray:
            good = field.type is ValueType.ARRAY and field.item_type is not ValueType.STRING
        else:
            raise TypeError(f"a key is read as int, float, bool, str, list or np.ndarray, not {kind!r}")
        if not good:
            stored = field.type.name if field.item_type is None else f"ARRAY of {field.item_type.name}"
            expected = {list: "an array of strings", np.ndarray: "an array of numbers"}.get(kind, kind.__name__)
            raise GGUFError(f"{self.path} stores the key {key!r} as {stored} where {expected} is expected.")
        value: T = field.value
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """`get` without a default."""
        return self.get(key, kind)
