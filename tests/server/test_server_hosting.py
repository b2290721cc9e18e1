"""Models in memory: when they come, and when they go."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from phiquant.errors import GGUFError
from phiquant.server.failures import Failure
from phiquant.server.hosting import Hosting, Loaded
from phiquant.server.settings import Model


class Stub:
    """A model and its engine at once."""

    def __init__(self, log: list[str], name: str) -> None:
        self._log, self._name = log, name

    async def __aexit__(self, *exception: object) -> None:
        self._log.append(f"stop {self._name}")

    def close(self) -> None:
        self._log.append(f"close {self._name}")


def hosting(log: list[str], idle_timeout: float = 0.0, broken: list[bool] | None = None) -> Hosting:
    async def load(model: Model) -> Loaded:
        log.append(f"load {model.name}")
        await asyncio.sleep(0.01)
        if broken:
            broken.pop()
            raise GGUFError("broken")
        stub: Any = Stub(log, model.name)
        return Loaded(stub, stub)

    return Hosting([Model(Path("a.gguf")), Model(Path("b.gguf"))], load, idle_timeout)


def test_a_model_is_loaded_once_however_many_ask_for_it() -> None:
    async def run() -> None:
        log: list[str] = []
        host = hosting(log)

        async def use(name: str | None) -> Loaded:
            async with host.lease(name) as loaded:
                return loaded

        found = await asyncio.gather(use(None), use("a"), use("a:latest"), use("b"))
        assert found[0] is found[1] is found[2]
        assert log == ["load a", "load b"]
        await host.close()
        assert log[2:] == ["stop a", "close a", "stop b", "close b"]

    asyncio.run(run())


def test_an_idle_model_goes_and_comes_back_and_one_in_use_stays() -> None:
    async def run() -> None:
        log: list[str] = []
        host = hosting(log, idle_timeout=0.05)
        host.start()
        async with host.lease("a"):
            async with host.lease("b"):
                pass
            await asyncio.sleep(0.2)
            assert log == ["load a", "load b", "stop b", "close b"]
        await asyncio.sleep(0.2)
        assert log[4:] == ["stop a", "close a"]
        async with host.lease("a"):
            assert log[6:] == ["load a"]
        await host.close()

    asyncio.run(run())


def test_a_model_that_could_not_be_loaded_is_tried_again() -> None:
    async def run() -> None:
        log: list[str] = []
        host = hosting(log, broken=[True])
        with pytest.raises(GGUFError):
            async with host.lease("a"):
                pass
        assert host.find("a").leases == 0
        async with host.lease("a") as loaded:
            assert loaded is not None

    asyncio.run(run())


def test_a_client_that_leaves_while_a_model_is_loaded_leaves_it_to_the_next() -> None:
    async def run() -> None:
        log: list[str] = []
        host = hosting(log)

        async def use() -> Loaded:
            async with host.lease("a") as loaded:
                return loaded

        first = asyncio.create_task(use())
        await asyncio.sleep(0.001)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert host.find("a").leases == 0
        await use()
        assert log == ["load a"]
        last = asyncio.create_task(host.ready(host.find("b")))
        await asyncio.sleep(0)
        last.cancel()
        await host.close()
        assert log[-1] == "close b"
        assert log.count("load b") == 1

    asyncio.run(run())


def test_only_configured_names_are_found() -> None:
    host = hosting([])
    assert host.find(None).model.name == "a"
    for name in ("c", "a.gguf", "./a", "A", "b:other"):
        with pytest.raises(Failure, match="there is no model"):
            host.find(name)
