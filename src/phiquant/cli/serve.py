"""`phiquant serve`: from options to the server's settings; the log goes to stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .failures import WrongUsage
from .models import fetched
from .notices import Notices
from .sizes import parse_size

__all__ = ["serve"]

SEVERAL = ("api_keys", "cors", "allowed_hosts")


def serve(
    config: Path | None,
    *,
    models: Sequence[Path],
    repositories: Sequence[str],
    quiet: bool,
    max_body: str | None,
    api_key_file: Sequence[Path],
    **options: Any,
) -> int:
    """Serve; returns the exit status. `options` are those of `Settings.gather`, None where they were not given.

    Models of the Hub, `repositories`, come after the files, and are fetched if they are not here.
    """
    if config is None and not models and not repositories:
        raise WrongUsage("no model is named: phiquant serve -m MODEL.gguf")
    from ..server.settings import Settings, read_keys

    for name in SEVERAL:
        options[name] = tuple(options[name] or ())
    options["api_keys"] += read_keys(api_key_file)
    if max_body is not None:
        options["max_body"] = parse_size("--max-body", max_body)
    paths = [*models, *(fetched(name, quiet=quiet) for name in repositories)]
    settings = Settings.gather(config, models=paths, **options)
    for model in settings.models:
        if not model.path.is_file():
            raise FileNotFoundError(2, "No such file", str(model.path))
    notices = Notices(quiet=quiet)
    for warning in settings.warnings:
        print(f"phiquant: warning: {warning}", file=sys.stderr, flush=True)
    from ..server.run import serve as run

    def ready(address: str) -> None:
        names = ", ".join(model.name for model in settings.models)
        notices.line(f"phiquant: serving {names} at {address}")

    with notices.compiling():
        return run(settings, ready=ready, quiet=quiet)
