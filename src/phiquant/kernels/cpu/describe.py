"""Facts about this machine and what the CPU backend makes of it."""

from __future__ import annotations

import platform
from pathlib import Path

import llvmlite

from ...errors import KernelError
from .library import cache_directory
from .target import host
from .team import available_threads

__all__ = ["describe"]

_SHOWN = ("avx512_vnni", "avx512vnni", "avxvnni", "avx512bf16", "avx512f", "avx2", "fma", "f16c", "dotprod", "i8mm")


def describe() -> dict[str, str]:
    """Processor, instruction set, threads and kernel cache, in words; a failure is a fact like others."""
    facts = {"processor": _name(), "llvmlite": llvmlite.__version__, "threads": str(available_threads())}
    try:
        target = host()
    except KernelError as error:
        return facts | {"kernels": str(error)}
    features = set(target.features.split(","))
    facts["LLVM's name"] = target.cpu
    facts["features"] = ", ".join(f for f in _SHOWN if f"+{f}" in features) or "none that kernels use"
    facts["lowering"] = target.lowering
    facts["kernel cache"] = _cache()
    return facts


def _name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cache() -> str:
    directory = cache_directory()
    if directory is None:
        return "in memory only: there is no directory of mode 0700 that belongs to you; set PHIQUANT_CACHE_DIR"
    files = list(directory.glob("*.o"))
    return f"{directory} ({len(files)} kernels, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB)"
