import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import combine
from phiquant.kernels.cpu.operation import Region, StepHeader
from phiquant.kernels.cpu.route import Routes

pytestmark = pytest.mark.cpu


def counts(tokens: int, used: int) -> StepHeader:
    header = StepHeader()
    header.set("tokens", tokens)
    header.set("routes", tokens * used)
    return header


@settings(max_examples=40, deadline=None)
@given(
    width=st.one_of(st.integers(1, 40), st.integers(1000, 2100)),
    tokens=st.integers(0, 7),
    spare=st.integers(0, 2),
    used=st.integers(1, 4),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_bit_is_that_of_additions_in_the_order_of_the_choices(
    each_target, machine, width, tokens, spare, used, threads, seed
) -> None:
    rng, room = np.random.default_rng(seed), tokens + spare
    header = counts(tokens, used)
    routes = Routes.of(8, used, room, header.address("routes"))
    routes.weights[:] = rng.random(len(routes.weights))
    x = rng.standard_normal((room * used, width)).astype(np.float32)
    x[tokens * used :] = np.nan
    out = rng.standard_normal((room, width)).astype(np.float32)
    expected = out.copy()
    for choice in range(used):
        mine = np.arange(tokens) * used + choice
        expected[:tokens] += routes.weights[mine, None] * x[mine]
    regions = Region(x, header.address("routes")), Region(out, header.address("tokens"))
    machine.run(combine.bind(routes, *regions, each_target), threads=threads)
    assert np.array_equal(out, expected)


def test_what_does_not_fit_is_refused() -> None:
    header = counts(3, 2)
    tokens, per_route = header.address("tokens"), header.address("routes")
    routes = Routes.of(8, 2, 3, per_route)
    x, out = Region(np.zeros((6, 20), np.float32), per_route), Region(np.zeros((3, 20), np.float32), tokens)
    combine.bind(routes, x, out)
    for wrong in (
        (routes, Region(np.zeros((6, 19), np.float32), per_route), out),
        (routes, Region(np.zeros((5, 20), np.float32), per_route), out),
        (routes, Region(x.array, tokens), out),
        (routes, x, Region(np.zeros((4, 20), np.float32), tokens)),
    ):
        with pytest.raises(KernelError, match="cannot be combined"):
            combine.bind(*wrong)
