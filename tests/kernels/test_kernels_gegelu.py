import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import pointwise
from phiquant.kernels.cpu.gegelu import gegelu

pytestmark = pytest.mark.cpu


@settings(max_examples=30, deadline=None)
@given(
    width=st.one_of(st.integers(1, 100), st.integers(1000, 2100)),
    rows=st.integers(1, 5),
    spare=st.integers(0, 2),
    threads=st.integers(1, 3),
    spread=st.sampled_from([1e-3, 1.0, 30.0, 300.0]),
    limit=st.sampled_from([20.0, 0.5, 1e4]),
    seed=st.integers(0, 99),
)
def test_it_equals_the_formula(
    each_target, machine, poisoned, width, rows, spare, threads, spread, limit, seed
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows + spare, 2 * width)) * spread).astype(np.float32)
    out = poisoned(rows + spare, width)
    bound = pointwise.bind(gegelu(limit), machine.region(x, rows), machine.region(out, rows), each_target)
    machine.run(bound, threads=threads)
    wide = x[:rows].astype(np.float64)
    a, b = np.minimum(wide[:, :width], limit), np.clip(wide[:, width:], -limit, limit)
    with np.errstate(over="ignore"):
        expected = a / (1 + np.exp(-1.702 * a)) * (b + 1)
    # Of an exponent of -80 the last place is 4e-6 of the result; b + 1 may cancel.
    atol = 1e-7 * (1 + np.abs(a))
    assert (np.abs(out[:rows] - expected) <= 1e-5 * np.abs(expected) + atol).all()
    assert np.isnan(out[rows:]).all()


def test_both_limits_hold(each_target, machine, poisoned) -> None:
    """The first part has none below, the second has two."""
    x = np.array([[100, -100, 1, 1, 1, 0, 0, 100, -100, 2]], np.float32)
    out = poisoned(1, 5)
    machine.run(pointwise.bind(gegelu(3.0), machine.region(x, 1), machine.region(out, 1), each_target))
    one = 1 / (1 + np.exp(-1.702))
    np.testing.assert_allclose(out[0], [3 / (1 + np.exp(-5.106)), 0, 4 * one, -2 * one, 3 * one], rtol=1e-6, atol=1e-30)


def test_a_value_that_is_not_a_number_is_not_hidden_by_the_limit(each_target, machine, poisoned) -> None:
    x, out = np.ones((1, 80), np.float32), poisoned(1, 40)
    x[0, [3, 39, 40 + 20]] = np.nan
    machine.run(pointwise.bind(gegelu(20.0), machine.region(x, 1), machine.region(out, 1), each_target))
    assert np.flatnonzero(np.isnan(out[0])).tolist() == [3, 20, 39]


def test_a_channel_does_not_depend_on_its_place(each_target, machine, poisoned) -> None:
    seen = set()
    for width in (1, 15, 16, 17, 1041):
        x = np.concatenate([np.full(width, -1.7), np.full(width, 0.3)])[None].astype(np.float32)
        out = poisoned(1, width)
        machine.run(pointwise.bind(gegelu(20.0), machine.region(x, 1), machine.region(out, 1), each_target))
        seen |= set(out[0].tolist())
    assert len(seen) == 1


def test_shapes_that_do_not_fit_are_refused(machine) -> None:
    x = machine.region(np.zeros((2, 8), np.float32), 2)
    for shape in ((2, 5), (1, 4)):
        with pytest.raises(KernelError, match="gegelu of 2 rows of 8"):
            pointwise.bind(gegelu(20.0), x, machine.region(np.zeros(shape, np.float32), 1))
