"""From a name to a path: listing, choosing, fetching what is missing, or the cache where there is no network."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from phiquant.errors import RequestError
from phiquant.hub.naming import USUAL, Found, choose, models_among
from phiquant.hub.reference import Reference
from phiquant.hub.sentences import first_line, offline, translated
from phiquant.hub.shown import Download, shown, without_bars
from phiquant.hub.transfer import Blob, transfer

__all__ = ["gguf", "is_cached", "local", "pull", "resolve"]

_CHECKPOINT: Final = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
]
_TIMEOUT: Final = 15.0  # seconds for an answer to a question
_PLAIN_HTTP: Final = 50 * 10**9  # bytes; what is larger is given out through the library's own protocol only


def local(model: str | Path) -> Path | None:
    """Return the path if something exists there; None for what does not exist or cannot be a path at all."""
    try:
        return Path(model) if Path(model).exists() else None
    except (OSError, ValueError):  # too long for a name, or with a null character
        return None


def is_cached(path: Path) -> bool:
    """Whether a file or directory lies in a cache of the Hub's, where nothing else is to be written."""
    return any(p.name == "snapshots" and p.parent.name.startswith("models--") for p in path.absolute().parents)


def resolve(model: str | Path | Reference, *, quiet: bool = False, download: Download | None = None) -> Path:
    """Return a directory or file that exists, else what a repository holds for a conversion, in the cache.

    `owner/name[@revision]` is a checkpoint's directory; `owner/name:quant` and `owner/name/file.gguf` are GGUF files,
    as for `gguf`, which has the other arguments, too. A Reference is never a path of this machine. RequestError says in
    one sentence what stands in the way.
    """
    if isinstance(model, Reference):
        reference = model
    else:
        path = local(model)
        if path is not None:
            return path
        try:
            reference = Reference.parse(str(model))
        except RequestError:
            raise RequestError(
                f"{str(model)[:200]!r} is neither a file, a directory nor a repository id (owner/name[@revision])."
            ) from None
    if reference.file or reference.quant:
        return gguf(reference, quiet=quiet, download=download)
    with translated(reference, str(model)), shown(quiet, download) as download:
        return _checkpoint(reference, _asked(reference, download), download)


def gguf(model: str | Reference, *, quiet: bool = False, download: Download | None = None) -> Path:
    """The path of a GGUF model of the Hub, of its first part if it has several; what is missing is fetched.

    Args:
        model: `owner/name[@revision][:quant]`, where `quant` is Q4_K_M or what the files' names say, or a file's
            path; without it Q4_K_M is taken, else Q8_0, else the first file.
        quiet: show no bar, and say nothing of what was chosen.
        download: is told how it goes, instead of the bar.

    Raises:
        RequestError: there is no such model, or it is one of several, or it cannot be fetched; the sentence says which.
    """
    reference = Reference.parse(model) if isinstance(model, str) else model
    with translated(reference, str(reference)), shown(quiet, download) as download:
        return _gguf(reference, _asked(reference, download), download)


def pull(model: str | Reference, *, quiet: bool = False, download: Download | None = None) -> Path:
    """Fetch a GGUF model as `gguf` does, or, from a repository without any, the checkpoint; returns its path."""
    reference = Reference.parse(model) if isinstance(model, str) else model
    with translated(reference, str(reference)), shown(quiet, download) as download:
        listing = _asked(reference, download)
        names = list(listing.files) if listing else _in_cache(reference)
        if reference.file or reference.quant or models_among(names):
            return _gguf(reference, listing, download)
        if listing and "config.json" not in names:
            raise RequestError(f"{reference.repository} holds neither a GGUF model nor a checkpoint (config.json).")
        return _checkpoint(reference, listing, download)


@dataclass(frozen=True)
class _File:
    size: int
    sha256: str | None  # None for what is not stored by its content


@dataclass(frozen=True)
class _Listing:
    """What the Hub says a repository holds at a commit."""

    commit: str
    files: dict[str, _File]


