"""The object cache: what is kept, where, and when it is not trusted."""

import ctypes
import os
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest

from phiquant.errors import KernelError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import activations, compiler, library, matmul, matmul_tiles, pack, target
from phiquant.kernels.cpu.compiler import emit_object
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


def triple(e: Emitter, x: Value) -> None:
    e.store(e.load(x, I64) * 3, x)


def called(address: int, value: int) -> int:
    word = ctypes.c_int64(value)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)(ctypes.addressof(word))
    return word.value


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """Results of functions that threads begin at one time."""
    begin = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        begin.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Names of the kernels that were compiled, with an empty cache."""
    monkeypatch.setenv("PHIQUANT_CACHE_DIR", str(tmp_path / "cache"))
    names: list[str] = []
    library.on_compile.append(names.append)
    yield names
    library.on_compile.remove(names.append)


def test_many_threads_that_want_one_kernel_wait_for_one_to_make_it(compiled: list[str]) -> None:
    emitted = []

    def body(e: Emitter, x: Value) -> None:
        emitted.append(threading.get_ident())
        time.sleep(0.05)
        triple(e, x)

    name = f"test.shared.{uuid.uuid4()}"
    addresses = together([lambda: library.function(name, 1, body)] * 12)
    assert len(set(addresses)) == len(emitted) == 1
    assert compiled == [name]
    assert called(addresses[0], 14) == 42


def test_different_kernels_are_made_at_one_time(compiled: list[str]) -> None:
    """Each body waits until all the others are being emitted: with one lock for all, none would get on."""
    inside = threading.Barrier(4, timeout=30)

    def plus(n: int) -> Callable[..., None]:
        def body(e: Emitter, x: Value) -> None:
            inside.wait()
            e.store(e.load(x, I64) + n, x)

        return body

    names = [f"test.plus.{n}.{uuid.uuid4()}" for n in range(4)]
    addresses = together([partial(library.function, name, 1, plus(n)) for n, name in enumerate(names)])
    assert [called(address, 10) for address in addresses] == [10, 11, 12, 13]
    assert sorted(compiled) == sorted(names)


@pytest.mark.slow
def test_what_threads_compile_side_by_side_is_what_one_compiles_alone() -> None:
    """Real kernels, twice each and again and again: LLVM is in use by all threads, past llvmlite's lock."""
    t = host()
    bodies = [matmul_tiles.body(matmul.FORMATS[kind]) for kind in (GGMLType.F16, GGMLType.Q8_0)]
    bodies += [activations.body(matmul.FORMATS[kind].activations) for kind in (GGMLType.Q4_0, GGMLType.Q4_K)]
    bodies += [pack._body(matmul.FORMATS[kind]) for kind in (GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.F32)]

    def made(body: Callable[..., None]) -> bytes:
        return emit_object(library._module("kernel", 4, body, t), t)

    alone = [made(body) for body in bodies]
    for _ in range(2):
        assert together([partial(made, body) for body in bodies * 2]) == alone * 2


def test_the_long_calls_do_not_wait_for_llvmlites_lock() -> None:
    t = host()
    machine = t.machine()
    module = llvm.parse_assembly(library._module("kernel", 1, triple, t), llvm.create_context())
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options())
    passes, said = builder.getModulePassManager(), compiler.ffi.OutputString()
    optimise, emit = map(compiler._direct, ("LLVMPY_RunNewModulePassManager", "LLVMPY_TargetMachineEmitToMemory"))
    with ThreadPoolExecutor(1) as other, compiler.ffi.lib._lock:
        other.submit(optimise, passes, module, builder).result(30)
        buffer = other.submit(emit, machine, module, 1, said).result(30)
    assert compiler.ffi.lib.LLVMPY_GetBufferSize(buffer) > 100
    compiler.ffi.lib.LLVMPY_DisposeMemoryBuffer(buffer)


def test_a_failure_is_told_to_each_who_asks_and_leaves_nothing(compiled: list[str]) -> None:
    def broken(e: Emitter, x: Value) -> None:
        raise KernelError("no such kernel")

    def attempt() -> str:
        with pytest.raises(KernelError) as caught:
            library.function(name, 1, broken)
        return str(caught.value)

    name = f"test.broken.{uuid.uuid4()}"
    assert together([attempt] * 4) == ["no such kernel"] * 4
    assert called(library.function(name, 1, triple), 2) == 6, "another try may succeed"


def test_asking_makes_nothing_and_tells_what_was_asked_for(compiled: list[str]) -> None:
    first, second = (f"test.asked.{uuid.uuid4()}" for _ in range(2))
    with library.asking() as asked:
        assert [library.function(name, 1, triple) for name in (first, second, first)] == [0, 0, 0]
        with ThreadPoolExecutor(1) as other:
            assert other.submit(library.function, "test.another", 1, triple).result() != 0, "other threads go on"
    assert [request.name for request in asked.values()] == [first, second]
    assert not set(compiled) & {first, second}
    addresses = {request.make() for request in asked.values()}
    assert addresses == {library.function(name, 1, triple) for name in (first, second)}
    assert [called(address, 5) for address in addresses] == [15, 15]
