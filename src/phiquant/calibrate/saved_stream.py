"""The residual stream in a file beside an unfinished output, so that a later run goes on behind the last whole stage.

    {"plan": "<fingerprint>", "stage": 12, "shape": [16384, 3072], "crc32": 305419896}    a line
    float32 little-endian                                                                 the rows

It is replaced after every stage, under a temporary name first.
"""

import contextlib
import json
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import OutputError
from phiquant.gguf.temporary import kept_path

__all__ = ["SavedStream"]

_MOST_HEADER: Final = 4096

Floats = NDArray[np.float32]


class SavedStream:
    """The stream that belongs to the output `target`, of a run with that plan's `fingerprint`."""

    def __init__(self, target: Path, fingerprint: str) -> None:
        self.path = Path(f"{kept_path(target.resolve())}.stream")
        self._fingerprint = fingerprint

    def write(self, stage: int, rows: Floats) -> None:
        """Keep what the stage of that number is to read; OutputError if the disk does not take it."""
        data = np.ascontiguousarray(rows, "<f4")
        head = {"plan": self._fingerprint, "stage": stage, "shape": rows.shape, "crc32": zlib.crc32(data.data)}
        fresh = self.path.with_name(f"{self.path.name}.new")
        try:
            with fresh.open("wb") as file:
                file.write(json.dumps(head).encode() + b"\n")
                file.write(data.reshape(-1).view(np.uint8).data)
            fresh.replace(self.path)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror or error}; free some space, or go without --resume."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)

    def read(self, rows: Floats) -> int | None:
        """Fill `rows` with what an earlier run of the same plan kept, and say of which stage; else None."""
        try:
            with self.path.open("rb") as file:
                head = json.loads(file.readline(_MOST_HEADER))
                if head["plan"] != self._fingerprint or tuple(head["shape"]) != rows.shape:
                    return None
                data = np.fromfile(file, "<f4", rows.size)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if data.size != rows.size or zlib.crc32(data.data) != head["crc32"]:
            return None
        rows[:] = data.reshape(rows.shape)
        return int(head["stage"])

    def remove(self) -> None:
        """It is not needed any more."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
