import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import route, sum_squares
from phiquant.kernels.cpu.operation import Region, StepHeader
from phiquant.kernels.cpu.route import Routes

pytestmark = pytest.mark.cpu


def in_order(sums: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The definition: one addition to a row, each rounded."""
    total = sums.copy()
    for row in x.astype(np.float64):
        total += row * row
    return total


@settings(max_examples=40, deadline=None)
@given(
    width=st.one_of(st.integers(1, 40), st.integers(500, 1100)),
    rows=st.integers(0, 11),
    spare=st.integers(0, 2),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_bit_is_that_of_additions_in_order(each_target, machine, width, rows, spare, threads, seed) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows + spare, width)) * 10.0 ** rng.integers(-20, 15, (rows + spare, 1))).astype("f4")
    x[rows:] = np.nan  # rows that the step does not use
    sums, counts = rng.random((1, width)) * 1e-3, np.array([7])
    expected = in_order(sums[0], x[:rows])
    machine.run(sum_squares.bind(machine.region(x, rows), sums, counts, each_target), threads=threads)
    assert np.array_equal(sums[0], expected)
    assert counts.tolist() == [7 + rows]


def test_steps_add_up(machine) -> None:
    x = np.random.default_rng(1).standard_normal((90, 700)).astype(np.float32)
    whole, parts = (np.zeros((1, 700)) for _ in range(2))
    counts = np.zeros(1, np.int64)
    machine.run(sum_squares.bind(machine.region(x, 90), whole, counts.copy()))
    for first, last in ((0, 1), (1, 31), (31, 90)):
        machine.run(sum_squares.bind(machine.region(x[first:last].copy(), last - first), parts, counts))
    assert np.array_equal(whole, parts)
    assert counts.tolist() == [90]


def test_what_is_not_finite_stays_in_its_column(machine) -> None:
    x = np.ones((3, 20), np.float32)
    x[1, 4], x[2, 17] = np.nan, np.inf
    sums = np.zeros((1, 20))
    machine.run(sum_squares.bind(machine.region(x, 3), sums, np.zeros(1, np.int64)))
    assert np.isnan(sums[0, 4])
    assert np.isposinf(sums[0, 17])
    assert (np.delete(sums[0], [4, 17]) == 3).all()


@pytest.mark.parametrize(
    ("sums", "counts"),
    [
        (np.zeros((1, 7)), np.zeros(1, np.int64)),
        (np.zeros((2, 8)), np.zeros(2, np.int64)),
        (np.zeros((1, 8), np.float32), np.zeros(1, np.int64)),
        (np.zeros((1, 8)), np.zeros(1, np.int32)),
        (np.zeros((1, 16))[:, ::2], np.zeros(1, np.int64)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(machine, sums, counts) -> None:
    with pytest.raises(KernelError, match="do not fit"):
        sum_squares.bind(machine.region(np.zeros((2, 8), np.float32), 2), sums, counts)


@settings(max_examples=40, deadline=None)
@given(
    width=st.one_of(st.integers(1, 40), st.integers(500, 1100)),
    tokens=st.integers(0, 12),
    spare=st.integers(0, 2),
    used=st.integers(1, 3),
    experts=st.integers(3, 6),
    skew=st.sampled_from([0.0, 5.0]),
    per_route=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_each_expert_gets_the_rows_that_are_routed_to_it(
    each_target, machine, width, tokens, spare, used, experts, skew, per_route, threads, seed
) -> None:
    rng = np.random.default_rng(seed)
    header = StepHeader()
    header.set("tokens", tokens)
    header.set("routes", tokens * used)
    routes = Routes.of(experts, used, tokens + spare, header.address("routes"))
    logits = Region(
        (rng.random((tokens + spare, experts)) + skew * np.arange(experts)).astype("f4"), header.address("tokens")
    )
    rows = (tokens + spare) * (used if per_route else 1)
    x = (rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-20, 15, (rows, 1))).astype("f4")
    x[tokens * (used if per_route else 1) :] = np.nan  # rows that the step does not use
    sums, counts = rng.random((experts, width)) * 1e-3, np.arange(experts)
    chosen = np.argsort(-logits.array[:tokens], axis=1)[:, :used].reshape(-1)
    mine = [np.flatnonzero(chosen == i) for i in range(experts)]
    expected = [in_order(sums[i], x[mine[i] if per_route else mine[i] // used]) for i in range(experts)]
    region = Region(x, header.address("routes" if per_route else "tokens"))
    machine.run(
        route.bind(logits, routes, 0.01, each_target),
        sum_squares.bind(region, sums, counts, each_target, routes),
        threads=threads,
    )
    assert np.array_equal(sums, expected)
    assert counts.tolist() == [i + len(m) for i, m in enumerate(mine)]


def test_sums_of_other_experts_are_refused() -> None:
    header = StepHeader()
    tokens, count = header.address("tokens"), header.address("routes")
    routes, x = Routes.of(4, 2, 3, count), np.zeros((6, 8), np.float32)
    sum_squares.bind(Region(x[:3], tokens), np.zeros((4, 8)), np.zeros(4, np.int64), routes=routes)
    sum_squares.bind(Region(x, count), np.zeros((4, 8)), np.zeros(4, np.int64), routes=routes)
    for region, shape in (
        (Region(x, count), (3, 8)),
        (Region(x, count), (1, 8)),
        (Region(x[:5], count), (4, 8)),
        (Region(x[:2], tokens), (4, 8)),
    ):
        with pytest.raises(KernelError, match="do not fit"):
            sum_squares.bind(region, np.zeros(shape), np.zeros(shape[0], np.int64), routes=routes)
