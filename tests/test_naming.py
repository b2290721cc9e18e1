"""Kernel, test and benchmark share a name, so that one finds the others."""

import re
from pathlib import Path
from typing import get_args

import pytest

from phiquant.kernels import ops

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "src" / "phiquant" / "kernels" / "cpu"
TESTS = ROOT / "tests"
NAMES = {
    "RMSNorm": "rms_norm",
    "MatMul": "matmul",
    "ExpertMatMul": "expert_matmul",
    "SwiGLU": "swiglu",
    "Select": "select_rows",
    "GELU": "gelu",
    "GeGELU": "gegelu",
}
# Where the time of a step goes; the others move less than a thousandth of the bytes.
MEASURED = {"attention", "expert_matmul", "matmul"}


def kernel_of(operation: type) -> str:
    name = operation.__name__
    return NAMES.get(name) or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize("operation", get_args(ops.Operation), ids=lambda o: o.__name__)
def test_every_operation_has_a_kernel_and_a_test_of_its_name(operation: type) -> None:
    name = kernel_of(operation)
    assert (CPU / f"{name}.py").exists()
    assert (TESTS / "kernels" / f"test_kernels_{name}.py").exists()


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_what_takes_time_has_a_benchmark_of_its_name(name: str) -> None:
    assert (ROOT / "benchmarks" / f"bench_{name}.py").exists()


def test_every_benchmark_of_a_kernel_names_one() -> None:
    for path in (ROOT / "benchmarks").glob("bench_*.py"):
        name = path.stem.removeprefix("bench_")
        assert (CPU / f"{name}.py").exists() or (CPU.parent / f"{name}.py").exists(), path.name


def test_files_of_tests_are_named_after_their_room_and_once() -> None:
    files = sorted(TESTS.rglob("test_*.py"))
    for path in files:
        if path.parent != TESTS:
            assert path.name.startswith(f"test_{path.parent.name}_"), f"{path} hides what it tests"
            room = ROOT / "src" / "phiquant" / path.parent.name
            assert path.parent.name in {"browser", "interop", "parity"} or room.is_dir()
    names = [path.name for path in files]
    assert len(names) == len(set(names))
    assert not list(TESTS.rglob("__init__.py"))


def test_nothing_is_called_utils() -> None:
    assert not [path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("util*.py")]
