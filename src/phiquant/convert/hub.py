"""Repositories of the Hugging Face Hub as directories: only what a conversion reads, resumed if interrupted."""

import re
from collections.abc import Callable
from pathlib import Path

from phiquant.errors import RequestError

__all__ = ["local", "resolve"]

_PATTERNS = [
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
_REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?P<file>/[^@]+\.gguf)?(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def resolve(model: str | Path, *, quiet: bool = False) -> Path:
    """Return a directory or file that exists, else fetch `owner/name[@revision]` and return its directory in the cache.

    `owner/name/file.gguf` fetches that one file. RequestError says in one sentence what stands in the way.
    """
    path = local(model)
    if path is not None:
        return path
    match = _REPOSITORY.fullmatch(str(model))
    if match is None or ".." in str(model):
        raise RequestError(
            f"{str(model)[:200]!r} is neither a file, a directory nor a repository id (owner/name[@revision])."
        )
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # not in its __all__

    if quiet:
        disable_progress_bars()
    repository, revision = match["id"], match["revision"]

    def fetch() -> str:
        if match["file"]:
            return str(huggingface_hub.hf_hub_download(repository, match["file"][1:], revision=revision))
        return str(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS))

    return Path(_translated(fetch, str(model), repository, revision))


def local(model: str | Path) -> Path | None:
    """Return the path if something exists there; None for what does not exist or cannot be a path at all."""
    try:
        return Path(model) if Path(model).exists() else None
    except (OSError, ValueError):  # too long for a name, or with a null character
        return None


def _translated(fetch: Callable[[], str], model: str, repository: str, revision: str | None) -> str:
    """Run `fetch` and turn whatever the library raises into one sentence."""
    from huggingface_hub import errors

    try:
        return fetch()
    except errors.GatedRepoError as exc:
        raise RequestError(
            f"{repository} is gated: accept its terms on its page at the Hub, then log in with `hf auth login` "
            "or set HF_TOKEN."
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise RequestError(
            f"{model} is no file or directory here, and the Hub has no repository {repository} that you may read; "
            "check the name, or log in with `hf auth login`."
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise RequestError(f"{repository} has no revision {revision!r}; check the branch, tag or commit.") from exc
    except errors.LocalEntryNotFoundError as exc:
        if isinstance(exc.__cause__, errors.HfHubHTTPError):
            raise RequestError(f"The Hub does not give out {repository}: {_first_line(exc.__cause__)}.") from exc
        raise RequestError(
            f"{model} is no file or directory here, and the Hub cannot be reached; "
            "check the network (and HF_HUB_OFFLINE), or give the path of a downloaded checkpoint."
        ) from exc
    except errors.EntryNotFoundError as exc:
        raise RequestError(f"{repository} has no file {model.removeprefix(repository + '/')}.") from exc
    except OSError as exc:
        raise RequestError(
            f"{repository} could not be downloaded: {exc.strerror or _first_line(exc)}; run again to resume."
        ) from exc
    except Exception as exc:  # the library's HTTP client changes; whatever it raises, the remedy is the same
        raise RequestError(f"{repository} could not be downloaded: {_first_line(exc)}; run again to resume.") from exc


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return (lines[0] if lines else type(exc).__name__).rstrip(".")[:200]