def _asked(reference: Reference, download: Download) -> _Listing | None:
    """The Hub's listing; None if it does not answer and the cache has something of that repository."""
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        info = huggingface_hub.HfApi().model_info(
            reference.repository, revision=reference.revision, files_metadata=True, timeout=_TIMEOUT
        )
    except RevisionNotFoundError:
        raise
    except Exception as exc:  # no network, or a Hub that is down or refuses: what is here can still be used
        if not _in_cache(reference):
            raise
        if not offline():
            download.note(f"the Hub cannot be asked ({first_line(exc)}); what is in the cache is used")
        return None
    if not info.sha or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise RequestError(f"The Hub names no commit of {reference.repository}; check HF_ENDPOINT.")
    return _Listing(
        info.sha,
        {
            file.rfilename: _File(file.size or 0, _digest(file.lfs.sha256) if file.lfs else None)
            for file in info.siblings or []
            if file.rfilename.isprintable() and not {"", ".", ".."} & set(file.rfilename.split("/"))
        },
    )


def _digest(text: object) -> str | None:
    """A SHA-256 that can be the name of a file, or None."""
    return text if isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) else None


def _gguf(reference: Reference, listing: _Listing | None, download: Download) -> Path:
    names = list(listing.files) if listing else _in_cache(reference)
    try:
        model = _chosen(reference, names)
    except RequestError as exc:
        if listing is not None:
            raise
        why = "HF_HUB_OFFLINE forbids to ask the Hub for more" if offline() else "the Hub cannot be reached for more"
        raise RequestError(f"{str(exc).removesuffix('.')} in the cache, and {why}.") from exc
    if reference.quant is None and reference.file is None and model.quant != USUAL[0]:
        download.note(f"{reference.repository} has no {USUAL[0]}; this is {model.quant or model.files[0]}")
    if listing is None:
        return _snapshot(reference) / model.files[0]
    _prefetch(reference, listing, model.files, download)
    for part in model.files[1:]:
        _linked(reference.repository, part, listing.commit)
    return _linked(reference.repository, model.files[0], reference.revision)


def _chosen(reference: Reference, names: list[str]) -> Found:
    models = models_among(names)
    if reference.file is None:
        return choose(models, reference.quant, reference.repository)
    if reference.file not in names:
        raise RequestError(f"{reference.repository} has no file {reference.file}.")
    return next((model for model in models if reference.file in model.files), Found((reference.file,), 1, ""))


def _checkpoint(reference: Reference, listing: _Listing | None, download: Download) -> Path:
    import huggingface_hub

    if listing is not None:
        files = [name for name in listing.files if any(fnmatch(name, pattern) for pattern in _CHECKPOINT)]
        _prefetch(reference, listing, files, download)
    with without_bars():
        return Path(
            huggingface_hub.snapshot_download(
                reference.repository,
                revision=reference.revision,
                allow_patterns=_CHECKPOINT,
                local_files_only=listing is None,
            )
        )


def _prefetch(reference: Reference, listing: _Listing, files: list[str] | tuple[str, ...], download: Download) -> None:
    """Bring large files into the cache as blobs; the library then finds them there and adds names and the rest."""
    from huggingface_hub import constants, hf_hub_url

    folder = Path(constants.HF_HUB_CACHE) / reference.folder
    missing: dict[str, Blob] = {}  # by content, which files may share
    for name in files:
        file = listing.files[name]
        if file.sha256 is None or file.size > _PLAIN_HTTP:
            continue
        if not ((folder / "snapshots" / listing.commit / name).exists() or (folder / "blobs" / file.sha256).exists()):
            url = hf_hub_url(reference.repository, name, revision=listing.commit)
            missing.setdefault(file.sha256, Blob(name, file.size, file.sha256, url))
    if not missing:
        return
    with _no_empty_folders(folder):
        name = Path(files[0] if len(files) == 1 else reference.repository).name
        download.planned(name, sum(blob.size for blob in missing.values()))
        for blob in missing.values():
            transfer(blob, folder, folder.parent / ".locks" / reference.folder, download)


def _linked(repository: str, file: str, revision: str | None) -> Path:
    import huggingface_hub

    with without_bars():
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))


def _snapshot(reference: Reference) -> Path:
    """The directory of a revision in the cache, which need not exist."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / reference.folder
    try:
        commit = (folder / "refs" / reference.ref).read_text().strip()
    except (OSError, ValueError):
        commit = reference.ref
    return folder / "snapshots" / commit


def _in_cache(reference: Reference) -> list[str]:
    """The files of a revision that are in the cache, by their paths in the repository."""
    snapshot = _snapshot(reference)
    return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())


@contextmanager
def _no_empty_folders(folder: Path) -> Iterator[None]:
    """On an error, take away the directories that hold nothing."""
    try:
        yield
    except BaseException:
        for path in (folder / "blobs", folder):
            try:
                path.rmdir()
            except OSError:  # it holds something, or is not there
                break
        raise
