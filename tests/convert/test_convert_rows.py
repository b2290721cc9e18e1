"""What is found bad in rows of blocks, wherever a format keeps its scales."""

import numpy as np
import pytest

from phiquant import quants
from phiquant.convert.rows import first_bad_row
from phiquant.gguf.types import GGMLType

ROWS, PER_ROW = 5, 3
BLOCKED = sorted(t for t in quants.READABLE if t.is_quantized)


def blocks_of(type: GGMLType) -> np.ndarray:
    """Rows of blocks of random bits whose scales are all valid."""
    rng = np.random.default_rng(type)
    data = rng.integers(0, 256, ROWS * PER_ROW * type.block_bytes, dtype=np.uint8)
    blocks = data.view(quants.block_dtype(type)).reshape(ROWS, PER_ROW)
    for name in halves_of(type):
        blocks[name] = rng.standard_normal((ROWS, PER_ROW))
    if type is GGMLType.IQ1_M:
        blocks["scales"][..., 3] &= 0x3FFF
    if type is GGMLType.MXFP4:
        blocks["e"] = rng.integers(0, 255, (ROWS, PER_ROW))
    return blocks


def halves_of(type: GGMLType) -> list[str]:
    layout = quants.block_dtype(type)
    return [name for name in layout.names or () if layout[name].base == np.float16]


def found(blocks: np.ndarray, type: GGMLType) -> int | None:
    return first_bad_row(blocks.reshape(-1).view(np.uint8), type, ROWS)


@pytest.mark.parametrize("type", BLOCKED)
def test_valid_scales_pass(type: GGMLType) -> None:
    blocks = blocks_of(type)
    assert found(blocks, type) is None
    values = quants.dequantize(blocks.reshape(-1).view(np.uint8), type, (ROWS, PER_ROW * type.block_elements))
    assert np.isfinite(values).all()


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01, 0xFFFF])
@pytest.mark.parametrize("type", [t for t in BLOCKED if halves_of(t)])
def test_half_precision_scales(type: GGMLType, bits: int) -> None:
    for name in halves_of(type):
        blocks = blocks_of(type)
        blocks[name].view(np.uint16)[2, -1] = blocks[name].view(np.uint16)[4, 0] = bits
        assert found(blocks, type) == 2


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01, 0xFFFF])
def test_a_scale_scattered_over_four_words(bits: int) -> None:
    blocks = blocks_of(GGMLType.IQ1_M)
    words = blocks["scales"][3, 1]
    words[:] = words & 0xFFF | (bits >> np.array([0, 4, 8, 12]) & 15) << 12
    assert found(blocks, GGMLType.IQ1_M) == 3


def test_bytes_as_exponents() -> None:
    blocks = blocks_of(GGMLType.MXFP4)
    blocks["e"][4, 2] = 0xFF
    assert found(blocks, GGMLType.MXFP4) == 4
    blocks = blocks_of(GGMLType.NVFP4)
    blocks["d"][1] = 0x7F  # read as 0
    assert found(blocks, GGMLType.NVFP4) is None
