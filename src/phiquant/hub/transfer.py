"""One large file into the cache: continued where an earlier try broke off, and checked against its SHA-256.

The library itself begins again from nothing in another process, and compares no checksum; its cache's layout is kept:
`blobs/SHA256`, and until it is whole `blobs/SHA256.incomplete`, under the lock that its other users take as well.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol

from phiquant.errors import RequestError

__all__ = ["Blob", "Counter", "transfer"]

_PIECE: Final = 1 << 18  # bytes that are written at once; what an interruption can lose
_TRIES: Final = 5  # in a row that bring nothing
_TIMEOUT: Final = 20.0  # seconds without a byte
_TRY_AGAIN: Final = (408, 429, 500, 502, 503, 504)


class Counter(Protocol):
    """Told of bytes as they are there."""

    def advanced(self, count: int) -> None:
        """So many more bytes came; a negative number where some have to come again."""

    def resumed(self, count: int) -> None:
        """So many bytes were there already."""


@dataclass(frozen=True)
class Blob:
    """A file of a repository.

    Attributes:
        name: its path in the repository, for messages.
        size: bytes.
        sha256: of its content, 64 hexadecimal digits; its name in the cache.
        url: where it is; redirects are followed.
    """

    name: str
    size: int
    sha256: str
    url: str


class _Interrupted(Exception):  # noqa: N818 - not an error yet
    """The connection broke; what came before it is kept."""


def transfer(blob: Blob, folder: Path, locks: Path, counter: Counter) -> None:
    """Make sure that `folder`/blobs has a file.

    Args:
        blob: the file.
        folder: the repository's directory in the cache.
        locks: the directory of its locks.
        counter: is told how it goes.

    Raises:
        RequestError: what came is not what the Hub announced, or the disk has no room for it.
        Exception: what the library raises for answers of the Hub, and its HTTP client's errors.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # not in its __all__

    blobs = folder / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    locks.mkdir(parents=True, exist_ok=True)
    target = blobs / blob.sha256
    partial = blobs / f"{blob.sha256}.incomplete"
    with WeakFileLock(locks / f"{blob.sha256}.lock"):
        if target.exists():
            counter.resumed(blob.size)
            return
        try:
            with partial.open("ab+") as file:
                _fill(file, blob, counter)
        finally:
            _tidy(partial)
        partial.replace(target)


def _fill(file: IO[bytes], blob: Blob, counter: Counter) -> None:
    """Append to a file until it is whole."""
    part = _Part(file, blob, counter)
    free = shutil.disk_usage(file.name).free
    if free < blob.size - part.have:
        raise RequestError(
            f"{blob.name} needs {(blob.size - part.have) / 1e6:,.0f} MB more and the disk of the cache has "
            f"{free / 1e6:,.0f} MB free; make room, or set HF_HUB_CACHE to a directory elsewhere."
        )
    failures = 0
    while part.have < blob.size:
        before = part.have
        try:
            _receive(part, blob)
        except _Interrupted as exc:
            failures = 1 if part.have > before else failures + 1
            if failures > _TRIES:
                raise exc.__cause__ or RequestError(
                    f"{blob.name} ends after {part.have} of {blob.size} bytes; run again to go on."
                ) from exc
            time.sleep(min(0.25 * 2**failures, 8))
    file.flush()
    os.fsync(file.fileno())
    part.check()


class _Part:
    """What there is of a file, and the digest of it."""

    def __init__(self, file: IO[bytes], blob: Blob, counter: Counter) -> None:
        self._file, self._blob, self._counter = file, blob, counter
        self._digest = hashlib.sha256()
        self.have = 0
        if file.seek(0, os.SEEK_END) > blob.size:
            file.truncate(0)
        file.seek(0)
        while piece := file.read(_PIECE):
            self._digest.update(piece)
            self.have += len(piece)
        counter.resumed(self.have)

    def append(self, piece: bytes) -> None:
        self._file.write(piece)
        self._digest.update(piece)
        self.have += len(piece)
        self._counter.advanced(len(piece))
        if self.have > self._blob.size:
            self.check()

    def restart(self) -> None:
        """Drop what there is."""
        self._file.truncate(0)
        self._counter.advanced(-self.have)
        self._digest, self.have = hashlib.sha256(), 0

    def check(self) -> None:
        """RequestError, and nothing is kept, if it is not the file that was announced."""
        if self.have == self._blob.size and self._digest.hexdigest() == self._blob.sha256:
            return
        self.restart()
        raise RequestError(
            f"{self._blob.name} arrived damaged: its SHA-256 is not the one that the Hub gives; what came was deleted, "
            "so run again."
        )


def _receive(part: _Part, blob: Blob) -> None:
    """Ask for what is missing, once. _Interrupted if less came."""
    with _response(blob, part.have) as response:
        if part.have and response.status_code == 200:  # all of it comes, although a part was asked for
            part.restart()
        for piece in _pieces(response):
            part.append(piece)
    if part.have < blob.size:
        raise _Interrupted


@contextmanager
def _response(blob: Blob, begin: int) -> Iterator[Any]:
    """The answer to a request for the file from byte `begin` on; _Interrupted if there is none for now."""
    import huggingface_hub as library
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # not in its __all__

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    with ExitStack() as stack:
        try:
            # The client follows redirects, and leaves the token behind where one leads to another host.
            response = stack.enter_context(
                library.get_session().stream("GET", blob.url, headers=headers, timeout=_TIMEOUT, follow_redirects=True)
            )
            if response.status_code >= 400:
                response.read()
        except OfflineModeIsEnabled:
            raise
        except Exception as exc:  # of the HTTP client, which changes with the library's versions
            raise _Interrupted from exc
        try:
            library.hf_raise_for_status(response)
        except HfHubHTTPError as exc:
            if response.status_code in _TRY_AGAIN:
                raise _Interrupted from exc
            raise
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
            raise RequestError(f"The server of {blob.name} sends another part of it than it was asked for.")
        yield response


def _pieces(response: Any) -> Iterator[bytes]:
    """The body; _Interrupted by whatever breaks it off."""
    pieces = response.iter_raw(_PIECE)
    while True:
        try:
            piece = next(pieces, None)
        except Exception as exc:
            raise _Interrupted from exc
        if piece is None:
            return
        yield piece


def _tidy(partial: Path) -> None:
    """Nothing is left of a try that brought nothing."""
    with suppress(OSError):
        if partial.stat().st_size == 0:
            partial.unlink()
