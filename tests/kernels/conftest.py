"""What tests of native operations share: every lowering this processor can be forced to, and a way to run them.

With PHIQUANT_EMULATE=aarch64 the tests of `each_target`, and no others, run on the lowerings of an emulated processor.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant.errors import KernelError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu.cache import KVCache
from phiquant.kernels.cpu.operation import NativeOp, Region, StepHeader
from phiquant.kernels.cpu.target import LOWERINGS, Target, host
from phiquant.kernels.cpu.team import Team, native_program
from phiquant.quants import block_dtype, quantize

from .emulator import TARGETS, Emulator

EMULATED = os.environ.get("PHIQUANT_EMULATE") == "aarch64"


def available() -> list[str]:
    found = []
    for name in LOWERINGS:
        try:
            found.append(host(name).lowering)
        except KernelError:
            continue
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    """Tests of the emulator need one; beside it the tests that know nothing of a target would run as ever."""

    def left_out(item: Any) -> bool:
        return "each_target" not in item.fixturenames if EMULATED else "emulator" in item.fixturenames

    others = [item for item in items if item.path.parent == Path(__file__).parent and left_out(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(params=TARGETS if EMULATED else available(), scope="session")
def each_target(request: pytest.FixtureRequest) -> Target:
    if EMULATED:
        request.getfixturevalue("emulator")
        return TARGETS[request.param]
    return host(request.param)


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    made = Emulator()
    yield made
    made.close()


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

    @staticmethod
    def fill(
        cache: KVCache, layer: int, pages: NDArray[Any], within: NDArray[Any], keys: NDArray[Any], values: NDArray[Any]
    ) -> None:
        """Write float32 [tokens, kv_heads, channels] to places in pages, in the layout of `cache_elements`."""
        kind, tokens, heads = cache.elements.type, cache.page_tokens, cache.shape.kv_heads
        planes = cache.layers[layer].reshape(cache.pages, heads, 2, cache.plane_bytes)
        for part, x in enumerate((keys, values)):
            blocks = quantize(x, kind).view(block_dtype(kind))
            levels = blocks["x" if "x" in blocks.dtype.names else "qs"].reshape(len(x), heads, -1)
            if kind is GGMLType.Q4_0:
                levels = levels ^ np.uint8(0x88)
            plane = planes[:, :, part]
            size = levels.shape[2] * levels.itemsize * tokens
            area = plane[:, :, :size].view(levels.dtype)
            if part == 0:
                area.reshape(cache.pages, heads, -1, tokens)[pages, :, :, within] = levels
            else:
                area.reshape(cache.pages, heads, tokens, -1)[pages, :, within] = levels
            if size < cache.plane_bytes:
                scales = plane[:, :, size:].view(np.float16).reshape(cache.pages, heads, -1, tokens)
                scales[pages, :, :, within] = blocks["d"].reshape(len(x), heads, -1)


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
