"""Models of the Hugging Face Hub by repository and file name, in huggingface_hub's cache."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from phiquant import hub
from phiquant.compat.llama_cpp.refusals import ArgumentError

__all__ = ["download"]


def download(
    repo_id: str,
    filename: str | None,
    additional: Sequence[str],
    *,
    local_dir: str | Path | None,
    cache_dir: str | Path | None,
) -> str:
    """Fetch a file and additional ones, each by a name or a pattern that fits only it; gives the path of the first.

    Raises:
        ArgumentError (a ValueError): a pattern fits no file, or several.
        RequestError: there is no such repository, or it cannot be fetched.
    """
    names = hub.names(repo_id)
    paths = []
    for pattern in (filename or "*.gguf", *additional):
        found = [name for name in names if fnmatch.fnmatch(name, pattern)]
        if len(found) != 1:
            what = "several files" if found else "no file"
            shown = ", ".join((found or names)[:20])
            raise ArgumentError(f"{repo_id} has {what} of the name {pattern}; there are {shown}")
        paths.append(hub.fetched(repo_id, found[0], local_dir=local_dir, cache_dir=cache_dir))
    return str(paths[0])
