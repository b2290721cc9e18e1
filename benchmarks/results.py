"""benchmarks/results.csv: every figure that was measured; rows are added, never changed."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from dataclasses import astuple, dataclass, fields
from pathlib import Path

__all__ = ["FILE", "Result", "append", "commit", "processor"]

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "results.csv"


@dataclass(frozen=True)
class Result:
    """A figure, and a peer's if one was measured in the same run."""

    date: str
    commit: str
    processor: str
    threads: int
    what: str
    figure: float
    unit: str
    peer: str = ""
    peer_version: str = ""
    peer_figure: float | str = ""
    ratio: float | str = ""


def append(results: list[Result], file: Path = FILE) -> None:
    """Adds rows, and the header if the file is new."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        if new:
            writer.writerow([field.name for field in fields(Result)])
        writer.writerows([_short(value) for value in astuple(result)] for result in results)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def today() -> str:
    """The date, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit() -> str:
    """The commit that is measured, with a plus if sources differ from it."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "src"], cwd=ROOT, capture_output=True, text=True)
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def processor() -> str:
    """The processor's name, as the system gives it, and LLVM's name for it."""
    from phiquant.kernels.cpu.describe import describe

    facts = describe()
    name = facts.get("LLVM's name", "unknown")
    return f"{facts.get('processor', platform.machine())} ({name})"
