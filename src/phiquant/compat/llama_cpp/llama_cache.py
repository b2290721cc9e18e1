"""Caches by llama-cpp-python's names: states of earlier prompts, taken up by prompts that begin alike.

The engine does much of this by itself, as far as its pages reach; these caches hold what does not fit there any more,
or, on disk, what another process computed. Nothing in them is pickled.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np

from phiquant.compat.llama_cpp.state import LlamaState
from phiquant.engine.cache import common_length
from phiquant.errors import CacheError, OutputError
from phiquant.gguf import temporary

__all__ = ["BaseLlamaCache", "LlamaCache", "LlamaDiskCache", "LlamaRAMCache", "longest_prefix"]

_CAPACITY: Final = 2 << 30  # bytes


def longest_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the beginning."""
    return common_length(tuple(a), tuple(b))


class BaseLlamaCache(ABC):
    """States by the tokens that they are of; looked up by the longest common beginning.

    capacity_bytes: what it may hold; the states that were used longest ago go first.
    """

    def __init__(self, capacity_bytes: int = _CAPACITY) -> None:
        self.capacity_bytes = capacity_bytes

    @property
    @abstractmethod
    def cache_size(self) -> int:
        """Bytes that it holds."""

    @abstractmethod
    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """The state that has most of a beginning in common with `key`; KeyError if none has a token."""

    @abstractmethod
    def __contains__(self, key: Sequence[int]) -> bool:
        """Whether there is such a state."""

    @abstractmethod
    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Keep a state."""


class LlamaRAMCache(BaseLlamaCache):
    """In memory."""

    def __init__(self, capacity_bytes: int = _CAPACITY) -> None:
        super().__init__(capacity_bytes)
        self.cache_state: OrderedDict[tuple[int, ...], LlamaState] = OrderedDict()

    @property
    def cache_size(self) -> int:
        """See `BaseLlamaCache`."""
        return sum(state.llama_state_size + state.scores.nbytes for state in self.cache_state.values())

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        found = _nearest(self.cache_state, key)
        if found is None:
            raise KeyError("nothing that is kept begins with these tokens")
        self.cache_state.move_to_end(found)
        return self.cache_state[found]

    def __contains__(self, key: Sequence[int]) -> bool:
        return _nearest(self.cache_state, key) is not None

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        kept = tuple(key)
        self.cache_state.pop(kept, None)
        self.cache_state[kept] = value
        while self.cache_size > self.capacity_bytes and self.cache_state:
            self.cache_state.popitem(last=False)


LlamaCache = LlamaRAMCache


class LlamaDiskCache(BaseLlamaCache):
    """In files of a directory, one for each state, readable by their owner; another process may use it, too.

    Raises OutputError if the directory cannot be made or written.
    """

    def __init__(
        self, cache_dir: str | os.PathLike[str] = ".cache/llama_cache", capacity_bytes: int = _CAPACITY
    ) -> None:
        super().__init__(capacity_bytes)
        self._directory = Path(cache_dir)
        self._known: dict[Path, tuple[int, ...]] = {}
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{cache_dir} cannot be made: {error.strerror}.") from error

    @property
    def cache_size(self) -> int:
        """See `BaseLlamaCache`."""
        return sum(size for _, size, _ in self._files())

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        keys = self._keys()
        found = _nearest(keys.values(), key)
        for path, ids in keys.items():
            if ids == found:
                state = _state(path)
                if state is not None:
                    with suppress(OSError):  # another process has taken it away meanwhile
                        os.utime(path)
                    return state
        raise KeyError("nothing that is kept begins with these tokens")

    def __contains__(self, key: Sequence[int]) -> bool:
        return _nearest(self._keys().values(), key) is not None

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        name = blake2b(np.array(key, np.int32).tobytes(), digest_size=16).hexdigest()
        made = temporary.new_path(self._directory)
        try:
            made.touch(mode=0o600)
            made.write_bytes(value.to_bytes())
            made.replace(self._directory / f"{name}.npz")
        except OSError as error:
            raise OutputError(f"{self._directory} cannot be written: {error.strerror}.") from error
        finally:
            made.unlink(missing_ok=True)
        self._known.pop(self._directory / f"{name}.npz", None)
        files = sorted(self._files())
        size = sum(nbytes for _, nbytes, _ in files)
        while files and size > self.capacity_bytes:
            _, nbytes, oldest = files.pop(0)
            oldest.unlink(missing_ok=True)
            size -= nbytes

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each file was used last, its bytes, and its path; those that another process takes away are left out."""
        found = []
        for path in self._directory.glob("*.npz"):
            with suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        return found

    def _keys(self) -> dict[Path, tuple[int, ...]]:
        """Tokens of every file that is a state."""
        files = [path for _, _, path in self._files()]
        known = {path: self._known[path] for path in files if path in self._known}
        for path in files:
            if path not in known:
                state = _state(path)
                known[path] = () if state is None else tuple(state.ids)
        self._known = known
        return known


def _state(path: Path) -> LlamaState | None:
    """What a file holds; None if it is gone, or is no state."""
    try:
        return LlamaState.from_bytes(path.read_bytes())
    except (OSError, CacheError):
        return None


def _nearest(keys: Iterable[tuple[int, ...]], wanted: Sequence[int]) -> tuple[int, ...] | None:
    best, most = None, 0
    for key in keys:
        common = longest_prefix(key, wanted)
        if common > most:
            best, most = key, common
    return best
