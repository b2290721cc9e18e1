import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import rms_norm

pytestmark = pytest.mark.cpu


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 300),
    rows=st.integers(1, 9),
    spare=st.integers(0, 2),
    threads=st.integers(1, 3),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 99),
)
def test_it_equals_the_formula(each_target, machine, poisoned, width, rows, spare, threads, exponent, seed) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows + spare, width)) * 10.0**exponent).astype(np.float32)
    weight = rng.standard_normal(width).astype(np.float32)
    out = poisoned(rows + spare, width)
    machine.run(
        rms_norm.bind(machine.region(x, rows), weight, 1e-5, machine.region(out, rows), each_target), threads=threads
    )
    wide = x[:rows].astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out[:rows], expected, rtol=2e-6, atol=1e-30)
    assert np.isnan(out[rows:]).all()


def test_a_row_does_not_depend_on_its_company_and_may_be_overwritten(each_target, machine, poisoned) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((7, 211)).astype(np.float32), rng.standard_normal(211).astype(np.float32)
    out = poisoned(7, 211)
    machine.run(rms_norm.bind(machine.region(x, 7), weight, 1e-6, machine.region(out, 7), each_target), threads=3)
    for i in range(7):
        alone = machine.region(x[i : i + 1].copy(), 1)
        machine.run(rms_norm.bind(alone, weight, 1e-6, alone, each_target), threads=1)
        assert np.array_equal(alone.array[0], out[i])


def test_shapes_that_do_not_fit_are_refused(machine) -> None:
    x, ones = machine.region(np.zeros((2, 8), np.float32), 2), np.ones(8, np.float32)
    for weight, shape in ((ones[:7], (2, 8)), (ones, (2, 7)), (ones, (1, 8)), (ones.astype(np.float64), (2, 8))):
        with pytest.raises(KernelError, match="norm"):
            rms_norm.bind(x, weight, 1e-5, machine.region(np.zeros(shape, np.float32), 1))
