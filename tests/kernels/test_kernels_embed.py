"""Embed: rows of a weight of any type, gathered by token."""

from typing import Any

import numpy as np
import pytest

from phiquant import quants
from phiquant.errors import KernelError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu.embed import Embedding
from phiquant.kernels.ops import Weight

pytestmark = pytest.mark.cpu

ROWS, WIDTH = 37, 256


def weight(type: GGMLType) -> Weight:
    values = np.random.default_rng(3).normal(0, 0.05, (ROWS, WIDTH)).astype(np.float32)
    importance = np.ones(WIDTH, np.float32)
    return Weight("token_embd.weight", type, (ROWS, WIDTH), quants.quantize(values, type, importance).reshape(-1))


@pytest.mark.parametrize("name", [type.name for type in sorted(quants.QUANTIZABLE)])
def test_rows_are_the_reference_dequantizers(name: str, machine: Any) -> None:
    table = weight(GGMLType[name])
    tokens = np.array([36, 0, 7, 7, 12, 1], np.int32)
    out = np.full((6, WIDTH), np.nan, np.float32)
    region = machine.region(out, 5)
    Embedding(table, tokens, region).run(5)
    expected = quants.dequantize(table.data, table.type, table.shape)
    np.testing.assert_array_equal(region.array[:5], expected[tokens[:5]])
    assert np.isnan(region.array[5]).all(), "rows that the step does not have stay as they are"


def test_rows_are_scaled(machine: Any) -> None:
    table, tokens = weight(GGMLType.F16), np.array([4, 36], np.int32)
    region = machine.region(np.full((2, WIDTH), np.nan, np.float32), 2)
    Embedding(table, tokens, region, 10.3).run(2)
    expected = quants.dequantize(table.data, table.type, table.shape)[tokens] * np.float32(10.3)
    np.testing.assert_array_equal(region.array, expected)


def test_columns_of_a_buffer_are_refused(machine: Any) -> None:
    region = machine.region(np.zeros((4, WIDTH + 8), np.float32), 4).columns(0, WIDTH)
    with pytest.raises(KernelError, match="some columns"):
        Embedding(weight(GGMLType.F32), np.zeros(4, np.int32), region)


def test_a_weight_of_another_width_is_refused(machine: Any) -> None:
    table = weight(GGMLType.F32)
    with pytest.raises(KernelError, match=r"token_embd\.weight"):
        Embedding(table, np.zeros(4, np.int32), machine.region(np.zeros((4, WIDTH + 1), np.float32), 4))
    with pytest.raises(KernelError, match=r"token_embd\.weight"):
        Embedding(table, np.zeros(3, np.int32), machine.region(np.zeros((4, WIDTH), np.float32), 4))
