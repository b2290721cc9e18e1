"""The writer: the same bytes as the `gguf` package's, from any thread, and nothing left behind when it fails."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gguf
from phiquant.errors import OutputError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType

RNG = np.random.default_rng(1)


def begun(path: Path, **options: Any) -> GGUFWriter:
    """A writer of one tensor of 8 x 4 float32, header written."""
    writer = GGUFWriter(path, **options)
    writer.add("general.architecture", "phi3", ValueType.STRING)
    writer.add_tensor("a", (8, 4), GGMLType.F32)
    writer.begin()
    return writer


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("alignment", [32, 64, 4096])
@pytest.mark.parametrize("with_tensors", [True, False])
def test_bytes_equal_those_of_the_gguf_package(tmp_path: Path, alignment: int, with_tensors: bool) -> None:
    tensors = {
        "norm": RNG.random(5, np.float32),
        "half": RNG.random((3, 7)).astype(np.float16),
        "cube": RNG.random((2, 3, 4), np.float32),
    }
    words = ["a", "", "▁the", "\N{OWL}"]
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "phi3")
    if alignment != 32:
        theirs.add_custom_alignment(alignment)
    theirs.add_uint32("n.u32", 7)
    theirs.add_float32("n.f32", 0.1)
    theirs.add_bool("n.bool", True)
    theirs.add_uint64("n.u64", 2**63)
    theirs.add_array("n.words", words)
    theirs.add_array("n.ints", [1, -2])
    theirs.add_array("n.floats", [0.1, 2.0])
    theirs.add_array("n.bools", [False, True])
    if with_tensors:
        for name, value in tensors.items():
            theirs.add_tensor(name, value)
    theirs.write_header_to_file()
    theirs.write_kv_data_to_file()
    if with_tensors:
        theirs.write_tensors_to_file()
    theirs.close()

    with GGUFWriter(tmp_path / "ours.gguf", alignment=alignment) as ours:
        ours.add("general.architecture", "phi3", ValueType.STRING)
        if alignment != 32:
            ours.add("general.alignment", alignment, ValueType.UINT32)
        ours.add("n.u32", 7, ValueType.UINT32)
        ours.add("n.f32", 0.1, ValueType.FLOAT32)
        ours.add("n.bool", True, ValueType.BOOL)
        ours.add("n.u64", 2**63, ValueType.UINT64)
        ours.add("n.words", words, ValueType.ARRAY, ValueType.STRING)
        ours.add("n.ints", np.array([1, -2], np.int64), ValueType.ARRAY, ValueType.INT32)
        ours.add("n.floats", [0.1, 2.0], ValueType.ARRAY, ValueType.FLOAT32)
        ours.add("n.bools", [False, True], ValueType.ARRAY, ValueType.BOOL)
        if with_tensors:
            for name, value in tensors.items():
                ours.add_tensor(name, value.shape, GGMLType.F16 if value.dtype == np.float16 else GGMLType.F32)
        ours.begin()
        if with_tensors:
            for name in reversed(tensors):
                ours.write(name, tensors[name])
        ours.commit()
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert ours.size == (tmp_path / "ours.gguf").stat().st_size


def test_a_missing_alignment_key_is_added(tmp_path: Path) -> None:
    with begun(tmp_path / "a.gguf", alignment=128) as writer:
        writer.write("a", bytes(128))
        writer.commit()
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.alignment == 128
        assert file.data_offset % 128 == 0


# Q2_0 is newer than the `gguf` package of this version; its Q8_1, a type of activations only, has blocks of 40 bytes
# where llama.cpp's have 36.
UNSHARED = {GGMLType.Q2_0, GGMLType.Q8_1}


@pytest.mark.parametrize("kinds", [set(GGMLType) - UNSHARED, UNSHARED], ids=["shared", "unshared"])
def test_every_type_is_read_back(tmp_path: Path, kinds: set[GGMLType]) -> None:
    data = {kind: RNG.integers(0, 256, 6 * kind.row_bytes(512), np.uint8) for kind in sorted(kinds)}
    with GGUFWriter(tmp_path / "a.gguf") as writer:
        for kind in data:
            writer.add_tensor(kind.name, (3, 2, 512), kind)
        writer.add_tensor("empty", (0, 32), GGMLType.F32)
        writer.begin()
        for kind, content in data.items():
            writer.write(kind.name, content)
        writer.commit()
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        for kind, content in data.items():
            assert file.tensors[kind.name].shape == (3, 2, 512)
            assert file.data(kind.name).tobytes() == content.tobytes()
        assert file.data("empty").size == 0
    if kinds != UNSHARED:
        reference = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
        for kind, content in data.items():
            assert reference[kind.name].tensor_type == kind
            assert reference[kind.name].data.tobytes() == content.tobytes()


def test_threads_write_chunks_in_any_order(tmp_path: Path) -> None:
    rows, columns = 997, 96
    weights = RNG.random((rows, columns), np.float32)
    with GGUFWriter(tmp_path / "a.gguf") as writer:
        writer.add_tensor("pad", (3,), GGMLType.F32)
        writer.add_tensor("w", weights.shape, GGMLType.F32)
        writer.begin()
        writer.write("pad", np.ones(3, np.float32))
        starts = RNG.permutation(np.arange(0, rows, 10))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda r: writer.write("w", weights[r : r + 10], int(r) * columns * 4), starts))
        writer.commit()
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.data("w").tobytes() == weights.tobytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_tensor_is_complete_when_every_byte_came_once(tmp_path: Path, data: st.DataObject) -> None:
    cuts = sorted({0, 128, *data.draw(st.lists(st.integers(1, 127), max_size=8))})
    spans = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    content = bytes(range(128))
    with begun(tmp_path / "a.gguf") as writer:
        for start, end in spans:
            writer.write("a", content[start:end], start)
            overlapping = data.draw(st.integers(start, end - 1))
            with pytest.raises(ValueError, match="written twice"):
                writer.write("a", content[overlapping : overlapping + 1], overlapping)
        writer.commit()
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.data("a").tobytes() == content

    missing = data.draw(st.integers(0, len(spans) - 1))
    writer = begun(tmp_path / "b.gguf")
    for index, (start, end) in enumerate(spans):
        if index != missing:
            writer.write("a", content[start:end], start)
    with pytest.raises(ValueError, match="1 tensors are incomplete"):
        writer.commit()
    assert left(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with begun(tmp_path / "a.gguf") as writer:
            writer.write("a", bytes(64))
            (name,) = left(tmp_path)
            assert name != "a.gguf"
            raise error

    with pytest.raises(error):
        fail()
    assert left(tmp_path) == []


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"old")
    with pytest.raises(RuntimeError), begun(tmp_path / "a.gguf"):
        raise RuntimeError
    assert (tmp_path / "a.gguf").read_bytes() == b"old"
    assert left(tmp_path) == ["a.gguf"]


def test_leaving_without_commit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not committed"), begun(tmp_path / "a.gguf") as writer:
        writer.write("a", bytes(128))
    assert left(tmp_path) == []


def test_an_interrupted_process_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import signal, sys\nfrom phiquant.gguf import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored by what a shell starts with an "&"
        "with GGUFWriter(sys.argv[1]) as writer:\n"
        "    writer.add_tensor('a', (1 << 30,), GGMLType.I8)\n    writer.begin()\n    print('ready', flush=True)\n"
        "    for at in range(1 << 30):\n        writer.write('a', b'x', at)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "a.gguf")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
    assert len(left(tmp_path)) == 1
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert left(tmp_path) == []


@pytest.mark.parametrize("turn", [1, 2], ids=["before", "after"])
def test_an_interruption_beside_a_write_is_not_waited_for(tmp_path: Path, turn: int) -> None:
    class Interrupted(threading.Condition):
        turns = 0

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            self.turns += 1
            if self.turns == turn:
                raise KeyboardInterrupt

    writer = begun(tmp_path / "a.gguf")
    name = next(iter(writer._plans))
    writer._file._state = Interrupted()
    with pytest.raises(KeyboardInterrupt), writer:
        writer.write(name, bytes(writer._plans[name].nbytes))
    assert left(tmp_path) == []


def test_bytes_that_an_interruption_left_out_are_never_committed(tmp_path: Path) -> None:
    class Interrupted(threading.Condition):
        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            raise KeyboardInterrupt

    with GGUFWriter(tmp_path / "a.gguf") as writer:
        for name in "ab":
            writer.add_tensor(name, (64,), GGMLType.I8)
        writer.begin()
        usual, writer._file._state = writer._file._state, Interrupted()
        with pytest.raises(KeyboardInterrupt):
            writer.write("a", bytes(64))
        writer._file._state = usual
        writer.write("b", bytes(64))
        with pytest.raises(ValueError, match="a write failed"):
            writer.commit()
    assert left(tmp_path) == []


def test_abort_waits_for_writes_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go = threading.Event(), threading.Event()
    real, used = os.pwrite, []

    def slow(descriptor: int, view: memoryview, at: int) -> int:
        inside.set()
        assert go.wait(10)
        used.append(os.fstat(descriptor).st_size)  # fails if the descriptor was closed meanwhile
        return real(descriptor, view, at)

    writer = begun(tmp_path / "a.gguf")
    monkeypatch.setattr(os, "pwrite", slow)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(writer.write, "a", bytes(128))
        assert inside.wait(10)
        aborting = pool.submit(writer.abort)
        time.sleep(0.05)
        assert not aborting.done()
        with pytest.raises(ValueError, match="between begin"):
            writer.write("a", b"x")
        go.set()
        aborting.result(10)
        writing.result(10)
    assert used == [writer.size]
    assert left(tmp_path) == []


def test_a_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = begun(tmp_path / "a.gguf")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"a\.gguf cannot be written: No space.*free some space"), writer:
        writer.write("a", bytes(128))
    assert left(tmp_path) == []


def test_a_failed_write_cannot_be_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def interrupt(descriptor: int, view: memoryview, at: int) -> int:
        real(descriptor, view[:10], at)
        raise KeyboardInterrupt

    writer = begun(tmp_path / "a.gguf")
    monkeypatch.setattr(os, "pwrite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write("a", bytes(128))
    with pytest.raises(ValueError, match="a write failed"):
        writer.commit()
    assert left(tmp_path) == []


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, view, at: real(descriptor, view[:7], at))
    content = bytes(range(128))
    with begun(tmp_path / "a.gguf") as writer:
        writer.write("a", content)
        writer.commit()
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        assert file.data("a").tobytes() == content


def test_a_disk_too_small_for_the_plan(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.add_tensor("a", (1 << 24, 1 << 24), GGMLType.F32)
    with pytest.raises(OutputError, match=r"a\.gguf needs 1,125,8.* MB.* free"):
        writer.begin()
    assert left(tmp_path) == []


def test_a_limit_on_file_sizes_is_reported(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\nfrom phiquant.gguf import *\nfrom phiquant.errors import OutputError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n    with GGUFWriter(sys.argv[1]) as writer:\n"
        "        writer.add_tensor('a', (1 << 20,), GGMLType.I8)\n        writer.begin()\n"
        "except OutputError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.gguf")]
    assert "File too large" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert left(tmp_path) == []


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path, reason in [
        (tmp_path, "is not a file"),
        (tmp_path / "absent" / "a.gguf", "absent is not a directory; create it"),
        (tmp_path / "file" / "a.gguf", "is not a directory"),
        (Path("/dev/null"), "is not a file"),
        (Path("a\0b"), "null"),
    ]:
        with pytest.raises(OutputError, match=reason):
            GGUFWriter(path)
    with pytest.raises(OutputError, match="exists already"):
        GGUFWriter(tmp_path / "file", overwrite=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission"):
        GGUFWriter(tmp_path / "a.gguf")


def test_a_refusal_by_the_system_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match=r"a\.gguf cannot be written: Permission denied"):
        begun(tmp_path / "a.gguf")


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    source, link, other = tmp_path / "in.gguf", tmp_path / "link.gguf", tmp_path / "other.gguf"
    source.write_bytes(b"input")
    link.symlink_to(source)
    os.link(source, other)
    for target in (source, link, other, tmp_path / "." / "in.gguf"):
        with pytest.raises(OutputError, match="is also an input"):
            GGUFWriter(target, protect=[tmp_path / "absent", source])
    assert source.read_bytes() == b"input"
    GGUFWriter(tmp_path / "new.gguf", protect=[source])


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.gguf")
    with begun(tmp_path / "link.gguf") as writer:
        writer.write("a", bytes(128))
        writer.commit()
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "real.gguf").stat().st_size == writer.size


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with begun(tmp_path / "a.gguf") as writer:
            writer.write("a", bytes(128))
            writer.commit()
    finally:
        os.umask(old)
    assert (tmp_path / "a.gguf").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("value", "kind", "item"),
    [
        (-1, ValueType.UINT32, None),
        (2**32, ValueType.UINT32, None),
        (1.5, ValueType.INT32, None),
        (True, ValueType.INT32, None),
        (1, ValueType.BOOL, None),
        ("1", ValueType.INT32, None),
        (1e300, ValueType.FLOAT32, None),
        (None, ValueType.STRING, None),
        (1, ValueType.STRING, None),
        ("\ud800", ValueType.STRING, None),
        ([1], ValueType.ARRAY, None),
        ([1], ValueType.INT32, ValueType.INT32),
        ([[1]], ValueType.ARRAY, ValueType.ARRAY),
        ([[1]], ValueType.ARRAY, ValueType.INT32),
        ([1.5], ValueType.ARRAY, ValueType.INT32),
        ([-1], ValueType.ARRAY, ValueType.UINT32),
        ([-1], ValueType.ARRAY, ValueType.UINT64),
        ([2**63], ValueType.ARRAY, ValueType.INT64),
        ([2**40], ValueType.ARRAY, ValueType.INT32),
        ([1e300], ValueType.ARRAY, ValueType.FLOAT32),
        ([1], ValueType.ARRAY, ValueType.BOOL),
        (["a"], ValueType.ARRAY, ValueType.INT32),
        ([1], ValueType.ARRAY, ValueType.STRING),
        ("word", ValueType.ARRAY, ValueType.STRING),
        (5, ValueType.ARRAY, ValueType.INT32),
    ],
)
def test_values_that_do_not_fit_are_refused(
    tmp_path: Path, value: Any, kind: ValueType, item: ValueType | None
) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="'k'"):
        writer.add("k", value, kind, item)


def test_misuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="power of two"):
        GGUFWriter(tmp_path / "a.gguf", alignment=48)
    writer = GGUFWriter(tmp_path / "a.gguf")
    writer.add("k", 1, ValueType.UINT32)
    writer.add_tensor("a", (2, 32), GGMLType.Q8_0)
    for key in ("", "k" * 1025):
        with pytest.raises(ValueError, match="bytes and must have"):
            writer.add(key, 1, ValueType.UINT32)
    with pytest.raises(ValueError, match="added twice"):
        writer.add("k", 1, ValueType.UINT32)
    with pytest.raises(ValueError, match=r"general\.alignment must be"):
        writer.add("general.alignment", 64, ValueType.UINT32)
    for name, shape, message in [
        ("a", (32,), "declared twice"),
        ("n" * 64, (32,), "64 bytes"),
        ("", (32,), "0 bytes"),
        ("b", (33,), "block"),
        ("b", (), "extents"),
        ("b", (1, 1, 1, 1, 32), "extents"),
        ("b", (-1, 32), "extents"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.add_tensor(name, shape, GGMLType.Q8_0)
    with pytest.raises(ValueError, match="between begin"):
        writer.write("a", bytes(34))
    with pytest.raises(ValueError, match="after begin"):
        writer.commit()
    with writer:
        writer.begin()
        with pytest.raises(ValueError, match="before begin"):
            writer.add("late", 1, ValueType.UINT32)
        with pytest.raises(ValueError, match="before begin"):
            writer.begin()
        for offset, length in [(-1, 1), (35, 34), (69, 0), (0, 69)]:
            with pytest.raises(ValueError, match="outside the tensor"):
                writer.write("a", bytes(length), offset)
        with pytest.raises(ValueError, match="contiguous"):
            writer.write("a", np.zeros(100, np.uint8)[::2])
        with pytest.raises(ValueError, match="contiguous"):
            writer.write("a", memoryview(bytes(100))[::2])
        with pytest.raises(ValueError, match="not declared"):
            writer.write("b", b"")
        writer.write("a", bytes(68))
        writer.commit()
        with pytest.raises(ValueError, match="commit"):
            writer.commit()
    assert left(tmp_path) == ["a.gguf"]
