"""The bar on stderr that counts bytes."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

__all__ = ["byte_bar"]


def byte_bar(*, quiet: bool) -> Progress:
    """What is at hand, how much is done, rate, time left; nothing without a terminal."""
    console = Console(stderr=True, highlight=False)
    return Progress(
        TextColumn("{task.description:<24}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
