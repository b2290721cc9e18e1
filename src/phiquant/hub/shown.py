"""How a download is shown: who is told of it, and the bar for programs that show nothing of their own."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from phiquant.hub.transfer import Counter

__all__ = ["Download", "shown", "without_bars"]


class Download(Counter, Protocol):
    """Told how a download goes; by one thread."""

    def planned(self, name: str, total: int) -> None:
        """So many bytes of something are to be here in the end. Not called if all is here."""

    def note(self, sentence: str) -> None:
        """Something the user should know."""


class _Silent:
    def planned(self, name: str, total: int) -> None:
        pass

    def advanced(self, count: int) -> None:
        pass

    def resumed(self, count: int) -> None:
        pass

    def note(self, sentence: str) -> None:
        pass


class _Bar(_Silent):
    """The library's own bar, on stderr, unless HF_HUB_DISABLE_PROGRESS_BARS says no."""

    def __init__(self) -> None:
        self._bar: Any = None

    def planned(self, name: str, total: int) -> None:
        from huggingface_hub import utils

        bar: Callable[..., Any] = utils.tqdm  # type: ignore[attr-defined]  # not in its __all__
        self._bar = bar(desc=name, total=total, unit="B", unit_scale=True)

    def advanced(self, count: int) -> None:
        self._bar.update(count)

    def resumed(self, count: int) -> None:
        self._bar.initial += count  # rate and time left count what comes now
        self._bar.n += count
        self._bar.refresh()

    def note(self, sentence: str) -> None:
        print(f"phiquant: note: {sentence}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def shown(quiet: bool, download: Download | None) -> Iterator[Download]:
    """Who is told: the caller's, or a bar, or nobody."""
    if download is not None:
        yield download
    elif quiet:
        yield _Silent()
    else:
        bar = _Bar()
        try:
            yield bar
        finally:
            bar.close()


@contextmanager
def without_bars() -> Iterator[None]:
    """While inside, the library shows no bars of its own."""
    from huggingface_hub import utils

    disabled: Callable[[], bool] = utils.are_progress_bars_disabled  # type: ignore[attr-defined]
    if disabled():
        yield
        return
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]
