"""Files under a temporary name, beside the file they become: made, locked, continued, and cleaned up after the dead.

    .phiquant-HOST-PID-RANDOM.part     goes when its run ends, however it ends, but for kill -9 and a power cut
    .NAME.part                         stays when a run with `keep` ends early, for a later one that continues it

Every one is locked as long as its process lives. A file of the first kind is removed by a later run if it was made on
this machine, its process is gone and its lock is free; systems without such locks leave it.
"""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import stat
from pathlib import Path
from typing import Final

try:
    import fcntl
except ImportError:  # Windows refuses to remove or rename a file that is open, which does as much
    fcntl = None  # type: ignore[assignment]

__all__ = ["clean", "create", "kept_path", "new_path", "reopen"]

_NAME: Final = re.compile(r"[.]phiquant-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]{1,10})-[0-9a-f]{16}[.]part")
_FLAGS: Final = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_MODE: Final = 0o666  # less the user's mask, as for any new file


def new_path(directory: Path) -> Path:
    """A fresh name of the first kind in `directory`."""
    return directory / f".phiquant-{_host()}-{os.getpid()}-{secrets.token_hex(8)}.part"


def create(path: Path) -> int | None:
    """Make and lock a file of the first kind, and return its descriptor; None if another run's cleaning took it."""
    descriptor = os.open(path, _FLAGS | os.O_EXCL, _MODE)
    try:
        # The cleaning may have come between the two calls; then there is no such file any more.
        if _lock(descriptor) and os.fstat(descriptor).st_nlink:
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def kept_path(target: Path) -> Path:
    """The name of the second kind for a file that becomes `target`."""
    return target.with_name(f".{target.name}.part")


def reopen(path: Path) -> int:
    """Open and lock a file of the second kind, made if there is none; BlockingIOError if another process has it."""
    while True:
        # No link is followed: the name can be guessed, and others may write in this directory.
        descriptor = os.open(path, _FLAGS | getattr(os, "O_NOFOLLOW", 0), _MODE)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise FileExistsError(f"{path} is not a file of an earlier run; remove it")
            if not _lock(descriptor):
                raise BlockingIOError(f"another run is writing {path}")
            with contextlib.suppress(FileNotFoundError):
                # Between the two calls the other run may have finished and renamed the file.
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def clean(directory: Path) -> None:
    """Remove what runs left behind in `directory` that were killed on this machine."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            match = _NAME.fullmatch(entry.name)
            if match is not None and match["host"] == _host() and not _alive(int(match["pid"])):
                with contextlib.suppress(OSError):
                    _remove(Path(entry.path))


def _remove(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if _lock(descriptor, needed=True) and os.path.samestat(path.stat(), os.fstat(descriptor)):
            path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, needed: bool = False) -> bool:
    """Lock the file until its descriptor is closed; False if another process has. Without locks: not `needed`."""
    if fcntl is None:
        return not needed
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return not needed
    return True


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
