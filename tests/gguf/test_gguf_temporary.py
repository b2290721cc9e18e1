"""Temporary files: gone with their run, kept on request, cleaned up after processes that were killed."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from phiquant.errors import OutputError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType, temporary

WRITE = """
    import os, signal, sys, time
    from pathlib import Path
    from phiquant.gguf import GGMLType, GGUFWriter
    with GGUFWriter(Path(sys.argv[1]), keep=len(sys.argv) > 2) as writer:
        writer.add_tensor("a", (8, 4), GGMLType.F32)
        writer.begin()
        print("begun", flush=True)
        time.sleep(60)
"""


def writing(path: Path, *more: str) -> subprocess.Popen[bytes]:
    """Another process that has begun to write `path` and then waits."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITE), str(path), *more], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def writer_of(path: Path, *, keep: bool = False) -> GGUFWriter:
    writer = GGUFWriter(path, keep=keep)
    writer.add("name", "x", ValueType.STRING)
    writer.add_tensor("a", (8, 4), GGMLType.F32)
    writer.add_tensor("b", (3,), GGMLType.F32)
    return writer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.skipif(temporary.fcntl is None, reason="without file locks nothing is cleaned up")
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process = writing(tmp_path / "x.gguf")
    try:
        assert len(names(tmp_path)) == 1
        temporary.clean(tmp_path)
        assert len(names(tmp_path)) == 1, "its process lives"
    finally:
        kill(process)
    left = names(tmp_path)
    assert len(left) == 1
    writer = writer_of(tmp_path / "y.gguf")
    writer.begin()
    assert left[0] not in names(tmp_path)
    assert len(names(tmp_path)) == 1
    writer.abort()
    assert names(tmp_path) == []


@pytest.mark.skipif(temporary.fcntl is None, reason="without file locks nothing is cleaned up")
def test_what_may_be_alive_is_left(tmp_path: Path) -> None:
    host, dead = temporary._host(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    keep = [
        f".phiquant-{host}-{os.getpid()}-{'0' * 16}.part",
        f".phiquant-{'0' * 8}-{dead.pid}-{'0' * 16}.part",
        f".phiquant-{host}-{dead.pid}-{'0' * 15}.part",
        f".phiquant-{host}-{dead.pid}-{'0' * 16}.part.gguf",
        ".x.gguf.part",
    ]
    locked, gone = f".phiquant-{host}-{dead.pid}-{'1' * 16}.part", f".phiquant-{host}-{dead.pid}-{'2' * 16}.part"
    for name in (*keep, gone):
        (tmp_path / name).touch()
    descriptor = temporary.create(tmp_path / locked)
    assert descriptor is not None
    temporary.clean(tmp_path)
    assert names(tmp_path) == sorted([*keep, locked])
    os.close(descriptor)
    temporary.clean(tmp_path)
    assert names(tmp_path) == sorted(keep)
    temporary.clean(tmp_path / "none")


def test_an_unfinished_file_is_kept_and_continued(tmp_path: Path) -> None:
    path, part = tmp_path / "x.gguf", tmp_path / ".x.gguf.part"
    a, b = np.arange(32, dtype=np.float32), np.arange(3, dtype=np.float32)
    writer = writer_of(path, keep=True)
    writer.begin()
    assert not writer.kept
    writer.write("a", a)
    writer.abort()
    assert names(tmp_path) == [part.name]
    with writer_of(path, keep=True) as writer:
        writer.begin()
        assert writer.kept
        found = np.empty(128, np.uint8)
        assert writer.read_into("a", 0, found)
        assert np.array_equal(found.view(np.float32), a)
        writer.adopt("a")
        with pytest.raises(ValueError, match="already"):
            writer.adopt("a")
        with pytest.raises(ValueError, match="twice"):
            writer.write("a", a)
        writer.write("b", b)
        writer.sync()
        writer.replace("name", "y", ValueType.STRING)
        writer.commit()
    assert names(tmp_path) == ["x.gguf"]
    with GGUFFile.open(path) as file:
        assert file.data("a").tobytes() == a.tobytes()
        assert file.data("b").tobytes() == b.tobytes()
        assert file.metadata["name"] == "y"


@pytest.mark.parametrize("why", ["size", "fresh"])
def test_another_unfinished_file_is_not_used(tmp_path: Path, why: str) -> None:
    part = tmp_path / ".x.gguf.part"
    probe = writer_of(tmp_path / "x.gguf", keep=True)
    probe.begin()
    probe.abort()
    part.write_bytes(b"\xff" * (part.stat().st_size + (why == "size")))
    with writer_of(tmp_path / "x.gguf", keep=True) as writer:
        writer.begin(fresh=why == "fresh")
        assert not writer.kept
        writer.write("a", bytes(128))
        writer.write("b", bytes(12))
        writer.commit()
    assert not (tmp_path / "x.gguf").read_bytes()[-160:].strip(b"\0"), "the padding is of this run, too"


def test_discarding_leaves_nothing(tmp_path: Path) -> None:
    writer = writer_of(tmp_path / "x.gguf", keep=True)
    writer.begin()
    writer.abort(discard=True)
    assert names(tmp_path) == []


@pytest.mark.skipif(temporary.fcntl is None, reason="without file locks two runs cannot be told apart")
def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    process = writing(tmp_path / "x.gguf", "keep")
    try:
        writer = writer_of(tmp_path / "x.gguf", keep=True)
        with pytest.raises(OutputError, match="being written by another run"):
            writer.begin()
    finally:
        kill(process)
    assert names(tmp_path) == [".x.gguf.part"]
    writer = writer_of(tmp_path / "x.gguf", keep=True)
    writer.begin()
    writer.abort(discard=True)


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for plant in (os.symlink, os.link):
        part = tmp_path / ".x.gguf.part"
        plant(victim, part)
        with pytest.raises(OutputError):
            writer_of(tmp_path / "x.gguf", keep=True).begin()
        assert victim.read_bytes() == b"precious"
        part.unlink()


def test_a_value_is_replaced_by_one_of_its_length(tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "x.gguf") as writer:
        writer.add("first", 1, ValueType.UINT8)
        writer.add("text", "aaaa", ValueType.STRING)
        writer.add("numbers", [0, 0], ValueType.ARRAY, ValueType.UINT64)
        writer.add("last", 2, ValueType.UINT8)
        writer.begin()
        writer.replace("text", "bbbb", ValueType.STRING)
        writer.replace("numbers", np.array([7, 2**64 - 1], np.uint64), ValueType.ARRAY, ValueType.UINT64)
        for value in ("ccc", "ccccc"):
            with pytest.raises(ValueError, match="longer or shorter"):
                writer.replace("text", value, ValueType.STRING)
        with pytest.raises(ValueError, match="longer or shorter"):
            writer.replace("numbers", [1], ValueType.ARRAY, ValueType.UINT64)
        writer.commit()
    with GGUFFile.open(tmp_path / "x.gguf") as file:
        assert file.metadata["text"] == "bbbb"
        assert file.metadata["numbers"].tolist() == [7, 2**64 - 1]
        assert (file.metadata["first"], file.metadata["last"]) == (1, 2)
