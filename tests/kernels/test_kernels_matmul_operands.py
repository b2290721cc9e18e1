"""Matrix multiplication with a bias, into columns of a matrix, of what is computed or rounded already on the way."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import matmul, pointwise
from phiquant.kernels.cpu.gegelu import gegelu
from phiquant.kernels.cpu.gelu import GELU
from phiquant.kernels.cpu.operation import Region
from phiquant.kernels.cpu.pointwise import Pointwise
from phiquant.kernels.cpu.swiglu import SWIGLU
from phiquant.kernels.cpu.target import Target, host

from .test_kernels_matmul import every_type, operands, product, random_weight

pytestmark = pytest.mark.cpu

some_types = pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_K], ids=lambda kind: kind.name)


def check_bias(kind: GGMLType, target: Target, machine: Any, examples: int) -> None:
    unit = kind.block_elements

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(
        rows=st.integers(1, 70),
        blocks=st.integers(1, 600 if unit == 1 else 1280 // unit),
        count=st.integers(1, 40),
        threads=st.integers(1, 2),
        packed_before=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(rows: int, blocks: int, count: int, threads: int, packed_before: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        weight = random_weight(kind, rows, blocks * unit, rng)
        x = rng.standard_normal((count, blocks * unit)).astype(np.float32)
        packed = matmul.prepare(weight, threads=threads, target=target, pack_now=packed_before)
        plain = product(machine, packed, x, threads=threads)
        bias = (rng.standard_normal(rows) * np.abs(plain).max()).astype(np.float32)
        got = product(machine, packed, x, bias=bias, threads=threads)
        dense, exact_x = operands(weight, x)
        bound = 3e-6 * ((np.abs(exact_x) @ np.abs(dense).T).max() + np.abs(bias).max())
        np.testing.assert_allclose(got, exact_x @ dense.T + bias, rtol=0, atol=bound)
        start = rng.standard_normal((count, rows)).astype(np.float32)
        added = product(machine, packed, x, start=start, bias=bias, threads=threads)
        np.testing.assert_array_equal(added, start + got)

    check()


@every_type
def test_a_bias_is_added(kind: GGMLType, machine: Any) -> None:
    check_bias(kind, host(), machine, 3)


@some_types
def test_a_bias_is_added_in_every_lowering(kind: GGMLType, each_target: Target, machine: Any) -> None:
    check_bias(kind, each_target, machine, 8)


@some_types
def test_with_a_bias_a_row_does_not_depend_on_its_company(kind: GGMLType, each_target: Target, machine: Any) -> None:
    rng = np.random.default_rng(1)
    packed = matmul.prepare(random_weight(kind, 53, 512, rng), target=each_target)
    x, bias = rng.standard_normal((300, 512)).astype(np.float32), rng.standard_normal(53).astype(np.float32)
    whole = product(machine, packed, x, bias=bias, threads=2)
    for first, last, threads in ((0, 1, 1), (299, 300, 2), (5, 8, 1), (3, 20, 3), (40, 299, 1)):
        part = product(machine, packed, x[first:last].copy(), bias=bias, threads=threads)
        np.testing.assert_array_equal(part.view(np.int32), whole[first:last].view(np.int32))


@every_type
def test_a_bias_of_zero_changes_no_bit(kind: GGMLType, machine: Any) -> None:
    rng = np.random.default_rng(2)
    packed = matmul.prepare(random_weight(kind, 21, 512, rng))
    for count in (2, 18):
        x = rng.standard_normal((count, 512)).astype(np.float32)
        plain, zero = product(machine, packed, x), product(machine, packed, x, bias=np.zeros(21, np.float32))
        np.testing.assert_array_equal(plain.view(np.int32), zero.view(np.int32))


@some_types
@pytest.mark.parametrize("add", [False, True])
def test_results_go_to_columns_of_a_matrix(kind: GGMLType, add: bool, each_target: Target, machine: Any) -> None:
    """Side by side, as queries, keys and values do; what lies around them stays as it is."""
    rng = np.random.default_rng(3)
    for rows, count, used in ((37, 4, 3), (1, 1, 1), (16, 40, 37), (70, 20, 20)):
        packed = matmul.prepare(random_weight(kind, rows, 512, rng), target=each_target)
        x = machine.region(rng.standard_normal((count, 512)).astype(np.float32), used)
        before = rng.standard_normal((count, rows + 8)).astype(np.float32)
        wide = Region(before.copy(), x.count)
        alone = Region(before[:, 5 : 5 + rows].copy(), x.count)
        options = {"add": add, "scratch": np.zeros(matmul.scratch_bytes(packed, count), np.uint8), "threads": 2}
        options["bias"] = rng.standard_normal(rows).astype(np.float32)
        machine.run(*matmul.bind(packed, x, alone, **options))
        machine.run(*matmul.bind(packed, x, wide.columns(5, rows), **options))
        before[:used, 5 : 5 + rows] = alone.array[:used]
        np.testing.assert_array_equal(wide.array, before)


@some_types
def test_activations_are_rounded_once_for_several_products(kind: GGMLType, each_target: Target, machine: Any) -> None:
    rng = np.random.default_rng(4)
    count, columns = 21, 768
    x = machine.region(rng.standard_normal((count, columns)).astype(np.float32), count)
    scratch = np.zeros(0, np.uint8)
    bound, outs, expected = [], [], []
    for i, rows in enumerate((40, 7, 129)):
        packed = matmul.prepare(random_weight(kind, rows, columns, rng), target=each_target)
        scratch = scratch if i else np.zeros(matmul.scratch_bytes(packed, count), np.uint8)
        outs.append(Region(np.full((count, rows), np.nan, np.float32), x.count))
        one = matmul.bind(packed, x, outs[-1], add=False, scratch=scratch, threads=2, rounded=i > 0)
        assert len(one) == (1 if i else 2)
        bound += one
        expected.append(product(machine, packed, x.array))
    machine.run(*bound)
    for out, alone in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out.array, alone)


@some_types
@pytest.mark.parametrize("f", [SWIGLU, GELU, gegelu(2.5)], ids=lambda f: f.name)
def test_what_is_computed_on_the_way_changes_no_bit(
    kind: GGMLType, f: Pointwise, each_target: Target, machine: Any
) -> None:
    rng = np.random.default_rng(11)
    for count, columns in ((1, 768), (21, 256 if kind is not GGMLType.F16 else 301)):
        packed = matmul.prepare(random_weight(kind, 40, columns, rng), target=each_target)
        x = (rng.standard_normal((count, f.parts * columns)) * 4).astype(np.float32)
        between, apart, together = (np.zeros((count, width), np.float32) for width in (columns, 40, 40))
        scratch = np.zeros(matmul.scratch_bytes(packed, count), np.uint8)
        regions = [machine.region(array, count) for array in (x, between, apart, together)]
        first, second, third, fourth = (dataclasses.replace(r, count=regions[0].count) for r in regions)
        options = {"add": False, "scratch": scratch, "threads": 2}
        machine.run(pointwise.bind(f, first, second, each_target), *matmul.bind(packed, second, third, **options))
        machine.run(*matmul.bind(packed, first, fourth, before=f, **options))
        assert np.array_equal(apart, together)
        assert np.abs(apart).max() > 0


def test_a_bias_that_does_not_fit_is_refused(machine: Any) -> None:
    packed = matmul.prepare(random_weight(GGMLType.Q4_K, 32, 256, np.random.default_rng(7)), threads=1)
    x = machine.region(np.zeros((2, 256), np.float32), 2)
    out, scratch = Region(np.zeros((2, 32), np.float32), x.count), np.zeros(matmul.scratch_bytes(packed, 2), np.uint8)
    for bias in (np.zeros(31, np.float32), np.zeros(32), np.zeros((1, 32), np.float32)):
        with pytest.raises(KernelError, match="32 outputs need as many float32 biases"):
            matmul.bind(packed, x, out, add=False, scratch=scratch, threads=1, bias=bias)


def test_activations_must_be_whole_rows(machine: Any) -> None:
    packed = matmul.prepare(random_weight(GGMLType.F16, 32, 64, np.random.default_rng(8)), threads=1)
    x = machine.region(np.zeros((2, 128), np.float32), 2)
    out, scratch = Region(np.zeros((2, 32), np.float32), x.count), np.zeros(matmul.scratch_bytes(packed, 2), np.uint8)
    with pytest.raises(KernelError, match="contiguous"):
        matmul.bind(packed, x.columns(0, 64), out, add=False, scratch=scratch, threads=1)
