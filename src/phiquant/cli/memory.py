"""Peak memory of this process; the one module of the command line that asks the operating system."""

from __future__ import annotations

import sys

__all__ = ["gibibytes", "peak_bytes"]


def peak_bytes() -> int | None:
    """The largest resident size so far, mapped files included; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gibibytes(size: int) -> str:
    """A size for people: MiB below one GiB, else GiB."""
    return f"{size / 2**20:.1f} MiB" if size < 1 << 30 else f"{size / 2**30:.2f} GiB"
