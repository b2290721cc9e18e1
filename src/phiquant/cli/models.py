"""The models that verbs work on: files, and, with `-hf`, GGUF models of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .failures import WrongUsage
from .notices import Notices

if TYPE_CHECKING:
    from rich.progress import TaskID

    from ..hub import Reference

__all__ = [
    "DownloadBar",
    "checkpoint_of",
    "chosen",
    "fetched",
    "given",
    "path_of",
    "source_and_target",
    "source_of",
]


class DownloadBar:
    """A bar on stderr with what is fetched, its bytes, their rate and the time left; a line without a terminal.

    A context manager; silent if `quiet`.
    """

    def __init__(self, *, quiet: bool) -> None:
        from .bars import byte_bar

        self._notices = Notices(quiet=quiet)
        self._bar = byte_bar(quiet=quiet)
        self._task: TaskID | None = None
        self._have = 0

    def planned(self, name: str, total: int) -> None:
        """The download begins."""
        from .memory import sized

        if self._bar.disable:
            self._notices.line(f"phiquant: fetching {name}, {sized(total)}")
            return
        self._bar.start()
        self._task = self._bar.add_task(name, total=total)

    def advanced(self, count: int) -> None:
        """Move the bar."""
        self._have += count
        if self._task is not None:
            self._bar.update(self._task, completed=self._have)

    def resumed(self, count: int) -> None:
        """Move the bar; rate and time left count from here, for this took no time now."""
        self._have += count
        if self._task is not None and count:
            self._bar.reset(self._task, completed=self._have)

    def note(self, sentence: str) -> None:
        """A line above the bar."""
        self._notices.note(sentence)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def given(file: Path | str | None, repository: str | None) -> Path | Reference | None:
    """The model that one of two options names, or None. WrongUsage if both do, RequestError if it is no name."""
    if repository is None:
        return None if file is None else Path(file)
    if file is not None:
        raise WrongUsage(f"two models are named, {file} and {repository}")
    from ..hub import Reference

    return Reference.parse(repository)


def chosen(file: Path | str | None, repository: str | None, usage: str) -> Path | Reference:
    """As `given`; WrongUsage, with an example, if no model is named."""
    model = given(file, repository)
    if model is None:
        raise WrongUsage(f"no model is named: {usage}")
    return model


def path_of(model: Path | Reference, *, quiet: bool) -> Path:
    """Where the model is; one of the Hub is fetched if it is not in the cache. RequestError if that cannot be."""
    if isinstance(model, Path):
        return model
    from ..hub import gguf

    with DownloadBar(quiet=quiet) as bar:
        return gguf(model, download=bar)


def fetched(repository: str, *, quiet: bool) -> Path:
    """Where the GGUF model `owner/name[@revision][:quant]` is, fetched if it is not in the cache."""
    from ..hub import Reference

    return path_of(Reference.parse(repository), quiet=quiet)


def source_and_target(arguments: Sequence[Path], repository: str | None, usage: str) -> tuple[Path | Reference, Path]:
    """IN and OUT of `arguments`, or OUT alone and a model of the Hub. WrongUsage if it is neither."""
    if len(arguments) != (2 if repository is None else 1):
        named = "IN and OUT" if repository is None else "OUT alone, for --hf-repo names what is read"
        raise WrongUsage(f"{len(arguments)} names are given instead of {named}: {usage}")
    return chosen(None if repository is not None else arguments[0], repository, usage), arguments[-1]


def checkpoint_of(model: str | None, repository: str | None, usage: str) -> str | Reference:
    """The checkpoint that an argument or an option names, for `source_of`. WrongUsage if none or both do."""
    if repository is None and model is not None:
        return model
    found = chosen(model, repository, usage)
    assert not isinstance(found, Path)
    return found


def source_of(model: str | Reference, *, quiet: bool) -> str | Path:
    """What to convert from: `model` if it is a path, else what the repository of that name has, in the cache."""
    from ..hub import local, resolve

    if isinstance(model, str) and local(model) is not None:
        return model
    with DownloadBar(quiet=quiet) as bar:
        return resolve(model, download=bar)
