"""Writing GGUF version 3, little-endian, with tensor data arriving in any order from any thread.

The whole table of tensors is declared first, so every byte's place is known when `begin` writes the header; after that
`write` is positioned and needs no order. The bytes go to a file of another name beside the target, which takes the
target's name only in `commit`; until then, and after any error, nothing exists under that name.
"""

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from phiquant.gguf.header import DTYPES, MAGIC, MAX_DIMENSIONS, MAX_KEY, MAX_STRING, MAX_TENSOR_NAME, SCALARS
from phiquant.gguf.output import OutputFile
from phiquant.gguf.types import GGMLType, ValueType

__all__ = ["GGUFWriter"]

Bytes = bytes | bytearray | memoryview | NDArray[Any]

_VERSION: Final = 3
_DEFAULT_ALIGNMENT: Final = 32


@dataclass(slots=True)
class _Plan:
    """A declared tensor: where its bytes go, and which of them have been written."""

    shape: tuple[int, ...]
    type: GGMLType
    offset: int  # from the start of the data section
    nbytes: int
    written: list[tuple[int, int]] = field(default_factory=list)  # sorted, disjoint, merged [start, end)

    def claim(self, start: int, end: int) -> bool:
        """Note [start, end) as written; False if a part of it was already."""
        place = len(self.written)
        while place and self.written[place - 1][0] >= end:
            place -= 1
        if place and self.written[place - 1][1] > start:
            return False
        if place < len(self.written) and self.written[place][0] == end:
            end = self.written.pop(place)[1]
        if place and self.written[place - 1][1] == start:
            place -= 1
            start = self.written.pop(place)[0]
        self.written.insert(place, (start, end))
        return True

    @property
    def complete(self) -> bool:
        return self.nbytes == 0 or self.written == [(0, self.nbytes)]


