"""What an unfinished run has done, in a file beside its output, so that a later run goes on from there.

    {"plan": "<hash of everything that the output depends on>"}
    {"tensor": "blk.0.attn_qkv.weight", "hash": "..."}           one line for each tensor that is complete

A line is a claim, not a promise: whoever goes on computes the hash of what the unfinished file holds and believes only
what agrees. So the order in which a disk writes after a power cut does not matter, and a line cut short is ignored.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Final

import numpy as np

import phiquant
from phiquant.convert.plan import Plan
from phiquant.errors import OutputError
from phiquant.gguf.temporary import kept_path

__all__ = ["Journal", "fingerprint"]

_MAX_BYTES: Final = 1 << 26
_PAUSE: Final = 2.0  # seconds between two waits for the disk


class Journal:
    """The journal of the run that writes `target`; `read`, `begin`, `note` from any thread, and `close` or `remove`."""

    def __init__(self, target: Path, plan: str, sync: Callable[[], None]) -> None:
        """`plan`: the fingerprint; `sync` waits until the disk has what was written to the output."""
        self.path = Path(f"{kept_path(target)}.json")
        self.found = False  # a journal of another plan was there
        self.plan = plan
        self._sync = sync
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._known: dict[str, bytes] = {}
        self._last = monotonic()
        self._descriptor = -1

    def read(self) -> dict[str, bytes]:
        """Hashes of the tensors that an earlier run with the same plan says it completed."""
        self._known = self._read()
        return self._known

    def begin(self) -> None:
        """Open the journal for this run: anew, unless `read` found something."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        try:
            self._descriptor = os.open(self.path, flags if self._known else flags | os.O_TRUNC, 0o666)
            # After a line cut short the next one begins on a line of its own.
            self._append(["", json.dumps({"plan": self.plan})])
        except OSError as error:
            raise _refused(self.path, error) from error

    def _read(self) -> dict[str, bytes]:
        done: dict[str, bytes] = {}
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                return {}
            lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return {}
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                if "plan" in entry and entry["plan"] != self.plan:
                    self.found = True
                    return {}
                if "tensor" in entry:
                    done[str(entry["tensor"])] = bytes.fromhex(entry["hash"])
        return done

    def note(self, tensor: str, digest: bytes) -> None:
        """A tensor is complete and has this hash; it is on the disk at the latest some seconds later."""
        with self._lock:
            self._waiting.append(json.dumps({"tensor": tensor, "hash": digest.hex()}))
            if monotonic() - self._last > _PAUSE:
                self._flush()

    def flush(self) -> None:
        """Have on the disk what was noted."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        lines, self._waiting = self._waiting, []
        try:
            if lines and self._descriptor >= 0:
                self._sync()
                self._append(lines)
        except OSError as error:
            raise _refused(self.path, error) from error
        self._last = monotonic()

    def _append(self, lines: Iterable[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Write down what is complete, and leave the journal for a later run."""
        with self._lock, contextlib.suppress(OutputError):
            self._flush()
        self._close()

    def remove(self) -> None:
        """The output is finished, or given up; a journal that was not begun may be another run's and stays."""
        if self._descriptor < 0:
            return
        self._close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _refused(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror or error}; free some space, or go without --resume.")


def fingerprint(plan: Plan, *, keep_nan: bool) -> str:
    """A hash of all that the bytes of the output depend on: version, sources as they are on disk, plan, metadata."""
    sources = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in plan.source.files]
    hashed = hashlib.sha256(repr((phiquant.__version__, keep_nan, sources, plan.part_sizes, plan.copied)).encode())
    for tensor in plan.tensors:
        shape = tensor.name, tensor.source_name, tensor.shape, int(tensor.source), int(tensor.type)
        hashed.update(repr(shape).encode())
        if tensor.importance is not None:
            hashed.update(np.ascontiguousarray(tensor.importance).data)
    for entry in plan.entries:
        value = entry.value.tolist() if isinstance(entry.value, np.ndarray | np.generic) else entry.value
        hashed.update(repr((entry.key, int(entry.type), entry.item_type, value)).encode())
    return hashed.hexdigest()
