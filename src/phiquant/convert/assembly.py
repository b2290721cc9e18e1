"""Where the tensors of a GGUF file come from: rows of stored tensors, one after the other.

Most are a stored tensor as it is. Experts are stacked from one tensor each, projections are taken apart or put
together, and rows may change their order; bytes of a row never do.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError

__all__ = ["Assembly", "Rows", "match"]

IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
_CHUNK = 1 << 21  # bytes that are read at a time to pick rows from

_Bytes = npt.NDArray[np.uint8]
Read = Callable[[StoredTensor, int, _Bytes], None]
"""Fills an array with the bytes of a stored tensor from a byte on."""


@dataclass(frozen=True)
class Rows:
    """`count` rows of a stored tensor, every `step`th from `first` on, taken in turn from `turns` equal parts of them.

    The tensor's leading extents are taken together; a vector has rows of one number.
    """

    tensor: StoredTensor
    first: int
    count: int
    step: int = 1
    turns: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        rows = 1
        for extent in self.tensor.shape[:-1] or self.tensor.shape:
            rows *= extent
        return self.tensor.nbytes // max(rows, 1)


@dataclass(frozen=True)
class Assembly:
    """A tensor of the output: its shape (contiguous extent last) and the rows it consists of, all of one data type."""

    shape: tuple[int, ...]
    rows: Sequence[Rows]
    _ends: Sequence[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len({part.tensor.dtype for part in self.rows}) != 1:
            names = sorted({f"{part.tensor.name} ({part.tensor.dtype})" for part in self.rows})[:3]
            raise CheckpointError(f"The tensors {', '.join(names)} belong together and are stored in different types.")
        object.__setattr__(self, "_ends", list(accumulate(part.count * part.row_bytes for part in self.rows)))

    @classmethod
    def whole(cls, tensor: StoredTensor) -> "Assembly":
        """A stored tensor as it is."""
        columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        elements = 1
        for extent in tensor.shape:
            elements *= extent
        return cls(tensor.shape, (Rows(tensor, 0, elements // max(columns, 1)),))

    @property
    def stored(self) -> StoredTensor:
        """One of the tensors, for data type and messages."""
        return self.rows[0].tensor

    def read_into(self, read: Read, begin: int, target: _Bytes) -> None:
        """Fill `target` with the bytes of it from `begin` on."""
        index, done = bisect_right(self._ends, begin), 0
        while done < target.size:
            part = self.rows[index]
            offset = begin + done - (self._ends[index] - part.count * part.row_bytes)
            stop = min(self._ends[index] - begin, target.size)
            if part.turns == part.step == 1:
                read(part.tensor, part.first * part.row_bytes + offset, target[done:stop])
            else:
                _gather(read, part, offset, target[done:stop])
            done = stop
            index += 1


def _gather(read: Read, part: Rows, offset: int, target: _Bytes) -> None:
    """The bytes from `offset` on of rows that do not lie one after the other."""
    size, turns = part.row_bytes, part.turns
    begin, end = offset // size, -(-(offset + target.size) // size)
    whole = (begin * size, end * size) == (offset, offset + target.size)
    rows = target.reshape(-1, size) if whole else np.empty((end - begin, size), np.uint8)
    for row in range(begin, min(begin + turns, end)):
        place = row % turns * (part.count // turns) + row // turns
        _pick(read, part.tensor, part.first + place * part.step, part.step, rows[row - begin :: turns])
    if not whole:  # begins or ends within a row
        target[:] = rows.reshape(-1)[offset - begin * size :][: target.size]


def _pick(read: Read, tensor: StoredTensor, first: int, step: int, rows: _Bytes) -> None:
    """Every `step`th row of a tensor from `first` on.

    What lies between them is read too and left out: a read for each row would take twice as long as this, for each
    number of a vector a thousand times as long.
    """
    size = rows.shape[1]
    most = max(1, _CHUNK // (size * step))
    buffer = np.empty((min(most, len(rows)) * step, size), np.uint8)
    for begin in range(0, len(rows), most):
        picked = rows[begin : begin + most]
        between = buffer[: (len(picked) - 1) * step + 1]
        read(tensor, (first + begin * step) * size, between.reshape(-1))
        picked[:] = between[::step]


def match(
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    what: str,
    *,
    unused: Iterable[str] = (),
) -> list[str]:
    """The names of the stored tensors that a model needs, in the checkpoint's order.

    CheckpointError if a tensor is missing, has no place in the model (`what`), or another shape than expected. `unused`
    names may be there and are left out.
    """
    left_out = set(unused)
    names: list[str] = []
    for name, tensor in stored.items():
        if name.endswith(IGNORED_SUFFIXES) or name in left_out:
            continue
        if name not in expected:
            raise CheckpointError(f"Tensor {name!r} of {tensor.file} has no place in {what}.")
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"Tensor {name} of {tensor.file} has shape {list(tensor.shape)}, config.json asks for "
                f"{list(expected[name])}."
            )
        names.append(name)
    there = set(names)
    for name in expected:
        if name not in there:
            raise CheckpointError(f"The checkpoint lacks tensor {name}; download its weights again.")
    return names
