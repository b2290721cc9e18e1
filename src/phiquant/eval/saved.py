"""Saved log-probabilities: the file that `llama-perplexity --save-all-logits` writes and `--kl-divergence` reads.

    offset                        size
    0                             8                  "_logits_"
    8                             4, 4, 4            int32: tokens of a window c, vocabulary v, windows n
    20                            4 n c              int32: the tokens
    20 + 4 n c                    n (c - 1 - c/2) r  records, one for each scored position

    a record of r = 2 (4 + v') bytes, v' = v rounded up to an even number:
    +0  float32 scale     +4  float32 lowest      +8  uint16 q[v']      log p[i] = scale q[i] + lowest

Lowest is the log-probability of the least likely token, or that of a token 16 below the likeliest if that is more:
what is less likely counts as so likely. Numbers are little-endian.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import LogitsError
from ..gguf.closing import Closing
from ..gguf.output import OutputFile
from .rows import slices
from .windows import Windows

__all__ = ["SavedLogits", "SavedRows", "SavedWriter", "pack"]

_MAGIC: Final = b"_logits_"
_HEADER: Final = np.dtype([("magic", "S8"), ("context", "<i4"), ("vocabulary", "<i4"), ("windows", "<i4")])
_RANGE: Final = np.float32(16)  # nats below the likeliest token that are told apart
_STEPS: Final = np.float32(65535)
_LEAST: Final = -16.0  # log-probability that a token must exceed to count in a divergence


def _record(vocabulary: int) -> np.dtype[np.void]:
    return np.dtype([("scale", "<f4"), ("lowest", "<f4"), ("q", "<u2", (vocabulary + vocabulary % 2,))])


@dataclass(frozen=True)
class _Shape:
    """Sizes that follow from the header."""

    context: int
    vocabulary: int
    windows: int

    @property
    def scored(self) -> int:
        return self.context - 1 - self.context // 2

    @property
    def begin(self) -> int:
        """Where the records begin."""
        return _HEADER.itemsize + 4 * self.windows * self.context

    @property
    def record(self) -> int:
        return 2 * (4 + self.vocabulary + self.vocabulary % 2)

    @property
    def size(self) -> int:
        return self.begin + self.windows * self.scored * self.record

    def at(self, window: int, row: int) -> int:
        return self.begin + (window * self.scored + row) * self.record


@dataclass(frozen=True)
class SavedRows:
    """Distributions of a saved file: records of neighbouring positions. Only tokens above exp(-16) count."""

    records: NDArray[np.void]
    vocabulary: int
    exact: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.records)

    def part(self, rows: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log-probabilities and probabilities of these rows."""
        records = self.records[rows]
        log = records["q"][:, : self.vocabulary].astype(np.float32)
        log *= records["scale"][:, None]
        log += records["lowest"][:, None]
        wide = log.astype(np.float64)
        p = np.exp(wide)
        p[wide <= _LEAST] = 0
        return wide, p


