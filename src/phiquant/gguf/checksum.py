"""A checksum of a model's tensor data that can be computed while many threads write it, and lies in its metadata.

A tree: each piece of a tensor (`pieces`) has a CRC-32 (4 bytes, little-endian), a tensor the SHA-256 of its pieces'
sums one after the other, the model that of its tensors' hashes in the order of the file. Padding, metadata and the
division into parts do not count. It is there to find damage: whoever changes weights on purpose can change it too, so
that the pieces need no cryptographic hash, which would cost a fifth of the time of quantizing.

    phiquant.checksum            "crc32:TABLE:DATA"; 32 hexadecimal digits of the hash of the tensor table, 64 of the
                                 model's
    phiquant.checksum.tensors    array of uint64: the first 8 bytes, little-endian, of each tensor's hash

Programs that rewrite a file copy keys they do not know. The table (names, shapes, types) tells their files from damaged
ones: where it is another, the checksum is of another file and says nothing.
"""

import hashlib
import math
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phiquant.gguf.types import GGMLType

__all__ = ["DIGITS", "PIECE", "PREFIX", "Checksum", "Piece", "Summed", "pieces", "table_hash"]

PIECE: Final = 1 << 19
"""Elements of a piece, at most: whole blocks of every type, and a size that stays in a processor's cache."""

PREFIX: Final = "crc32:"
DIGITS: Final = len(PREFIX) + 32 + 1 + 64


class Piece(NamedTuple):
    """`rows` rows from `row` on, whole; or of one row that is longer than a piece `columns` from `column` on."""

    row: int
    rows: int
    column: int
    columns: int

    def start(self, kind: GGMLType, row_columns: int) -> int:
        """Where it begins in its tensor, in bytes, if that is stored as `kind` in rows of `row_columns`."""
        return self.row * kind.row_bytes(row_columns) + kind.row_bytes(self.column)

    def nbytes(self, kind: GGMLType) -> int:
        """Bytes if stored as `kind`."""
        return self.rows * kind.row_bytes(self.columns)


@dataclass(frozen=True)
class Summed:
    """What the checksum says of a tensor, shape in NumPy order."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType


def pieces(shape: Sequence[int]) -> Iterator[Piece]:
    """The pieces of a tensor in order: as many whole rows as make up PIECE elements, or PIECE elements of a longer row.

    All dimensions but the last count as rows; an empty tensor has no pieces.
    """
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    if columns > PIECE:
        for row in range(rows):
            for column in range(0, columns, PIECE):
                yield Piece(row, 1, column, min(PIECE, columns - column))
    elif columns:
        step = PIECE // columns
        for row in range(0, rows, step):
            yield Piece(row, min(step, rows - row), 0, columns)


class Checksum:
    """The tree as it grows; pieces may come in any order, from any thread."""

    def __init__(self, tensors: Sequence[Summed]) -> None:
        """Expect every piece of these tensors, in the order of the file."""
        self._tensors = tensors
        self._places = {tensor.name: place for place, tensor in enumerate(tensors)}
        self._hashes: dict[str, dict[Piece, bytes]] = {}
        self._counts = {tensor.name: sum(1 for _ in pieces(tensor.shape)) for tensor in tensors}
        self._digests: list[bytes | None] = [
            None if self._counts[tensor.name] else hashlib.sha256().digest() for tensor in tensors
        ]
        self._lock = threading.Lock()

    def add(self, tensor: str, piece: Piece, data: NDArray[np.uint8]) -> bytes | None:
        """Take the bytes of a piece; the tensor's hash if it was the last one."""
        own = zlib.crc32(data.data).to_bytes(4, "little")
        with self._lock:
            known = self._hashes.setdefault(tensor, {})
            known[piece] = own
            if len(known) < self._counts[tensor]:
                return None
            whole = hashlib.sha256(b"".join(known[piece] for piece in sorted(known))).digest()
            del self._hashes[tensor]
            self._digests[self._places[tensor]] = whole
            return whole

    def adopt(self, tensor: str, digest: bytes) -> None:
        """Take a tensor's hash as it was found earlier."""
        self._digests[self._places[tensor]] = digest

    def text(self) -> str:
        """The model's checksum; ValueError while a piece is missing."""
        return f"{PREFIX}{table_hash(self._tensors)}:{hashlib.sha256(b''.join(self._whole())).hexdigest()}"

    def parts(self) -> NDArray[np.uint64]:
        """The first 8 bytes of each tensor's hash, as a number."""
        return np.array([struct.unpack_from("<Q", digest)[0] for digest in self._whole()], np.uint64)

    def _whole(self) -> list[bytes]:
        digests = [digest for digest in self._digests if digest is not None]
        if len(digests) != len(self._digests):
            raise ValueError(f"{len(self._digests) - len(digests)} tensors are not summed up yet")
        return digests


def table_hash(tensors: Sequence[Summed]) -> str:
    """The hash of names, shapes and types of all tensors in order: 32 hexadecimal digits."""
    lines = [f"{t.name}\0{','.join(map(str, t.shape))}\0{int(t.type)}\n" for t in tensors]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]
