"""The object cache: what is kept, where, and when it is not trusted."""

import ctypes
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phiquant.errors import KernelError
from phiquant.kernels.cpu import library, target
from phiquant.kernels.cpu.emit import I64, Emitter, Value
from phiquant.kernels.cpu.target import host

pytestmark = pytest.mark.cpu

PROGRAM = """
import ctypes, sys
from phiquant.kernels.cpu import library
library.on_compile.append(lambda name: print("compiled", name))
def body(e, x):
    e.store(e.load(x, __import__("phiquant.kernels.cpu.emit", fromlist=["I64"]).I64) * 3, x)
address = library.function("test.triple", 1, body)
word = ctypes.c_int64(14)
ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)(ctypes.addressof(word))
print(word.value)
"""


def run(cache: Path, program: str = PROGRAM, **extra: str) -> str:
    environment = {**os.environ, "PHIQUANT_CACHE_DIR": str(cache), **extra}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


def test_second_start_loads_what_the_first_compiled(tmp_path: Path) -> None:
    assert run(tmp_path) == "compiled test.triple\n42\n"
    directory = tmp_path / "kernels"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [p.suffix for p in directory.iterdir()] == [".o"]
    assert run(tmp_path) == "42\n"


TABLE = """
import ctypes, sys
from phiquant.kernels.cpu import library
from phiquant.kernels.cpu.emit import I64
library.on_compile.append(lambda name: print("compiled", name))
def body(e, x):
    at = e.table(bytes(range(200)) * 50)
    e.store(e.load(at + e.load(x, I64), I64), x)
address = library.function("test.table", 1, body)
word = ctypes.c_int64(9401)
ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)(ctypes.addressof(word))
print(word.value.to_bytes(8, "little")[::7])
"""


@pytest.mark.parametrize("lowering", ["", "generic"])
def test_constant_tables_come_back_with_the_code(tmp_path: Path, lowering: str) -> None:
    assert run(tmp_path, TABLE, PHIQUANT_LOWERING=lowering) == "compiled test.table\nb'\\x01\\x08'\n"
    assert run(tmp_path, TABLE, PHIQUANT_LOWERING=lowering) == "b'\\x01\\x08'\n"


def test_another_lowering_is_another_file(tmp_path: Path) -> None:
    run(tmp_path)
    assert run(tmp_path, PHIQUANT_LOWERING="generic") == "compiled test.triple\n42\n"
    assert len(list((tmp_path / "kernels").iterdir())) == 2


def test_a_directory_open_to_others_is_not_trusted(tmp_path: Path) -> None:
    directory = tmp_path / "kernels"
    directory.mkdir()
    directory.chmod(0o777)
    assert run(tmp_path) == "compiled test.triple\n42\n"
    assert run(tmp_path) == "compiled test.triple\n42\n"
    assert not list(directory.iterdir())


def test_a_cache_that_cannot_be_made_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file where the directory should be")
    assert run(tmp_path) == "compiled test.triple\n42\n"


def test_a_damaged_object_is_compiled_again(tmp_path: Path) -> None:
    run(tmp_path)
    (path,) = (tmp_path / "kernels").iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(tmp_path) == "compiled test.triple\n42\n"
    assert run(tmp_path) == "42\n"


def test_the_directory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(10):
        (tmp_path / f"{i}.o").write_bytes(bytes(1000))
        os.utime(tmp_path / f"{i}.o", (i, i))
    monkeypatch.setattr(library, "LIMIT", 3500)
    library._trim(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7.o", "8.o", "9.o"]


def test_unknown_and_missing_lowerings_are_named() -> None:
    with pytest.raises(KernelError, match="nonsense"):
        host("nonsense")
    with pytest.raises(KernelError, match="lacks the lowering"):
        host("sse41" if host().arm else "neon")


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Features of the Arm processor that this machine pretends to be."""
    features = {"neon": True, "dotprod": True, "i8mm": True, "sve": True}
    monkeypatch.setattr(target.llvm, "get_default_triple", lambda: "aarch64-unknown-linux-gnu")
    monkeypatch.setattr(target.llvm, "get_host_cpu_features", lambda: features)
    host.cache_clear()
    yield features
    host.cache_clear()


def test_an_arm_processor_gets_the_best_that_it_has(arm: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHIQUANT_LOWERING", raising=False)
    best = host()
    assert (best.lowering, best.arm) == ("i8mm", True)
    assert best.features == "+dotprod,+i8mm,+neon,+sve"
    assert host("neon").features == "+neon,+dotprod", "a lesser one does without what it stands without"
    assert host("generic").features == "+neon"
    reasons = target.not_chosen()
    assert reasons["avx2"] == "for another kind of processor"
    assert reasons["neon"] == reasons["generic"] == "i8mm is better"
    with pytest.raises(KernelError, match="lacks the lowering 'avx2'; it has i8mm, neon, generic"):
        host("avx2")
    arm["i8mm"] = False
    host.cache_clear()
    assert host().lowering == "neon"
    assert target.not_chosen()["i8mm"] == "the processor lacks i8mm"
    arm["dotprod"] = False
    host.cache_clear()
    assert host().lowering == "generic"


def test_one_name_is_compiled_once() -> None:
    calls = []

    def body(e: Emitter, x: Value) -> None:
        calls.append(x)
        e.store(e.load(x, I64) + 1, x)

    first = library.function(f"test.once.{os.getpid()}", 1, body)
    assert library.function(f"test.once.{os.getpid()}", 1, body) == first
    assert len(calls) == 1
    word = ctypes.c_int64(1)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(first)(ctypes.addressof(word))
    assert word.value == 2
