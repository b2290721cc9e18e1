"""Convert, quantize and run Microsoft Phi models as GGUF."""

from typing import TYPE_CHECKING, Any

from phiquant import errors
from phiquant.errors import PhiquantError

if TYPE_CHECKING:
    from phiquant.llm import LLM, Completion, CompletionChunk, Options, Timings, Usage

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Completion",
    "CompletionChunk",
    "Options",
    "PhiquantError",
    "Timings",
    "Usage",
    "__version__",
    "errors",
]

_LAZY = frozenset({"LLM", "Completion", "CompletionChunk", "Options", "Timings", "Usage"})


def __getattr__(name: str) -> Any:
    """Names of `llm` are imported when they are first used, so that `import phiquant` costs next to nothing."""
    if name in _LAZY:
        from phiquant import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'phiquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
