import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import pointwise
from phiquant.kernels.cpu.gelu import GELU

pytestmark = pytest.mark.cpu


def formula(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))


@settings(max_examples=30, deadline=None)
@given(
    width=st.one_of(st.integers(1, 100), st.integers(1000, 2100)),
    rows=st.integers(1, 5),
    spare=st.integers(0, 2),
    threads=st.integers(1, 3),
    spread=st.sampled_from([1e-3, 1.0, 5.0, 300.0, 1e15]),
    seed=st.integers(0, 99),
)
def test_it_equals_the_formula(each_target, machine, poisoned, width, rows, spare, threads, spread, seed) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows + spare, width)) * spread).astype(np.float32)
    out = poisoned(rows + spare, width)
    machine.run(pointwise.bind(GELU, machine.region(x, rows), machine.region(out, rows), each_target), threads=threads)
    np.testing.assert_allclose(out[:rows], formula(x[:rows]), rtol=1e-6, atol=1e-7)
    assert np.isnan(out[rows:]).all()


def test_negative_values_keep_their_leading_digits(each_target, machine, poisoned) -> None:
    """What is left of them is small, and is not a difference of ones."""
    x = np.linspace(-9, 9, 100_001, dtype=np.float32)[None]
    out = poisoned(*x.shape)
    machine.run(pointwise.bind(GELU, machine.region(x, 1), machine.region(out, 1), each_target))
    # Written so, the truth itself does not cancel.
    wide = x.astype(np.float64)
    truth = wide / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    near = np.abs(wide) < 2
    np.testing.assert_allclose(out[near], truth[near], rtol=1e-6, atol=0)
    np.testing.assert_allclose(out, truth, rtol=2e-5, atol=1e-37)


def test_what_is_not_finite_stays_visible(each_target, machine, poisoned) -> None:
    x, out = np.zeros((1, 40), np.float32), poisoned(1, 40)
    x[0, [3, 17, 38]] = np.nan, np.inf, -np.inf
    machine.run(pointwise.bind(GELU, machine.region(x, 1), machine.region(out, 1), each_target))
    assert np.flatnonzero(~np.isfinite(out[0])).tolist() == [3, 17, 38]


def test_a_channel_does_not_depend_on_its_place_and_may_be_overwritten(each_target, machine) -> None:
    seen = set()
    for width in (1, 15, 16, 17, 1041):
        x = machine.region(np.full((1, width), -1.7, np.float32), 1)
        machine.run(pointwise.bind(GELU, x, x, each_target))
        seen |= set(x.array[0].tolist())
    assert len(seen) == 1


def test_shapes_that_do_not_fit_are_refused(machine) -> None:
    x = machine.region(np.zeros((2, 8), np.float32), 2)
    for shape in ((2, 4), (1, 8)):
        with pytest.raises(KernelError, match="gelu of 2 rows of 8"):
            pointwise.bind(GELU, x, machine.region(np.zeros(shape, np.float32), 1))
