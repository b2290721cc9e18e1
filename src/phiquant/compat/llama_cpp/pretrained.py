"""Models of the Hugging Face Hub by repository and file name, in huggingface_hub's cache."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

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

    Raises ArgumentError (a ValueError) if a pattern fits no file, or several.
    """
    from huggingface_hub import HfApi, hf_hub_download

    names = HfApi().list_repo_files(repo_id)
    paths = []
    for pattern in (filename or "*.gguf", *additional):
        found = [name for name in names if fnmatch.fnmatch(name, pattern)]
        if len(found) != 1:
            what = "several files" if found else "no file"
            shown = ", ".join((found or names)[:20])
            raise ArgumentError(f"{repo_id} has {what} of the name {pattern}; there are {shown}")
        path = PurePosixPath(found[0])
        subfolder = None if path.parent == PurePosixPath(".") else str(path.parent)
        paths.append(
            hf_hub_download(repo_id, filename=path.name, subfolder=subfolder, local_dir=local_dir, cache_dir=cache_dir)
        )
    return str(paths[0])
