"""The Python API for programs with an event loop: many texts at once, none of which waits for another's consumer.

from phiquant import AsyncLLM

async with AsyncLLM.load("phi.gguf", parallel=8) as llm:
    async for chunk in llm.stream("Once upon a time", max_tokens=64):
        print(chunk.text, end="", flush=True)

A thread of the engine computes; what it finds is put into words on the event loop that asked. Requests of several event
loops may be under way at once. A consumer that is slow finds all that came since: a text is bounded by the context.
"""

import asyncio
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack
from weakref import WeakSet

from phiquant.completion import Completion, CompletionChunk, Embeddings, Options
from phiquant.embedding import Pooled, Pooling, embeddings, pooled
from phiquant.engine import Sequence as Job
from phiquant.engine import Stats
from phiquant.errors import RequestError
from phiquant.llm import LLM
from phiquant.request import Prompt, Request, prompts_of
from phiquant.text import Message

__all__ = ["AsyncLLM"]

T = TypeVar("T")

# Threads that read prompts: templates, grammars and long texts take their time, and the event loop has none.
_READERS: Final = 4
# Tokens of a text of which nobody reads the pieces that are put into words at a time, so as not to hold the loop up.
_AT_ONCE: Final = 32


class AsyncLLM:
    """An LLM whose steps are computed by a thread of its own, for as many tasks and event loops as there are.

    Use it with `async with`, or `close` it.

    Args:
        llm: a loaded model; it stays open when this is closed. Its own methods may be used meanwhile.
        queue: most requests that may wait for a place; more are refused with QueueFull.

    Attributes:
        llm: see there: tokenizer, context and so on.
    """

    def __init__(self, llm: LLM, *, queue: int = 64) -> None:
        if queue < 0:
            raise RequestError(f"queue is {queue} and must be 0 or more")
        self.llm, self._queue, self._owned = llm, queue, False
        self._engine = llm.engine
        self._live = WeakSet[Job]()  # a task whose event loop was closed never comes to forget its own
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="phiquant-reader")
        self._started = self._closing = self._closed = False

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, queue: int = 64, **arguments: Any) -> Self:
        """Load a model, which takes seconds and holds the event loop up; arguments and errors are those of `LLM.load`.

        It is closed with this.
        """
        made = cls(LLM.load(path, **arguments), queue=queue)
        made._owned = True
        return made

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Continue a prompt; arguments and errors as `LLM.generate`, and QueueFull. A cancelled task ends the work."""
        return (await self._complete(lambda: prompt, options, 1))[0]

    async def generate_many(self, prompt: Prompt, n: int, **options: Unpack[Options]) -> list[Completion]:
        """`n` continuations of a prompt, which is computed once; their seeds are `seed`, `seed` + 1 and so on."""
        return await self._complete(lambda: prompt, options, n)

    async def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[CompletionChunk, None]:
        """Continue a prompt, in pieces as they come. Nothing happens before the first is asked for.

        The work ends when the iterator is closed, which leaving the loop does as soon as nobody holds it any more.
        """
        async for chunk in self._chunks(lambda: prompt, options):
            yield chunk

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Answer a conversation; arguments and errors as `LLM.chat`, and QueueFull."""
        ids = self.llm.requests.chat_ids
        return (await self._complete(lambda: ids(messages, tools, template_arguments), options, 1))[0]

    async def chat_many(
        self,
        messages: Sequence[Message],
        n: int,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion]:
        """`n` answers, as `generate_many`."""
        ids = self.llm.requests.chat_ids
        return await self._complete(lambda: ids(messages, tools, template_arguments), options, n)

    async def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[CompletionChunk, None]:
        """Answer a conversation, in pieces as `stream` gives them."""
        ids = self.llm.requests.chat_ids
        async for chunk in self._chunks(lambda: ids(messages, tools, template_arguments), options):
            yield chunk

    async def embed(self, inputs: Prompt | Sequence[Prompt], *, pooling: Pooling = "mean") -> Embeddings:
        """What texts mean to the model; arguments and errors as `LLM.embed`, and QueueFull."""
        several = prompts_of(inputs)

        def read() -> list[Pooled]:
            texts = [inputs] if several is None else several
            found = [pooled(self.llm.requests.ids(text), pooling) for text in texts]  # type: ignore[arg-type]
            for one in found:
                self._engine.check(one.job)
            return found

        found = await self._read(read)
        loop, queue = asyncio.get_running_loop(), self._queue
        for first in range(0, len(found), self.llm.parallel):  # the rest would only fill the queue
            waiting = [_Waiting(one.job, loop, self._engine.cancel) for one in found[first : first + self.llm.parallel]]
            self._submit(waiting, queue if first == 0 else None)
            try:
                for one in waiting:
                    await one.ended()
            finally:
                self._forget(waiting)
        return embeddings(found)

    def stats(self) -> Stats:
        """What the engine is doing and has done."""
        return self.llm.stats()

    async def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Take no more requests, and wait for those that are under way.

        Args:
            cancel: end them at once; what they have so far is their result.
            timeout: the same after so many seconds.
        """
        with self._lock:
            self._closing = True
            jobs = list(self._live)
        if cancel:
            self._engine.cancel(*jobs)
        if jobs:
            waiting = asyncio.ensure_future(asyncio.to_thread(self._wait, jobs))
            try:
                await asyncio.wait([waiting], timeout=timeout)
            finally:  # also if the task that closes is cancelled
                self._engine.cancel(*(job for job in jobs if not job.ended))
            await waiting
        with self._lock:
            first, self._closed = not self._closed, True
        if first:
            self._readers.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self._end)  # all of it, also if the task is cancelled meanwhile

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(cancel=error is not None)

    def __repr__(self) -> str:
        return f"Async{self.llm!r}"

    def _end(self) -> None:
        if self._started:
            self._engine.stop()
        if self._owned:
            self.llm.close()

    def _wait(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            with suppress(Exception):  # its own task hears of it
                self._engine.advance(job, sys.maxsize)

    async def _read(self, work: Callable[[], T]) -> T:
        """Do something that takes a while, in another thread."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    def _check_open(self) -> None:
        if self._closing:
            raise RequestError("the model is closing; it takes no more requests")

    async def _start(self, ids: Callable[[], Prompt], options: Options, count: int, every: bool) -> list["_Text"]:
        """Read a prompt and submit its texts."""

        def read() -> list[Request]:
            made = self.llm.requests.make(ids(), options, count=count, drafters=self.llm.drafters)
            for request in made:
                self._engine.check(request.job)
            return made

        loop = asyncio.get_running_loop()
        texts = [_Text(request, loop, self._engine.cancel, every) for request in await self._read(read)]
        self._submit(texts, self._queue)
        return texts

    def _submit(self, waiting: Sequence["_Waiting"], queue: int | None) -> None:
        jobs = [one.job for one in waiting]
        with self._lock:
            self._check_open()
            if not self._started:
                self._engine.start()
                self._started = True
            self._engine.submit(*jobs, queue=queue)
            self._live.update(jobs)

    def _forget(self, waiting: Sequence["_Waiting"]) -> None:
        jobs = [one.job for one in waiting]
        self._engine.cancel(*jobs)
        with self._lock:
            self._live.difference_update(jobs)

    async def _complete(self, ids: Callable[[], Prompt], options: Options, count: int) -> list[Completion]:
        texts = await self._start(ids, options, count, every=False)
        try:
            return [await text.completion() for text in texts]
        finally:
            self._forget(texts)

    async def _chunks(self, ids: Callable[[], Prompt], options: Options) -> AsyncGenerator[CompletionChunk, None]:
        texts = await self._start(ids, options, 1, every=True)
        try:
            while True:
                chunk = await texts[0].next()
                yield chunk
                if chunk.completion is not None:
                    return
        finally:
            self._forget(texts)


