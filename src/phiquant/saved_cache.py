"""A conversation's keys and values in a file: a safetensors file, which anybody can look into, and nothing is run.

    ids      int32 [tokens]              all tokens of the conversation
    pages    uint8 [pages, page_bytes]   what is computed of its beginning, in the processor's own order
    sums     uint32 [pages]              CRC-32 of each page

The metadata say what made it: model, type of the cache, backend, version. Anything else is refused, because its bytes
would mean something else.
"""

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from phiquant.engine import Engine
from phiquant.errors import CacheError, OutputError, RequestError
from phiquant.gguf import temporary

__all__ = ["SavedCache"]

_LONGEST_HEADER: Final = 1 << 16
_FORMAT: Final = "phiquant conversation cache 1"
_MEANINGS: Final = {
    "format": "in the form",
    "model": "with the model",
    "cache_type": "with a cache of",
    "page_tokens": "with pages of",
    "backend": "on the backend",
    "version": "by version",
}


class SavedCache:
    """Writes and reads such files for an engine.

    `fingerprint`: what must be the same for their bytes to mean the same.
    """

    def __init__(self, engine: Engine, fingerprint: Mapping[str, str]) -> None:
        self._engine = engine
        self._fingerprint = {"format": _FORMAT, **fingerprint}

    def save(self, path: str | os.PathLike[str], ids: list[int]) -> int:
        """Write what the cache holds of `ids`; gives the number of tokens. RequestError, OutputError."""
        with self._engine.kept_pages(ids) as pages:
            if not pages:
                raise RequestError(
                    f"nothing of these {len(ids)} tokens is in the cache, or less than a page of "
                    f"{self._engine.page_tokens}; generate with them first"
                )
            try:
                self._write(Path(path), np.array(ids, "<i4"), pages)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
        return len(pages) * self._engine.page_tokens

    def load(self, path: str | os.PathLike[str]) -> list[int]:
        """Put a file's pages into the cache; gives the tokens. CacheError, RequestError, ContextError, TokenError."""
        try:
            with Path(path).open("rb") as file:
                places = self._header(file, path)
                ids: list[int] = _array(file, places["ids"], "<i4").tolist()
                sums: list[int] = _array(file, places["sums"], "<u4").tolist()
                self._engine.write_pages(ids, self._pages(file, places["pages"][0], sums, path))
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}.") from error
        return ids

    def _header(self, file: BinaryIO, path: str | os.PathLike[str]) -> dict[str, tuple[int, int]]:
        """Where each array starts, and how many elements it has (pages: pages)."""
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > min(_LONGEST_HEADER, size - 8):
                raise ValueError
            header = json.loads(file.read(length))
            made = header["__metadata__"]
            told = {name: str(made[name]) for name in self._fingerprint}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise CacheError(f"{path} is no saved cache; save one with save_cache.") from None
        for name, expected in self._fingerprint.items():
            if told[name] != expected:
                raise CacheError(
                    f"{path} was saved {_MEANINGS[name]} {told[name]:.100}, and this is {expected:.100}; "
                    "compute the conversation again."
                )
        places, begin = {}, 0
        for name, kind, width in (("ids", "I32", 4), ("pages", "U8", self._engine.page_bytes), ("sums", "U32", 4)):
            try:
                entry = header[name]
                count, offsets = int(entry["shape"][0]), [int(at) for at in entry["data_offsets"]]
                shape = [count, width] if name == "pages" else [count]
                good = entry["dtype"] == kind and entry["shape"] == shape and count >= 1
            except (KeyError, TypeError, ValueError, IndexError):
                good = False
            if not good or offsets != [begin, begin + count * width]:
                raise CacheError(f"{path} is damaged: what it says of {name!r} does not fit.")
            places[name] = 8 + length + begin, count
            begin += count * width
        pages, tokens = places["pages"][1], places["ids"][1]
        if 8 + length + begin != size or places["sums"][1] != pages or pages > tokens // self._engine.page_tokens:
            raise CacheError(f"{path} is damaged: it has {size} bytes, {tokens} tokens and {pages} pages.")
        return places

    def _pages(
        self, file: BinaryIO, start: int, sums: list[int], path: str | os.PathLike[str]
    ) -> Iterator[NDArray[np.uint8]]:
        for page, expected in enumerate(sums):
            file.seek(start + page * self._engine.page_bytes)
            data = file.read(self._engine.page_bytes)
            if zlib.crc32(data) != expected:
                raise CacheError(f"{path} is damaged: page {page} is not what was saved.")
            yield np.frombuffer(data, np.uint8)

    def _write(self, path: Path, ids: NDArray[np.int32], pages: list[int]) -> None:
        """The file, which has its name once it is whole."""
        header: dict[str, Any] = {"__metadata__": self._fingerprint}
        at = 0
        for name, kind, shape, nbytes in (
            ("ids", "I32", [len(ids)], ids.nbytes),
            ("pages", "U8", [len(pages), self._engine.page_bytes], len(pages) * self._engine.page_bytes),
            ("sums", "U32", [len(pages)], 4 * len(pages)),
        ):
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        temporary.clean(path.parent)
        made = temporary.new_path(path.parent)
        try:
            descriptor = temporary.create(made)
            if descriptor is None:
                raise OSError(errno.ENOENT, "its temporary file was removed")
            with open(descriptor, "wb") as file:  # noqa: PTH123  a descriptor has no path
                file.write(len(text).to_bytes(8, "little") + text + ids.tobytes())
                sums = []
                for page in pages:
                    data = self._engine.read_page(page).tobytes()
                    sums.append(zlib.crc32(data))
                    file.write(data)
                file.write(np.array(sums, "<u4").tobytes())
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)


def _array(file: BinaryIO, place: tuple[int, int], kind: str) -> NDArray[Any]:
    start, count = place
    file.seek(start)
    return np.frombuffer(file.read(4 * count), kind)
