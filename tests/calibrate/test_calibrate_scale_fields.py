"""Scales of blocks: of every type, what they are multiplied by, and that nothing else changes with them."""

import numpy as np
import pytest

from phiquant.calibrate.scale_fields import scale_fields, scales_of, values_of_field, with_scales
from phiquant.gguf import GGMLType
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.quants import READABLE, block_dtype

ROWS, BLOCKS = 3, 2
WITHOUT = {GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.IQ1_M, GGMLType.MXFP4, GGMLType.NVFP4}
TUNED = sorted(READABLE - WITHOUT)


def made(type: GGMLType) -> np.ndarray:
    rng = np.random.default_rng(int(type))
    data = rng.integers(0, 256, (ROWS, BLOCKS * type.block_bytes), np.uint8)
    blocks = data.reshape(-1).view(block_dtype(type))
    for name in scale_fields(type):
        blocks[name] = rng.uniform(0.01, 0.5, len(blocks))
    return data


def test_which_types_have_such_scales() -> None:
    assert {type for type in READABLE if not scale_fields(type)} == WITHOUT
    assert scale_fields(GGMLType.Q4_K) == ("d", "dmin")
    assert scale_fields(GGMLType.Q4_1) == ("d", "m")
    assert scale_fields(GGMLType.Q6_K) == ("d",)


@pytest.mark.cpu
@pytest.mark.parametrize("type", TUNED, ids=lambda type: type.name)
def test_values_are_the_sum_of_scales_times_what_they_are_derived_by(type: GGMLType) -> None:
    data, columns = made(type), BLOCKS * type.block_elements
    parts = [values_of_field(data, type, field, ROWS, columns) for field in scale_fields(type)]
    scales = scales_of(data, type)
    assert scales.shape == (len(parts), ROWS * BLOCKS)
    for factor in (1.0, 0.75):
        other = with_scales(data, type, scales * np.float32(factor))
        each = [
            part.reshape(-1, type.block_elements) * scale[:, None]
            for part, scale in zip(parts, scales_of(other, type), strict=True)
        ]
        expected = np.sum(each, axis=0).reshape(ROWS, columns)
        found = dequantize_rows(other, type, ROWS, columns)
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    for part in parts:
        assert np.abs(part).max() > 0


@pytest.mark.parametrize("type", TUNED, ids=lambda type: type.name)
def test_only_the_scales_are_written(type: GGMLType) -> None:
    data = made(type)
    same = with_scales(data, type, scales_of(data, type))
    assert (same == data).all()
    assert same is not data
    changed = with_scales(data, type, scales_of(data, type) * 2).reshape(-1).view(block_dtype(type))
    before = data.reshape(-1).view(block_dtype(type))
    for name in before.dtype.names or ():
        assert (changed[name] == before[name]).all() == (name not in scale_fields(type))
