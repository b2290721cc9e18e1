"""How much memory a process may still take; the one module that asks the operating system for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["free_memory"]

_ROOT: Final = Path("/")


def free_memory(root: Path = _ROOT) -> int | None:
    """Bytes that are free, or taken by nothing but copies of files; None where the system does not tell.

    root: where proc and sys are.

    On Linux what the kernel deems available, and no more than what a container has left (cgroups, both versions).
    Elsewhere the machine's whole memory, if that is known.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return _all_memory()
    return max(0, min(free, *_left_of_groups(root)))


def _left_of_groups(root: Path) -> list[int]:
    """What the limits of a container leave; files that the group has read can be let go."""
    group = root / "sys/fs/cgroup"
    found = [1 << 62]
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = int((group / limit).read_text()), int((group / used).read_text())
            stat = dict(line.split() for line in (group / limit).with_name("memory.stat").read_text().splitlines())
            found.append(most - now + int(stat.get(cached, 0)))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return found


def _all_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
