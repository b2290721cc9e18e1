"""Reading a file at a position, from several threads, without mapping it.

Weights are read once, front to back, into buffers that are used again: nothing of the source stays in the process's
resident memory, and a file that shrinks underneath is an error instead of a bus error.
"""

import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phiquant.errors import PhiquantError
from phiquant.gguf.closing import Closing

__all__ = ["PositionedFile"]

_HAS_PREADV = hasattr(os, "preadv")


class PositionedFile(Closing):
    """A file open for reading at any position; safe to use from several threads at once."""

    def __init__(self, path: Path, error: type[PhiquantError]) -> None:
        """Open `path`; what goes wrong, now or later, is raised as `error`."""
        self.path = path
        self._error = error
        try:
            self._file = path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as exc:
            raise error(f"{path} cannot be read: {exc.strerror or exc}.") from exc
        self._lock = threading.Lock()  # for systems without preadv, where the position is shared

    def read_into(self, offset: int, target: npt.NDArray[np.uint8]) -> None:
        """Fill `target` (contiguous, uint8) with the bytes at `offset`; all of them or an error."""
        view = target.data
        done = 0
        try:
            while done < len(view):
                count = self._read_some(offset + done, view[done:])
                if count == 0:
                    raise self._error(
                        f"{self.path} ended at byte {offset + done} while it was read; is it still being written?"
                    )
                done += count
        except OSError as exc:
            raise self._error(f"{self.path} cannot be read: {exc.strerror or exc}.") from exc

    def _read_some(self, offset: int, view: memoryview) -> int:
        if _HAS_PREADV:
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(view) or 0

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        self._file.close()
