"""Matrix multiplication by every weight type, in every lowering this processor can be forced to.

The truth is float64 arithmetic on the operands the kernel works with: dequantized weights, rounded activations.
"""

import ctypes
import mmap
import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phiquant import quants
from phiquant.errors import KernelError, UnsupportedError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import activations, library, matmul, matmul_tiles
from phiquant.kernels.cpu.matmul_blocks import WideLevels
from phiquant.kernels.cpu.operation import Region, aligned
from phiquant.kernels.cpu.target import Target, host
from phiquant.kernels.ops import Weight
from phiquant.kernels.reference.activations import activation_block, round_activations
from phiquant.quants.iquants import d_iq1_m

pytestmark = pytest.mark.cpu

TYPES = list(matmul.FORMATS)
FAST = {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"}
every_type = pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.name)


def random_weight(kind: GGMLType, rows: int, columns: int, rng: np.random.Generator) -> Weight:
    """Every pattern of bits in the levels and integer scales; only the half-precision fields must be numbers."""
    if not kind.is_quantized:
        raw = quants.quantize(rng.standard_normal((rows, columns)).astype(np.float32), kind)
        return Weight("w", kind, (rows, columns), np.ascontiguousarray(raw).reshape(-1))
    dtype = quants.block_dtype(kind)
    data = rng.integers(0, 256, rows * kind.row_bytes(columns), np.uint8)
    blocks = data.view(dtype)
    for field in _units(dtype):
        blocks[field] = rng.standard_normal(len(blocks)) * 0.01
    if kind is GGMLType.MXFP4:
        blocks["e"] = rng.integers(118, 125, len(blocks))  # others make all weights zero beside the largest
    if kind is GGMLType.IQ1_M:
        _set_unit(blocks, (rng.standard_normal(len(blocks)) * 0.01).astype(np.float16))
    return Weight("w", kind, (rows, columns), data)


def _units(dtype: np.dtype[Any]) -> list[str]:
    """The half-precision fields of a block."""
    return [name for name in ("d", "dmin", "m") if name in (dtype.names or ()) and dtype[name] == np.float16]


def _set_unit(blocks: NDArray[np.void], unit: NDArray[np.float16]) -> None:
    """The scale of IQ1_M, whose bits lie in the top nibbles of four words."""
    for i in range(4):
        blocks["scales"][:, i] = blocks["scales"][:, i] & 0xFFF | unit.view(np.uint16) >> (4 * i) << 12


