"""AsyncLLM on the bundled model: many tasks, cancellations, event loops that come and go."""

import asyncio
import contextlib
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import LLM, AsyncLLM, Completion, CompletionChunk, Grammar
from phiquant.convert import convert
from phiquant.errors import ContextError, GrammarError, KernelError, QueueFull, RequestError, TokenError

TINY = Path(__file__).parents[1] / "models" / "phi3-tiny"
PROMPT = "Once upon a time there was a little girl"
PROMPTS = [
    PROMPT,
    "The sun",
    "One day Tom and his dog went to the park. They",
    "Lily had a red ball and",
    PROMPT + " who",
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "emoji": {"enum": ["🙂", "日本", "é"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "emoji", "age"],
    "additionalProperties": False,
}

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("async") / "tiny.gguf"
    convert(TINY, made, "f16", quiet=True)
    return made


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM.load(path, parallel=4, context=512, cache_tokens=1024, batch=64) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(path: Path) -> Iterator[LLM]:
    with LLM.load(path, context=512) as loaded:
        yield loaded


@asynccontextmanager
async def opened(llm: LLM, **more: Any) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(llm, **more) as made:
        yield made
    assert llm.stats().running == llm.stats().waiting == llm.stats().pages_used == 0
    assert not [t.name for t in threading.enumerate() if t.name == "phiquant-engine"]


async def until(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it does not come"
        await asyncio.sleep(0.01)


async def collected(stream: AsyncIterator[CompletionChunk]) -> list[CompletionChunk]:
    return [chunk async for chunk in stream]


def test_texts_are_those_that_are_computed_alone(llm: LLM, alone: LLM) -> None:
    requests = [
        (prompt, {"max_tokens": 10 + 7 * i, "temperature": t, "seed": i})
        for i, prompt in enumerate(PROMPTS)
        for t in (0.0, 1.2)
    ]
    expected = [alone.generate(prompt, **options) for prompt, options in requests]  # type: ignore[arg-type]

    async def main() -> None:
        async with opened(llm) as a:
            found = await asyncio.gather(*(a.generate(prompt, **options) for prompt, options in requests))  # type: ignore[arg-type]
            for one, other in zip(found, expected, strict=True):
                assert (one.text, one.ids, one.finish_reason, one.seed) == (
                    other.text,
                    other.ids,
                    other.finish_reason,
                    other.seed,
                )
                assert one.usage.completion_tokens == other.usage.completion_tokens
                assert one.timings.prompt_seconds > 0
            streams = await asyncio.gather(*(collected(a.stream(prompt, **options)) for prompt, options in requests))  # type: ignore[arg-type]
            for chunks, other in zip(streams, expected, strict=True):
                assert "".join(chunk.text for chunk in chunks) == other.text
                assert tuple(i for chunk in chunks for i in chunk.ids) == other.ids
                assert [chunk.completion is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
                assert chunks[-1].completion is not None
                assert chunks[-1].completion.text == other.text

    asyncio.run(main())


def test_texts_are_the_same_between_cancellations(llm: LLM, alone: LLM) -> None:
    expected = [alone.generate(p, max_tokens=25, seed=3).text for p in PROMPTS]

    async def main() -> None:
        async with opened(llm) as a:

            async def given_up(i: int) -> None:
                if i % 2:
                    async for chunk in a.stream(PROMPTS[i % 5], seed=i):
                        if chunk.ids and i % 3:
                            break
                    return
                task = asyncio.ensure_future(a.generate(PROMPTS[i % 5], seed=i))
                await asyncio.sleep(0.005 * i)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

            async def wanted(i: int) -> str:
                await asyncio.sleep(0.003 * i)
                return (await a.generate(PROMPTS[i % 5], max_tokens=25, seed=3)).text

            _, texts = await asyncio.gather(
                asyncio.gather(*map(given_up, range(16))), asyncio.gather(*map(wanted, range(20)))
            )
            assert texts == [expected[i % 5] for i in range(20)]
            await until(lambda: a.stats().running + a.stats().waiting == 0)

    asyncio.run(main())


def test_a_stop_text_ends_the_work_whether_or_not_somebody_reads(llm: LLM) -> None:
    async def main() -> None:
        async with opened(llm) as a:
            before = a.stats()
            made = await a.generate(PROMPT, temperature=0, stop=["so pleased", "girl,"])
            assert (made.text, made.finish_reason, made.stop) == (" who had been a little ", "stop", "girl,")
            stream = a.stream(PROMPT, temperature=0, stop="girl,")
            first = await anext(stream)
            await until(lambda: a.stats().running == 0)  # nobody reads
            rest = await collected(stream)
            assert first.text + "".join(chunk.text for chunk in rest) == " who had been a little "
            assert a.stats().cancelled == before.cancelled + 2
            assert a.stats().generated_tokens - before.generated_tokens < 200

    asyncio.run(main())


def test_a_slow_reader_stalls_nobody(llm: LLM, alone: LLM) -> None:
    async def main() -> None:
        async with opened(llm) as a:
            slow = a.stream(PROMPT, temperature=0, max_tokens=60)
            first = await anext(slow)
            assert (await a.generate(PROMPTS[1], temperature=0, max_tokens=30)).ids
            await until(lambda: a.stats().running == 0)
            rest = await collected(slow)
            assert [first.text, *(chunk.text for chunk in rest)] == [
                chunk.text for chunk in alone.generate(PROMPT, temperature=0, max_tokens=60, stream=True)
            ]

    asyncio.run(main())


@pytest.mark.parametrize("how", ["break", "close", "cancel", "collect"])
def test_who_stops_reading_ends_the_work(llm: LLM, how: str) -> None:
    async def main() -> None:
        async with opened(llm) as a:
            before = a.stats().cancelled

            async def reader() -> None:
                async for _ in a.stream(PROMPT):
                    if how == "break":
                        break

            if how == "break":
                await reader()
            elif how == "close":
                async with aclosing(a.stream(PROMPT)) as stream:
                    await anext(stream)
            elif how == "collect":
                stream = a.stream(PROMPT)
                await anext(stream)
                del stream
                gc.collect()
            else:
                task = asyncio.ensure_future(reader())
                await until(lambda: a.stats().running == 1)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await until(lambda: a.stats().running == 0)
            assert a.stats().cancelled == before + 1

    asyncio.run(main())


def test_choices_share_a_prompt(llm: LLM, alone: LLM) -> None:
    prompt = "A long story that was told to Ben. " * 12
    expected = [alone.generate(prompt, max_tokens=15, seed=s).text for s in (7, 8, 9)]

    async def main() -> None:
        async with opened(llm) as a:
            found = await a.generate_many(prompt, n=3, max_tokens=15, seed=7)
            assert [one.text for one in found] == expected
            assert [one.seed for one in found] == [7, 8, 9]
            assert all(one.usage.cached_tokens >= 64 for one in found[1:])
            for n in (0, 129, 1.5):
                with pytest.raises(RequestError, match=f"n is {n} and must be from 1 to 128"):
                    await a.generate_many(prompt, n)  # type: ignore[arg-type]

    asyncio.run(main())


def test_constrained_texts_are_valid_in_a_crowd_and_with_guesses(llm: LLM) -> None:
    grammar = Grammar.json_schema(PERSON)

    async def main() -> None:
        async with opened(llm) as a:

            async def person(i: int) -> Completion:
                return await a.generate("Somebody as JSON:", grammar=grammar, seed=i, temperature=1.5, max_tokens=200)

            free = [a.generate(PROMPTS[i % 5], max_tokens=40, seed=i) for i in range(6)]
            people, _ = await asyncio.gather(asyncio.gather(*map(person, range(8))), asyncio.gather(*free))
            one_by_one = [await person(i) for i in range(3)]  # alone, guesses are made
            assert [one.text for one in one_by_one] == [one.text for one in people[:3]]
            for one in people:
                assert one.finish_reason == "stop"
                found = json.loads(one.text)
                assert found.keys() == PERSON["properties"].keys()  # type: ignore[attr-defined]
                assert found["emoji"] in ("🙂", "日本", "é")
                assert 0 <= found["age"] <= 99
                assert len(found["name"]) <= 12

    asyncio.run(main())


@pytest.mark.parametrize(
    ("grammar", "form"),
    [
        (Grammar("regex", r"(aé|日本){12}"), r"(aé|日本){12}"),
        (Grammar("gbnf", 'root ::= ("ab " ){30}'), r"(ab ){30}"),
    ],
)
def test_repeated_constrained_text_with_guesses(alone: LLM, grammar: Grammar, form: str) -> None:
    import re

    made = alone.generate("x:", grammar=grammar, temperature=0)
    assert re.fullmatch(form, made.text)
    assert made.finish_reason == "stop"


def test_embeddings(llm: LLM, alone: LLM) -> None:
    texts = [*PROMPTS, alone.tokenize("The moon"), "word " * 300]
    expected = alone.embed(texts)  # type: ignore[arg-type]

    async def main() -> None:
        async with opened(llm) as a:
            busy = asyncio.ensure_future(a.generate(PROMPT, max_tokens=60))
            found = await a.embed(texts)  # type: ignore[arg-type]
            assert np.array_equal(found.vectors, expected.vectors), "whatever else is computed, and however divided"
            assert found.tokens == expected.tokens
            with pytest.raises(RequestError, match="pooling"):
                await a.embed(["x"], pooling="max")  # type: ignore[arg-type]
            with pytest.raises(ContextError):
                await a.embed(["word " * 600])
            await busy

    asyncio.run(main())


def test_a_full_queue_is_told_at_once(llm: LLM) -> None:
    async def main() -> None:
        async with opened(llm, queue=2) as a:
            tasks = [asyncio.ensure_future(a.generate(PROMPT, max_tokens=100, seed=i)) for i in range(6)]
            await until(lambda: a.stats().running + a.stats().waiting == 6)
            with pytest.raises(QueueFull) as caught:
                await a.generate(PROMPT)
            assert caught.value.retry_after >= 1
            with pytest.raises(QueueFull):
                await anext(a.stream(PROMPT))
            assert [len(one.ids) for one in await asyncio.gather(*tasks)] == [100] * 6

    asyncio.run(main())


def test_errors_are_told_to_the_one_who_made_them(llm: LLM) -> None:
    async def main() -> None:
        async with opened(llm) as a:
            good = asyncio.ensure_future(a.generate(PROMPT, max_tokens=40))
            cases: list[tuple[type[Exception], str, Awaitable[Any]]] = [
                (TokenError, "40000", a.generate([1, 40000])),
                (ContextError, "512", a.generate([1] * 600)),
                (RequestError, "empty", a.generate("")),
                (RequestError, "top_p", a.generate(PROMPT, top_p=3)),
                (RequestError, "prompt", a.generate(None)),  # type: ignore[arg-type]
                (RequestError, "prompt", a.generate(["a", "b"])),  # type: ignore[list-item]
                (TypeError, "temprature", a.generate(PROMPT, temprature=1)),  # type: ignore[call-arg]
                (GrammarError, "JSON schema", a.generate(PROMPT, grammar=Grammar("json_schema", '{"type": "no"}'))),
                (RequestError, "role", a.chat([{"role": "nobody", "content": ""}])),
            ]
            for error, named, what in cases:
                with pytest.raises(error, match=named):
                    await what
            assert len((await good).ids) == 40

    asyncio.run(main())


def test_a_failing_step_is_told_and_the_engine_goes_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened(llm) as a:
            run = llm.engine._executable.run

            def fail(step: object) -> None:
                raise KernelError("a kernel reported error 3")

            monkeypatch.setattr(llm.engine._executable, "run", fail)
            results = await asyncio.gather(
                a.generate(PROMPT), collected(a.stream(PROMPT)), a.embed("x"), return_exceptions=True
            )
            assert [type(result) for result in results] == [KernelError] * 3
            assert len(set(map(id, results))) == 3
            monkeypatch.setattr(llm.engine._executable, "run", run)
            assert (await a.generate(PROMPT, max_tokens=3)).ids

    asyncio.run(main())


def test_closing_finishes_what_is_under_way(llm: LLM) -> None:
    async def main() -> None:
        a = AsyncLLM(llm)
        task = asyncio.ensure_future(a.generate(PROMPT, max_tokens=50))
        await until(lambda: a.stats().running == 1)
        closing = asyncio.ensure_future(a.close())
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="closing"):
            await a.generate(PROMPT)
        await closing
        assert len((await task).ids) == 50
        await a.close()

    asyncio.run(main())


@pytest.mark.parametrize("arguments", [{"cancel": True}, {"timeout": 0.05}])
def test_closing_cancels_what_is_under_way(llm: LLM, arguments: dict[str, Any]) -> None:
    async def main() -> None:
        a = AsyncLLM(llm)
        tasks = [asyncio.ensure_future(a.generate(PROMPT, temperature=0, ignore_eos=True)) for _ in range(6)]
        await until(lambda: a.stats().running == 4)
        await a.close(**arguments)
        for task in tasks:
            made = await task
            assert made.finish_reason == "cancelled"
            assert len(made.ids) < 450
        assert llm.stats().pages_used == 0

    asyncio.run(main())


def test_closing_may_be_given_up_and_asked_for_again(llm: LLM) -> None:
    async def main() -> None:
        a = AsyncLLM(llm)
        task = asyncio.ensure_future(a.generate(PROMPT, ignore_eos=True))
        await until(lambda: a.stats().running == 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(a.close(), 0.01)
        assert (await task).finish_reason == "cancelled"
        await asyncio.gather(a.close(), a.close())
        assert not [t for t in threading.enumerate() if t.name == "phiquant-engine"]

    asyncio.run(main())


def test_an_error_in_the_block_cancels(llm: LLM) -> None:
    async def main() -> None:
        tasks = []

        async def failing() -> None:
            async with AsyncLLM(llm) as a:
                tasks.append(asyncio.ensure_future(a.generate(PROMPT, ignore_eos=True)))
                await until(lambda: a.stats().running == 1)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await failing()
        assert (await tasks[0]).finish_reason == "cancelled"

    asyncio.run(main())


def test_event_loops_come_and_go(llm: LLM, alone: LLM) -> None:
    expected = alone.generate(PROMPT, max_tokens=20, seed=1).text
    a = AsyncLLM(llm)

    async def one() -> str:
        return (await a.generate(PROMPT, max_tokens=20, seed=1)).text

    assert [asyncio.run(one()) for _ in range(3)] == [expected] * 3
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(asyncio.run(one()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 4
    # A loop that ends in the middle of a text, and takes nothing down in an orderly manner.
    before = a.stats().cancelled
    loop = asyncio.new_event_loop()
    stream = a.stream(PROMPT, ignore_eos=True)
    loop.run_until_complete(anext(stream))
    loop.close()
    end = time.monotonic() + 20
    while a.stats().running:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert a.stats().cancelled == before + 1
    assert asyncio.run(one()) == expected
    with pytest.raises(StopIteration):  # closing needs no loop
        stream.aclose().send(None)
    asyncio.run(a.close())


def test_threads_use_the_model_meanwhile(llm: LLM, alone: LLM) -> None:
    expected = [alone.generate(p, max_tokens=20, seed=2).text for p in PROMPTS]
    logits = alone.logits(alone.tokenize(PROMPT))

    async def main() -> None:
        async with opened(llm) as a:
            waiting = [asyncio.to_thread(llm.generate, p, max_tokens=20, seed=2) for p in PROMPTS]
            found, texts, rows = await asyncio.gather(
                asyncio.gather(*(a.generate(p, max_tokens=20, seed=2) for p in PROMPTS)),
                asyncio.gather(*waiting),
                asyncio.to_thread(lambda: list(llm.stream_logits([llm.tokenize(PROMPT)]))),
            )
            assert [one.text for one in found] == expected
            assert [one.text for one in texts] == expected
            assert np.array_equal(np.concatenate([row for _, _, row in rows]), logits)

    asyncio.run(main())


def test_a_conversation_is_kept_while_others_are_under_way(llm: LLM, tmp_path: Path) -> None:
    ids = llm.tokenize("Tom had a dog and the dog had a bone. " * 10)

    async def main() -> None:
        async with opened(llm) as a:
            kept = await a.generate(ids, max_tokens=1)
            assert kept.usage.prompt_tokens == len(ids)
            busy = [asyncio.ensure_future(a.generate(PROMPT, max_tokens=300, ignore_eos=True)) for _ in range(3)]
            await until(lambda: a.stats().running == 3)
            assert await asyncio.to_thread(llm.save_cache, tmp_path / "kept", ids) == 64 * (len(ids) // 64)
            assert await asyncio.to_thread(llm.load_cache, tmp_path / "kept") == ids
            assert not any(task.done() for task in busy)
            assert all([len((await task).ids) == 300 for task in busy])

    asyncio.run(main())


def test_a_model_that_it_loaded_is_closed_with_it(path: Path) -> None:
    async def main() -> None:
        async with AsyncLLM.load(path, context=64, queue=1) as a:
            assert (await a.chat([{"role": "user", "content": "Hello"}], max_tokens=3)).usage.completion_tokens <= 3
            chunks = await collected(a.stream_chat([{"role": "user", "content": "Hello"}], max_tokens=3))
            assert chunks[-1].completion is not None
            assert repr(a).startswith("AsyncLLM('")
        with pytest.raises(RequestError, match="closed"):
            a.llm.generate(PROMPT)

    asyncio.run(main())


def test_a_model_that_is_closed_underneath_ends_everything(path: Path) -> None:
    async def main() -> None:
        loaded = LLM.load(path, context=512)
        a = AsyncLLM(loaded)
        tasks = [asyncio.ensure_future(a.generate(PROMPT, ignore_eos=True)) for _ in range(3)]
        await until(lambda: a.stats().running == 1 and a.stats().waiting == 2)
        await asyncio.to_thread(loaded.close)
        for task in tasks:
            with pytest.raises(RequestError, match="closed"):
                await task
        with pytest.raises(RequestError, match="closed"):
            await a.generate(PROMPT)
        await a.close()

    asyncio.run(main())


def test_a_queue_of_less_than_nothing_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="queue is -1"):
        AsyncLLM(llm, queue=-1)