class _Waiting:
    """A sequence that a task waits for.

    The engine's thread calls `_told`, which sends the event loop to look; the loop does it once, however often it was
    sent meanwhile.
    """

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop, cancel: Callable[[Job], None]) -> None:
        self.job = job
        self._loop, self._cancel, self._sent = loop, cancel, False
        self._came = asyncio.Event()
        job.listener = self._told

    async def ended(self) -> None:
        """When it has ended; raises what went wrong with it."""
        while not self.job.ended:
            self._came.clear()
            await self._came.wait()
        if self.job.error is not None:
            raise self.job.error

    def _told(self, job: Job) -> None:
        if self._sent and not self._loop.is_closed():
            return
        if self._matters():
            self._sent = True
            try:
                self._loop.call_soon_threadsafe(self._look)
            except RuntimeError:  # the loop is closed, and the task is gone with it
                self._cancel(job)

    def _matters(self) -> bool:
        return self.job.ended

    def _look(self) -> None:
        self._sent = False
        self._came.set()


class _Text(_Waiting):
    """A text that a task waits for, all of it or every piece.

    It is put together as it comes, whether or not somebody takes the pieces, so that a stop text ends the work at once.
    """

    def __init__(
        self, request: Request, loop: asyncio.AbstractEventLoop, cancel: Callable[[Job], None], every: bool
    ) -> None:
        super().__init__(request.job, loop, cancel)
        self._request, self._every = request, every
        self._chunks = deque[CompletionChunk]()
        self._error: Exception | None = None

    async def completion(self) -> Completion:
        """The whole, when it is there."""
        while self._request.completion is None:
            await self._more()
        return self._request.completion

    async def next(self) -> CompletionChunk:
        """The next piece, when it is there."""
        while not self._chunks:
            await self._more()
        return self._chunks.popleft()

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        self._came.clear()
        await self._came.wait()

    def _matters(self) -> bool:
        if self._every or self._request.has_stops or self.job.ended:
            return True
        return self.job.shown - self._request.seen >= _AT_ONCE

    def _look(self) -> None:
        self._sent = False  # first: what comes from now on is looked at again
        try:
            while (chunk := self._request.pull()) is not None:
                if self._every:
                    self._chunks.append(chunk)
        except Exception as error:
            self._error = error
            self._cancel(self.job)
        if self._request.completion is not None and not self.job.ended:
            self._cancel(self.job)
        self._came.set()
