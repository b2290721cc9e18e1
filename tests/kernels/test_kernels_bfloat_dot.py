"""BF16 weights by activations rounded to BF16, where the processor multiplies those.

The truth is float64 arithmetic on the rounded operands; the instruction may round every sum of two products in its own
way, so results are allowed what float32 sums are: 3e-6 of the sum of magnitudes.
"""

import dataclasses
import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phiquant import quants
from phiquant.errors import KernelError, RequestError
from phiquant.gguf.types import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.cpu import library, matmul, matmul_tiles, pointwise
from phiquant.kernels.cpu.backend import CpuBackend
from phiquant.kernels.cpu.matmul_float import BFloatDot
from phiquant.kernels.cpu.operation import Region
from phiquant.kernels.cpu.swiglu import SWIGLU
from phiquant.kernels.cpu.target import Target, host
from phiquant.kernels.reference import ReferenceBackend

from .test_kernels_backend import CAPACITY, bits, model, step
from .test_kernels_matmul import _at_fence, product, random_weight

BF16 = GGMLType.BF16
pytestmark = pytest.mark.cpu
has_it = pytest.mark.skipif(not host().has_bfloat_dot, reason="the processor lacks AVX512_BF16, or a lesser is forced")


def rounded(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Nearest BF16, halves to even."""
    return quants.dequantize(quants.quantize(x, BF16), BF16, x.shape).astype(np.float64)


def dense(weight: ops.Weight) -> NDArray[np.float64]:
    return quants.dequantize(weight.data, BF16, weight.shape).astype(np.float64)


def dot(weight: ops.Weight, **options: Any) -> matmul.Packed:
    return matmul.prepare(weight, bf16_dot=True, **{"threads": 1, **options})


@has_it
def test_equals_exact_arithmetic_on_rounded_operands(machine: Any) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(
        rows=st.integers(1, 150),
        columns=st.integers(1, 1100),
        count=st.integers(1, 40),
        threads=st.integers(1, 2),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(rows: int, columns: int, count: int, threads: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        weight = random_weight(BF16, rows, columns, rng)
        x = rng.standard_normal((count + 3, columns)).astype(np.float32)
        out = product(machine, dot(weight, threads=threads), x, used=count, threads=threads)
        exact, w = rounded(x[:count]), dense(weight)
        bound = 3e-6 * (np.abs(exact) @ np.abs(w).T).max()
        np.testing.assert_allclose(out, exact @ w.T, rtol=0, atol=bound)

    check()


@has_it
def test_every_weight_by_itself(machine: Any) -> None:
    """Products of two BF16 are exact in float32, so a single one comes out to the bit."""
    weight = random_weight(BF16, 37, 301, np.random.default_rng(2))
    x = np.diag(np.full(301, 1 + 2**-7, np.float32))
    np.testing.assert_array_equal(product(machine, dot(weight), x).T, (dense(weight) * (1 + 2**-7)).astype(np.float32))


@has_it
def test_activations_are_rounded_to_nearest_even(machine: Any) -> None:
    ones = ops.Weight("w", BF16, (16, 4), np.array([0x3F80] * 64, np.uint16).view(np.uint8))
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8 + 2**-20), 2**-8], np.float32)
    out = product(machine, dot(ones), np.diag(x))
    np.testing.assert_array_equal(out[:, 0], np.array([1, 1 + 2**-6, -(1 + 2**-7), 2**-8], np.float32))


@has_it
def test_bits_do_not_depend_on_company(machine: Any) -> None:
    rng = np.random.default_rng(1)
    many = matmul_tiles.BLOCK + 9
    packed = dot(random_weight(BF16, 16 * 9 + 5, 531, rng))
    x = rng.standard_normal((many, 531)).astype(np.float32)
    whole = product(machine, packed, x, threads=2)
    few = matmul_tiles.FEW
    parts = [*((i, 1, 1 + i % 3) for i in range(6)), (1, 2, 2), (4, 3, 1), (5, 4, 3), (0, few - 1, 1), (0, few, 2)]
    for first, count, threads in [*parts, (0, few + 1, 3), (7, 31, 1), (0, matmul_tiles.BLOCK, 3), (0, many, 1)]:
        part = product(machine, packed, x[first : first + count], threads=threads)
        np.testing.assert_array_equal(bits(part), bits(whole[first : first + count]))


@has_it
@pytest.mark.parametrize("columns", [37, 512])
def test_unpacked_gives_the_same_bits(columns: int, machine: Any) -> None:
    rng = np.random.default_rng(5)
    weight = random_weight(BF16, 70, columns, rng)
    for count, threads in ((1, 1), (3, 2), (17, 2), (300, 1)):
        x, start = (rng.standard_normal((count, n)).astype(np.float32) for n in (columns, 70))
        expected = product(machine, dot(weight), x, start=start, threads=threads)
        found = product(machine, dot(weight, pack_now=False), x, start=start, threads=threads)
        np.testing.assert_array_equal(bits(found), bits(expected))


@has_it
def test_gating_on_the_way_changes_no_bit(machine: Any) -> None:
    rng = np.random.default_rng(11)
    packed = dot(random_weight(BF16, 40, 301, rng))
    x = (rng.standard_normal((21, 602)) * 4).astype(np.float32)
    between, apart, together = (np.zeros((21, width), np.float32) for width in (301, 40, 40))
    scratch = np.zeros(matmul.scratch_bytes(packed, 21), np.uint8)
    regions = [machine.region(array, 21) for array in (x, between, apart, together)]
    first, second, third, fourth = (dataclasses.replace(r, count=regions[0].count) for r in regions)
    options: dict[str, Any] = {"add": False, "scratch": scratch, "threads": 2}
    machine.run(pointwise.bind(SWIGLU, first, second), *matmul.bind(packed, second, third, **options))
    machine.run(*matmul.bind(packed, first, fourth, before=SWIGLU, **options))
    assert np.array_equal(apart, together)
    assert np.abs(apart).max() > 0


@has_it
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_not_a_number_stays_visible(value: float, machine: Any) -> None:
    """The last is beyond the largest BF16, and rounded to infinity."""
    rng = np.random.default_rng(6)
    packed = dot(random_weight(BF16, 20, 511, rng))
    x = rng.standard_normal((3, 511)).astype(np.float32)
    x[1, 300] = value
    out = product(machine, packed, x)
    assert not np.isfinite(out[1]).any()
    assert np.isfinite(out[[0, 2]]).all()


@has_it
def test_numbers_that_are_not_normal_count_as_zero(machine: Any) -> None:
    tiny = np.full(64, 0x0001, np.uint16)  # 2**-133
    weight = ops.Weight("w", BF16, (16, 4), tiny.view(np.uint8))
    out = product(machine, dot(weight), np.full((2, 4), 2.0**100, np.float32))
    assert (np.abs(out) <= 4 * 2.0**-33).all()  # what it is exactly, or nothing


@has_it
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with Linux's mprotect")
@pytest.mark.parametrize("columns", [3, 18])
def test_reads_nothing_beyond_its_operands(columns: int, machine: Any) -> None:
    weight = random_weight(BF16, 19, columns, np.random.default_rng(3))
    x = np.random.default_rng(4).standard_normal((5, columns)).astype(np.float32)
    fenced = ops.Weight("w", BF16, weight.shape, _at_fence(weight.data))
    at_fence = _at_fence(x.view(np.uint8).reshape(-1)).view(np.float32).reshape(x.shape)
    np.testing.assert_array_equal(product(machine, dot(fenced), at_fence), product(machine, dot(weight), x))


@has_it
def test_the_intended_instruction() -> None:
    text = library.emit_assembly("matmul", 4, matmul_tiles.body(BFloatDot()), host())
    assert re.search(r"vdpbf16ps\s[^\n]*%zmm", text)
    assert "vfmadd" not in text
    assert not re.search(r"\bcall\w*\s+(?!\*)", text), "a kernel must not call library functions"


@has_it
def test_panels_are_no_larger_than_the_file() -> None:
    weight = random_weight(BF16, 64, 1024, np.random.default_rng(4))
    assert dot(weight).data.size - 64 == weight.data.size


@has_it
def test_logits_equal_those_of_the_reference_and_the_kernel_is_this_one() -> None:
    program, capacity = model(BF16, layers=1), dataclasses.replace(CAPACITY, cache_type=GGMLType.F32, bf16_dot=True)
    reference, executable = ReferenceBackend().prepare(program, capacity), CpuBackend().prepare(program, capacity)
    plain = ReferenceBackend().prepare(program, dataclasses.replace(capacity, bf16_dot=False))
    for parts in ([(0, 0, 40), (1, 0, 33)], [(1, 33, 34), (0, 40, 41)]):
        expected, unrounded = (e.run(step(program, parts)) for e in (reference, plain))
        error = np.abs(executable.run(step(program, parts)) - expected).max(axis=1) / np.abs(expected).max()
        assert np.median(error) < 1e-4
        # An activation that lies between two BF16 may fall to either side.
        assert error.max() < 0.01
        assert np.median(error) < np.median(np.abs(unrounded - expected).max(axis=1) / np.abs(expected).max()) / 10
    executable.close()
    assert {f"matmul.BF16.dot.{host().lowering}", f"pack.BF16.dot.{host().lowering}"} <= library._loaded.keys()


@has_it
def test_other_types_are_what_they_were() -> None:
    program = model(GGMLType.F16, layers=1)
    capacity = dataclasses.replace(CAPACITY, cache_type=GGMLType.F32)
    logits = []
    for option in (False, True):
        executable = CpuBackend().prepare(program, dataclasses.replace(capacity, bf16_dot=option))
        logits.append(bits(executable.run(step(program, [(0, 0, 30)]))))
        executable.close()
    np.testing.assert_array_equal(*logits)


@pytest.mark.skipif(host().arm, reason="forces a lowering of x86")
def test_a_processor_without_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=r"for the tensor w: the processor, or the lowering .* lacks AVX512_BF16"):
        dot(random_weight(BF16, 16, 4, np.random.default_rng(0)), target=host("generic"))
    monkeypatch.setenv("PHIQUANT_LOWERING", "generic")
    host.cache_clear()
    try:
        with pytest.raises(RequestError, match=r"bf16_dot.*lacks AVX512_BF16"):
            CpuBackend().prepare(model(BF16, layers=1), dataclasses.replace(CAPACITY, bf16_dot=True))
    finally:
        host.cache_clear()


def test_only_a_target_with_the_feature_and_its_registers_has_it() -> None:
    wide = Target("x86_64-unknown-linux-gnu", "znver4", "+avx512bf16,+fma", "avx512vnni")
    assert wide.has_bfloat_dot
    assert not dataclasses.replace(wide, features="-avx512bf16,+fma").has_bfloat_dot
    assert not dataclasses.replace(wide, lowering="avx2").has_bfloat_dot


def test_regions_of_the_wrong_size_are_refused(machine: Any) -> None:
    if not host().has_bfloat_dot:
        pytest.skip("the processor lacks AVX512_BF16")
    packed = dot(random_weight(BF16, 32, 256, np.random.default_rng(7)))
    x, out = np.zeros((4, 256), np.float32), np.zeros((4, 32), np.float32)
    region = machine.region(x, 4)
    scratch = np.zeros(matmul.scratch_bytes(packed, 4) - 1, np.uint8)
    with pytest.raises(KernelError, match="bytes of scratch memory"):
        matmul.bind(packed, region, Region(out, region.count), add=False, scratch=scratch, threads=1)
