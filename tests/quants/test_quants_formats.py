"""Layouts and reference conversions against the gguf package, and against themselves."""

import numpy as np
import pytest
from gguf.quants import dequantize as their_dequantize
from gguf.quants import quantize as their_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf
from phiquant import quants
from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.quants.block import join, split

TYPES = sorted(quants.QUANTIZABLE)
READABLE = sorted(quants.READABLE - {GGMLType.Q1_0, GGMLType.Q2_0})  # which gguf does not dequantize
BLOCKED = [t for t in TYPES if t.is_quantized]
WEIGHTED = [(t, w) for t in BLOCKED for w in (False, True) if w or t not in quants.IMPORTANCE_REQUIRED]
PLANES = sorted(t for t in quants.READABLE if quants.format_of(t).planes)
# gguf's own quantizers of these types are exact copies of llama.cpp's; of the K types it has none
THEIRS = [GGMLType.F16, GGMLType.BF16, GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0]
THEIRS += [GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.MXFP4]


def random_bytes(type: GGMLType, blocks: int, seed: int) -> np.ndarray:
    """Blocks of random bits, but with every half-precision field finite."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (blocks, type.block_bytes), dtype=np.uint8).reshape(-1).view(quants.block_dtype(type))
    for field in data.dtype.names:
        if data.dtype[field].base == np.dtype("<f2"):
            bits = data[field].view(np.uint16)
            bits[(bits & 0x7C00) == 0x7C00] &= 0xBFFF
            data[field] = bits.view(np.float16)
    if type is GGMLType.IQ1_M:  # the top bits of d are those of the last word
        data["scales"][:, 3] &= 0xBFFF
    return data.view(np.uint8)


def inputs(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns))
    match kind:
        case "heavy":
            x = rng.standard_t(2, (rows, columns))
        case "constant":
            x[:] = rng.standard_normal((rows, 1))
        case "zero":
            x[:] = 0
        case "tiny":
            x *= 10.0 ** -rng.integers(3, 30, (rows, 1))
        case "denormal":
            x *= 1e-40
    return x.astype(np.float32)


KINDS = ("normal", "heavy", "constant", "zero", "tiny", "denormal")


@pytest.mark.parametrize("type", READABLE)
def test_dequantize_equals_gguf_bit_for_bit(type):
    data = random_bytes(type, 400, seed=type)
    ours = quants.dequantize(data, type, (10, 40 * type.block_elements))
    with np.errstate(all="ignore"):
        theirs = their_dequantize(data.reshape(10, -1), gguf.GGMLQuantizationType(int(type))).astype(np.float32)
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type", THEIRS)
def test_quantize_equals_gguf(type, kind):
    x = inputs(kind, 40, 768 if type.block_elements == 256 else 320, seed=type)
    with np.errstate(all="ignore"):
        theirs = their_quantize(x, gguf.GGMLQuantizationType(int(type))).view(np.uint8).reshape(40, -1)
    if kind == "denormal" and type.is_quantized:
        # scales below half precision are zero in both, or hold only zeros; their levels are undefined casts
        theirs, ours = (quants.dequantize(b, type, x.shape) for b in (theirs, quants.quantize(x, type)))
        assert np.array_equal(ours, theirs)
    else:
        assert np.array_equal(quants.quantize(x, type), theirs)


def test_bfloat16_of_every_rounding():
    rng = np.random.default_rng(0)
    bits = np.concatenate(
        [rng.integers(0, 2**32, 100_000, dtype=np.uint32), np.arange(0x3F800000, 0x3F820000, dtype=np.uint32)]
    )
    edges = np.array([0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 1, 0x80000000], np.uint32)
    x = np.concatenate([bits, edges]).view(np.float32)
    theirs = their_quantize(x, gguf.GGMLQuantizationType.BF16).view(np.uint16)
    assert np.array_equal(quants.quantize(x, GGMLType.BF16).view(np.uint16), theirs)


# root mean square error of a block as part of its peak, at most; and the peak below which a block may come out zero
BOUNDS = {
    GGMLType.Q1_0: (1.0, 1e-7),
    GGMLType.Q2_0: (0.5, 1e-7),
    GGMLType.TQ1_0: (0.5, 1e-7),
    GGMLType.TQ2_0: (0.5, 1e-7),
    GGMLType.MXFP4: (0.26, 1e-37),  # 6 is the largest level, but peaks reach 8
    GGMLType.NVFP4: (0.17, 1e-2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("type", "with_importance"), WEIGHTED)
def test_error_is_bounded_by_the_step(type, kind, with_importance):
    x = inputs(kind, 6, 768, seed=3)
    importance = np.random.default_rng(5).random(768, np.float32) if with_importance else None
    back = quants.dequantize(quants.quantize(x, type, importance), type, x.shape)
    assert np.isfinite(back).all()
    n = type.block_elements
    peak = np.abs(x).reshape(-1, n).max(1)
    error = np.sqrt(((back - x).astype(np.float64) ** 2).reshape(-1, n).mean(1))
    # levels are peak / 2**(bits - 1) apart
    bits = sum(plane.bits for plane in quants.format_of(type).planes)
    part, least = BOUNDS.get(type, (0.6 / 2 ** (bits - 1), 6e-8 * (16 if n == 32 else 4096)))
    assert (error <= part * peak + least).all(), (error / peak).max()


@pytest.mark.parametrize("type", BLOCKED)
def test_blocks_do_not_depend_on_their_neighbours(type):
    n = type.block_elements
    x = inputs("heavy", 8, 2 * n, seed=9)
    importance = np.random.default_rng(5).random(2 * n, np.float32)
    given = {None: None, 1: importance} if type not in quants.IMPORTANCE_REQUIRED else {1: importance}
    if n == 32 and type is not GGMLType.IQ4_NL:
        given.pop(1)  # there the whole row has a part in the weights
    for weights in given.values():
        whole = quants.quantize(x, type, weights).reshape(-1, type.block_bytes)
        for i, block in enumerate(x.reshape(-1, n)[:5]):
            part = None if weights is None else weights[i % 2 * n :][:n]
            assert np.array_equal(quants.quantize(block, type, part), whole[i])


@given(st.data())
@settings(deadline=None)
def test_planes_hold_every_level(data):
    entry = quants.format_of(data.draw(st.sampled_from(PLANES)))
    bits = sum(plane.bits for plane in entry.planes)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    levels = rng.integers(0, 2**bits, (3, entry.type.block_elements), dtype=np.int32)
    blocks = np.zeros(3, entry.dtype)
    join(blocks, entry.planes, levels)
    assert np.array_equal(split(blocks, entry.planes), levels)
    element = data.draw(st.integers(0, entry.type.block_elements - 1))
    level = 0
    for plane in entry.planes:
        byte, bit = plane.place(element)
        value = np.ascontiguousarray(blocks[1][plane.field]).reshape(-1).view(np.uint8)[byte]
        level |= (int(value) >> bit & (2**plane.bits - 1)) << plane.shift
    assert level == levels[1, element]


def test_one_and_two_bits_by_hand():
    data = np.zeros(1, quants.block_dtype(GGMLType.Q1_0))
    data["d"], data["qs"][0, 1] = 0.5, 0b10000010
    values = quants.dequantize(data.view(np.uint8), GGMLType.Q1_0, (128,))
    assert np.flatnonzero(values > 0).tolist() == [9, 15]
    assert set(values.tolist()) == {-0.5, 0.5}
    data = np.zeros(1, quants.block_dtype(GGMLType.Q2_0))
    data["d"], data["qs"] = 0.5, 0b11100100
    values = quants.dequantize(data.view(np.uint8), GGMLType.Q2_0, (64,))
    assert values.tolist() == [-0.5, 0.0, 0.5, 1.0] * 16


def test_shapes_and_empty_input():
    x = np.zeros((0, 256), np.float32)
    assert quants.quantize(x, GGMLType.Q4_K).shape == (0, 144)
    assert quants.quantize(np.zeros((2, 3, 256), np.float32), GGMLType.Q6_K).shape == (2, 3, 210)
    assert quants.dequantize(np.zeros(0, np.uint8), GGMLType.Q4_K, (0, 256)).shape == (0, 256)


def test_refusals_name_the_cause():
    with pytest.raises(UnsupportedError, match="I32"):
        quants.block_dtype(GGMLType.I32)
    with pytest.raises(WeightsError, match="blocks of 256"):
        quants.quantize(np.zeros((2, 100), np.float32), GGMLType.Q4_K)
    with pytest.raises(WeightsError, match="importance"):
        quants.quantize(np.zeros((2, 256), np.float32), GGMLType.Q4_K, np.ones(255, np.float32))
    with pytest.raises(WeightsError, match="IQ1_S is not quantized without an importance"):
        quants.check_importance(GGMLType.IQ1_S, None, 256)
    with pytest.raises(WeightsError, match="143 bytes"):
        quants.dequantize(np.zeros(143, np.uint8), GGMLType.Q4_K, (1, 256))
