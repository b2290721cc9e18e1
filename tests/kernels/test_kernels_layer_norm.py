import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import layer_norm

pytestmark = pytest.mark.cpu


def formula(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    wide = x.astype(np.float64)
    wide -= wide.mean(axis=1, keepdims=True)
    return wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + epsilon) * weight + bias


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 300),
    rows=st.integers(1, 9),
    spare=st.integers(0, 2),
    threads=st.integers(1, 3),
    exponent=st.integers(-12, 12),
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_it_equals_the_formula(
    each_target, machine, poisoned, width, rows, spare, threads, exponent, offset, seed
) -> None:
    """Also of rows whose mean is far from zero beside their spread."""
    rng = np.random.default_rng(seed)
    x = ((rng.standard_normal((rows + spare, width)) + offset) * 10.0**exponent).astype(np.float32)
    weight, bias = (rng.standard_normal(width).astype(np.float32) for _ in range(2))
    out = poisoned(rows + spare, width)
    bound = layer_norm.bind(machine.region(x, rows), weight, bias, 1e-5, machine.region(out, rows), each_target)
    machine.run(bound, threads=threads)
    np.testing.assert_allclose(out[:rows], formula(x[:rows], weight, bias, 1e-5), rtol=2e-6, atol=2e-6)
    assert np.isnan(out[rows:]).all()


def test_a_wide_row_far_from_zero_loses_nothing(each_target, machine, poisoned) -> None:
    """A mean that is rounded to float32 and no more would be off by hundredths of the spread."""
    rng = np.random.default_rng(1)
    x = (1e5 + rng.standard_normal((3, 5120))).astype(np.float32)
    ones, zeros, out = np.ones(5120, np.float32), np.zeros(5120, np.float32), poisoned(3, 5120)
    machine.run(layer_norm.bind(machine.region(x, 3), ones, zeros, 1e-5, machine.region(out, 3), each_target))
    np.testing.assert_allclose(out, formula(x, ones, zeros, 1e-5), rtol=2e-6, atol=2e-6)


def test_equal_channels_become_the_bias(each_target, machine, poisoned) -> None:
    for value in (0.0, 0.1, -3e7):
        x, out = np.full((1, 203), value, np.float32), poisoned(1, 203)
        weight, bias = np.ones(203, np.float32), np.linspace(-1, 1, 203, dtype=np.float32)
        machine.run(layer_norm.bind(machine.region(x, 1), weight, bias, 1e-5, machine.region(out, 1), each_target))
        np.testing.assert_allclose(out[0], bias, rtol=0, atol=1e-5)


def test_what_is_not_a_number_stays_visible(each_target, machine, poisoned) -> None:
    x, out = np.zeros((2, 100), np.float32), poisoned(2, 100)
    x[0, 70], ones = np.nan, np.ones(100, np.float32)
    machine.run(layer_norm.bind(machine.region(x, 2), ones, ones, 1e-5, machine.region(out, 2), each_target))
    assert np.isnan(out[0]).all()
    assert (out[1] == 1).all()


def test_a_row_does_not_depend_on_its_company_and_may_be_overwritten(each_target, machine, poisoned) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 211), 211, 211))
    out = poisoned(7, 211)
    bound = layer_norm.bind(machine.region(x, 7), weight, bias, 1e-6, machine.region(out, 7), each_target)
    machine.run(bound, threads=3)
    for i in range(7):
        alone = machine.region(x[i : i + 1].copy(), 1)
        machine.run(layer_norm.bind(alone, weight, bias, 1e-6, alone, each_target), threads=1)
        assert np.array_equal(alone.array[0], out[i])


def test_shapes_that_do_not_fit_are_refused(machine) -> None:
    x, ones = machine.region(np.zeros((2, 8), np.float32), 2), np.ones(8, np.float32)
    for weight, bias, shape in (
        (ones[:7], ones, (2, 8)),
        (ones, ones[:7], (2, 8)),
        (ones, ones, (2, 7)),
        (ones, ones, (1, 8)),
        (ones, ones.astype(np.float64), (2, 8)),
    ):
        with pytest.raises(KernelError, match="norm"):
            layer_norm.bind(x, weight, bias, 1e-5, machine.region(np.zeros(shape, np.float32), 1))
