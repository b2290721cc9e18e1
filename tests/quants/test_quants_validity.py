"""Scales that are no numbers are found in blocks of every type, and nothing else is refused."""

import numpy as np
import pytest

from phiquant import quants
from phiquant.gguf import GGMLType
from phiquant.quants.validity import bad_blocks

RNG = np.random.default_rng(6)
BLOCKS = 37
FLOATS = {GGMLType.F32: "<f4", GGMLType.F16: "<f2", GGMLType.F64: "<f8"}
INTEGERS = (GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64)


def good(kind: GGMLType) -> np.ndarray:
    """Any bits, but the scales small numbers: what a file may hold."""
    data = RNG.integers(0, 256, BLOCKS * kind.block_bytes, np.uint8)
    for at, width, bits in places(kind):
        value = data.reshape(BLOCKS, -1)[:, at : at + width].copy().view(f"<u{width}")
        data.reshape(BLOCKS, -1)[:, at : at + width] = (value & ~np.array(bits, value.dtype)).view(np.uint8)
    return data


def places(kind: GGMLType) -> list[tuple[int, int, int]]:
    """Position, width and the bits of NaN of every scale of a block, from the description of the formats."""
    if kind in FLOATS:
        width = int(FLOATS[kind][-1])
        return [(0, width, {2: 0x7C00, 4: 0x7F800000, 8: 0x7FF << 52}[width])]
    single = {
        "BF16": (0, 2, 0x7F80),
        "MXFP4": (0, 1, 0xFF),
        "Q8_K": (0, 4, 0x7F800000),
        "Q6_K": (208, 2, 0x7C00),
        "Q3_K": (108, 2, 0x7C00),
        "TQ1_0": (52, 2, 0x7C00),
        "TQ2_0": (64, 2, 0x7C00),
    }
    several = {
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q8_1": (0, 2),
        "Q2_K": (80, 82),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
    }
    if kind.name in single:
        return [single[kind.name]]
    if kind.name in several:
        return [(at, 2, 0x7C00) for at in several[kind.name]]
    if kind is GGMLType.NVFP4:
        return [(at, 1, 0x7F) for at in range(4)]
    if kind is GGMLType.IQ1_M:  # the exponent's five bits are spread over two words
        return [(52, 2, 0xC000), (54, 2, 0x7000)]
    return [(0, 2, 0x7C00)]


WITH_SCALES = [kind for kind in GGMLType if kind not in INTEGERS]


@pytest.mark.parametrize("kind", WITH_SCALES, ids=lambda kind: kind.name)
def test_all_other_bytes_are_valid(kind: GGMLType) -> None:
    assert bad_blocks(good(kind), kind) is None


@pytest.mark.parametrize("kind", WITH_SCALES, ids=lambda kind: kind.name)
def test_every_scale_that_is_no_number_is_found(kind: GGMLType) -> None:
    found = places(kind)
    if kind is GGMLType.IQ1_M:
        data = good(kind)
        blocks = data.reshape(BLOCKS, -1)
        blocks[[5, 30], 55] |= 0xF0
        blocks[[5, 30], 53] |= 0x40
        assert bad_blocks(data, kind) is None, "four of five bits"
        blocks[[5, 30], 53] |= 0x80
        assert bad_blocks(data, kind).tolist() == [5, 30]
        return
    for at, width, bits in found:
        for extra in (0, 1, 1 << (8 * width - 1)):
            data = good(kind)
            value = np.array([bits | extra], f"<u{width}").view(np.uint8)
            for block in (5, 30):
                data.reshape(BLOCKS, -1)[block, at : at + width] = value
            assert bad_blocks(data, kind).tolist() == [5, 30]


@pytest.mark.parametrize("kind", sorted(quants.READABLE), ids=lambda kind: kind.name)
def test_what_is_found_are_blocks_that_decode_to_no_numbers(kind: GGMLType) -> None:
    """The definition agrees: random bytes decode to numbers exactly in the blocks that are not found."""
    data = RNG.integers(0, 256, 4096 * kind.block_bytes, np.uint8)
    values = quants.dequantize(data, kind, (4096, kind.block_elements))
    found = bad_blocks(data, kind)
    if kind is GGMLType.MXFP4:
        assert found is not None, "the largest scales are numbers, though times 12 they are too large for float32"
        return
    if kind is GGMLType.NVFP4:
        assert np.isfinite(values).all(), "readers take the NaN for 0, and only a damaged file has it"
        return
    with np.errstate(all="ignore"):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    assert set(bad.tolist()) <= set([] if found is None else found.tolist())
    assert len(bad) or kind.block_elements == 1


@pytest.mark.parametrize("kind", INTEGERS, ids=lambda kind: kind.name)
def test_integers_are_always_good(kind: GGMLType) -> None:
    assert bad_blocks(np.full(64, 255, np.uint8), kind) is None


def test_nothing_holds_nothing_bad() -> None:
    assert bad_blocks(np.empty(0, np.uint8), GGMLType.Q4_K) is None
