"""`phiquant doctor`: what this machine offers and what phiquant makes of it, as text or JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import stat
import sys
from typing import Any

from .. import __version__
from ..errors import KernelError
from ..kernels.cpu import library
from ..kernels.cpu.describe import describe
from ..kernels.cpu.target import not_chosen
from .memory import sized

__all__ = ["doctor", "facts"]

LIBRARIES = (
    "numpy",
    "llvmlite",
    "ml_dtypes",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "pyyaml",
    "platformdirs",
    "typer",
    "rich",
    "prompt_toolkit",
    "fastapi",
    "starlette",
    "pydantic",
    "uvicorn",
    "prometheus_client",
)
LATER = ("triton", "wgpu", "sycl")


def doctor(as_json: bool) -> None:
    """Prints the report."""
    found = facts()
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    rows = [("phiquant", f"{found['phiquant']} on Python {found['python']}, {found['system']}")]
    rows += [(name, text) for name, text in found["cpu"].items() if name not in ("llvmlite", "kernel cache", "kernels")]
    if found["forced"]:
        rows.append(("forced", f"PHIQUANT_LOWERING={found['forced']}"))
    if "kernels" in found["cpu"]:
        rows.append(("kernels", f"none: {found['cpu']['kernels']}"))
    rows += _section("not chosen", found["not_chosen"])
    cache = found["kernel_cache"]
    if cache["directory"] is None:
        rows.append(("kernel cache", cache["state"]))
    else:
        used = f"{cache['files']} kernels, {sized(cache['bytes'])} of {sized(cache['limit'])} at most"
        rows.append(("kernel cache", f"{cache['directory']}, {cache['state']}, mode {cache['mode']}; {used}"))
    rows += _section("backends", found["backends"])
    rows.append(("libraries", ", ".join(f"{name} {version}" for name, version in found["libraries"].items())))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


def facts() -> dict[str, Any]:
    """All that the report says, in JSON's types."""
    cpu = describe()
    try:
        others = not_chosen()
    except KernelError:  # told by describe
        others = {}
    return {
        "phiquant": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "forced": os.environ.get("PHIQUANT_LOWERING") or None,
        "not_chosen": others,
        "kernel_cache": _cache(),
        "backends": {
            "cpu": f"not available: {cpu['kernels']}" if "kernels" in cpu else "available",
            "reference": "available (NumPy: slow, for checking)",
            **dict.fromkeys(LATER, "not available: not part of this version"),
        },
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _section(title: str, entries: dict[str, str]) -> list[tuple[str, str]]:
    return [(title if i == 0 else "", f"{name}: {text}") for i, (name, text) in enumerate(entries.items())]


def _cache() -> dict[str, Any]:
    directory = library.cache_directory()
    if directory is None:
        return {
            "directory": None,
            "state": "in memory only: the directory cannot be made, or is not yours alone (mode 0700); "
            "set PHIQUANT_CACHE_DIR to one that is",
        }
    sizes = [path.stat().st_size for path in directory.glob("*.o")]
    return {
        "directory": str(directory),
        "state": "usable",
        "files": len(sizes),
        "bytes": sum(sizes),
        "limit": library.LIMIT,
        "mode": f"{stat.S_IMODE(directory.stat().st_mode):04o}",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
