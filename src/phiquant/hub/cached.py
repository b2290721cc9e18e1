"""What is in the cache that all users of huggingface_hub share: models, unfinished downloads; and removing them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from phiquant.errors import RequestError
from phiquant.hub.naming import models_among
from phiquant.hub.reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRepoInfo, CachedRevisionInfo, HFCacheInfo

__all__ = ["CachedModel", "Removal", "Unfinished", "cached_models", "removal", "unfinished"]

_COMMIT_SHOWN: Final = 12  # hexadecimal digits


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache.

    Attributes:
        name: what `-hf` and `rm` know it by: owner/name[@revision][:quant or file].
        kind: "gguf", or "checkpoint" for what can be converted.
        quant: the quant that the name states; "" for a checkpoint, or if the name states none.
        size: bytes of all its files.
        used: when one of them was last read, seconds since 1970, as exactly as the file system keeps it.
        path: of the file, the first part or the checkpoint's directory.
        commit: of the revision.
        complete: whether no part is missing.
    """

    name: str
    kind: Literal["gguf", "checkpoint"]
    quant: str
    size: int
    used: float
    path: Path
    commit: str
    complete: bool
    repository: str
    files: tuple["CachedFileInfo", ...]


@dataclass(frozen=True)
class Unfinished:
    """What an interrupted download left, to be continued: a repository and the bytes that are there."""

    repository: str
    size: int


def cached_models() -> list[CachedModel]:
    """All GGUF models and checkpoints in the cache, by name; of one that several revisions share, each."""
    info = _scan()
    repos = [repo for repo in info.repos if repo.repo_type == "model"] if info else []
    return sorted((model for repo in repos for model in _models(repo)), key=lambda model: (model.name, model.commit))


def unfinished() -> list[Unfinished]:
    """Interrupted downloads, by repository."""
    sizes: dict[str, int] = {}
    for path in _cache().glob("models--*/blobs/*.incomplete"):
        name = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return [Unfinished(name, size) for name, size in sorted(sizes.items())]


class Removal:
    """What `removal` found and would take away; `execute` does.

    Attributes:
        models: the models that go.
        unfinished: interrupted downloads that go.
        freed: bytes that nothing else in the cache uses.
    """

    def __init__(
        self,
        models: Sequence[CachedModel],
        unfinished: Sequence[Path],
        info: "HFCacheInfo | None",
        revisions: Sequence["CachedRevisionInfo"],
        files: Sequence["CachedFileInfo"],
        kept: frozenset[Path],
    ) -> None:
        self.models, self.unfinished = tuple(models), tuple(unfinished)
        self._info, self._revisions, self._files = info, revisions, files
        self._orphans = {file.blob_path for file in files} - kept
        going = {file.blob_path: file.size_on_disk for revision in revisions for file in revision.files}
        going |= {file.blob_path: file.size_on_disk for file in files}
        self.freed = sum(size for blob, size in going.items() if blob not in kept)
        self.freed += sum(path.stat().st_size for path in unfinished)

    def execute(self) -> None:
        """Take it away. OSError if the file system refuses."""
        for path in self.unfinished:
            path.unlink(missing_ok=True)
            _remove_empty(path.parent, path.parent.parent)
        if self._info is None:
            return
        if self._files:
            info: Any = self._info
            if hasattr(info, "delete_files"):  # it knows of blobs that several repositories share
                info.delete_files(*self._files).execute()
            else:
                for file in self._files:
                    file.file_path.unlink(missing_ok=True)
                for blob in self._orphans:
                    blob.unlink(missing_ok=True)
        if self._revisions:
            self._info.delete_revisions(*(revision.commit_hash for revision in self._revisions)).execute()


