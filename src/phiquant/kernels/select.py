"""Picks a backend, once, when a model is loaded."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import KernelError, UnsupportedError
from .ops import Backend

__all__ = ["BACKENDS", "select"]

BACKENDS = ("cpu", "reference")
"""Names of the backends there are, best first."""


def select(name: str = "auto", progress: Callable[[str], None] | None = None) -> Backend:
    """The backend of that name; "auto" for the best one that this machine can run (never the reference).

    Args:
        name: "auto" or one of BACKENDS.
        progress: is told, in a line, what takes its time.

    Raises:
        UnsupportedError: there is no backend of that name.
        KernelError: it cannot run here; says why.
    """
    if name == "reference":
        from .reference import ReferenceBackend

        return ReferenceBackend()
    if name not in ("auto", "cpu"):
        raise UnsupportedError(f"there is no backend {name!r}; possible are auto, {', '.join(BACKENDS)}")
    try:
        from .cpu.backend import CpuBackend
        from .cpu.target import host

        host()
    except (ImportError, KernelError, OSError) as error:
        raise KernelError(
            f"tried the backend cpu: {error}. The backend reference runs anywhere, slowly, if asked for by name"
        ) from error
    return CpuBackend(progress)
