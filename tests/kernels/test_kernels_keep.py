import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import keep, route
from phiquant.kernels.cpu.operation import Region, StepHeader
from phiquant.kernels.cpu.route import Routes

pytestmark = pytest.mark.cpu


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 100),
    rows=st.integers(0, 9),
    spare=st.integers(0, 2),
    more=st.integers(0, 2),
    threads=st.integers(1, 3),
)
def test_the_rows_of_the_step_are_kept_and_no_others(
    each_target, machine, poisoned, width, rows, spare, more, threads
) -> None:
    x = np.random.default_rng(width).standard_normal((rows + spare, width)).astype(np.float32)
    if rows:
        x[0, 0] = np.nan  # kept as it is
    kept = poisoned(rows + spare + more, width)
    machine.run(keep.bind(machine.region(x, rows), kept, target=each_target), threads=threads)
    assert np.array_equal(kept[:rows].view(np.uint32), x[:rows].view(np.uint32))
    assert np.isnan(kept[rows:]).all()


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 12),
    spare=st.integers(0, 2),
    used=st.integers(1, 3),
    per_route=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_expert_of_every_route_is_kept(each_target, machine, tokens, spare, used, per_route, threads, seed) -> None:
    rng = np.random.default_rng(seed)
    header = StepHeader()
    header.set("tokens", tokens)
    header.set("routes", tokens * used)
    routes = Routes.of(5, used, tokens + spare, header.address("routes"))
    logits = Region(rng.random((tokens + spare, 5)).astype("f4"), header.address("tokens"))
    share = used if per_route else 1
    x = rng.standard_normal(((tokens + spare) * share, 24)).astype(np.float32)
    kept, chosen = np.full_like(x, -7), np.full((tokens + spare) * used + 1, -7, np.int32)
    region = Region(x, header.address("routes" if per_route else "tokens"))
    machine.run(
        route.bind(logits, routes, 0.01, each_target),
        keep.bind(region, kept, chosen, routes, each_target),
        threads=threads,
    )
    assert np.array_equal(kept[: tokens * share], x[: tokens * share])
    assert (kept[tokens * share :] == -7).all()
    expected = np.argsort(-logits.array[:tokens], axis=1)[:, :used].reshape(-1)
    assert chosen[: tokens * used].tolist() == expected.tolist()
    assert (chosen[tokens * used :] == -7).all()


def test_arrays_that_do_not_fit_are_refused(machine) -> None:
    x = machine.region(np.zeros((3, 8), np.float32), 2)
    for kept in (
        np.zeros((2, 8), np.float32),
        np.zeros((3, 7), np.float32),
        np.zeros((3, 8)),
        np.zeros((3, 16), np.float32)[:, ::2],
        np.zeros(24, np.float32),
    ):
        with pytest.raises(KernelError, match="kept"):
            keep.bind(x, kept)
    header, kept = StepHeader(), np.zeros((3, 8), np.float32)
    routes = Routes.of(4, 2, 3, header.address("routes"))
    for chosen, of in (
        (np.zeros(5, np.int32), routes),
        (np.zeros(6, np.int64), routes),
        (np.zeros((6, 1), np.int32), routes),
        (None, routes),
        (np.zeros(6, np.int32), None),
    ):
        with pytest.raises(KernelError, match="kept"):
            keep.bind(x, kept, chosen, of)
