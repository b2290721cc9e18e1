"""Single files of a repository, for callers who name them, and say where they are to be."""

from pathlib import Path, PurePosixPath

from phiquant.hub.reference import Reference
from phiquant.hub.sentences import translated

__all__ = ["fetched", "names"]


def names(repository: str) -> list[str]:
    """The files of owner/name, by their paths in it. RequestError says in one sentence what stands in the way."""
    import huggingface_hub

    with translated(Reference(repository), repository):
        return list(huggingface_hub.HfApi().list_repo_files(repository))


def fetched(
    repository: str, name: str, *, local_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The path of a file, by its path in the repository, which huggingface_hub fetches if it is not there.

    Args:
        repository: owner/name.
        name: of the file.
        local_dir: where to put it, instead of the library's cache.
        cache_dir: another place for that cache.

    Raises:
        RequestError: it cannot be fetched; the sentence says why.
    """
    import huggingface_hub

    path = PurePosixPath(name)
    folder = None if path.parent == PurePosixPath(".") else str(path.parent)
    with translated(Reference(repository, file=name), f"{repository}/{name}"):
        return Path(
            huggingface_hub.hf_hub_download(
                repository, filename=path.name, subfolder=folder, local_dir=local_dir, cache_dir=cache_dir
            )
        )
