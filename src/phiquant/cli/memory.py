"""Peak memory of this process; the one module of the command line that asks the operating system."""

from __future__ import annotations

import sys

__all__ = ["peak_bytes", "sized"]


def peak_bytes() -> int | None:
    """The largest resident size so far, mapped files included; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def sized(count: int) -> str:
    """A number of bytes for people: MB below a gigabyte (10⁹ bytes), else GB."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
