"""From a request to events, the same for all families: texts, calls of tools, and how each choice ended."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from phiquant.completion import Completion, CompletionChunk, Options
from phiquant.engine import TokenLogprob
from phiquant.server.failures import ENDING
from phiquant.server.hosting import Loaded
from phiquant.server.logs import Record
from phiquant.text.tool_reader import CallArguments, CallBegun, Content, ToolReader

__all__ = ["Answer", "Call", "CallDelta", "CallStart", "End", "Event", "TextDelta", "Work", "collect", "events"]


@dataclass(frozen=True)
class Work:
    """What is to be computed.

    Attributes:
        prompts: token ids; each is continued by itself.
        options: of every choice.
        n: choices of each prompt. Choice k of prompt p has the index p * n + k.
        reader: makes one that finds calls of tools in a choice's text; None: there are no tools.
    """

    prompts: Sequence[Sequence[int]]
    options: Options
    n: int = 1
    reader: Callable[[], ToolReader] | None = None


@dataclass(frozen=True)
class TextDelta:
    """More of a choice's text, and the log-probabilities of the tokens behind it if they were asked for."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class CallStart:
    """A choice calls a tool: its first, second, ... call."""

    choice: int
    call: int
    name: str


@dataclass(frozen=True)
class CallDelta:
    """More of a call's arguments, which are JSON."""

    choice: int
    call: int
    arguments: str


@dataclass(frozen=True)
class End:
    """A choice has ended."""

    choice: int
    completion: Completion
    calls: int = 0

    @property
    def finish(self) -> str:
        """ "stop", "length" or "tool_calls"."""
        if self.completion.finish_reason == "length":
            return "length"
        return "tool_calls" if self.calls else "stop"


Event = TextDelta | CallStart | CallDelta | End


@dataclass
class Call:
    """A call of a tool; `arguments` are JSON if the model kept to it."""

    name: str
    arguments: str = ""

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as an object; what is none, which only an answer cut short has, stays a text in one."""
        try:
            found = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return {"": self.arguments}
        return found if isinstance(found, dict) else {"": self.arguments}


@dataclass
class Answer:
    """A choice, whole. `logprobs` belong to all of its tokens, in order."""

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: End | None = None

    @property
    def completion(self) -> Completion:
        """What the engine says of it."""
        assert self.end is not None
        return self.end.completion

    @property
    def finish(self) -> str:
        """As `End.finish`."""
        assert self.end is not None
        return self.end.finish


async def events(loaded: Loaded, work: Work, record: Record) -> AsyncGenerator[Event, None]:
    """What comes, of all choices, as it comes; closing it cancels the work. Errors are those of `AsyncLLM.stream`."""
    readers = [work.reader() if work.reader is not None else None for _ in range(len(work.prompts) * work.n)]
    async with aclosing(_chunks(loaded, work)) as chunks:
        async for choice, chunk in chunks:
            if record.first is None:
                record.first = time.perf_counter()
            reader, logprobs = readers[choice], tuple(chunk.logprobs or ())
            if reader is None:
                if chunk.text or chunk.ids:
                    yield TextDelta(choice, chunk.text, logprobs, chunk.ids)
            else:
                found = reader.push(chunk.text)
                if chunk.completion is not None:
                    found += reader.finish()
                if logprobs and not any(isinstance(item, Content) for item in found):
                    yield TextDelta(choice, "", logprobs, chunk.ids)
                    logprobs = ()
                for item in found:
                    if isinstance(item, Content):
                        yield TextDelta(choice, item.text, logprobs, chunk.ids)
                        logprobs = ()
                    elif isinstance(item, CallBegun):
                        yield CallStart(choice, item.call, item.name)
                    elif isinstance(item, CallArguments):
                        yield CallDelta(choice, item.call, item.text)
            if chunk.completion is not None:
                if chunk.completion.finish_reason == "cancelled":
                    raise ENDING.with_traceback(None)  # the same every time
                usage = chunk.completion.usage
                record.prompt_tokens += usage.prompt_tokens
                record.cached_tokens += usage.cached_tokens
                record.completion_tokens += usage.completion_tokens
                end = End(choice, chunk.completion, reader.calls if reader is not None else 0)
                record.finish = end.finish
                yield end


async def collect(loaded: Loaded, work: Work, record: Record) -> list[Answer]:
    """All choices, whole, in order."""
    answers = [Answer() for _ in range(len(work.prompts) * work.n)]
    async with aclosing(events(loaded, work, record)) as found:
        async for item in found:
            answer = answers[item.choice]
            if isinstance(item, TextDelta):
                answer.text += item.text
                answer.logprobs += item.logprobs
            elif isinstance(item, CallStart):
                answer.calls.append(Call(item.name))
            elif isinstance(item, CallDelta):
                answer.calls[item.call].arguments += item.arguments
            else:
                answer.end = item
    return answers


def _options(loaded: Loaded, work: Work, choice: int) -> Options:
    """Those of one choice: with a seed given, each has the next; no more tokens than the server lets an answer have."""
    options = work.options.copy()
    if loaded.most is not None:
        options["max_tokens"] = min(options.get("max_tokens") or loaded.most, loaded.most)
    seed = options.get("seed")
    if seed is not None and work.n > 1:
        options["seed"] = (seed + choice % work.n) % (1 << 64)
    return options


async def _chunks(loaded: Loaded, work: Work) -> AsyncGenerator[tuple[int, CompletionChunk], None]:
    count = len(work.prompts) * work.n
    if count == 1:
        async with aclosing(loaded.engine.stream(work.prompts[0], **_options(loaded, work, 0))) as stream:
            async for chunk in stream:
                yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, CompletionChunk] | BaseException | None] = asyncio.Queue()

    async def pump(choice: int) -> None:
        try:
            prompt = work.prompts[choice // work.n]
            async with aclosing(loaded.engine.stream(prompt, **_options(loaded, work, choice))) as stream:
                async for chunk in stream:
                    queue.put_nowait((choice, chunk))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(choice)) for choice in range(count)]
    try:
        left = count
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
