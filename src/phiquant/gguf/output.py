"""One output file: nothing under its name until all of it is there, positioned writes from any thread, one sentence
for whatever the file system refuses.
"""

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from numpy import uint8
from numpy.typing import NDArray

from phiquant.errors import OutputError
from phiquant.gguf import temporary

__all__ = ["OutputFile", "check_space"]

_CHUNK: Final = 1 << 30  # one system call writes less than 2 GiB


class OutputFile:
    """A file on its way: `begin`, then `put` from any thread, then `commit` or `abort`.

    With `keep`, `abort` leaves the unfinished file, and a later `begin` of the same size continues it: `kept` says so.
    """

    def __init__(
        self, path: Path, *, overwrite: bool, protect: Iterable[str | os.PathLike[str]] = (), keep: bool = False
    ) -> None:
        """Take `path` as the target; OutputError if it could never be written, or is one of `protect`."""
        self.path = path
        self.kept = False
        self.failed = False  # a write was, so that bytes counted as written are not
        self._overwrite = overwrite
        self._keep = keep
        self._target = self._check_target(protect)
        self._temporary: Path | None = None
        self._descriptor = -1
        self._closed = False
        self._writers: set[int] = set()  # threads within `put`
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
        if isinstance(error, BlockingIOError):
            return OutputError(f"{self.path} is being written by another run; wait for it, or choose another output.")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OutputError(f"{self.path} cannot be written: {error.strerror}; free some space or write elsewhere.")
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return OutputError(f"{self.path} cannot be written: {reason}.")

    @property
    def begun(self) -> bool:
        """Whether `begin` came, or the file is done with."""
        return self._descriptor >= 0 or self._closed

    @property
    def unfinished(self) -> bool:
        """Whether there is a temporary file."""
        return self._temporary is not None

    @property
    def temporary_path(self) -> Path:
        """Where the unfinished file is; ValueError if there is none."""
        if self._temporary is None:
            raise ValueError("there is an unfinished file between begin() and commit() only")
        return self._temporary

    @property
    def writing(self) -> int:
        """How many threads are within `put`."""
        return len(self._writers)

    def begin(self, size: int, *, fresh: bool = False) -> None:
        """Create the temporary file at its full size, or find it unless `fresh`; OutputError if the disk is full."""
        directory = self._target.parent
        try:
            temporary.clean(directory)
            if self._keep:
                path = temporary.kept_path(self._target)
                self._descriptor = temporary.reopen(path)
                self._temporary = path
                found = os.fstat(self._descriptor)
                self.kept = found.st_size == size and not fresh
                if not self.kept:
                    os.ftruncate(self._descriptor, 0)
                check_space(self.path, size - (_occupied(found) if self.kept else 0))
            else:
                check_space(self.path, size)
                while self._descriptor < 0:
                    self._temporary = temporary.new_path(directory)  # noted first: a Ctrl-C may come any time
                    made = temporary.create(self._temporary)
                    self._descriptor = -1 if made is None else made
            os.ftruncate(self._descriptor, size)  # all padding is written by this
        except OSError as error:
            self.abort()
            raise self._refused(error) from error
        except BaseException:
            self.abort()
            raise

    def put(self, view: memoryview, at: int, before: Callable[[], None] = lambda: None) -> None:
        """Write bytes at a position; safe from several threads. `before` runs first, and alone; it may refuse."""
        with self._state:
            if self._descriptor < 0 or self._closed:
                raise ValueError("tensors are written between begin() and commit()")
            self.failed |= threading.get_ident() in self._writers  # a Ctrl-C came after the noting: never written
            before()
            self._writers.add(threading.get_ident())
        whole = False
        try:
            while view:
                if hasattr(os, "pwrite"):
                    count = os.pwrite(self._descriptor, view[:_CHUNK], at)
                else:  # Windows has no positioned write, so the position is shared
                    with self._state:
                        os.lseek(self._descriptor, at, os.SEEK_SET)
                        count = os.write(self._descriptor, view[:_CHUNK])
                view = view[count:]
                at += count
            whole = True
        except OSError as error:
            raise self._refused(error) from error
        finally:
            with self._state:
                self._writers.discard(threading.get_ident())
                self.failed |= not whole
                self._state.notify_all()

    def get(self, target: NDArray[uint8], at: int) -> bool:
        """Fill `target` with what a kept file has at a position; False if it cannot be read."""
        view = target.data
        with self._state:  # rare, so that the shared position of Windows need not be told apart
            try:
                os.lseek(self._descriptor, at, os.SEEK_SET)
                while view:
                    part = os.read(self._descriptor, min(len(view), _CHUNK))
                    if not part:
                        return False
                    view[: len(part)] = part
                    view = view[len(part) :]
            except OSError:
                return False
        return True

    def sync(self) -> None:
        """Wait until the disk has all that was written so far; OutputError if it does not take it."""
        try:
            getattr(os, "fdatasync", os.fsync)(self._descriptor)
        except OSError as error:
            raise self._refused(error) from error

    def commit(self) -> None:
        """Give the file its name."""
        assert self._temporary is not None
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

    def abort(self, *, discard: bool = False) -> None:
        """Remove what was written, or leave it for later with `keep`, unless `discard`; harmless when called again."""
        with self._state:
            self._closed = True
        path, self._temporary = self._temporary, None
        if self._keep and not discard:
            path = None
        if path is not None:
            # First the name, so that a second Ctrl-C while waiting leaves nothing behind; where a file in use keeps its
            # name (Windows), it goes after it is closed.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        try:
            self._close_descriptor()
        finally:
            if path is not None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _close_descriptor(self) -> None:
        """Close the file once no other thread writes: a number closed earlier could be another file's by then.

        This thread does not, whatever is noted: a Ctrl-C may come between the noting and the writing.
        """
        with self._state:
            self._writers.discard(threading.get_ident())
            while self._writers:
                self._state.wait()
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def check_space(path: Path, size: int) -> None:
    """OutputError if the disk of `path` has not `size` more bytes free."""
    parent = path.resolve().parent
    free = shutil.disk_usage(parent).free
    if size > free:
        raise OutputError(
            f"{path} needs {_megabytes(size)} and {parent} has {_megabytes(free)} free; free some space or write "
            "elsewhere."
        )


def _occupied(found: os.stat_result) -> int:
    """Bytes of a file that the disk holds already; where the system does not tell, none."""
    blocks: int = getattr(found, "st_blocks", 0)
    return min(blocks * 512, found.st_size)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
