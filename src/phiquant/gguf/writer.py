"""Writing GGUF version 3, little-endian, with tensor data arriving in any order from any thread.

The whole table of tensors is declared first, so every byte's place is known when `begin` writes the header; after that
`write` is positioned and needs no order. The bytes go to a file of another name beside the target, which takes the
target's name only in `commit`; until then, and after any error, nothing exists under that name.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import OutputError
from phiquant.gguf.header import DTYPES, MAGIC, MAX_DIMENSIONS, MAX_KEY, MAX_STRING, MAX_TENSOR_NAME, SCALARS
from phiquant.gguf.types import GGMLType, ValueType

__all__ = ["GGUFWriter"]

Bytes = bytes | bytearray | memoryview | NDArray[Any]

_VERSION: Final = 3
_DEFAULT_ALIGNMENT: Final = 32
_CHUNK: Final = 1 << 30  # one system call writes less than 2 GiB


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
    ) -> None:
        """Take `path` as the target, refusing at once what could never be written.

        `alignment` is in bytes, a power of two; one other than 32 is also written as the key `general.alignment`.
        Without `overwrite` an existing target is refused. `protect` lists files that are being read and may not be
        the target.
        """
        if alignment <= 0 or alignment & (alignment - 1) or alignment >= 1 << 32:
            raise ValueError(f"the alignment is {alignment} and must be a power of two below 2^32")
        self.path = Path(path)
        self.alignment = alignment
        self.size = 0  # bytes of the whole file, known from `begin` on
        self._overwrite = overwrite
        self._target = self._check_target(protect)
        self._pairs: dict[str, bytes] = {}
        self._plans: dict[str, _Plan] = {}
        self._data_end = 0
        self._data_offset = 0
        self._temporary: Path | None = None
        self._descriptor = -1
        self._closed = False
        self._writing = 0  # threads within `write`
        self._failed = False
        self._state = threading.Condition()

    def _check_target(self, protect: Iterable[str | os.PathLike[str]]) -> Path:
        """The file behind the path (a link stays a link), once nothing is known to stand against writing it."""
        try:
            target = self.path.resolve()
            if target.exists():
                if not stat.S_ISREG(target.stat().st_mode):
                    raise OutputError(f"{self.path} exists and is not a file; choose another output path.")
                if not self._overwrite:
                    raise OutputError(f"{self.path} exists already; choose another output path or allow overwriting.")
                for source in protect:
                    if Path(source).exists() and target.samefile(source):
                        raise OutputError(f"{self.path} is also an input; choose another output path.")
            if not target.parent.is_dir():
                raise OutputError(
                    f"{self.path} cannot be written: {target.parent} is not a directory; create it first."
                )
            if not os.access(target.parent, os.W_OK):
                raise OutputError(f"{self.path} cannot be written: no permission to write into {target.parent}.")
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # ValueError: a null character; RuntimeError: a loop of links
            raise self._refused(error) from error
        return target

    def _refused(self, error: Exception) -> OutputError:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OutputError(f"{self.path} cannot be written: {error.strerror}; free some space or write elsewhere.")
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return OutputError(f"{self.path} cannot be written: {reason}.")

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
        if (type is ValueType.ARRAY) != (item_type is not None):
            raise ValueError(f"the key {key!r}: an array has an item type, and nothing else has")
        try:
            encoded = _encode_array(value, item_type) if item_type is not None else _encode(value, type)
        except (struct.error, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"the value of {key!r} is not {(item_type or type).name}: {error}") from error
        self._pairs[key] = _encode_string(name) + struct.pack("<i", type) + encoded

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
        if self._descriptor >= 0 or self._closed:
            raise ValueError("keys and tensors are declared before begin()")

    def _padded(self, count: int) -> int:
        return -(-count // self.alignment) * self.alignment

    def begin(self) -> None:
        """Create the temporary file at its full size and write the header; OutputError if the disk cannot hold it."""
        self._declare()
        if self.alignment != _DEFAULT_ALIGNMENT and "general.alignment" not in self._pairs:
            self.add("general.alignment", self.alignment, ValueType.UINT32)
        header = self._header()
        # As gguf-py and llama.cpp have it: a file without tensors ends with its header, without padding.
        self._data_offset = self._padded(len(header)) if self._plans else len(header)
        self.size = self._data_offset + self._data_end
        try:
            free = shutil.disk_usage(self._target.parent).free
            if self.size > free:
                raise OutputError(
                    f"{self.path} needs {_megabytes(self.size)} and {self._target.parent} has {_megabytes(free)} free; "
                    "free some space or write elsewhere."
                )
            self._temporary = self._target.parent / f".phiquant-{secrets.token_hex(8)}.part"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self._temporary, flags, 0o666)
            os.ftruncate(self._descriptor, self.size)  # all padding is written by this
            self._put(memoryview(header), 0)
        except OSError as error:
            self.abort()
            raise self._refused(error) from error
        except BaseException:
            self.abort()
            raise

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
        with self._state:
            if self._descriptor < 0 or self._closed:
                raise ValueError("tensors are written between begin() and commit()")
            if len(view) and not plan.claim(offset, offset + len(view)):
                raise ValueError(f"bytes {offset} to {offset + len(view)} of the tensor {name!r} are written twice")
            self._writing += 1
        whole = False
        try:
            self._put(view, self._data_offset + plan.offset + offset)
        except OSError as error:
            raise self._refused(error) from error
        else:
            whole = True
        finally:
            with self._state:
                self._writing -= 1
                self._failed |= not whole  # the bytes count as written and are not
                self._state.notify_all()

    def _put(self, view: memoryview, at: int) -> None:
        while view:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self._descriptor, view[:_CHUNK], at)
            else:  # Windows has no positioned write, so the position is shared
                with self._state:
                    os.lseek(self._descriptor, at, os.SEEK_SET)
                    count = os.write(self._descriptor, view[:_CHUNK])
            view = view[count:]
            at += count

    def commit(self) -> None:
        """Give the finished file its name; ValueError, and nothing is left, if a byte of a tensor is missing."""
        with self._state:
            if self._descriptor < 0 or self._closed or self._temporary is None:
                raise ValueError("commit() comes once, after begin()")
            missing = [name for name, plan in self._plans.items() if not plan.complete]
            writing = self._writing
        if missing or writing or self._failed:
            self.abort()
            reason = f"{len(missing)} tensors are incomplete ({missing[:3]})" if missing else "a write is under way"
            raise ValueError(f"{self.path} is not committed: {'a write failed' if self._failed else reason}")
        try:
            self._close_descriptor()
            if not self._overwrite and self._target.exists():
                raise OutputError(f"{self.path} exists already; choose another output path or allow overwriting.")
            self._temporary.replace(self._target)
            self._temporary = None
            self._closed = True
        except OSError as error:
            raise self._refused(error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what was written; harmless after `commit` and when called again."""
        with self._state:
            self._closed = True
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            # First the name, so that a second Ctrl-C while waiting leaves nothing behind; where a file in use keeps its
            # name (Windows), it goes after it is closed.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        try:
            self._close_descriptor()
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _close_descriptor(self) -> None:
        """Close the file once no thread writes: a number closed earlier could be another file's by then."""
        with self._state:
            while self._writing:
                self._state.wait()
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unfinished = self._temporary is not None
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


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
