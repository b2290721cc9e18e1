"""The machine's limits, as they are measured."""

import numpy as np
import pytest

from phiquant.kernels.cpu.limits import Limits, peak, reading
from phiquant.kernels.cpu.operation import aligned
from phiquant.kernels.cpu.pack import call
from phiquant.kernels.cpu.target import host

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("prefetched", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_is_read_once(prefetched: bool, threads: int) -> None:
    memory, sink = aligned(5 << 20), aligned(4096 * threads)
    memory.view(np.int32)[:] = np.arange(memory.size // 4, dtype=np.int32) % 1000
    op = reading(memory, host(), sink, prefetched=prefetched)
    call(op.kernel, op.block, threads)
    parts = sink.view(np.int32).reshape(threads, -1)[:, :16]
    assert parts.sum() == memory.view(np.int32).sum()


def test_limits_are_plausible() -> None:
    with Limits(1, nbytes=1 << 24) as limits:
        assert limits.threads == 1
        assert 1e9 < limits.dot_products() < 1e14
        assert 1e8 < limits.read_bandwidth() < 1e13


@pytest.mark.parametrize("kind", ["dot", "fma"])
def test_operations_are_counted(kind: str) -> None:
    op, operations = peak(kind, host(), aligned(4096))
    lanes = host().vector_bytes // 4
    assert operations == 1_000_000 * 12 * 2 * lanes * (4 if kind == "dot" else 1)
    assert op.kernel != 0
