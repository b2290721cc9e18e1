"""What tests of native operations share: every lowering this processor can be forced to, and a way to run them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant.errors import KernelError
from phiquant.kernels.cpu.operation import NativeOp, Region, StepHeader
from phiquant.kernels.cpu.target import LOWERINGS, Target, host
from phiquant.kernels.cpu.team import Team, native_program


def available() -> list[str]:
    found = []
    for name in LOWERINGS:
        try:
            found.append(host(name).lowering)
        except KernelError:
            continue
    return found


@pytest.fixture(params=available(), scope="session")
def each_target(request: pytest.FixtureRequest) -> Target:
    return host(request.param)


@pytest.fixture(scope="session")
def lowerings() -> list[str]:
    return available()


class Machine:
    """Runs single operations; its teams live as long as the test session."""

    def __init__(self) -> None:
        self.teams: dict[int, Team] = {}
        self.headers: list[StepHeader] = []

    def region(self, array: NDArray[Any], used: int) -> Region:
        """Rows of which a step uses the first `used`."""
        header = StepHeader()
        header.set("tokens", used)
        self.headers.append(header)
        return Region(array, header.address("tokens"))

    def run(self, *operations: NativeOp, threads: int = 2) -> None:
        team = self.teams.setdefault(threads, Team(threads))
        with team.step():
            team.run(native_program(list(operations)))


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    for team in made.teams.values():
        team.close()


@pytest.fixture(scope="session")
def poisoned() -> Callable[..., NDArray[np.float32]]:
    """Makes a matrix of NaN, so that what is not written shows."""
    return lambda *shape: np.full(shape, np.nan, np.float32)