class GGUFWriter:
    """Writes one GGUF file: `add` and `add_tensor`, then `begin`, then `write` from any thread, then `commit`.

    Use it as a context manager: leaving it by an exception removes everything. Misuse (a duplicate key, a value that
    does not fit its type, a tensor written twice or not at all) is a ValueError; what the file system refuses is an
    OutputError that names the path.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        alignment: int = _DEFAULT_ALIGNMENT,
        overwrite: bool = True,
        protect: Iterable[str | os.PathLike[str]] = (),
        keep: bool = False,
    ) -> None:
        """Take `path` as the target, refusing at once what could never be written.

        `alignment` is in bytes, a power of two; one other than 32 is also written as the key `general.alignment`.
        Without `overwrite` an existing target is refused. `protect` lists files that are being read and may not be
        the target. With `keep` an unfinished file stays behind, and a later writer of the same declarations finds it.
        """
        if alignment <= 0 or alignment & (alignment - 1) or alignment >= 1 << 32:
            raise ValueError(f"the alignment is {alignment} and must be a power of two below 2^32")
        self.path = Path(path)
        self.alignment = alignment
        self.size = 0  # bytes of the whole file, known from `begin` on
        self._file = OutputFile(self.path, overwrite=overwrite, protect=protect, keep=keep)
        self._pairs: dict[str, bytes] = {}
        self._plans: dict[str, _Plan] = {}
        self._data_end = 0
        self._data_offset = 0

    def add(self, key: str, value: Any, type: ValueType, item_type: ValueType | None = None) -> None:
        """Append a metadata pair; an array needs its `item_type` and is a sequence or 1-D NumPy array of such items."""
        self._declare()
        name = key.encode()
        if not name or len(name) > MAX_KEY:
            raise ValueError(f"the key {key[:80]!r} has {len(name)} bytes and must have 1 to {MAX_KEY}")
        if key in self._pairs:
            raise ValueError(f"the key {key!r} is added twice")
        if key == "general.alignment" and (type is not ValueType.UINT32 or value != self.alignment):
            raise ValueError(f"general.alignment must be UINT32 {self.alignment}, as the writer was made with")
        self._pairs[key] = _encode_string(name) + _encode_pair(key, value, type, item_type)

    def add_tensor(self, name: str, shape: Sequence[int], type: GGMLType) -> None:
        """Declare the file's next tensor: `shape` in NumPy order, the contiguous extent last."""
        self._declare()
        length = len(name.encode())
        if not 1 <= length <= MAX_TENSOR_NAME:
            raise ValueError(f"the tensor name {name[:80]!r} has {length} bytes and must have 1 to {MAX_TENSOR_NAME}")
        if name in self._plans:
            raise ValueError(f"the tensor {name!r} is declared twice")
        extents = tuple(int(extent) for extent in shape)
        if not 1 <= len(extents) <= MAX_DIMENSIONS or min(extents) < 0:
            raise ValueError(f"the tensor {name!r} has the shape {extents}; 1 to {MAX_DIMENSIONS} extents are possible")
        try:
            nbytes = type.row_bytes(extents[-1])
        except ValueError as error:
            raise ValueError(f"the tensor {name!r}: {error}") from error
        for extent in extents[:-1]:
            nbytes *= extent
        self._plans[name] = _Plan(extents, type, self._data_end, nbytes)
        self._data_end = self._padded(self._data_end + nbytes)

    def _declare(self) -> None:
        if self._file.begun:
            raise ValueError("keys and tensors are declared before begin()")

    def _padded(self, count: int) -> int:
        return -(-count // self.alignment) * self.alignment

    def begin(self, *, fresh: bool = False) -> None:
        """Create the temporary file at its full size and write the header; OutputError if the disk cannot hold it.

        `fresh`: nothing is used of the file that an earlier writer kept.
        """
        self._declare()
        if self.alignment != _DEFAULT_ALIGNMENT and "general.alignment" not in self._pairs:
            self.add("general.alignment", self.alignment, ValueType.UINT32)
        header = self._header()
        # As gguf-py and llama.cpp have it: a file without tensors ends with its header, without padding.
        self._data_offset = self._padded(len(header)) if self._plans else len(header)
        self.size = self._data_offset + self._data_end
        self._file.begin(self.size, fresh=fresh)
        try:
            self._file.put(memoryview(header), 0)
        except BaseException:
            self.abort()
            raise

    @property
    def kept(self) -> bool:
        """Whether `begin` found the unfinished file of an earlier writer, whose tensors may be adopted."""
        return self._file.kept

    @property
    def unfinished_path(self) -> Path:
        """Where the file is between `begin` and `commit`; ValueError before and after."""
        return self._file.temporary_path

    def _header(self) -> bytes:
        parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(self._plans), len(self._pairs)), *self._pairs.values()]
        for name, plan in self._plans.items():
            parts.append(_encode_string(name.encode()))
            extents = plan.shape[::-1]
            parts.append(struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, plan.type, plan.offset))
        return b"".join(parts)

    def write(self, name: str, data: Bytes, offset: int = 0) -> None:
        """Write contiguous `data` into a tensor, `offset` bytes from its start.

        Safe from several threads; ValueError if the bytes lie outside the tensor or were written before.
        """
        view = _as_bytes(data)
        plan = self._plans.get(name)
        if plan is None:
            raise ValueError(f"the tensor {name!r} was not declared")
        if offset < 0 or offset + len(view) > plan.nbytes:
            raise ValueError(f"{len(view)} bytes at {offset} are outside the tensor {name!r} of {plan.nbytes} bytes")
        declared = plan

        def claim() -> None:
            if len(view) and not declared.claim(offset, offset + len(view)):
                raise ValueError(f"bytes {offset} to {offset + len(view)} of the tensor {name!r} are written twice")

        self._file.put(view, self._data_offset + plan.offset + offset, claim)

    def replace(self, key: str, value: Any, type: ValueType, item_type: ValueType | None = None) -> None:
        """Write another value of a key over the one in the header, between `begin` and `commit`; as long as that."""
        before = self._pairs[key]
        encoded = _encode_string(key.encode()) + _encode_pair(key, value, type, item_type)
        if len(encoded) != len(before):
            raise ValueError(f"the new value of {key!r} is longer or shorter than the old one")
        at = 24
        for other, pair in self._pairs.items():
            if other == key:
                break
            at += len(pair)
        self._file.put(memoryview(encoded), at)
        self._pairs[key] = encoded

    def read_into(self, name: str, offset: int, target: NDArray[np.uint8]) -> bool:
        """Fill `target` with what a kept file has of a tensor; False if it cannot be read."""
        return self._file.get(target, self._data_offset + self._plans[name].offset + offset)

    def adopt(self, name: str) -> None:
        """Count a tensor of a kept file as written; the caller knows that its bytes are right."""
        plan = self._plans[name]
        if plan.nbytes and not plan.claim(0, plan.nbytes):
            raise ValueError(f"the tensor {name!r} is written already")

    def sync(self) -> None:
        """Wait until the disk has all that was written so far."""
        self._file.sync()

    def commit(self) -> None:
        """Give the finished file its name; ValueError, and nothing is left, if a byte of a tensor is missing."""
        file = self._file
        if not file.unfinished:
            raise ValueError("commit() comes once, after begin()")
        missing = [name for name, plan in self._plans.items() if not plan.complete]
        if missing or file.writing or file.failed:
            self.abort()
            reason = f"{len(missing)} tensors are incomplete ({missing[:3]})" if missing else "a write is under way"
            raise ValueError(f"{self.path} is not committed: {'a write failed' if file.failed else reason}")
        file.commit()

    def abort(self, *, discard: bool = False) -> None:
        """Remove what was written (with `keep`: only if `discard`); harmless after `commit` and when called again."""
        self._file.abort(discard=discard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unfinished = self._file.unfinished
        self.abort()
        if unfinished and error is None:
            raise ValueError(f"{self.path} was begun and not committed, so it was removed")


def _as_bytes(data: Bytes) -> memoryview:
    """A flat view of contiguous data; ValueError if it is not contiguous."""
    if isinstance(data, np.ndarray):
        if not data.flags.c_contiguous:
            raise ValueError("tensor data must be contiguous")
        return data.reshape(-1).view(np.uint8).data
    view = memoryview(data)
    if not view.c_contiguous:
        raise ValueError("tensor data must be contiguous")
    return view.cast("B")


def _encode_string(text: bytes) -> bytes:
    if len(text) > MAX_STRING:
        raise ValueError(f"it is {len(text)} bytes long, and GGUF readers refuse more than {MAX_STRING}")
    return struct.pack("<Q", len(text)) + text


def _encode_pair(key: str, value: Any, type: ValueType, item_type: ValueType | None) -> bytes:
    """Type and value, as they follow a key."""
    if (type is ValueType.ARRAY) != (item_type is not None):
        raise ValueError(f"the key {key!r}: an array has an item type, and nothing else has")
    try:
        encoded = _encode_array(value, item_type) if item_type is not None else _encode(value, type)
    except (struct.error, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"the value of {key!r} is not {(item_type or type).name}: {error}") from error
    return struct.pack("<i", type) + encoded


def _encode(value: Any, type: ValueType) -> bytes:
    if type is ValueType.STRING:
        return _encode_string(value.encode())
    if type is ValueType.BOOL:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{value!r} is no bool")
        return b"\1" if value else b"\0"
    if isinstance(value, bool | np.bool_ | str):
        raise TypeError(f"{value!r} is no number")
    return SCALARS[type].pack(value)


def _encode_array(value: Any, item_type: ValueType) -> bytes:
    if item_type is ValueType.ARRAY:
        raise ValueError("GGUF readers refuse arrays of arrays")
    head = struct.pack("<iQ", item_type, len(value))
    if item_type is ValueType.STRING:
        if isinstance(value, str):
            raise TypeError("a string is not an array of strings")
        return head + b"".join([_encode_string(item.encode()) for item in value])
    dtype = DTYPES[item_type]
    source = np.asarray(value)
    if source.ndim != 1:
        raise ValueError(f"an array has one dimension and not {source.ndim}")
    if source.size == 0:
        return head
    with np.errstate(over="raise"):
        packed = source.astype(dtype)
    # Only a loss that the types themselves bring is accepted: floats are rounded, integers never wrap or lose digits.
    exact = source.dtype.kind == dtype.kind or (source.dtype.kind in "iu" and dtype.kind in "iuf")
    if not exact or (dtype.kind in "iu" and not np.array_equal(packed, source)):
        raise ValueError(f"its items are {source.dtype} or out of range")
    return head + packed.tobytes()
