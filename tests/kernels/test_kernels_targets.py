"""What kernels become on processors and systems that this machine is not."""

import ctypes
import re
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import pytest

from phiquant.gguf.types import GGMLType
from phiquant.kernels.cache_types import CACHE_TYPES
from phiquant.kernels.cpu import (
    attention,
    combine,
    expert_matmul,
    keep,
    layer_norm,
    matmul,
    matmul_tiles,
    pointwise,
    rms_norm,
    rotate_store,
    route,
    select_rows,
    sum_squares,
    team,
)
from phiquant.kernels.cpu.cache_elements import elements_of
from phiquant.kernels.cpu.emit import I64, Emitter, Value
from phiquant.kernels.cpu.gegelu import gegelu
from phiquant.kernels.cpu.gelu import GELU
from phiquant.kernels.cpu.library import emit_assembly, function
from phiquant.kernels.cpu.swiglu import SWIGLU
from phiquant.kernels.cpu.target import Target

pytestmark = pytest.mark.cpu

AVX2 = "+avx2,+fma,+f16c"
AVX512 = f"+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni,{AVX2}"
TARGETS = {
    "arm linux": (Target("aarch64-unknown-linux-gnu", "generic", "+neon,+dotprod", "neon"), "fmla"),
    "arm linux with i8mm": (Target("aarch64-unknown-linux-gnu", "generic", "+neon,+i8mm,+dotprod", "i8mm"), "fmla"),
    "arm mac": (Target("arm64-apple-darwin", "apple-m1", "", "neon"), "fmla"),
    "arm mac with i8mm": (Target("arm64-apple-darwin", "apple-m2", "", "i8mm"), "fmla"),
    "avxvnni": (Target("x86_64-unknown-linux-gnu", "alderlake", f"+avxvnni,{AVX2}", "avxvnni"), "vfmadd"),
    "windows": (Target("x86_64-pc-windows-msvc", "haswell", AVX2, "avx2"), "vfmadd"),
    "avx512vnni": (Target("x86_64-unknown-linux-gnu", "icelake-server", AVX512, "avx512vnni"), "vfmadd"),
}
# What multiplies bytes in a matrix multiplication, as each target's assembly has it: all of these and nothing else.
DOTS = {
    "arm linux": [r"sdot\tv\d+\.4s,"],
    "arm linux with i8mm": [r"usdot\tv\d+\.4s,", r"usmmla\tv\d+\.4s,"],
    "arm mac": [r"sdot\.4s\tv\d+,"],
    "arm mac with i8mm": [r"usdot\.4s\tv\d+,", r"usmmla\.4s\tv\d+,"],
    "avxvnni": [r"\{vex\}\s+vpdpbusd\t.*%ymm"],
    "windows": [r"vpmaddubsw\t.*%ymm"],
    "avx512vnni": [r"vpdpbusd\t.*%zmm"],
}
KERNELS: dict[str, tuple[int, Callable[..., None]]] = {
    **{f"attention {kind.name}": (4, attention._emitter(96, elements_of(kind))) for kind in CACHE_TYPES.values()},
    "attention sparse": (4, attention._emitter(96, elements_of(GGMLType.F16), sparse=True)),
    "rms_norm": (4, rms_norm._emit),
    "layer_norm": (4, layer_norm._emit),
    **{f.name: (4, pointwise.body(f)) for f in (SWIGLU, GELU, gegelu(20.0))},
    "select_rows": (4, select_rows._emit),
    "route": (4, route._emit),
    "combine": (4, combine._emit),
    "sum_squares": (4, sum_squares._emit_routed),
    "keep": (4, keep._emit),
    **{
        f"rotate_store {kind.name}{turn.__name__}": (4, rotate_store._emitter(elements_of(kind), turn))
        for kind in CACHE_TYPES.values()
        for turn in (rotate_store._turn_halves, rotate_store._turn_neighbours)
    },
}


# Targets that differ from others here by the system or the product of bytes alone: of all kernels, these tell.
ALIKE = ("arm linux with i8mm", "arm mac", "arm mac with i8mm")
TELLING = ("attention F16", "gelu", "route", "rotate_store F16_turn_halves")
EVERY = [(t, name) for t in TARGETS for name in KERNELS if t not in ALIKE or name in TELLING]


def named(assembly: str) -> set[str]:
    """Functions that are called, or whose address is taken to be."""
    return set(re.findall(r"\b(fmaf|expf|nearbyintf|sqrtf|memcpy|__\w*hf\w*|__gnu_\w+)\b", assembly))


@pytest.fixture(params=TARGETS)
def name_of_target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name_of_target: str) -> tuple[Target, str]:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return TARGETS[name_of_target]


@pytest.mark.slow
@pytest.mark.parametrize(("name_of_target", "name"), EVERY, indirect=["name_of_target"])
def test_kernels_are_instructions_alone(case: tuple[Target, str], name: str) -> None:
    target, fused = case
    arguments, body = KERNELS[name]
    assembly = emit_assembly(name, arguments, body, target)
    assert named(assembly) == set()
    assert (fused in assembly) == (
        name.split()[0] in ("attention", "rms_norm", "layer_norm", "swiglu", "gelu", "gegelu", "route")
    )


def test_threads_wait_as_the_system_has_it(case: tuple[Target, str]) -> None:
    target, _ = case

    def stop(e: Emitter, address: Value, _: Value) -> None:
        team._emit_stop(e, address)

    work = emit_assembly("work", 2, team._emit_work, target)
    ending = emit_assembly("stop", 2, stop, target)
    linux = "linux" in target.triple
    assert ("syscall" in work) == ("syscall" in ending) == linux
    assert ("nanosleep" in work) == ("darwin" in target.triple)
    assert ("SwitchToThread" in work) == ("windows" in target.triple)
    assert ("pause" in work) == target.triple.startswith("x86_64")
    assert bool(re.search(r"^\s+(yield|hint\s+#1)", work, re.MULTILINE)) == target.arm


@pytest.mark.parametrize("kind", [GGMLType.Q4_K, GGMLType.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("experts", [False, True])
def test_products_are_dot_instructions(
    case: tuple[Target, str], name_of_target: str, kind: GGMLType, experts: bool
) -> None:
    """Both ways through a panel: one takes few columns, the other many, and neither multiplies bytes otherwise."""
    target, _ = case
    f = matmul.FORMATS[kind]
    body = (expert_matmul if experts else matmul_tiles).body(f)
    assembly = emit_assembly("matmul", 4, body, target)
    multiplied = r"^\s+((?:\{vex\}\s+)?(?:u?sdot|us?mmla|smmla|v?pdpbusds?|v?pmaddubsw)\b.*)$"
    found = re.findall(multiplied, assembly, re.MULTILINE)
    for expected in DOTS[name_of_target]:
        assert sum(bool(re.match(expected, line)) for line in found) >= 16
    assert [line for line in found if not any(re.match(expected, line) for expected in DOTS[name_of_target])] == []


def test_a_kernel_of_an_emulated_processor_runs_there(emulator: Any, each_target: Target) -> None:
    def double(e: Emitter, at: Value) -> None:
        e.store(e.load(at, I64) * 2, at)

    address = function("test.double", 1, double, each_target)
    word, before = ctypes.c_int64(21), emulator.calls
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)(ctypes.addressof(word))
    assert word.value == 42
    assert emulator.calls == before + 1
    with pytest.raises(RuntimeError, match="touched 0x300000000000: Bad address"):
        emulator.run(address, 0x300000000008)
