"""What a native operation is: a kernel's address and a block of 64-bit arguments.

Every kernel has the signature void(block, thread, threads, counter), all int64: `block` is the address of its
arguments, `counter` that of a shared 32-bit word that is 0 when the operation begins, for taking work by tickets;
8 bytes after it is the word for an error code. Sizes that depend on the step are read through the block from the
`StepHeader`, whose address never changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import I64, Emitter, Value

__all__ = ["ERROR_OFFSET", "Arguments", "NativeOp", "Region", "StepHeader", "aligned", "float_bits", "tickets"]

ERROR_OFFSET = 8


def aligned(nbytes: int, alignment: int = 64) -> NDArray[np.uint8]:
    """Zeroed memory that begins at a multiple of `alignment`."""
    raw = np.zeros(nbytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + nbytes]


@dataclass(frozen=True, eq=False)
class Region:
    """Rows in memory that an operation reads or writes: all of their columns, or some.

    Attributes:
        array: keeps the memory alive; [rows, width] of its element type, the elements of a row adjacent.
        count: address of the int64 that says how many rows the present step uses.
    """

    array: NDArray[Any]
    count: int

    def __post_init__(self) -> None:
        a = self.array
        if a.ndim != 2 or not (a.flags.c_contiguous or a.strides[1] == a.itemsize):
            raise KernelError("a region must be a matrix whose rows are contiguous")

    def columns(self, first: int, width: int) -> Region:
        """Some of the columns, which must exist."""
        return Region(self.array[:, first : first + width], self.count)

    @property
    def address(self) -> int:
        """Of the first element, for a kernel that takes rows one right after the other. KernelError if they are not."""
        if not self.array.flags.c_contiguous:
            raise KernelError("a region must be a contiguous matrix here, not some columns of one")
        return int(self.array.ctypes.data)

    @property
    def strided(self) -> tuple[int, int]:
        """Address of the first element, and bytes from a row to the next, for a kernel that minds them."""
        return int(self.array.ctypes.data), int(self.array.strides[0])

    @property
    def width(self) -> int:
        """Elements of a row."""
        return int(self.array.shape[1])

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return int(self.array.shape[0])


@dataclass(frozen=True, eq=False)
class NativeOp:
    """A kernel bound to its arguments; `keep` holds whatever owns memory that the block points to."""

    kernel: int
    block: NDArray[np.int64]
    keep: tuple[Any, ...] = ()


class Arguments:
    """The layout of an argument block: named int64 words, declared once for the writer and the kernel.

    ARGS = Arguments("count", "x", "out", "width")
    block = ARGS.pack(count=region.count, x=..., out=..., width=...)        # binding
    count = ARGS.read(e, block, "count")                                    # emission
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def pack(self, **values: int) -> NDArray[np.int64]:
        """The block; every name must be given."""
        if set(values) != set(self.names):
            raise KernelError(f"arguments {sorted(values)} given for a block of {sorted(self.names)}")
        return np.array([values[n] for n in self.names], np.int64)

    def read(self, e: Emitter, block: Value, name: str) -> Value:
        """Load one word in a kernel."""
        return e.load(block + 8 * self.names.index(name), I64, align=8)

    def read_all(self, e: Emitter, block: Value, names: Sequence[str] | None = None) -> list[Value]:
        """Load several words, all in declared order by default."""
        return [self.read(e, block, n) for n in names or self.names]


def float_bits(value: float) -> int:
    """A float32 as the low half of a word of arguments."""
    return int(np.float32(value).view(np.int32))


@contextmanager
def tickets(e: Emitter, counter: Value, count: Value) -> Iterator[Value]:
    """A loop over the numbers below `count` that this thread gets; every number goes to exactly one thread."""
    with e.forever() as done:
        ticket = e.atomic_add(counter, 1)
        done(ticket >= count)
        yield ticket


class StepHeader:
    """The sizes of the running step, as int64 words whose addresses never change."""

    NAMES = ("tokens", "outputs", "routes", "first_tile", "last_tile")

    def __init__(self) -> None:
        self._words = aligned(64).view(np.int64)

    def address(self, name: str) -> int:
        """Of one word."""
        return int(self._words.ctypes.data) + 8 * self.NAMES.index(name)

    def set(self, name: str, value: int) -> None:
        """Write one word; not while a native call runs."""
        self._words[self.NAMES.index(name)] = value
