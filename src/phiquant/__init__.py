"""Convert, quantize and run Microsoft Phi models as GGUF."""

from typing import TYPE_CHECKING, Any

from phiquant import errors
from phiquant.errors import PhiquantError

if TYPE_CHECKING:
    from phiquant.async_llm import AsyncLLM
    from phiquant.completion import Completion, CompletionChunk, Embeddings, Options, Timings, Usage
    from phiquant.engine import Stats, TokenLogprob
    from phiquant.llm import LLM
    from phiquant.text.grammar import Grammar

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "Completion",
    "CompletionChunk",
    "Embeddings",
    "Grammar",
    "Options",
    "PhiquantError",
    "Stats",
    "Timings",
    "TokenLogprob",
    "Usage",
    "__version__",
    "errors",
]

_LAZY = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    **dict.fromkeys(("Completion", "CompletionChunk", "Embeddings", "Options", "Timings", "Usage"), "completion"),
    **dict.fromkeys(("Stats", "TokenLogprob"), "engine"),
    "Grammar": "text.grammar",
}


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used, so that `import phiquant` costs next to nothing."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"phiquant.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'phiquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