class SavedLogits(Closing):
    """A saved file, open for reading; a context manager.

    Attributes:
        windows: what was read when it was written; the first token of each is the text's, not that of beginning.
        vocabulary: tokens of the model that wrote it.

    Raises LogitsError if it is not such a file, or not a whole one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = self.path.open("rb")
        try:
            self._shape = self._header()
            tokens = np.frombuffer(self._file.read(4 * self._shape.windows * self._shape.context), "<i4")
            if tokens.size and (tokens.min() < 0 or tokens.max() >= self._shape.vocabulary):
                raise self._refused("has tokens that are not of its vocabulary")
            cut = tokens.astype(np.int32).reshape(self._shape.windows, self._shape.context)
            self.windows = Windows(cut, self._shape.context // 2)
        except BaseException:
            self._file.close()
            raise
        self.vocabulary = self._shape.vocabulary

    def _header(self) -> _Shape:
        raw = self._file.read(_HEADER.itemsize)
        if len(raw) < _HEADER.itemsize or not raw.startswith(_MAGIC):
            raise LogitsError(
                f"{self.path} is not a file of saved logits; make one with --save-all-logits, by the base model"
            )
        header = np.frombuffer(raw, _HEADER)[0]
        shape = _Shape(int(header["context"]), int(header["vocabulary"]), int(header["windows"]))
        if shape.context < 3 or shape.vocabulary < 1 or shape.windows < 1:
            raise self._refused(f"tells of {shape.windows} windows of {shape.context} tokens out of {shape.vocabulary}")
        found = os.fstat(self._file.fileno()).st_size
        if found < shape.size:
            whole = max(found - shape.begin, 0) // (shape.scored * shape.record)
            raise self._refused(f"ends after {whole} of {shape.windows} windows")
        if found > shape.size:
            raise self._refused(f"is {found - shape.size} bytes longer than it says it is")
        return shape

    def _refused(self, what: str) -> LogitsError:
        return LogitsError(f"{self.path} {what}: it is damaged, or was being written; make it again")

    def take(self, window: int, position: int, count: int) -> SavedRows:
        """Distributions of `count` scored positions. LogitsError if they are not numbers."""
        kind, shape = _record(self.vocabulary), self._shape
        self._file.seek(shape.at(window, position - self.windows.first))
        raw = self._file.read(count * shape.record)
        if len(raw) < count * shape.record:
            raise self._refused("became shorter while it was read")
        records = np.frombuffer(raw, kind)
        if not (np.isfinite(records["scale"]).all() and np.isfinite(records["lowest"]).all()):
            raise self._refused(f"holds what is no number, in window {window + 1}")
        return SavedRows(records, self.vocabulary)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SavedWriter:
    """Writes a saved file, under a temporary name until `commit`; a context manager that removes what is unfinished.

    Args:
        path: must not exist yet.
        windows: what the model reads; halves, not strided ones.
        vocabulary: tokens of the model.

    Raises OutputError if it cannot be written.
    """

    def __init__(self, path: Path, windows: Windows, vocabulary: int) -> None:
        self._shape = _Shape(windows.size, vocabulary, len(windows))
        self._first = windows.first
        self._output = OutputFile(path, overwrite=False)
        self._output.begin(self._shape.size)
        header = np.array([(_MAGIC, windows.size, vocabulary, len(windows))], _HEADER)
        try:
            self._put(header, 0)
            self._put(np.ascontiguousarray(windows.tokens, "<i4"), _HEADER.itemsize)
        except BaseException:
            self._output.abort()
            raise

    def add(self, window: int, position: int, logits: NDArray[np.float32]) -> None:
        """Rows of scored positions."""
        at = self._shape.at(window, position - self._first)
        for rows in slices(*logits.shape):
            self._put(pack(logits[rows]), at + rows.start * self._shape.record)

    def commit(self) -> None:
        """Every row is there: give the file its name."""
        self._output.commit()

    def _put(self, array: NDArray[np.generic], at: int) -> None:
        self._output.put(array.reshape(-1).view(np.uint8).data, at)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._output.abort()


def pack(logits: NDArray[np.float32]) -> NDArray[np.void]:
    """Records of rows of logits.

        floor = max(least logit, likeliest - 16)      scale = (likeliest - floor) / 65535
        q     = round((logit - floor) / scale)        lowest = floor - likeliest - ln Σ exp(logit - likeliest)

    In float32 but for the sum, as in llama.cpp, whose q are the same from the same logits.
    """
    rows, vocabulary = logits.shape
    top = logits.max(axis=1)
    floor = np.maximum(logits.min(axis=1), top - _RANGE)
    shifted = logits - top[:, None]
    log_sum = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64)).astype(np.float32)
    made = np.zeros(rows, _record(vocabulary))
    made["scale"] = (top - floor) / _STEPS
    made["lowest"] = floor - top - log_sum
    scale = made["scale"][:, None]
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    steps = np.maximum(logits - floor[:, None], 0)
    steps *= inverse
    made["q"][:, :vocabulary] = np.rint(steps, out=steps)
    return made
