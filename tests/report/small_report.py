"""What a small report is made of: ours, a file of another program with a hostile name, and one with no loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phiquant import LLM
from phiquant.gguf import GGUFFile, GGUFWriter
from phiquant.report import Gathering, Report

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
HOSTILE = '<script>alert("1")</script>\'"><img src=x onerror=alert(1)>\u202e\x1b[31m'


def changed(source: Path, path: Path, **values: object) -> Path:
    """The file as another program would write it: without our keys, and with other values."""
    with GGUFFile.open(source) as old, GGUFWriter(path) as writer:
        for key, field in old.fields.items():
            if not key.startswith("phiquant."):
                value = values.get(key.replace(".", "_"), field.value)
                writer.add(key, value, field.type, field.item_type)
        for info in old.tensors.values():
            writer.add_tensor(info.name, info.shape, info.type)
        writer.begin()
        for name in old.tensors:
            writer.write(name, old.data(name))
        writer.commit()
    return path


class Silent:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.weighed: dict[str, int] = {}

    @contextmanager
    def reading(self, what: str) -> Iterator[Callable[[int, int, str], None]]:
        self.read.append(what)
        yield lambda windows, total, found: None

    @contextmanager
    def weighing(self, what: str, nbytes: int) -> Iterator[Callable[[int], None]]:
        left = [nbytes]

        def advanced(done: int) -> None:
            left[0] -= done

        yield advanced
        self.weighed[what] = left[0]


def load(path: Path) -> LLM:
    return LLM.load(path, context=128, parallel=4, batch=256)


@dataclass
class Made:
    reference: Path
    ours: Path
    theirs: Path
    same: Path
    wanted: Gathering
    report: Report
    progress: Silent

    @property
    def files(self) -> list[Path]:
        return [self.ours, self.theirs, self.same]
