import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import pointwise
from phiquant.kernels.cpu.swiglu import SWIGLU

pytestmark = pytest.mark.cpu


@settings(max_examples=30, deadline=None)
@given(
    width=st.one_of(st.integers(1, 100), st.integers(1000, 2100)),
    rows=st.integers(1, 5),
    spare=st.integers(0, 2),
    threads=st.integers(1, 3),
    spread=st.sampled_from([1e-3, 1.0, 30.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_it_equals_the_formula(each_target, machine, poisoned, width, rows, spare, threads, spread, seed) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows + spare, 2 * width)) * spread).astype(np.float32)
    out = poisoned(rows + spare, width)
    machine.run(
        pointwise.bind(SWIGLU, machine.region(x, rows), machine.region(out, rows), each_target), threads=threads
    )
    gate, up = x[:rows, :width].astype(np.float64), x[:rows, width:].astype(np.float64)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(out[:rows], expected, rtol=2e-6, atol=1e-30)
    assert np.isnan(out[rows:]).all()


def test_a_channel_does_not_depend_on_its_place(each_target, machine, poisoned) -> None:
    gate, up = np.float32(-1.7), np.float32(0.3)
    seen = set()
    for width in (1, 15, 16, 17, 1041):
        x = np.concatenate([np.full(width, gate), np.full(width, up)])[None]
        out = poisoned(1, width)
        machine.run(pointwise.bind(SWIGLU, machine.region(x, 1), machine.region(out, 1), each_target))
        seen |= set(out[0].tolist())
    assert len(seen) == 1


def test_shapes_that_do_not_fit_are_refused(machine) -> None:
    x = machine.region(np.zeros((2, 8), np.float32), 2)
    for shape in ((2, 5), (1, 4)):
        with pytest.raises(KernelError, match="swiglu of 2 rows of 8"):
            pointwise.bind(SWIGLU, x, machine.region(np.zeros(shape, np.float32), 1))
