"""What is refused, and what is said once about arguments that change nothing."""

import warnings
from collections.abc import Mapping
from typing import Any

from phiquant.errors import RequestError

__all__ = ["ArgumentError", "StateError", "note_ignored"]


class ArgumentError(RequestError, ValueError):
    """An argument that cannot be served; a ValueError too, which scripts written for llama-cpp-python expect."""


class StateError(RequestError, RuntimeError):
    """The model was not loaded for what is asked of it; a RuntimeError too, as there."""


_noted = set[str]()


def note_ignored(given: Mapping[str, Any], reasons: Mapping[str, tuple[Any, str]]) -> None:
    """Warn, once in a process for each name, of arguments that differ from their default and change nothing.

    `reasons`: name -> its default, and why it changes nothing.
    """
    for name, (default, reason) in reasons.items():
        if given[name] != default and name not in _noted:
            _noted.add(name)
            warnings.warn(f"{name}={given[name]!r:.80} changes nothing: {reason}", UserWarning, stacklevel=4)
