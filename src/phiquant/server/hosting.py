"""The models of a server: found by name, loaded on first use, unloaded when nobody has used them for a while."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

from phiquant.server.failures import Failure
from phiquant.server.settings import Model

if TYPE_CHECKING:
    from phiquant.async_llm import AsyncLLM
    from phiquant.llm import LLM

__all__ = ["Hosted", "Hosting", "Loaded", "load"]

_log = logging.getLogger("phiquant.server")
_LATEST: Final = ":latest"  # Ollama's clients add it to names without a tag


@dataclass(frozen=True)
class Loaded:
    """A model in memory: itself, and the loop that computes for many at a time."""

    llm: "LLM"
    engine: "AsyncLLM"
    most: int | None = None
    """Tokens of an answer, whatever a request asks for."""

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token."""
        tokenizer = self.llm.tokenizer
        return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))


Loader = Callable[[Model], Awaitable[Loaded]]


async def load(model: Model) -> Loaded:
    """Open a model's file and start its engine, outside the event loop's thread."""
    from phiquant.async_llm import AsyncLLM
    from phiquant.llm import LLM

    llm = await asyncio.to_thread(
        LLM.load,
        model.path,
        context=model.ctx_size,
        threads=model.threads,
        cache_type=model.cache_type,
        cache_tokens=model.cache_tokens,
        batch=model.batch_size,
        parallel=model.parallel,
    )
    for note in llm.notes:
        _log.info("%s: %s", model.name, note)
    _log.info(
        "%s: %d conversations at once, of up to %d tokens; the cache holds %d tokens, %.2f GB",
        *(model.name, llm.parallel, llm.context, llm.cache_tokens, llm.cache_bytes / 1e9),
    )
    return Loaded(llm, await AsyncLLM(llm, queue=model.queue).__aenter__(), model.predict or None)


@dataclass
class Hosted:
    """A configured model, in memory or not.

    Attributes:
        model: its settings.
        loaded: None while it is not in memory.
        loading: the task that brings it there.
        leases: requests that use it now.
        used: when it was last used, by time.monotonic().
        loaded_at: when it was loaded, by time.time().
        load_seconds: how long that took.
    """

    model: Model
    loaded: Loaded | None = None
    loading: "asyncio.Task[Loaded] | None" = None
    leases: int = 0
    used: float = 0.0
    loaded_at: float = 0.0
    load_seconds: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Hosting:
    """All models of a server.

    Args:
        models: the first is meant by requests that name none.
        loader: brings one into memory.
        idle_timeout: seconds after which an unused model leaves it; 0 for never.
    """

    def __init__(self, models: Sequence[Model], loader: Loader = load, idle_timeout: float = 0.0) -> None:
        self.hosted = {model.name: Hosted(model) for model in models}
        self._first = models[0].name
        self._loader, self._idle_timeout = loader, idle_timeout
        self._watch: asyncio.Task[None] | None = None

    def find(self, name: str | None) -> Hosted:
        """The model of this name, never a path; that of None is the first. Failure 404 if there is none."""
        if name is None or name == "":
            return self.hosted[self._first]
        found = self.hosted.get(name) or self.hosted.get(name.removesuffix(_LATEST))
        if found is None:
            known = ", ".join(self.hosted)
            raise Failure(
                404, f"there is no model {name[:100]!r}; there are: {known[:500]}", "model", code="model_not_found"
            )
        return found

    @asynccontextmanager
    async def lease(self, name: str | None) -> AsyncIterator[Loaded]:
        """A model that stays in memory meanwhile; loaded if need be."""
        hosted = self.find(name)
        hosted.leases += 1
        try:
            yield await self.ready(hosted)
        finally:
            hosted.leases -= 1
            hosted.used = time.monotonic()

    async def ready(self, hosted: Hosted) -> Loaded:
        """The model in memory; whoever comes while it is being loaded waits for the same.

        A client that leaves does not end the loading, which goes on in a thread in any case: what comes of it is kept.
        """
        if hosted.loaded is not None:
            return hosted.loaded
        if hosted.loading is None:
            hosted.loading = asyncio.create_task(self._load(hosted), name="phiquant-load")
        return await asyncio.shield(hosted.loading)

    async def _load(self, hosted: Hosted) -> Loaded:
        try:
            async with hosted.lock:  # not before the last one has gone
                begin = time.monotonic()
                loaded = await self._loader(hosted.model)
                hosted.used = time.monotonic()
                hosted.loaded_at, hosted.load_seconds = time.time(), hosted.used - begin
                hosted.loaded = loaded
                return loaded
        finally:
            hosted.loading = None

    def start(self) -> None:
        """Begin to look for idle models."""
        if self._idle_timeout > 0 and self._watch is None:
            self._watch = asyncio.create_task(self._unload_idle(), name="phiquant-idle")

    async def close(self) -> None:
        """Unload all."""
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
            self._watch = None
        for hosted in self.hosted.values():
            if hosted.loading is not None:
                await asyncio.wait({hosted.loading})
            await self.unload(hosted)

    async def unload(self, hosted: Hosted, unless_used: bool = False) -> None:
        """Free a model's memory; its running requests fail, or it stays `unless_used`."""
        async with hosted.lock:
            if unless_used and hosted.leases:
                return
            loaded, hosted.loaded = hosted.loaded, None
            if loaded is not None:
                await loaded.engine.__aexit__(None, None, None)
                await asyncio.to_thread(loaded.llm.close)

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(min(self._idle_timeout / 4, 10.0))
            for hosted in self.hosted.values():
                idle = time.monotonic() - hosted.used
                if hosted.loaded is not None and hosted.leases == 0 and idle >= self._idle_timeout:
                    await self.unload(hosted, unless_used=True)
