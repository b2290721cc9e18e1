"""The vocabulary of vector operations, in every lowering this processor can be forced to."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant.kernels.cpu import library, simd
from phiquant.kernels.cpu.emit import F32, I8, I16, I32, Emitter, Value, vec
from phiquant.kernels.cpu.target import Target, host

pytestmark = pytest.mark.cpu


@pytest.fixture
def target(each_target: Target) -> Target:
    return each_target


def call(name: str, body: Callable[..., None], target: Target, *arrays: NDArray) -> None:
    address = library.function(f"test.{name}", len(arrays), body, target)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arrays))(address)(*(a.ctypes.data for a in arrays))


@pytest.mark.parametrize("below", [16, 64, 256])
@pytest.mark.parametrize("lanes", [16, 32])
def test_dot_quads(target: Target, below: int, lanes: int) -> None:
    def body(e: Emitter, u: Value, s: Value, t: Value) -> None:
        start = e.load(t, vec(I32, lanes))
        bytes_ = vec(I8, 4 * lanes)
        e.store(simd.dot_quads(e, start, e.load(u, bytes_), e.load(s, bytes_), below=below), t)

    rng = np.random.default_rng(below)
    for extreme in (False, True):
        u = rng.integers(0, below, 4 * lanes).astype(np.uint8)
        s = rng.integers(-127, 128, 4 * lanes).astype(np.int8)
        if extreme:  # where an instruction that saturates would show
            u[:], s[:] = below - 1, 127
        t = rng.integers(-1000, 1000, lanes).astype(np.int32)
        expected = t + (u.astype(np.int32) * s).reshape(lanes, 4).sum(1)
        call(f"quads.{below}.{lanes}", body, target, u, s, t)
        np.testing.assert_array_equal(t, expected)


@pytest.mark.parametrize("lanes", [8, 16])
def test_dot_pairs(target: Target, lanes: int) -> None:
    def body(e: Emitter, a: Value, b: Value, t: Value) -> None:
        words = vec(I16, 2 * lanes)
        e.store(simd.dot_pairs(e, e.load(t, vec(I32, lanes)), e.load(a, words), e.load(b, words)), t)

    rng = np.random.default_rng(1)
    a, b = rng.integers(-32767, 32768, (2, 2 * lanes)).astype(np.int16)
    t = np.arange(lanes, dtype=np.int32)
    expected = t + (a.astype(np.int64) * b).reshape(lanes, 2).sum(1).astype(np.int32)
    call(f"pairs.{lanes}", body, target, a, b, t)
    np.testing.assert_array_equal(t, expected)


@pytest.mark.parametrize("entries", [4, 8, 16])
@pytest.mark.parametrize("lanes", [16, 64])
def test_lookup(target: Target, lanes: int, entries: int) -> None:
    rng = np.random.default_rng(entries)
    table = rng.integers(0, 256, entries).astype(np.uint8)
    index = rng.integers(0, entries, lanes).astype(np.uint8)
    out = np.zeros(lanes, np.uint8)

    def body(e: Emitter, i: Value, o: Value) -> None:
        e.store(simd.lookup(e, table.tolist(), e.load(i, vec(I8, lanes))), o)

    call(f"lookup.{lanes}.{entries}", body, target, index, out)
    np.testing.assert_array_equal(out, table[index])
    text = library.emit_assembly("lookup", 2, body, target)
    assert ("pshufb" in text) == (target.lowering != "generic" and not target.arm)


def test_the_lowering_asked_for_is_the_one_emitted(lowerings: list[str]) -> None:
    def body(e: Emitter, u: Value, s: Value, t: Value) -> None:
        bytes_ = vec(I8, 64)
        total = e.load(t, vec(I32, 16))
        e.store(simd.dot_quads(e, total, e.load(u, bytes_), e.load(s, bytes_), below=64), t)

    marks = {"avx512vnni": "vpdpbusd", "avxvnni": "vpdpbusd", "avx2": "vpmaddubsw", "sse41": "pmaddubsw"}
    for name in lowerings:
        text = library.emit_assembly("lowering", 3, body, host(name))
        for other, mark in marks.items():
            if other == name:
                assert mark in text
        assert ("zmm" in text) == (name == "avx512vnni")
        if name in ("sse41", "generic"):
            assert "ymm" not in text


def test_half_precision(target: Target) -> None:
    def widen(e: Emitter, x: Value, y: Value) -> None:
        e.store(simd.half_to_float(e, e.load(x, vec(I16, 16))), y)

    def narrow(e: Emitter, x: Value, y: Value) -> None:
        e.store(simd.float_to_half(e, e.load(x, vec(F32, 16))), y)

    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, 16)
    for row in halves[::5].copy():
        out = np.full(16, np.nan, np.float32)
        call("widen", widen, target, row, out)
        np.testing.assert_array_equal(out, row.astype(np.float32))
    rng = np.random.default_rng(2)
    special = np.array(
        [0, -0.0, np.inf, -np.inf, 65504, 65519.99, 65520, 6e-8, 2.9e-8, 3e-8, 6.1e-5, 1, -1, 2049, 2051, 1e-30]
    )
    for _ in range(300):
        x = (rng.standard_normal(16) * 10.0 ** rng.uniform(-9, 6, 16)).astype(np.float32)
        for values in (x, special.astype(np.float32)):
            out = np.zeros(16, np.uint16)
            call("narrow", narrow, target, values, out)
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(out, values.astype(np.float16).view(np.uint16))


def test_bfloat(target: Target) -> None:
    def both(e: Emitter, x: Value, y: Value, z: Value) -> None:
        short = simd.float_to_bfloat(e, e.load(x, vec(F32, 16)))
        e.store(short, y)
        e.store(simd.bfloat_to_float(e, short), z)

    import ml_dtypes

    rng = np.random.default_rng(3)
    for _ in range(100):
        x = (rng.standard_normal(16) * 10.0 ** rng.uniform(-38, 38, 16)).astype(np.float32)
        x[0] = np.nan
        y, z = np.zeros(16, np.uint16), np.zeros(16, np.float32)
        call("bfloat", both, target, x, y, z)
        expected = x.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(y[1:], expected.view(np.uint16)[1:])
        np.testing.assert_array_equal(z, expected.astype(np.float32))


def test_exp(target: Target) -> None:
    def body(e: Emitter, x: Value, y: Value) -> None:
        e.store(simd.exp(e, e.load(x, vec(F32, 16))), y)

    x = np.linspace(-87.3, 88.7, 16 * 4000).astype(np.float32).reshape(-1, 16)
    y = np.full_like(x, np.nan)
    for row, out in zip(x, y, strict=True):
        call("exp", body, target, row, out)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(y - exact) / np.spacing(exact.astype(np.float32))).max() < 1.0
    edge = np.array([-np.inf, -200, -88, 0, 89, 1000, np.inf, 1] * 2, np.float32)
    out = np.full(16, np.nan, np.float32)
    call("exp", body, target, edge, out)
    np.testing.assert_array_equal(out[:7], [0, 0, 0, 1, np.inf, np.inf, np.inf])


def test_rounding(target: Target) -> None:
    def body(e: Emitter, x: Value, even: Value, away: Value) -> None:
        v = e.load(x, vec(F32, 16))
        e.store(simd.nearest_int(e, v), even)
        e.store(simd.round_away(e, v), away)

    rng = np.random.default_rng(4)
    halves = np.array([0.5, 1.5, -0.5, -1.5, 2.5, -2.5, 0.49999997, -0.49999997] * 2, np.float32)
    for x in (halves, *(rng.uniform(-1000, 1000, (50, 16)).astype(np.float32))):
        x = np.ascontiguousarray(x)
        even, away = np.zeros((2, 16), np.int32)
        call("rounding", body, target, x, even, away)
        np.testing.assert_array_equal(even, np.rint(x))
        np.testing.assert_array_equal(away, np.sign(x) * np.floor(np.abs(x.astype(np.float64)) + 0.5))


def test_transpose_and_reduce(target: Target) -> None:
    def body(e: Emitter, x: Value, y: Value, total: Value) -> None:
        rows = [e.load(x + 64 * i, vec(F32, 16)) for i in range(16)]
        for i, column in enumerate(simd.transpose(e, rows)):
            e.store(column, y + 64 * i)
        for i, op in enumerate(("add", "max", "min")):
            e.store(simd.reduce(e, rows[3], op), total + 4 * i)

    x = np.random.default_rng(5).standard_normal((16, 16)).astype(np.float32)
    y, total = np.full_like(x, np.nan), np.zeros(3, np.float32)
    call("transpose", body, target, x, y, total)
    np.testing.assert_array_equal(y, x.T)
    assert total[1] == x[3].max()
    assert total[2] == x[3].min()
    assert total[0] == pytest.approx(x[3].sum(), rel=1e-5)


@pytest.mark.parametrize("entries", [4, 8, 16])
@pytest.mark.parametrize("lanes", [16, 32])
def test_lookup_floats(target: Target, entries: int, lanes: int) -> None:
    table = [float(v) for v in np.random.default_rng(entries).standard_normal(entries).astype(np.float32)]

    def body(e: Emitter, index: Value, out: Value) -> None:
        e.store(simd.lookup_floats(e, table, e.load(index, vec(I32, lanes))), out)

    index = np.random.default_rng(2).integers(0, entries, lanes).astype(np.int32)
    out = np.zeros(lanes, np.float32)
    call(f"lookup_floats.{entries}.{lanes}", body, target, index, out)
    np.testing.assert_array_equal(out, np.array(table, np.float32)[index])


def test_choose_of_four(target: Target) -> None:
    def body(e: Emitter, table: Value, index: Value, out: Value) -> None:
        e.store(simd.choose_of_four(e, e.load(table, vec(F32, 4)), e.load(index, vec(I32, 16))), out)

    table = np.array([0.5, -3, 7, np.nan], np.float32)
    index = np.random.default_rng(3).integers(0, 3, 16).astype(np.int32)
    out = np.zeros(16, np.float32)
    call("choose_of_four", body, target, table, index + 4 * np.arange(16, dtype=np.int32), out)
    np.testing.assert_array_equal(out, table[index])