def removal(name: str) -> Removal:
    """What `rm` of a name takes away: a model (`owner/name:quant`), a revision, or all of a repository (`owner/name`).

    RequestError if the cache has nothing by that name.
    """
    reference = Reference.parse(name)
    info = _scan()
    repo = next(
        (
            repo
            for repo in (info.repos if info else ())
            if repo.repo_type == "model" and repo.repo_id.lower() == reference.repository.lower()
        ),
        None,
    )
    if info and repo:  # commits are looked up by their hashes, which a repository and its copy have in common
        info = replace(info, repos=frozenset({repo}))
    folder = repo.repo_path if repo else _cache() / reference.folder
    parts = sorted((folder / "blobs").glob("*.incomplete"))
    revisions = [revision for revision in repo.revisions if _is_of(revision, reference)] if repo else []
    commits = {revision.commit_hash for revision in revisions}
    models = [model for model in _models(repo) if model.commit in commits] if repo else []
    if reference.quant is None and reference.file is None:
        whole = reference.revision is None
        if not revisions and not (whole and parts):
            if repo is None and folder.is_dir():
                raise RequestError(f"What the cache has of {name} is damaged and stays; delete {folder} yourself.")
            raise _nothing(name, models)
        others = [revision for revision in repo.revisions if revision not in revisions] if repo else []
        return Removal(models, parts if whole else [], info, revisions, [], _blobs(others))
    going = [model for model in models if _is_meant(model, reference)]
    if not going:
        raise _nothing(name, models)
    assert repo is not None
    files = {file for model in going for file in model.files}
    emptied = [revision for revision in revisions if revision.files <= files]
    left = [file for file in files if not any(file in revision.files for revision in emptied)]
    kept = frozenset(file.blob_path for revision in repo.revisions for file in revision.files - files)
    return Removal(going, [], info, emptied, left, kept)


def _models(repo: "CachedRepoInfo") -> list[CachedModel]:
    found = []
    for revision in repo.revisions:
        files = {file.file_path.relative_to(revision.snapshot_path).as_posix(): file for file in revision.files}
        base = repo.repo_id + _at(revision)
        models = models_among(sorted(files))
        labels = [model.quant for model in models]
        for model in models:
            label = model.quant if model.quant and labels.count(model.quant) == 1 else model.files[0]
            some = tuple(files[name] for name in model.files)
            path = revision.snapshot_path / model.files[0]
            found.append(_entry(f"{base}:{label}", "gguf", model.quant, some, path, revision, repo, model.complete))
        weights = [name for name in files if name.endswith(".safetensors") and "/" not in name]
        if weights and "config.json" in files:
            some = tuple(file for name, file in files.items() if not name.lower().endswith(".gguf"))
            whole = _all_shards(weights)
            found.append(_entry(base, "checkpoint", "", some, revision.snapshot_path, revision, repo, whole))
    return found


def _entry(
    name: str,
    kind: Literal["gguf", "checkpoint"],
    quant: str,
    files: tuple["CachedFileInfo", ...],
    path: Path,
    revision: "CachedRevisionInfo",
    repo: "CachedRepoInfo",
    complete: bool,
) -> CachedModel:
    size = sum({file.blob_path: file.size_on_disk for file in files}.values())
    used = max(file.blob_last_accessed for file in files)
    return CachedModel(name, kind, quant, size, used, path, revision.commit_hash, complete, repo.repo_id, files)


def _all_shards(weights: Sequence[str]) -> bool:
    """Whether all of `model-00001-of-00003.safetensors` are there."""
    counts = {int(match[1]) for name in weights if (match := re.search(r"-of-(\d{5})\.safetensors$", name))}
    return all(sum(name.endswith(f"-of-{count:05}.safetensors") for name in weights) == count for count in counts)


def _at(revision: "CachedRevisionInfo") -> str:
    """@revision, where it is not the main one."""
    if "main" in revision.refs:
        return ""
    return "@" + (min(revision.refs) if revision.refs else revision.commit_hash[:_COMMIT_SHOWN])


def _is_of(revision: "CachedRevisionInfo", reference: Reference) -> bool:
    if reference.revision is None:  # all of them: while one has a file, taking it from another frees nothing
        return True
    return reference.revision in revision.refs or (
        len(reference.revision) >= 7 and revision.commit_hash.startswith(reference.revision)
    )


def _is_meant(model: CachedModel, reference: Reference) -> bool:
    if model.kind != "gguf":
        return False
    which = reference.file or reference.quant or ""
    paths = [file.file_path.as_posix() for file in model.files]
    return model.name.rpartition(":")[2].lower() == which.lower() or any(path.endswith("/" + which) for path in paths)


def _blobs(revisions: Sequence["CachedRevisionInfo"]) -> frozenset[Path]:
    return frozenset(file.blob_path for revision in revisions for file in revision.files)


def _nothing(name: str, models: Sequence[CachedModel]) -> RequestError:
    has = ", ".join(model.name for model in models)
    there = f"it has {has}." if has else "`phiquant list` shows what it has."
    return RequestError(f"The cache has no {name}; {there}")


def _scan() -> "HFCacheInfo | None":
    import huggingface_hub
    from huggingface_hub.errors import CacheNotFound

    try:
        return huggingface_hub.scan_cache_dir()
    except CacheNotFound:
        return None


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _remove_empty(*folders: Path) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # it holds something
            return
