"""transformers, asked for logits by a program in another process: the package itself needs neither it nor torch."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import RequestError
from ..gguf.closing import Closing
from .measure import Block

__all__ = ["Transformers"]

_WORKER: Final = Path(__file__).with_name("oracle_worker.py")
_BLOCK_BYTES: Final = 1 << 24


class Transformers(Closing):
    """Logits of a checkpoint in float32 by transformers; a context manager, which ends the process.

    Args:
        checkpoint: a folder in Hugging Face layout.
        sequences: token ids of each.
        python: an interpreter that has torch and transformers.

    Attributes:
        vocabulary: tokens.
        versions: of torch and transformers.
        model_class: of transformers, that computed.

    Raises RequestError, here or while logits are read, if transformers is not there or cannot run the checkpoint.
    """

    def __init__(
        self, checkpoint: Path, sequences: Sequence[Sequence[int]], python: str | os.PathLike[str] = sys.executable
    ) -> None:
        self._checkpoint, self._sequences = checkpoint, sequences
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                [python, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},  # what is wanted is a folder here
            )
        except OSError as error:
            self._errors.close()
            raise RequestError(f"{python} cannot be run: {error.strerror}; name a Python with --python") from error
        try:
            head = self._head(python)
        except BaseException:
            self.close()
            raise
        self.vocabulary = int(head["vocabulary"])
        self.versions = {name: str(head[name]) for name in ("torch", "transformers")}
        self.model_class = str(head["class"])

    def _head(self, python: str | os.PathLike[str]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {
            "model": str(self._checkpoint.absolute()),
            "sequences": [list(map(int, ids)) for ids in self._sequences],
            "rows": 64,
        }
        try:
            self._process.stdin.write(json.dumps(job).encode())
            self._process.stdin.close()
        except BrokenPipeError:
            raise self._ended() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        head: dict[str, Any] = json.loads(line)
        if "missing" in head:
            raise RequestError(
                f"{python} has no {head['missing']}: install it (pip install torch transformers), "
                "or name a Python that has both with --python"
            )
        if "error" in head:
            raise RequestError(f"transformers cannot run {self._checkpoint}: {head['error']}")
        return head

    def blocks(self) -> Iterator[Block]:
        """Logits of each sequence in turn, a few rows at a time; once."""
        assert self._process.stdout is not None
        step = max(1, _BLOCK_BYTES // (4 * self.vocabulary))
        for index, ids in enumerate(self._sequences):
            for start in range(0, len(ids), step):
                count = min(step, len(ids) - start)
                raw = self._process.stdout.read(4 * count * self.vocabulary)
                if len(raw) < 4 * count * self.vocabulary:
                    raise self._ended()
                yield index, start, np.frombuffer(raw, "<f4").reshape(count, self.vocabulary)

    def _ended(self) -> RequestError:
        """The process ended early; its last words say why."""
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1].strip()}" if lines else ""
        status = self._process.returncode
        why = f"was ended by signal {-status}, perhaps for want of memory" if status < 0 else f"failed{said}"
        return RequestError(f"transformers {why} while it ran {self._checkpoint}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()
        self._errors.close()
