"""Whatever the library raises, as one sentence that says what to do."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from phiquant.errors import PhiquantError, RequestError
from phiquant.hub.reference import Reference

__all__ = ["first_line", "offline", "translated"]

_LOG_IN: Final = "log in with `hf auth login` or set HF_TOKEN"
_NEAR: Final = 3  # names that are offered instead of one that there is not
_ALIKE: Final = 0.7  # share of the characters


@contextmanager
def translated(reference: Reference, name: str) -> Iterator[None]:
    """While inside, errors of the library and its HTTP client become RequestError; `name` is what the user wrote."""
    from huggingface_hub import errors

    repository = reference.repository
    try:
        yield
    except PhiquantError:
        raise
    except errors.GatedRepoError as exc:
        raise RequestError(
            f"{repository} is gated: accept its terms on its page at the Hub, then {_LOG_IN} of that account."
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        near = _near(repository)
        hint = f"did you mean {' or '.join(near)}?" if near else f"check the name, or, if it is private, {_LOG_IN}."
        raise RequestError(
            f"{name} is no file or directory here, and the Hub has no repository {repository} that you may read; {hint}"
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise RequestError(
            f"{repository} has no revision {reference.revision!r}; check the branch, tag or commit."
        ) from exc
    except errors.LocalEntryNotFoundError as exc:
        if isinstance(exc.__cause__, errors.HfHubHTTPError):
            raise RequestError(f"The Hub does not give out {repository}: {first_line(exc.__cause__)}.") from exc
        raise RequestError(_unreachable(name, exc.__cause__)) from exc
    except errors.EntryNotFoundError as exc:
        raise RequestError(f"{repository} has no file {reference.file or name}.") from exc
    except errors.OfflineModeIsEnabled as exc:
        raise RequestError(_unreachable(name, exc)) from exc
    except errors.HfHubHTTPError as exc:
        if exc.response is not None and exc.response.status_code == 401:
            raise RequestError(f"The Hub does not accept your token: {_LOG_IN} again.") from exc
        raise RequestError(f"The Hub does not give out {repository}: {first_line(exc)}.") from exc
    except OSError as exc:
        raise RequestError(
            f"{repository} could not be downloaded: {exc.strerror or first_line(exc)}; run again to resume."
        ) from exc
    except Exception as exc:  # the library's HTTP client changes; whatever it raises, the remedy is the same
        if type(exc).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError"):
            raise RequestError(_unreachable(name, exc)) from exc
        raise RequestError(f"{repository} could not be downloaded: {first_line(exc)}; run again to resume.") from exc


def offline() -> bool:
    """Whether the user told the library to stay off the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def first_line(exc: BaseException) -> str:
    """The beginning of an exception's text, which may be a server's, without a full stop; its class if it has none."""
    lines = str(exc).strip().splitlines()
    return "".join(c for c in (lines[0] if lines else type(exc).__name__) if c.isprintable()).rstrip(".")[:200]


def _unreachable(name: str, exc: BaseException | None) -> str:
    if offline():
        reason = "HF_HUB_OFFLINE forbids to ask the Hub; unset it"
    else:
        reason = f"the Hub cannot be reached{f' ({first_line(exc)})' if exc else ''}; check the network"
    return f"{name} is neither here nor in the cache, and {reason}, or give the path of a downloaded model."


def _near(repository: str) -> list[str]:
    """Repositories with a name like it, by the same owner or else by anyone; none if the Hub does not say."""
    import huggingface_hub

    name = repository.lower().partition("/")[2]

    def likeness(found: str) -> float:
        return difflib.SequenceMatcher(None, found.lower().partition("/")[2], name).ratio()

    try:
        api = huggingface_hub.HfApi()
        for query in ({"author": repository.partition("/")[0]}, {"search": repository.partition("/")[2]}):
            models = [model.id for model in api.list_models(limit=500, **query)]  # type: ignore[arg-type]
            near = sorted((model for model in models if likeness(model) >= _ALIKE), key=likeness, reverse=True)
            if near:
                return near[:_NEAR]
    except Exception:  # what is told is that the repository is not there; a guess at what was meant may fail
        return []
    return []
