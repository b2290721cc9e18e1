import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.kernels.cpu import select_rows

pytestmark = pytest.mark.cpu


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 100), rows=st.integers(1, 9), used=st.integers(0, 6), threads=st.integers(1, 3), data=st.data()
)
def test_rows_are_picked(each_target, machine, poisoned, width, rows, used, threads, data) -> None:
    x = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    indices = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=6, max_size=6)), np.int32)
    out = poisoned(6, width)
    operation = select_rows.bind(machine.region(x, rows), indices, machine.region(out, used), each_target)
    machine.run(operation, threads=threads)
    assert np.array_equal(out[:used], x[indices[:used]])
    assert np.isnan(out[used:]).all()


def test_shapes_that_do_not_fit_are_refused(machine) -> None:
    x = machine.region(np.zeros((2, 8), np.float32), 2)
    out = machine.region(np.zeros((3, 8), np.float32), 2)
    narrow = machine.region(np.zeros((3, 7), np.float32), 2)
    for indices, to in (
        (np.zeros(2, np.int32), out),
        (np.zeros(3, np.int64), out),
        (np.zeros(3, np.int32), narrow),
    ):
        with pytest.raises(KernelError, match="picked"):
            select_rows.bind(x, indices, to)
