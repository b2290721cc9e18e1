"""ExpertMatMul: bit for bit the matrix multiplication of each expert with the rows that are routed to it."""

import ctypes
import dataclasses
import itertools
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phiquant import quants
from phiquant.errors import KernelError, UnsupportedError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import expert_matmul, library, matmul, matmul_tiles, pointwise, swiglu
from phiquant.kernels.cpu.operation import Region, StepHeader, aligned
from phiquant.kernels.cpu.route import Routes
from phiquant.kernels.cpu.target import Target
from phiquant.kernels.ops import Weight
from phiquant.kernels.reference.activations import activation_block, round_activations

pytestmark = pytest.mark.cpu

# One of each family of formats in every lowering; the loops around them are the same for all.
KINDS = [GGMLType[name] for name in ("F16", "Q8_0", "Q4_K", "Q2_K", "IQ2_S")]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def experts_of(kind: GGMLType, experts: int, rows: int, columns: int, rng: np.random.Generator) -> Weight:
    values = rng.standard_normal((experts * rows, columns)).astype(np.float32)
    data = np.ascontiguousarray(quants.quantize(values, kind)).view(np.uint8).reshape(-1)
    return Weight("blk.0.ffn_up_exps.weight", kind, (experts, rows, columns), data)


def routes_of(chosen: NDArray[np.int64], experts: int, spare: int = 0) -> tuple[Routes, StepHeader]:
    """Routes as the Route operation leaves them, chosen by hand [tokens, used]; room for `spare` tokens more."""
    tokens, used = chosen.shape
    header = StepHeader()
    header.set("tokens", tokens)
    header.set("routes", tokens * used)
    made = Routes.of(experts, used, tokens + spare, header.address("routes"))
    flat = chosen.reshape(-1)
    made.chosen[: len(flat)] = flat
    made.order[:] = 1 << 30
    made.order[: len(flat)] = np.argsort(flat, kind="stable")
    made.starts[1:] = np.cumsum(np.bincount(flat, minlength=experts))
    return made, header


