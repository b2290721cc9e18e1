"""Weights quantized in memory: the bytes of a quantization, and their squared errors."""

from dataclasses import replace

import numpy as np
import pytest

from phiquant.calibrate.quantizing import distortions, quantized
from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import WeightsError
from phiquant.gguf import GGMLType
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.quantize import quantize_rows

pytestmark = pytest.mark.cpu

RNG = np.random.default_rng(7)


def experts(rows: int) -> tuple[PlannedTensor, np.ndarray]:
    """Three experts of `rows` rows each, whose columns matter differently in each, and their values."""
    values = RNG.standard_normal((3, rows, 256), np.float32) * np.array([1, 2, 3], np.float32)[:, None, None]
    weights = RNG.random((3, 256), np.float32) ** 4
    tensor = PlannedTensor("blk.0.ffn_up_exps.weight", values.shape, GGMLType.F32, GGMLType.Q3_K, importance=weights)
    return tensor, values


@pytest.mark.parametrize("rows", [5, 4100])  # of 4100 rows an expert is divided among threads
def test_experts_have_importance_of_their_own(rows: int) -> None:
    tensor, values = experts(rows)
    assert tensor.importance is not None
    made = quantized(tensor, values.view(np.uint8).reshape(-1), threads=3)
    expected = [
        quantize_rows(matrix, GGMLType.F32, GGMLType.Q3_K, weights)
        for matrix, weights in zip(values, tensor.importance, strict=True)
    ]
    assert np.array_equal(made, np.concatenate(expected).reshape(-1))


def test_a_weight_that_keeps_its_type_keeps_its_bytes() -> None:
    tensor, values = experts(2)
    data = values.view(np.uint8).reshape(-1)
    assert quantized(replace(tensor, type=GGMLType.F32), data) is data


def test_the_distortion_is_the_weighted_squared_error() -> None:
    tensor, values = experts(5)
    assert tensor.importance is not None
    data = values.view(np.uint8).reshape(-1)
    kinds = [GGMLType.F32, GGMLType.F16, GGMLType.Q3_K, GGMLType.Q8_0]
    found = distortions(tensor, data, kinds, quantized)
    assert list(found) == kinds
    assert found[GGMLType.F32] == 0
    for kind in (GGMLType.Q3_K, GGMLType.Q8_0):
        back = dequantize_rows(quantized(replace(tensor, type=kind), data), kind, 15, 256).reshape(values.shape)
        error = (back.astype(np.float64) - values) ** 2 * tensor.importance[:, None]
        assert found[kind] == pytest.approx(error.sum(), rel=1e-5)
    assert found[GGMLType.F16] < found[GGMLType.Q8_0] < found[GGMLType.Q3_K] / 100


def test_a_sample_of_rows_stands_for_all() -> None:
    tensor, values = experts(4100)
    data = values.view(np.uint8).reshape(-1)
    seen: list[tuple[int, ...]] = []

    def watched(part: PlannedTensor, piece: np.ndarray) -> np.ndarray:
        seen.append(part.shape)
        return quantized(part, piece)

    found = distortions(tensor, data, [GGMLType.Q3_K], watched)[GGMLType.Q3_K]
    assert seen == [(3, 341, 256)]
    assert tensor.importance is not None
    back = dequantize_rows(quantized(tensor, data), GGMLType.Q3_K, 12300, 256).reshape(values.shape)
    whole = ((back.astype(np.float64) - values) ** 2 * tensor.importance[:, None]).sum()
    assert found == pytest.approx(whole, rel=0.02)


def test_what_is_no_number_is_refused() -> None:
    tensor, values = experts(2)
    values[1, 1, 3] = np.nan
    with pytest.raises(WeightsError, match=r"Tensor blk\.0\.ffn_up_exps\.weight: .*NaN"):
        quantized(tensor, values.view(np.uint8).reshape(-1))
