"""The compiled quantizers and dequantizers: the reference's bytes, on every lowering that runs here."""

import ctypes
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant import quants
from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf.types import GGMLType
from phiquant.kernels import dequantize as reading
from phiquant.kernels import quantize as module
from phiquant.kernels.cpu import library, target
from phiquant.kernels.cpu.dequantize import DEQUANTIZABLE
from phiquant.kernels.cpu.quantize_iq1_cuts import sorting_network
from phiquant.kernels.dequantize import FLOATS, dequantize_rows
from phiquant.kernels.quantize import quantize_rows
from phiquant.quants.iquants import IQ4_TABLE
from phiquant.quants.nonlinear import middles

pytestmark = pytest.mark.cpu

TYPES = sorted(quants.QUANTIZABLE)
BLOCKED = [t for t in TYPES if t.is_quantized]
WEIGHTED = [(t, w) for t in TYPES for w in (False, True) if w or t not in quants.IMPORTANCE_REQUIRED]
KINDS = ("normal", "heavy", "constant", "zero", "tiny", "denormal", "flat", "sparse", "wide", "signed zeros", "uneven")


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
            x *= 10.0 ** rng.uniform(-46, -36, (rows, 1))
        case "flat":  # a few units of last place apart, where sums cancel and scales come out negative or infinite
            x = -np.abs(rng.standard_normal((rows, 1))) * (1 + x * 1e-6)
        case "sparse":
            x *= rng.random((rows, columns)) < 0.03
        case "wide":
            x *= 10.0 ** rng.integers(-30, 4, (rows, columns))
        case "signed zeros":
            x = np.where(x > 0, 0.0, -0.0)
        case "uneven":  # from sub-block to sub-block, some of them zero
            x = (x.reshape(rows, -1, 16) * 10.0 ** rng.integers(-8, 2, (rows, columns // 16, 1))).reshape(x.shape)
            x.reshape(rows, -1, 16)[rng.random((rows, columns // 16)) < 0.3] = 0
    return x.astype(np.float32)


def importances(columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = (rng.random(columns) * 10.0 ** rng.integers(-4, 4, columns)).astype(np.float32)
    w[rng.random(columns) < 0.1] = 0
    return w


def needed(type: GGMLType, columns: int) -> np.ndarray | None:
    """An importance where a type is not quantized without."""
    return importances(columns, seed=11) if type in quants.IMPORTANCE_REQUIRED else None


def stored(x: np.ndarray, source: GGMLType) -> np.ndarray:
    return quants.quantize(x, source)


@pytest.mark.parametrize(("type", "with_importance"), WEIGHTED)
def test_bytes_equal_the_reference(type, with_importance):
    importance = importances(768, seed=1) if with_importance else None
    for kind in KINDS:
        x = inputs(kind, 23, 768, seed=2)  # 69 super-blocks: groups of lanes cross rows, and the last one is partial
        # some "wide" values are too large for NVFP4, which clips them then
        how = "keep" if type is GGMLType.NVFP4 else "raise"
        found = quantize_rows(x, GGMLType.F32, type, importance, nonfinite=how)
        assert found.shape == (23, type.row_bytes(768))
        assert np.array_equal(found, quants.quantize(x, type, importance)), kind


@pytest.mark.slow
@pytest.mark.parametrize("source", [GGMLType.F16, GGMLType.BF16])
@pytest.mark.parametrize("type", TYPES)
def test_other_sources_are_widened_exactly(type, source):
    x = stored(inputs("heavy", 9, 512, seed=3), source)
    wide = quants.dequantize(x, source, (9, 512))
    importance = importances(512, seed=4)
    for weights in (needed(type, 512), importance):
        expected = quants.quantize(wide, type, weights)
        assert np.array_equal(quantize_rows(x, source, type, weights), expected)
        assert np.array_equal(quantize_rows(x.view(np.uint16), source, type, weights), expected)


@pytest.mark.parametrize("type", [*BLOCKED, GGMLType.F16, GGMLType.BF16])
def test_every_lowering_gives_the_same_bytes(type, each_target, monkeypatch):
    x = inputs("heavy", 5, 768, seed=5)
    half = stored(x, GGMLType.F16)
    compiled = []
    function = library.function

    def forced(name, arguments, body):
        compiled.append(name)
        return function(name, arguments, body, each_target)

    monkeypatch.setattr(library, "function", forced)
    caches = (module._quantizer, reading._dequantizer, reading.convert_floats)
    for cache in caches:
        cache.cache_clear()
    importance = needed(type, 768)
    try:
        found = quantize_rows(x, GGMLType.F32, type, importance)
        from_half = quantize_rows(half, GGMLType.F16, type, importance)
        back = dequantize_rows(found, type, 5, 768)
    finally:
        for cache in caches:
            cache.cache_clear()
    assert len(compiled) == 3, "the kernels under test must be the forced ones"
    expected = quants.quantize(x, type, importance)
    assert np.array_equal(found, expected)
    wide = quants.dequantize(half, GGMLType.F16, x.shape)
    assert np.array_equal(from_half, quants.quantize(wide, type, importance))
    assert np.array_equal(back, quants.dequantize(expected, type, x.shape))


@pytest.mark.parametrize(
    "type", [GGMLType.Q4_0, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.NVFP4, GGMLType.IQ4_XS]
)
@pytest.mark.parametrize("arm", [False, True])
def test_no_operation_is_contracted_and_nothing_is_called(type, arm, monkeypatch):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = target.host()
    if arm:
        machine = target.Target("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+dotprod", "neon")
    written = []

    def assemble(name, arguments, body):
        written.append(library.emit_assembly(name, arguments, body, machine))
        return 1

    monkeypatch.setattr(library, "function", assemble)
    module._quantizer.cache_clear()
    try:
        module._quantizer(type, GGMLType.F16, True)
    finally:
        module._quantizer.cache_clear()
    (assembly,) = written
    assert re.search(r"fmul|mulps", assembly), "this must be the code of a quantizer"
    assert not re.findall(r"\n\t(?:v?fn?m(?:add|sub|la|ls)\w*|call\w*|blr?)\t.*", assembly)


@given(st.sampled_from(BLOCKED), st.sampled_from(FLOATS), st.integers(1, 70), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_any_number_of_blocks_and_nothing_beside_them(type, source, blocks, seed):
    n = type.block_elements
    values = inputs("normal", blocks, n, seed)
    x = np.concatenate([stored(values, source).reshape(-1), np.full(64, 0xFF, np.uint8)])  # NaN behind the input
    room = np.full((blocks + 2) * type.block_bytes, 0xA5, np.uint8)
    flags = ctypes.c_int64(-1)
    importance = needed(type, n)
    kernel = module._quantizer(type, source, importance is not None)
    made = module._QUANTIZERS[type].tables
    tables = made().ctypes.data if made else 0
    weights = 0 if importance is None else importance.ctypes.data
    out = room[type.block_bytes : -type.block_bytes]
    # each block a row: all share the importance of one
    kernel(x.ctypes.data, out.ctypes.data, blocks, 1, weights, 0, ctypes.addressof(flags), tables)
    assert flags.value == 0
    assert (room[: type.block_bytes] == 0xA5).all()
    assert (room[-type.block_bytes :] == 0xA5).all()
    wide = quants.dequantize(stored(values, source), source, values.shape)
    assert np.array_equal(out, quants.quantize(wide, type, importance).reshape(-1))


@given(
    st.sampled_from(TYPES),
    st.sampled_from(FLOATS),
    st.integers(0, 19 * 256 - 1),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
@settings(max_examples=100, deadline=None)
def test_what_is_not_finite_is_reported_wherever_it_stands(type, source, position, value):
    x = inputs("normal", 19, 256, seed=6)
    x.reshape(-1)[position] = value
    data = stored(x, source)
    importance = needed(type, 256)
    with pytest.raises(WeightsError, match=f"row {position // 256} .* NaN or infinity"):
        quantize_rows(data, source, type, importance)
    kept = quantize_rows(data, source, type, importance, nonfinite="keep")
    clean = np.arange(19) != position // 256
    wide = quants.dequantize(data, source, x.shape)
    assert np.array_equal(kept[clean], quants.quantize(wide[clean], type, importance))


@pytest.mark.parametrize("type", [t for t in TYPES if t not in (GGMLType.F32, GGMLType.BF16, GGMLType.MXFP4)])
def test_values_too_large_for_the_scales_are_refused(type):
    x = inputs("normal", 3, 256, seed=7)
    x[1] *= 1e9
    with pytest.raises(WeightsError, match=f"row 1 .* too large for {type.name}"):
        quantize_rows(x, GGMLType.F32, type, needed(type, 256))
    assert quantize_rows(x, GGMLType.F32, type, needed(type, 256), nonfinite="keep").shape == (3, type.row_bytes(256))


def test_every_readable_type_has_a_dequantizer():
    assert {*FLOATS, *DEQUANTIZABLE} == quants.READABLE


@pytest.mark.parametrize("type", sorted(DEQUANTIZABLE))
def test_dequantize_equals_the_reference_on_any_bytes(type, each_target, monkeypatch):
    compiled = []
    function = library.function

    def forced(name, arguments, body):
        compiled.append(name)
        return function(name, arguments, body, each_target)

    monkeypatch.setattr(library, "function", forced)
    reading._dequantizer.cache_clear()
    rng = np.random.default_rng(8)
    data = rng.integers(0, 256, (7, 3 * type.block_bytes), dtype=np.uint8)
    try:
        found = dequantize_rows(data, type, 7, 3 * type.block_elements)
    finally:
        reading._dequantizer.cache_clear()
    assert len(compiled) == 1, "the kernel under test must be the forced one"
    expected = quants.dequantize(data, type, found.shape)
    assert np.array_equal(found, expected, equal_nan=True)
    finite = np.isfinite(expected)
    assert np.array_equal(found.view(np.uint32)[finite], expected.view(np.uint32)[finite])


def test_the_nearest_entry_of_iq4_at_every_border():
    # the block's peak is 1 * 127, so that the scale of the levels is one and they show the entry nearest to x itself
    ends = middles(IQ4_TABLE)
    near = np.concatenate([ends, np.nextafter(ends, np.float32(-200)), np.nextafter(ends, np.float32(200))])
    x = np.concatenate([near, np.linspace(-126, 126, 3411, dtype=np.float32)]).reshape(-1, 9)
    block = np.concatenate([IQ4_TABLE.astype(np.float32), np.full(7, -127, np.float32)])
    blocks = np.concatenate([np.broadcast_to(block, (len(x), 23)), x], axis=1)
    importance = np.concatenate([np.full(23, 1e6, np.float32), np.zeros(9, np.float32)])
    found = quantize_rows(blocks, GGMLType.F32, GGMLType.IQ4_NL, importance)
    assert np.array_equal(found, quants.quantize(blocks, GGMLType.IQ4_NL, importance))
    values = quants.dequantize(found, GGMLType.IQ4_NL, blocks.shape)
    assert (values[:, :23] == block).all()
    distance = np.abs(values[:, 23:] - x)
    assert np.array_equal(distance, np.abs(IQ4_TABLE.astype(np.float32) - x[..., None]).min(axis=2))


def test_the_sorting_network_sorts():
    # what sorts all columns of 0 and 1 sorts everything
    columns = (np.arange(2**16) >> np.arange(16)[:, None] & 1).astype(np.uint8)
    for i, j in sorting_network(16):
        columns[i], columns[j] = np.minimum(columns[i], columns[j]), np.maximum(columns[i], columns[j])
    assert (np.diff(columns.astype(np.int8), axis=0) >= 0).all()
    values = np.random.default_rng(12).permuted(np.arange(32).repeat(500).reshape(32, -1), axis=0)
    for i, j in sorting_network(32):
        values[i], values[j] = np.minimum(values[i], values[j]), np.maximum(values[i], values[j])
    assert (values == np.arange(32)[:, None]).all()


def test_exponents_of_mxfp4_just_below_powers_of_two():
    # where the logarithm in float32 is rounded up to the next whole number, and where it is not
    tops = (np.arange(1, 255, dtype=np.uint32) << 23)[:, None]
    peaks = (tops + 3 - np.arange(63, dtype=np.uint32)).view(np.float32).reshape(-1)
    x = np.zeros((len(peaks), 32), np.float32)
    x[:, 7] = peaks
    found = quantize_rows(x, GGMLType.F32, GGMLType.MXFP4)
    assert np.array_equal(found, quants.quantize(x, GGMLType.MXFP4))
    e = np.log2(peaks.astype(np.float64)).astype(np.float32)
    assert np.array_equal(found[:, 0], np.maximum(np.floor(e) + 125, 0))
    assert (np.floor(e) > np.floor(np.log2(peaks.astype(np.float64)))).sum() > 1000, "the case must occur"


def test_half_precision_of_every_pattern():
    bits = np.arange(2**16, dtype=np.uint16)[None]
    for type, dtype in ((GGMLType.F16, np.float16), (GGMLType.BF16, ml_dtypes.bfloat16)):
        wide = dequantize_rows(bits, type, 1, 2**16)
        expected = bits.view(dtype).astype(np.float32)
        assert np.array_equal(wide, expected, equal_nan=True)
        back = quantize_rows(wide, GGMLType.F32, type, nonfinite="keep").view(np.uint16)
        same = ~np.isnan(expected)
        assert np.array_equal(back[same], bits[same])
        assert np.isnan(back[~same].view(dtype).astype(np.float32)).all()


@given(st.integers(0, 2**32), st.integers(1, 50))
@settings(deadline=None)
def test_floats_are_rounded_to_nearest_even(seed, count):
    x = np.random.default_rng(seed).integers(0, 2**32, (1, count), dtype=np.uint32).view(np.float32)
    x[~np.isfinite(x)] = 0
    for type in (GGMLType.F16, GGMLType.BF16, GGMLType.F32):
        found = quantize_rows(x, GGMLType.F32, type, nonfinite="keep")
        assert np.array_equal(found, quants.quantize(x, type))
        half = quants.quantize(x, GGMLType.F16)
        wide = quants.dequantize(half, GGMLType.F16, x.shape)
        assert np.array_equal(quantize_rows(half, GGMLType.F16, type, nonfinite="keep"), quants.quantize(wide, type))


def test_threads_do_not_disturb_one_another():
    x = inputs("heavy", 64, 1024, seed=9)
    importance = importances(1024, seed=10)
    expected = quantize_rows(x, GGMLType.F32, GGMLType.Q4_K, importance)
    with ThreadPoolExecutor(4) as pool:
        chunks = pool.map(
            lambda i: quantize_rows(x[i : i + 4], GGMLType.F32, GGMLType.Q4_K, importance), range(0, 64, 4)
        )
        assert np.array_equal(np.concatenate(list(chunks)), expected)


def test_empty_input():
    assert quantize_rows(np.zeros((0, 256), np.float32), GGMLType.F32, GGMLType.Q4_K).shape == (0, 144)
    assert quantize_rows(np.zeros((3, 0), np.float32), GGMLType.F32, GGMLType.Q4_K).shape == (3, 0)
    assert dequantize_rows(np.zeros(0, np.uint8), GGMLType.Q4_K, 0, 256).shape == (0, 256)


@pytest.mark.parametrize(
    ("x", "source", "type", "importance", "error", "words"),
    [
        (np.zeros((2, 100), np.float32), GGMLType.F32, GGMLType.Q4_K, None, WeightsError, "blocks of 256"),
        (np.zeros((2, 512), np.float32)[:, ::2], GGMLType.F32, GGMLType.Q4_K, None, WeightsError, "contiguous"),
        (np.zeros(256, np.float32), GGMLType.F32, GGMLType.Q4_K, None, WeightsError, "matrix"),
        (np.zeros((2, 256), np.float64), GGMLType.F32, GGMLType.Q4_K, None, WeightsError, "float64"),
        (np.zeros((2, 1023), np.uint8), GGMLType.F32, GGMLType.Q4_K, None, WeightsError, "does not hold rows of F32"),
        (np.zeros((2, 256), np.float32), GGMLType.F32, GGMLType.Q4_K, np.ones(255), WeightsError, "importance"),
        (np.zeros((2, 144), np.uint8), GGMLType.Q4_K, GGMLType.Q6_K, None, UnsupportedError, "Q4_K"),
        (np.zeros((2, 256), np.float32), GGMLType.F32, GGMLType.Q8_K, None, UnsupportedError, "Q8_K"),
    ],
)
def test_refusals_name_the_cause(x, source, type, importance, error, words):
    with pytest.raises(error, match=words):
        quantize_rows(x, source, type, importance)


def test_dequantize_refuses_what_does_not_fit():
    with pytest.raises(WeightsError, match="143 bytes"):
        dequantize_rows(np.zeros(143, np.uint8), GGMLType.Q4_K, 1, 256)
    with pytest.raises(WeightsError, match="contiguous"):
        dequantize_rows(np.zeros((1, 288), np.uint8)[:, ::2], GGMLType.Q4_K, 1, 256)


def test_tables_outlive_the_kernel_that_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not always those that a cache holds: two threads may make them at once."""
    how = module._QUANTIZERS[GGMLType.IQ3_S]
    made: list[weakref.ref[np.ndarray]] = []

    def tables() -> np.ndarray:
        array = np.zeros(8, np.int32)
        made.append(weakref.ref(array))
        return array

    def kernel(*arguments: int) -> None:
        assert made[-1]() is not None
        assert made[-1]().ctypes.data == arguments[-1]  # type: ignore[union-attr]

    monkeypatch.setitem(module._QUANTIZERS, GGMLType.IQ3_S, replace(how, tables=tables))
    monkeypatch.setattr(module, "_quantizer", lambda *_: kernel)
    quantize_rows(np.zeros((1, 256), np.float32), GGMLType.F32, GGMLType.IQ3_S)
    assert len(made) == 1
