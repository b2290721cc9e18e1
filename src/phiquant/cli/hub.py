"""`phiquant pull`, `list` and `rm`: models of the Hugging Face Hub, in the cache that its other tools share."""

import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phiquant import hub
from phiquant.cli.memory import sized
from phiquant.cli.models import DownloadBar
from phiquant.cli.notices import Notices
from phiquant.errors import OutputError, RequestError

if TYPE_CHECKING:
    from phiquant.hub import CachedModel, Removal

__all__ = ["list_models", "pull", "remove"]

_UNSEEN_WIDTH: Final = 400  # columns when the output goes to a file or a pipe: paths are long and are not cut
_UNITS: Final = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"))


def pull(name: str, *, quiet: bool = False) -> int:
    """Fetch a model, and print where it is."""
    with DownloadBar(quiet=quiet) as bar:
        path = hub.pull(name, download=bar)
    print(path)
    return 0


def list_models(*, as_json: bool = False) -> int:
    """Print the models in the cache."""
    models, parts = hub.cached_models(), hub.unfinished()
    if as_json:
        document = {
            "models": [
                {
                    "name": model.name,
                    "kind": model.kind,
                    "quant": model.quant or None,
                    "size": model.size,
                    "last_used": datetime.fromtimestamp(model.used).astimezone().isoformat(timespec="seconds"),
                    "complete": model.complete,
                    "path": str(model.path),
                }
                for model in models
            ],
            "unfinished": [{"repository": part.repository, "size": part.size} for part in parts],
        }
        json.dump(document, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return 0
    if models:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _UNSEEN_WIDTH)
        console.print(_table(models))
    for part in parts:
        print(f"{part.repository}: {sized(part.size)} of an interrupted download; pull goes on with it, rm drops it")
    if not models and not parts:
        print("no models are in the cache; phiquant pull OWNER/REPO[:QUANT] fetches one", file=sys.stderr)
    return 0


def remove(names: Sequence[str], *, yes: bool = False, quiet: bool = False) -> int:
    """Take models out of the cache, after asking; 1 if the answer is no."""
    removals = [hub.removal(name) for name in names]  # before anything goes: all of them are there
    if not yes:
        if not sys.stdin or not sys.stdin.isatty():
            raise RequestError("nobody is here to be asked whether to remove it; --yes says so")
        _show(names, removals)
        print("remove? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return 1
    freed = 0
    for name in names:
        found = hub.removal(name)  # again, since what another one took away is gone
        freed += found.freed
        try:
            found.execute()
        except OSError as error:
            raise OutputError(f"{error.filename or name} cannot be removed: {error.strerror or error}.") from error
    Notices(quiet=quiet).line(f"{sized(freed)} freed")
    return 0


def _show(names: Sequence[str], removals: Sequence["Removal"]) -> None:
    for name, found in zip(names, removals, strict=True):
        what = ", ".join(model.name for model in found.models) or name
        if found.unfinished:
            what += ", with what an interrupted download left"
        print(f"{what}: frees {sized(found.freed)}", file=sys.stderr)


def _table(models: Sequence["CachedModel"]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("kind")
    table.add_column("quant")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    table.add_column("path", overflow="fold")
    now = time.time()
    for model in models:
        kind = model.kind + ("" if model.complete else ", incomplete")
        name, path = Text(model.name), Text(str(model.path))  # of files that strangers named: no markup
        table.add_row(name, kind, model.quant or "-", sized(model.size), _ago(now - model.used), path)
    return table


def _ago(seconds: float) -> str:
    for unit, name in _UNITS:
        if seconds >= unit:
            count = int(seconds // unit)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"