def random_routes(tokens: int, used: int, experts: int, skew: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Different experts for every token; with skew they crowd at the lowest numbers."""
    scores = rng.random((tokens, experts)) + skew * np.arange(experts)
    return np.argsort(scores, axis=1)[:, :used]


def product(
    machine: Any,
    packed: matmul.Packed,
    routes: Routes,
    header: StepHeader,
    x: NDArray[np.float32],
    *,
    per_route: bool = False,
    threads: int = 2,
    around: int = 0,
    before: pointwise.Pointwise | None = None,
) -> NDArray[np.float32]:
    """out [routes, rows], as columns of wider rows if there is something `around`; all else must stay untouched."""
    count = header.address("routes")
    used_rows = int(routes.starts[-1])
    room = len(routes.order)
    wide = np.full((room + 1, packed.rows + 2 * around), np.nan, np.float32)
    needed = expert_matmul.scratch_bytes(packed, room)
    scratch = np.full(needed + 64, 0xA5, np.uint8)
    buffers = aligned(matmul.buffer_bytes(packed, threads) + 64)
    buffers[:] = 0xA5
    region = Region(x, count if per_route else header.address("tokens"))
    out = Region(wide[:room], count).columns(around, packed.rows)
    bound = expert_matmul.bind(
        packed, routes, region, out, scratch=scratch[:needed], threads=threads, buffers=buffers[:-64], before=before
    )
    machine.run(*bound, threads=threads)
    assert (scratch[needed:] == 0xA5).all()
    assert (buffers[-64:] == 0xA5).all()
    got = wide[:used_rows, around : around + packed.rows].copy()
    wide[:used_rows, around : around + packed.rows] = np.nan
    assert np.isnan(wide).all()
    return got


def dense(
    machine: Any, weight: Weight, expert: int, x: NDArray[np.float32], target: Target | None = None
) -> NDArray[np.float32]:
    """What the matrix multiplication makes of some rows and the matrix of one expert."""
    packed = matmul.prepare(weight.matrix(expert), threads=1, target=target)
    out = np.full((len(x), packed.rows), np.nan, np.float32)
    regions = [machine.region(a, len(x)) for a in (x, out)]
    regions[1] = Region(out, regions[0].count)
    scratch = np.zeros(matmul.scratch_bytes(packed, len(x)), np.uint8)
    machine.run(*matmul.bind(packed, *regions, add=False, scratch=scratch, threads=2))
    return out


def expected(
    machine: Any,
    weight: Weight,
    chosen: NDArray[np.int64],
    x: NDArray[np.float32],
    per_route: bool,
    target: Target | None = None,
) -> NDArray[np.float32]:
    flat, used = chosen.reshape(-1), chosen.shape[1]
    out = np.empty((len(flat), weight.rows), np.float32)
    for expert in np.unique(flat):
        mine = np.flatnonzero(flat == expert)
        out[mine] = dense(
            machine, weight, int(expert), np.ascontiguousarray(x[mine if per_route else mine // used]), target
        )
    return out


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return np.isfinite(a).all() and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@every_kind
def test_every_bit_is_that_of_the_experts_own_multiplication(kind: GGMLType, each_target: Target, machine: Any) -> None:
    unit = kind.block_elements

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        rows=st.integers(1, 70),
        blocks=st.integers(1, 300 if unit == 1 else max(1, 768 // unit)),
        tokens=st.one_of(st.integers(0, 6), st.integers(20, 70)),
        experts=st.integers(1, 6),
        share=st.floats(0, 1),
        skew=st.sampled_from([0.0, 0.5, 5.0]),
        per_route=st.booleans(),
        packed=st.booleans(),
        threads=st.integers(1, 3),
        spare=st.integers(0, 2),
        around=st.sampled_from([0, 1, 16]),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(
        rows: int,
        blocks: int,
        tokens: int,
        experts: int,
        share: float,
        skew: float,
        per_route: bool,
        packed: bool,
        threads: int,
        spare: int,
        around: int,
        seed: int,
    ) -> None:
        rng, used = np.random.default_rng(seed), 1 + int(share * (min(experts, 3) - 1))
        weight = experts_of(kind, experts, rows, blocks * unit, rng)
        chosen = random_routes(tokens, used, experts, skew, rng)
        routes, header = routes_of(chosen, experts, spare)
        x = rng.standard_normal(((tokens + spare) * (used if per_route else 1), blocks * unit)).astype(np.float32)
        made = expert_matmul.prepare(weight, threads=threads, target=each_target, pack_now=packed)
        out = product(machine, made, routes, header, x, per_route=per_route, threads=threads, around=around)
        assert same_bits(out, expected(machine, weight, chosen, x, per_route, each_target))

    check()


@pytest.mark.parametrize("kind", list(matmul.FORMATS), ids=lambda kind: kind.name)
def test_every_type_gives_the_bits_of_the_multiplication(kind: GGMLType, machine: Any) -> None:
    rng = np.random.default_rng(1)
    columns = 2 * max(256, kind.block_elements) if kind.is_quantized else 300
    values = rng.standard_normal((3 * 21, columns)).astype(np.float32)
    if kind.name.startswith("IQ"):
        importance = np.ones(columns, np.float32)
        data = quants.quantize(values, kind, importance)
    else:
        data = quants.quantize(values, kind)
    weight = Weight("w", kind, (3, 21, columns), np.ascontiguousarray(data).view(np.uint8).reshape(-1))
    x = rng.standard_normal((33, columns)).astype(np.float32)
    chosen = random_routes(33, 2, 3, 0.5, rng)
    routes, header = routes_of(chosen, 3)
    out = product(machine, expert_matmul.prepare(weight), routes, header, x)
    assert same_bits(out, expected(machine, weight, chosen, x, per_route=False))


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.Q4_K], ids=lambda kind: kind.name)
def test_results_equal_exact_arithmetic(kind: GGMLType, each_target: Target, machine: Any) -> None:
    rng = np.random.default_rng(2)
    weight = experts_of(kind, 4, 40, 512, rng)
    x = rng.standard_normal((30, 512)).astype(np.float32)
    chosen = random_routes(30, 2, 4, 0.2, rng)
    routes, header = routes_of(chosen, 4)
    out = product(machine, expert_matmul.prepare(weight, target=each_target), routes, header, x)
    matrices = quants.dequantize(weight.data, kind, weight.shape).astype(np.float64)
    exact = x.astype(np.float64)
    if activation_block(kind):
        levels, scale = round_activations(x, activation_block(kind))
        exact = levels * np.repeat(scale.astype(np.float64), activation_block(kind), axis=1)
    wanted = np.einsum("tc,turc->tur", exact, matrices[chosen]).reshape(60, 40)
    bound = 3e-6 * np.einsum("tc,turc->tur", np.abs(exact), np.abs(matrices[chosen])).max()
    np.testing.assert_allclose(out, wanted, rtol=0, atol=bound)


@every_kind
def test_bits_depend_neither_on_company_nor_on_threads(kind: GGMLType, each_target: Target, machine: Any) -> None:
    """Tokens alone, with neighbours that go elsewhere, and all to one expert in more than one block of columns."""
    rng = np.random.default_rng(3)
    tokens, columns = matmul_tiles.BLOCK + 9, 300 if kind.block_elements == 1 else 512
    weight = experts_of(kind, 3, 16 * 9 + 5, columns, rng)
    packed = expert_matmul.prepare(weight, threads=2, target=each_target)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    everything = np.array([product(machine, packed, *routes_of(np.full((tokens, 1), i), 3), x) for i in range(3)])
    assert np.isfinite(everything).all()
    for part, threads in ((slice(0, 1), 1), (slice(5, 8), 2), (slice(100, 117), 3), (slice(0, 40), 1)):
        size = part.stop - part.start
        for used in (1, 2):
            chosen = random_routes(size, used, 3, 0.3, rng)
            out = product(machine, packed, *routes_of(chosen, 3), np.ascontiguousarray(x[part]), threads=threads)
            alone = everything[chosen, np.arange(part.start, part.stop)[:, None]].reshape(out.shape)
            assert same_bits(out, alone)


def test_all_to_one_expert_and_experts_without_tokens(machine: Any) -> None:
    rng = np.random.default_rng(4)
    weight = experts_of(GGMLType.Q4_K, 5, 48, 256, rng)
    packed = expert_matmul.prepare(weight)
    x = rng.standard_normal((40, 256)).astype(np.float32)
    for first, second in itertools.permutations((0, 2, 4), 2):
        chosen = np.tile([[first, second]], (40, 1))
        out = product(machine, packed, *routes_of(chosen, 5), x)
        assert same_bits(out, expected(machine, weight, chosen, x, per_route=False))


@pytest.mark.parametrize("packed", [True, False])
def test_only_the_experts_that_are_chosen_are_read(machine: Any, packed: bool) -> None:
    """The others lie in memory that must not be touched: reading it ends the process."""
    rng, page = np.random.default_rng(5), mmap.PAGESIZE
    weight = experts_of(GGMLType.F32, 4, 64, 64, rng)  # 16 KB to an expert, in panels too
    made = expert_matmul.prepare(weight, threads=2, pack_now=packed)
    size = made.data.size // 4 // page * page
    assert size == 64 * 64 * 4
    memory = mmap.mmap(-1, 5 * size)
    area = np.frombuffer(memory, np.uint8)[: made.data.size]
    area[:] = made.data
    moved = dataclasses.replace(made, data=area)
    x = rng.standard_normal((20, 64)).astype(np.float32)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for chosen in (np.array([[2, 0]]), np.full((20, 1), 1), np.tile([[3, 1]], (20, 1))):
        idle = [i for i in range(4) if i not in chosen]
        wanted = expected(machine, weight, chosen, x[: len(chosen)], per_route=False)
        for access in (0, 3):
            for i in idle:
                place = ctypes.c_void_p(area.ctypes.data + i * size)
                assert protect(place, ctypes.c_size_t(size), access) == 0
            if access == 0:
                out = product(machine, moved, *routes_of(chosen, 4), x[: len(chosen)])
        assert same_bits(out, wanted)


@every_kind
def test_nothing_beyond_the_rows_and_the_scratch_memory_is_read(kind: GGMLType, machine: Any) -> None:
    rng = np.random.default_rng(6)
    weight = experts_of(kind, 3, 19, 256, rng)
    packed = expert_matmul.prepare(weight)
    for tokens, tail in itertools.product((12, 24, 35), (1, 5, 7, 17)):
        # The last expert's columns begin anywhere, and its tiles reach beyond the last.
        chosen = np.repeat([0, 2], [tokens, tail])[:, None]
        routes, header = routes_of(chosen, 3)
        x = rng.standard_normal((len(chosen), 256)).astype(np.float32)
        needed = expert_matmul.scratch_bytes(packed, len(chosen))
        fenced = _fenced(x.nbytes).view(np.float32).reshape(x.shape)
        fenced[:] = x
        out = np.full((len(chosen), 19), np.nan, np.float32)
        bound = expert_matmul.bind(
            packed,
            routes,
            Region(fenced, header.address("tokens")),
            Region(out, header.address("routes")),
            scratch=_fenced(needed),
            threads=2,
        )
        machine.run(*bound)
        assert same_bits(out, expected(machine, weight, chosen, x, per_route=False))


def _fenced(nbytes: int) -> NDArray[np.uint8]:
    """Memory that ends where a page begins that must not be touched."""
    page = mmap.PAGESIZE
    size = -(-nbytes // page) * page
    area = np.frombuffer(mmap.mmap(-1, size + page), np.uint8)
    place = ctypes.c_void_p(area.ctypes.data + size)
    assert ctypes.CDLL(None, use_errno=True).mprotect(place, ctypes.c_size_t(page), 0) == 0
    return area[size - nbytes : size]


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_K], ids=lambda kind: kind.name)
def test_gating_on_the_way_changes_no_bit(kind: GGMLType, each_target: Target, machine: Any) -> None:
    rng = np.random.default_rng(7)
    columns = 300 if kind is GGMLType.F16 else 512
    packed = expert_matmul.prepare(experts_of(kind, 3, 40, columns, rng), target=each_target)
    for tokens in (1, 30):
        routes, header = routes_of(random_routes(tokens, 2, 3, 0.3, rng), 3)
        x = (rng.standard_normal((2 * tokens, 2 * columns)) * 4).astype(np.float32)
        between = np.zeros((2 * tokens, columns), np.float32)
        count = header.address("routes")
        machine.run(pointwise.bind(swiglu.SWIGLU, Region(x, count), Region(between, count), each_target))
        apart = product(machine, packed, routes, header, between, per_route=True)
        assert same_bits(product(machine, packed, routes, header, x, per_route=True, before=swiglu.SWIGLU), apart)


def test_rows_that_are_rounded_already_are_used_again(machine: Any) -> None:
    rng = np.random.default_rng(8)
    gate, up = (expert_matmul.prepare(experts_of(GGMLType.Q4_K, 3, 32, 256, rng)) for _ in range(2))
    x = rng.standard_normal((9, 256)).astype(np.float32)
    chosen = random_routes(9, 2, 3, 0.3, rng)
    routes, header = routes_of(chosen, 3)
    both = np.full((18, 64), np.nan, np.float32)
    scratch = np.zeros(expert_matmul.scratch_bytes(up, 18), np.uint8)
    region, out = Region(x, header.address("tokens")), Region(both, header.address("routes"))
    first = expert_matmul.bind(gate, routes, region, out.columns(0, 32), scratch=scratch, threads=2)
    second = expert_matmul.bind(up, routes, region, out.columns(32, 32), scratch=scratch, threads=2, rounded=True)
    assert (len(first), len(second)) == (2, 1)
    machine.run(*first, *second)
    for packed, got in ((gate, both[:, :32]), (up, both[:, 32:])):
        assert same_bits(np.ascontiguousarray(got), product(machine, packed, routes, header, x))


def test_loading_lets_go_of_each_expert_once_it_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = experts_of(GGMLType.Q4_K, 4, 32, 256, np.random.default_rng(9))
    gone: list[NDArray[np.uint8]] = []
    monkeypatch.setattr(expert_matmul, "release", gone.append)
    expert_matmul.prepare(weight)
    assert [a.ctypes.data for a in gone] == [weight.matrix(i).data.ctypes.data for i in range(4)]
    assert sum(a.size for a in gone) == weight.data.size
    left = expert_matmul.prepare(weight, pack_now=False)
    assert np.may_share_memory(left.data, weight.data)
    assert len(gone) == 4


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q4_K], ids=lambda kind: kind.name)
def test_instructions_are_those_of_the_dense_kernel(kind: GGMLType, each_target: Target) -> None:
    f = matmul.FORMATS[kind]
    text = library.emit_assembly("expert_matmul", 4, expert_matmul.body(f), each_target)
    plain = library.emit_assembly("matmul", 4, matmul_tiles.body(f), each_target)
    for name in ("vpdpbusd", "pmaddubsw", "pmaddwd", "vfmadd", "usdot", "sdot", "%zmm", "%ymm"):
        assert (name in text) == (name in plain), name


def test_what_does_not_fit_is_refused() -> None:
    packed = expert_matmul.prepare(experts_of(GGMLType.Q4_K, 3, 32, 256, np.random.default_rng(10)))
    routes, header = routes_of(np.array([[0, 1], [2, 0]]), 3)
    tokens, count = header.address("tokens"), header.address("routes")
    x, out = np.zeros((2, 256), np.float32), np.zeros((4, 32), np.float32)
    scratch = np.zeros(expert_matmul.scratch_bytes(packed, 4), np.uint8)

    def bind(**changes: Any) -> None:
        given: dict[str, Any] = {
            "routes": routes,
            "x": Region(x, tokens),
            "out": Region(out, count),
            "scratch": scratch,
            "packed": packed,
        }
        expert_matmul.bind(**(given | changes), threads=1)

    bind()
    wide = np.zeros((4, 512), np.float32)
    unpacked = expert_matmul.prepare(experts_of(GGMLType.Q4_K, 3, 32, 256, np.random.default_rng(0)), pack_now=False)
    for wrong, complaint in (
        ({"x": Region(wide, tokens)}, "256 inputs meet rows of 512"),
        ({"out": Region(wide, count)}, "32 outputs meet rows of 512"),
        ({"x": Region(x[:1], tokens)}, "4 routes meet 1 rows of inputs"),
        ({"x": Region(x, count)}, "4 routes meet 2 rows of inputs"),
        ({"out": Region(out[:3], count)}, "4 routes meet 3 rows of outputs"),
        ({"out": Region(out, tokens)}, "number"),
        ({"x": Region(x.astype(np.float64), tokens)}, "float32"),
        ({"scratch": scratch[:-1]}, "bytes of scratch memory"),
        ({"out": Region(x.reshape(-1)[:128].reshape(4, 32), count)}, "overlap"),
        ({"routes": routes_of(np.array([[0, 1], [2, 0]]), 4)[0]}, "3 matrices meet 4 experts"),
        ({"packed": unpacked}, "no room to pack panels"),
    ):
        with pytest.raises(KernelError, match=complaint):
            bind(**wrong)
    with pytest.raises(KernelError, match="not some columns"):
        bind(x=Region(wide[:, :256], tokens))


def test_weights_that_are_no_experts_are_refused() -> None:
    with pytest.raises(KernelError, match="does not hold the matrices of experts"):
        expert_matmul.prepare(Weight("w", GGMLType.F32, (4, 4), np.zeros(64, np.uint8)))
    with pytest.raises(UnsupportedError, match="has type I16"):
        expert_matmul.prepare(Weight("w", GGMLType.I16, (2, 4, 4), np.zeros(64, np.uint8)))
