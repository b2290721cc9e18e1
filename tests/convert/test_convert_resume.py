"""`--resume`: whatever stops a run, the next one goes on, and the bytes are those of a run that was not stopped."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.convert import convert, journal, quantize
from phiquant.convert.parts import Division
from phiquant.convert.plan import Plan
from phiquant.errors import OutputError, WeightsError

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
PROGRAM = """
    import os, signal, sys, time
    from phiquant.convert import journal, quantize
    from phiquant.convert.parts import Division
    journal._PAUSE = 0

    class Stop:
        left = int(sys.argv[3])
        def planned(self, plan): pass
        def resumed(self, source_bytes): print("resumed", flush=True)
        def advanced(self, source_bytes, tensor):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), int(sys.argv[4]))
                time.sleep(0.1)

    division = Division(max_tensors=15) if sys.argv[5] == "parts" else Division()
    quantize(sys.argv[1], sys.argv[2], "Q4_K_M", threads=2, resume=True, progress=Stop(), division=division)
"""


class Stopper:
    """Raises after so many pieces; remembers what it was told."""

    def __init__(self, after: int = -1, error: BaseException | None = None) -> None:
        self.left, self.error = after, error
        self.done = self.skipped = 0

    def planned(self, plan: Plan) -> None:
        self.total = plan.source_bytes

    def advanced(self, source_bytes: int, tensor: str) -> None:
        self.done += source_bytes
        self.left -= 1
        if self.left == 0:
            raise self.error or KeyboardInterrupt

    def resumed(self, source_bytes: int) -> None:
        self.skipped = source_bytes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "x.gguf"
    quantize(TINY, path, "Q4_K_M")
    return path


@pytest.mark.skipif(os.name == "nt", reason="processes are not killed by signals there")
@pytest.mark.parametrize(("kind", "seed"), [("one", 1), ("one", 2), ("parts", 3)])
def test_a_run_killed_again_and_again_gives_the_same_bytes(tmp_path: Path, kind: str, seed: int) -> None:
    chance = random.Random(seed)
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(TINY), str(tmp_path / "out" / "x.gguf")]
    (tmp_path / "out").mkdir()
    stops = [(chance.randrange(5, 30), chance.choice([signal.SIGKILL, signal.SIGINT])) for _ in range(5)]
    resumed = False
    for after, number in stops:
        done = subprocess.run([*command, str(after), str(int(number)), kind], capture_output=True, timeout=60)
        if done.returncode == 0:
            break
        resumed |= b"resumed" in done.stdout
        assert not [name for name in names(tmp_path / "out") if not name.startswith(".")], "no file is complete yet"
        assert all(name.endswith((".part", ".part.json")) for name in names(tmp_path / "out"))
    done = subprocess.run([*command, "-1", "0", kind], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert resumed or b"resumed" in done.stdout
    division = Division(max_tensors=15) if kind == "parts" else Division()
    (tmp_path / "whole").mkdir()
    parts = quantize(TINY, tmp_path / "whole" / "x.gguf", "Q4_K_M", division=division).plan.parts
    assert names(tmp_path / "out") == [part.path.name for part in parts], "nothing else is left"
    for part in parts:
        assert (tmp_path / "out" / part.path.name).read_bytes() == part.path.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_an_interrupted_run_is_continued(whole: Path, tmp_path: Path, seed: int) -> None:
    path, chance = tmp_path / "x.gguf", random.Random(seed)
    stopper = Stopper()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            quantize(TINY, path, "Q4_K_M", resume=True, threads=chance.randrange(1, 4), progress=Stopper(20))
        assert names(tmp_path) == [".x.gguf.part", ".x.gguf.part.json"]
    report = quantize(TINY, path, "Q4_K_M", resume=True, progress=stopper)
    assert any("tensors are done by an earlier run" in note for note in report.plan.notes)
    assert 0 < stopper.skipped < stopper.total == stopper.done
    assert names(tmp_path) == ["x.gguf"]
    assert path.read_bytes() == whole.read_bytes()


def test_convert_is_continued_too(tmp_path: Path) -> None:
    expected = convert(TINY, tmp_path / "whole.gguf", "f32").plan.path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        convert(TINY, tmp_path / "x.gguf", "f32", resume=True, progress=Stopper(25))
    stopper = Stopper()
    convert(TINY, tmp_path / "x.gguf", "f32", resume=True, progress=stopper)
    assert stopper.skipped > 0
    assert (tmp_path / "x.gguf").read_bytes() == expected


def test_a_run_without_resume_neither_leaves_nor_uses_anything(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", progress=Stopper(20))
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt):
        quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", resume=True, progress=Stopper(20))
    stopper = Stopper()
    quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", progress=stopper)
    assert stopper.skipped == 0
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()


def interrupted(folder: Path, **options: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        quantize(TINY, folder / "x.gguf", "Q4_K_M", resume=True, threads=1, progress=Stopper(40), **options)
    return folder / ".x.gguf.part"


CHANGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "keep_nan": lambda folder: {"keep_nan": True},
    "type": lambda folder: {"filetype": "Q4_K_S"},
    "source": lambda folder: {"model": convert(TINY, folder / "bf16.gguf", "bf16").plan.path},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_plan_starts_anew(tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    changed = {"model": TINY, "filetype": "Q4_K_M", **CHANGES[name](tmp_path / "other")}
    expected = quantize(outfile=tmp_path / "other" / "e.gguf", **changed).plan.path.read_bytes()
    interrupted(tmp_path)
    stopper = Stopper()
    report = quantize(outfile=tmp_path / "x.gguf", resume=True, progress=stopper, **changed)
    assert stopper.skipped == 0
    assert any("starts anew" in note for note in report.plan.notes)
    assert (tmp_path / "x.gguf").read_bytes() == expected


def test_what_the_unfinished_file_lost_is_made_again(whole: Path, tmp_path: Path) -> None:
    """As after a power cut: the journal claims more than the disk holds."""
    part = interrupted(tmp_path)
    content = bytearray(part.read_bytes())
    assert content[4_000_000:4_000_100] != bytes(100)
    content[4_000_000:4_000_100] = bytes(100)
    part.write_bytes(content)
    stopper = Stopper()
    quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", resume=True, progress=stopper)
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:-10],
        lambda text: "[]\n7\nnull\n{}\n" + text,
        lambda text: text.replace("blk.", "none."),
        lambda text: text + '{"tensor": "blk.0.attn_norm.weight", "hash": "xyz"}\n',
        lambda text: text + json.dumps({"tensor": "output_norm.weight", "hash": "00" * 32}) + "\n",
        lambda text: "[" * 100_000,
        lambda text: "\udcff",
    ],
)
def test_a_journal_is_not_believed(whole: Path, tmp_path: Path, spoil: Callable[[str], str]) -> None:
    path = Path(f"{interrupted(tmp_path)}.json")
    path.write_bytes(spoil(path.read_text()).encode(errors="surrogateescape"))
    quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", resume=True)
    assert names(tmp_path) == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()


def test_a_missing_unfinished_file_starts_anew(whole: Path, tmp_path: Path) -> None:
    interrupted(tmp_path).unlink()
    stopper = Stopper()
    quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", resume=True, progress=stopper)
    assert stopper.skipped == 0
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()


def test_a_full_disk_is_resumable(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def pwrite(descriptor: int, data: Any, offset: int, original: Any = os.pwrite) -> int:
        nonlocal written
        written += len(data)
        if written > 9_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(original(descriptor, data, offset))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match="No space left"):
            quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", resume=True)
    assert names(tmp_path) == [".x.gguf.part", ".x.gguf.part.json"]
    stopper = Stopper()
    quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", resume=True, progress=stopper)
    assert stopper.skipped > 5_000_000
    assert (tmp_path / "x.gguf").read_bytes() == whole.read_bytes()


def test_refused_weights_leave_nothing(checkpoint: Callable[..., Path], make: Any, tmp_path: Path) -> None:
    tensors = make.tensors(make.config, "BF16")
    tensors["model.layers.1.mlp.down_proj.weight"][1][3, 5] = np.nan
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match="row 3"):
        quantize(checkpoint(tensors=tensors), tmp_path / "out" / "x.gguf", "Q8_0", resume=True)
    assert names(tmp_path / "out") == []


def test_the_disk_is_waited_for_before_the_journal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_PAUSE", 0.0)
    calls: list[str] = []
    for name in ("fdatasync", "fsync"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda fd, name=name, original=original: (calls.append(name), original(fd)))
    quantize(TINY, tmp_path / "x.gguf", "Q4_K_M", resume=True, threads=1)
    assert calls[0] == "fsync", "the plan"
    assert len(calls) > 40
    assert calls[1:] == ["fdatasync", "fsync"] * (len(calls) // 2)
