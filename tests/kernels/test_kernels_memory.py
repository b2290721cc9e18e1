"""Advice about memory never loses what memory holds."""

import mmap

import numpy as np
import pytest

from phiquant.kernels.cpu.memory import release

PAGE = mmap.PAGESIZE


def mapped(tmp_path, access: int) -> tuple[mmap.mmap, np.ndarray]:
    path = tmp_path / "file"
    path.write_bytes(np.arange(8 * PAGE, dtype=np.uint32).astype(np.uint8).tobytes())
    with path.open("r+b") as f:
        m = mmap.mmap(f.fileno(), 0, access=access)
    return m, np.frombuffer(m, np.uint8)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system takes no such advice")
def test_a_mapped_file_is_let_go_and_read_again(tmp_path) -> None:
    _, data = mapped(tmp_path, mmap.ACCESS_READ)
    expected = data.copy()
    assert release(data)
    assert release(data[100 : 5 * PAGE].reshape(2, -1))
    assert np.array_equal(data, expected)


def test_less_than_a_page_is_left_alone(tmp_path) -> None:
    _, data = mapped(tmp_path, mmap.ACCESS_READ)
    assert not release(data[1:PAGE])
    assert not release(data[1 : PAGE + 100])


@pytest.mark.parametrize("access", [mmap.ACCESS_WRITE, mmap.ACCESS_COPY])
def test_memory_that_could_lose_its_contents_is_left_alone(tmp_path, access: int) -> None:
    _, data = mapped(tmp_path, access)
    data[:] = 7
    assert not release(data)
    assert (data == 7).all()


def test_memory_that_is_no_file_is_left_alone() -> None:
    anonymous = np.frombuffer(mmap.mmap(-1, 4 * PAGE), np.uint8)
    anonymous[:] = 5
    ordinary = np.full(4 * PAGE, 5, np.uint8)
    for array in (anonymous, ordinary, ordinary[3:]):
        assert not release(array)
        assert (array == 5).all()