def operands(weight: Weight, x: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights and activations as the kernel sees them, exactly."""
    dense = quants.dequantize(weight.data, weight.type, weight.shape).astype(np.float64)
    block = activation_block(weight.type)
    if not block:
        return dense, x.astype(np.float64)
    levels, scale = round_activations(x, block)
    return dense, levels * np.repeat(scale.astype(np.float64), block, axis=1)


def product(
    machine: Any,
    packed: matmul.Packed,
    x: NDArray[np.float32],
    *,
    used: int | None = None,
    start: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """out [len(x), rows], rows beyond `used` and the surroundings checked to be untouched; `start` is added to."""
    used = len(x) if used is None else used
    around = np.full(len(x) * packed.rows + 128, np.nan, np.float32)
    out = around[64:-64].reshape(len(x), packed.rows)
    if start is not None:
        out[:used] = start[:used]
    needed = matmul.scratch_bytes(packed, len(x))
    scratch = np.full(needed + 64, 0xA5, np.uint8)
    regions = machine.region(x, used), Region(out, 0)
    regions = regions[0], Region(out, regions[0].count)
    room = matmul.buffer_bytes(packed, threads)
    buffers = aligned(room + 64)
    buffers[:] = 0xA5
    bound = matmul.bind(
        packed,
        *regions,
        add=start is not None,
        scratch=scratch[:needed],
        threads=threads,
        buffers=buffers[:room],
        bias=bias,
    )
    machine.run(*bound, threads=threads)
    assert np.isnan(around[:64]).all()
    assert np.isnan(around[64 + used * packed.rows :]).all()
    assert (scratch[needed:] == 0xA5).all()
    assert (buffers[room:] == 0xA5).all()
    return out[:used]


@every_type
def test_equals_exact_arithmetic(kind: GGMLType, each_target: Target, machine: Any) -> None:
    unit = kind.block_elements

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(
        rows=st.integers(1, 70),
        blocks=st.integers(1, 1100 if unit == 1 else 1280 // unit),
        count=st.integers(1, 40),
        threads=st.integers(1, 2),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(rows: int, blocks: int, count: int, threads: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        weight = random_weight(kind, rows, blocks * unit, rng)
        x = rng.standard_normal((count + 3, blocks * unit)).astype(np.float32)
        packed = matmul.prepare(weight, threads=threads, target=each_target)
        out = product(machine, packed, x, used=count, threads=threads)
        dense, exact_x = operands(weight, x[:count])
        bound = 3e-6 * (np.abs(exact_x) @ np.abs(dense).T).max()
        np.testing.assert_allclose(out, exact_x @ dense.T, rtol=0, atol=bound)

    check()


@pytest.mark.parametrize("kind", [t for t in TYPES if t.is_quantized], ids=lambda t: t.name)
def test_every_weight_by_itself(kind: GGMLType, each_target: Target, machine: Any) -> None:
    """Activations with a single value other than zero: no other weight hides what is wrong with one."""
    rng = np.random.default_rng(10)
    columns = max(kind.block_elements, 64)
    weight = random_weight(kind, 133, columns, rng)  # all points of a lattice, all scales of a byte
    if kind in (GGMLType.MXFP4, GGMLType.NVFP4):
        field = weight.data.view(quants.block_dtype(kind))["e" if kind is GGMLType.MXFP4 else "d"].reshape(-1)
        # All but MXFP4's largest, whose products overflow.
        field[:] = np.arange(len(field)) % (245 if kind is GGMLType.MXFP4 else 256)
    packed = matmul.prepare(weight, threads=1, target=each_target)
    out = product(machine, packed, np.diag(np.full(columns, 127, np.float32)))
    dense = quants.dequantize(weight.data, kind, weight.shape)
    # One rounding of the product each; K-quants' minimums are taken off apart.
    slack = 4e-7 * np.abs(dense).max() * 127 if matmul.FORMATS[kind].activations.sums != "start" else 1e-45
    np.testing.assert_allclose(out.T, dense * np.float32(127), rtol=2e-7, atol=slack)


@every_type
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_do_not_overflow(kind: GGMLType, sign: int, each_target: Target, machine: Any) -> None:
    """All levels at an end of their range, all activations at an end of theirs: every partial sum at its largest."""
    rng = np.random.default_rng(8)
    weight = random_weight(kind, 32, 512, rng)
    if kind.is_quantized:
        blocks = weight.data.view(quants.block_dtype(kind))
        kept = [*_units(blocks.dtype), *(["e"] if kind is GGMLType.MXFP4 else [])]
        units = {name: blocks[name].copy() for name in kept}
        unit = d_iq1_m(blocks) if kind is GGMLType.IQ1_M else None
        rows = weight.data.reshape(32, -1)
        rows[:16], rows[16:] = 0xFF, 0x80 if kind is GGMLType.Q8_0 else 0
        for name, values in units.items():
            blocks[name] = values
        if unit is not None:
            _set_unit(blocks, unit)
    x = np.full((14, 512), sign, np.float32)
    out = product(machine, matmul.prepare(weight, threads=1, target=each_target), x, threads=2)
    dense, exact_x = operands(weight, x)
    bound = 3e-6 * (np.abs(exact_x) @ np.abs(dense).T).max()
    np.testing.assert_allclose(out, exact_x @ dense.T, rtol=0, atol=bound)


@every_type
def test_bits_do_not_depend_on_company(kind: GGMLType, each_target: Target, machine: Any) -> None:
    """Rows alone, with few and with many neighbours, by 1, 2 and 3 threads and tickets of several sizes."""
    rng = np.random.default_rng(1)
    columns = {256: 1024, 128: 640, 64: 576, 32: 608}.get(kind.block_elements, 531)
    many = matmul_tiles.BLOCK + 9  # more than one block of columns
    weight = random_weight(kind, 16 * 9 + 5, columns, rng)
    packed = matmul.prepare(weight, threads=2, target=each_target)
    x = rng.standard_normal((many, columns)).astype(np.float32)
    whole = product(machine, packed, x, threads=2)
    assert np.isfinite(whole).all()
    few = matmul_tiles.FEW
    for first, count, threads in (*((i, 1, 1 + i % 3) for i in range(6)), (1, 2, 2), (4, 3, 1), (5, 4, 3)):
        part = product(machine, packed, x[first : first + count], threads=threads)
        np.testing.assert_array_equal(part.view(np.int32), whole[first : first + count].view(np.int32))
    for count, threads in ((few - 1, 1), (few, 2), (few + 1, 3), (31, 1), (matmul_tiles.BLOCK, 3), (many, 1)):
        part = product(machine, packed, x[:count], threads=threads)
        np.testing.assert_array_equal(part.view(np.int32), whole[:count].view(np.int32))


@every_type
@pytest.mark.parametrize("count", [1, 3, 17])
def test_adds_the_product(kind: GGMLType, count: int, machine: Any) -> None:
    rng = np.random.default_rng(2)
    packed = matmul.prepare(random_weight(kind, 37, 512, rng), threads=1)
    x, start = (rng.standard_normal((count, n)).astype(np.float32) for n in (512, 37))
    np.testing.assert_array_equal(product(machine, packed, x, start=start), start + product(machine, packed, x))


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with Linux's mprotect")
@every_type
def test_reads_nothing_beyond_its_operands(kind: GGMLType, each_target: Target, machine: Any) -> None:
    """Weights and activations end where a page begins that must not be touched: a read beyond ends the process."""
    rng = np.random.default_rng(3)
    weight = random_weight(kind, 19, 3 * kind.block_elements, rng)
    x = rng.standard_normal((5, weight.columns)).astype(np.float32)
    fenced = Weight("w", kind, weight.shape, _at_fence(weight.data))
    packed = matmul.prepare(fenced, threads=1, target=each_target)
    at_fence = _at_fence(x.view(np.uint8).reshape(-1)).view(np.float32).reshape(x.shape)
    plain = product(machine, matmul.prepare(weight, threads=1, target=each_target), x)
    np.testing.assert_array_equal(product(machine, packed, at_fence), plain)


def _at_fence(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    page = mmap.PAGESIZE
    size = -(-data.size // page) * page
    memory = mmap.mmap(-1, size + page)
    area = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(area.ctypes.data + size), ctypes.c_size_t(page), 0) == 0
    area[size - data.size : size] = data
    return area[size - data.size : size]


@every_type
def test_intended_instructions(kind: GGMLType, each_target: Target) -> None:
    lowering, f = each_target.lowering, matmul.FORMATS[kind]
    text = library.emit_assembly("matmul", 4, matmul_tiles.body(f), each_target)
    found = {name for name in ("vpdpbusd", "pmaddubsw", "pmaddwd", "vfmadd") if name in text}
    if not kind.is_quantized:
        assert found == ({"vfmadd"} if lowering.startswith("avx") else set())
    elif lowering == "avx512vnni":
        assert re.search(r"vpdpbusd\s[^\n]*%zmm", text)
        assert not found & {"pmaddubsw", "pmaddwd"}
    elif lowering in ("avx2", "sse41"):
        assert {"pmaddwd", "pmaddubsw"} <= found
        assert "vpdpbusd" not in found
        assert ("psignb" in text) == isinstance(f, WideLevels)
    else:
        assert not found & {"vpdpbusd", "pmaddubsw", "vfmadd"}
        if each_target.arm:
            used = set(re.findall(r"\b(u?sdot|u?s?mmla)\b", text))
            assert used == ({"usdot", "usmmla"} if lowering == "i8mm" else {"sdot"})
    assert ("%zmm" in text) == (lowering == "avx512vnni")
    assert ("%ymm" in text) == lowering.startswith("avx") or lowering == "avx512vnni"
    assert not re.search(r"\bcall\w*\s+(?!\*)", text), "a kernel must not call library functions"


@every_type
def test_resident_size(kind: GGMLType) -> None:
    weight = random_weight(kind, 64, 1024, np.random.default_rng(4))
    packed = matmul.prepare(weight, threads=1)
    assert packed.data.size - 64 <= (1.15 if kind.name in FAST else 1.5) * weight.data.size


@pytest.mark.parametrize("kind", [t for t in TYPES if t.is_quantized], ids=lambda t: t.name)
def test_rounds_activations_as_the_reference_does(kind: GGMLType, each_target: Target, machine: Any) -> None:
    form, block = matmul.FORMATS[kind].activations, activation_block(kind)
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((7, 512)) * 10.0 ** rng.integers(-9, 9, (7, 1))).astype(np.float32)
    x[3, :256] = 0
    x[4] = 1e-40
    chunks, padded = 2, activations.PADDING
    scratch = np.zeros(chunks * padded * form.stride, np.uint8)
    machine.run(activations.bind(form, machine.region(x, 7), scratch, 512, None, each_target), threads=2)
    stored = scratch.reshape(chunks, padded, form.stride).transpose(1, 0, 2)
    assert not stored[7:].any()
    levels, scales = round_activations(x, block)
    got = stored[:7, :, :256].reshape(7, 512).view(np.int8).astype(np.float64)
    groups = 256 // block
    got_scales = np.ascontiguousarray(stored[:7, :, 256 : 256 + 4 * groups]).view(np.float32).reshape(7, 2 * groups)
    # The sign of a scale cancels in every product; that of a group of all but zeros does not matter.
    np.testing.assert_array_equal(
        got * np.repeat(got_scales, block, axis=1), levels * np.repeat(scales.astype(np.float64), block, axis=1)
    )
    spans = 256 // form.span
    size, kind_of = {"pairs": (2, np.int16), "start": (4, np.int32), "scaled": (4, np.float32)}[form.sums]
    raw = np.ascontiguousarray(stored[:7, :, form.sums_offset : form.sums_offset + size * spans])
    expected = got.reshape(7, 2 * spans, form.span).sum(axis=2)
    if form.sums == "start":
        expected *= -form.centre
    elif form.sums == "scaled":
        expected = expected.astype(np.float32) * got_scales
    np.testing.assert_array_equal(raw.view(kind_of).reshape(7, 2 * spans), expected)


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q4_K, GGMLType.Q4_0], ids=lambda t: t.name)
def test_no_rows(kind: GGMLType, machine: Any) -> None:
    """A step whose logits nobody wants."""
    packed = matmul.prepare(random_weight(kind, 37, 512, np.random.default_rng(9)), threads=1)
    assert product(machine, packed, np.ones((3, 512), np.float32), used=0).shape == (0, 37)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@every_type
def test_not_a_number_stays_visible(kind: GGMLType, value: float, machine: Any) -> None:
    rng = np.random.default_rng(6)
    packed = matmul.prepare(random_weight(kind, 20, 512, rng), threads=1)
    x = rng.standard_normal((3, 512)).astype(np.float32)
    x[1, 300] = value
    out = product(machine, packed, x)
    assert not np.isfinite(out[1]).any()
    assert np.isfinite(out[[0, 2]]).all()


def test_refuses_what_does_not_fit(machine: Any) -> None:
    packed = matmul.prepare(random_weight(GGMLType.Q4_K, 32, 256, np.random.default_rng(7)), threads=1)
    x, out = np.zeros((4, 256), np.float32), np.zeros((4, 32), np.float32)
    scratch = np.zeros(matmul.scratch_bytes(packed, 4), np.uint8)
    region = machine.region(x, 4)

    def bind(x: NDArray[Any] = x, out: NDArray[Any] = out, scratch: NDArray[Any] = scratch, count: int = 0) -> None:
        regions = Region(x, region.count), Region(out, count or region.count)
        matmul.bind(packed, *regions, add=False, scratch=scratch, threads=1)

    bind()
    wide = np.zeros((4, 512), np.float32)
    for wrong, complaint in (
        ({"x": wide}, "256 inputs meet rows of 512"),
        ({"out": wide}, "32 outputs meet rows of 512"),
        ({"out": out[:3]}, "number of rows"),
        ({"count": region.count + 8}, "number of rows"),
        ({"x": x.astype(np.float64)}, "float32"),
        ({"scratch": scratch[:-1]}, "bytes of scratch memory"),
        ({"out": x.reshape(-1)[:128].reshape(4, 32)}, "overlap"),
    ):
        with pytest.raises(KernelError, match=complaint):
            bind(**wrong)  # type: ignore[arg-type]


def test_refuses_panels_without_room() -> None:
    weight = random_weight(GGMLType.Q4_K, 33, 256, np.random.default_rng(7))
    room = np.zeros(matmul.panels_bytes(matmul.outline(weight)) - 1, np.uint8)
    with pytest.raises(KernelError, match=f"33 rows of Q4_K need {room.size + 1} bytes where there are {room.size}"):
        matmul.prepare(weight, out=room)


def test_refuses_types_without_a_kernel() -> None:
    weight = Weight("blk.0.ffn_up.weight", GGMLType.I16, (1, 256), np.zeros(512, np.uint8))
    with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_up\.weight has type I16"):
        matmul.prepare(weight)
    with pytest.raises(KernelError, match="not a matrix"):
        matmul.prepare(Weight("norm", GGMLType.F32, (4,), np.zeros(16, np.uint8)))


def check_unpacked(kind: GGMLType, target: Target, machine: Any) -> None:
    """Panels made while they are multiplied give the bits of those that are there."""
    rng = np.random.default_rng(5)
    columns = 37 if kind.block_elements == 1 else 2 * max(256, kind.block_elements)
    weight = random_weight(kind, 37, columns, rng)
    panels = matmul.prepare(weight, target=target)
    rows = matmul.prepare(weight, target=target, pack_now=False)
    assert np.may_share_memory(rows.data, weight.data)
    assert matmul.buffer_bytes(panels, 2) == 0
    for count, threads in ((1, 1), (3, 2), (16, 2), (17, 2), (300, 1)):
        x = rng.standard_normal((count, columns)).astype(np.float32)
        start = rng.standard_normal((count, 37)).astype(np.float32)
        expected = product(machine, panels, x, start=start, threads=threads)
        found = product(machine, rows, x, start=start, threads=threads)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), count
    region = machine.region(np.zeros((1, columns), np.float32), 1)
    scratch = np.zeros(matmul.scratch_bytes(rows, 1), np.uint8)
    with pytest.raises(KernelError, match="no room to pack panels"):
        matmul.bind(
            rows, region, Region(np.zeros((1, 37), np.float32), region.count), add=False, scratch=scratch, threads=1
        )


@every_type
def test_unpacked_gives_the_same_bits(kind: GGMLType, machine: Any) -> None:
    check_unpacked(kind, host(), machine)


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q4_K, GGMLType.IQ2_S], ids=lambda t: t.name)
def test_unpacked_gives_the_same_bits_in_every_lowering(kind: GGMLType, each_target: Target, machine: Any) -> None:
    check_unpacked(kind, each_target, machine)
