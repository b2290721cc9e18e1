"""The model that a quantization starts from, as a GGUF file that can be run."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from phiquant.cli.notices import Notices
from phiquant.convert.plan import plan_convert
from phiquant.convert.run import execute
from phiquant.convert.source import CheckpointSource, Source
from phiquant.errors import OutputError

__all__ = ["Original"]


class Original:
    """A source that can be run: a GGUF file as it is; a checkpoint converted without loss when it is first asked for.

    A context manager: the converted file is gone afterwards.

    Attributes:
        source: what it is made of.

    Args:
        source: must be open as long as this is.
        folder: holds the converted file, which is as large as the checkpoint.
        threads: of the conversion; 0 for one each core.
        quiet: do not say that it is being converted.
    """

    def __init__(self, source: Source, folder: Path, *, threads: int = 0, quiet: bool = False) -> None:
        self.source = source
        self._folder, self._threads = folder, threads
        self._notices = Notices(quiet=quiet)
        self._path: Path | None = None
        self._stack = ExitStack()

    def path(self) -> Path:
        """Of the file; OutputError if there is no place for it, and as `execute`."""
        if self._path is None:
            self._path = self._made()
        return self._path

    def _made(self) -> Path:
        if not isinstance(self.source, CheckpointSource):
            return self.source.files[0]
        try:
            temporary = tempfile.TemporaryDirectory(prefix=".phiquant-calibrate-", dir=self._folder)
        except OSError as error:
            raise OutputError(f"{self._folder} cannot hold a temporary file: {error.strerror or error}.") from error
        plan = plan_convert(self.source, "auto", Path(self._stack.enter_context(temporary)) / "lossless.gguf")
        self._notices.progress(f"converting the checkpoint to a temporary file of {plan.size / 1e9:.2f} GB")
        execute(plan, threads=self._threads)
        self._notices.clear()
        return plan.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
