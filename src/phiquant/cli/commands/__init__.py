"""How each verb reads its arguments: names, defaults and help; the bodies are in a file of `cli` named after the verb.

Names and defaults are those of llama.cpp's tools: of `run` llama-cli's, of `quantize` llama-quantize's, and so on.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["GROUPS"]

GROUPS = {
    "quantizing": ("quantize",),
    "files": ("convert", "split", "merge", "verify", "inspect"),
    "models": ("run", "compare", "bench", "doctor"),
    "serving": ("serve",),
    "measures": ("imatrix", "perplexity", "measure", "report", "certify"),
    "hub": ("pull", "list", "rm"),
}
"""Which module here declares which verbs; `commands.VERB` imports it, since the others are not needed."""


def __getattr__(verb: str) -> Callable[..., Any]:
    for group, verbs in GROUPS.items():
        if verb in verbs:
            function: Callable[..., Any] = getattr(import_module(f".{group}", __name__), verb)
            return function
    raise AttributeError(f"module {__name__!r} has no attribute {verb!r}")
