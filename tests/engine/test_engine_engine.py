"""The engine with a thread of its own: sequences come and go from anywhere, and get what they would get alone."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from engine_checker import GREEDY, VOCABULARY, Checker, engine, expected, following, run

from phiquant.engine import Engine, Sampling, Sequence
from phiquant.engine.speed import LEAST, Speed
from phiquant.errors import ContextError, KernelError, QueueFull, RequestError


@pytest.fixture
def driven() -> Iterator[tuple[Engine, Checker]]:
    e, checker = engine(sequences=4, pages=40)
    e.start()
    yield e, checker
    e.stop()
    assert not [t for t in threading.enumerate() if t.name == "phiquant-engine"]


class Told:
    """A listener that notes what it was told, and by whom."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.threads: set[str] = set()
        self.ended = threading.Event()

    def __call__(self, sequence: Sequence) -> None:
        self.lengths.append(sequence.shown)
        self.threads.add(threading.current_thread().name)
        if sequence.ended:
            self.ended.set()


def test_a_listener_is_told_of_every_token(driven: tuple[Engine, Checker]) -> None:
    e, _ = driven
    told = Told()
    sequence = Sequence([1, 2, 3], GREEDY, max_tokens=6, listener=told)
    e.submit(sequence)
    assert told.ended.wait(20)
    assert sequence.generated == expected([1, 2, 3], 6)
    assert told.lengths == [4, 5, 6, 7, 8, 9]
    assert told.threads == {"phiquant-engine"}
    assert 0 < sequence.submitted <= sequence.begun <= sequence.first_token <= sequence.last_token


def test_threads_wait_for_the_engine(driven: tuple[Engine, Checker]) -> None:
    e, checker = driven
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(run, e, [i] * (5 + 9 * i), 20) for i in range(8)]
        assert [job.result().generated for job in jobs] == [expected([i] * (5 + 9 * i), 20) for i in range(8)]
    assert max(len(s.pages) for s in checker.steps) > 1
    assert e.stats().finished == 8


def test_a_thread_that_waits_goes_on_when_the_engine_stops_and_when_it_starts_again() -> None:
    e, checker = engine(sequences=2, pages=20)
    checker.pause = 0.002
    e.start()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, e, [i, i], 100) for i in (1, 2)]
        for _ in range(5):
            time.sleep(0.01)
            e.stop()
            time.sleep(0.01)
            e.start()
        assert [job.result().generated for job in jobs] == [expected([i, i], 100) for i in (1, 2)]
    e.stop()


def test_submitting_and_cancelling_do_not_wait_for_a_step(driven: tuple[Engine, Checker]) -> None:
    e, checker = driven
    checker.gate = threading.Event()
    first, second = Sequence([1], GREEDY, max_tokens=3), Sequence([2], GREEDY, max_tokens=3)
    e.submit(first)
    assert checker.entered.wait(20)
    e.submit(second)
    e.cancel(first)
    assert first.cancelled
    assert not first.ended, "the step that it is in goes on"
    checker.gate.set()
    e.advance(second, 3)
    assert first.finish == "cancelled"
    assert first.generated == [], "nothing comes after it was cancelled"


def test_the_error_of_a_step_goes_to_those_in_it_alone(driven: tuple[Engine, Checker]) -> None:
    e, checker = driven
    checker.gate, checker.failure = threading.Event(), KernelError("a kernel reported error 7")
    told = Told()
    jobs = [Sequence([i], GREEDY, max_tokens=3, listener=told) for i in (1, 2, 3)]
    e.submit(*jobs[:2])
    assert checker.entered.wait(20)
    checker.fail_at = len(checker.steps)  # the step that runs
    e.submit(jobs[2])
    checker.gate.set()
    for job in jobs[:2]:
        with pytest.raises(KernelError, match="error 7"):
            e.advance(job, 1)
    assert jobs[0].error is not jobs[1].error, "each has its own"
    e.advance(jobs[2], 3)
    assert jobs[2].generated == expected([3], 3)
    assert run(e, [1], 3).generated == expected([1], 3), "it goes on"
    assert e.stats().failed == 2


def test_an_unforeseen_error_is_told_as_one_of_the_kernel(driven: tuple[Engine, Checker]) -> None:
    e, checker = driven
    checker.fail_at, checker.failure = 1, ZeroDivisionError("division by zero")
    with pytest.raises(KernelError, match="ZeroDivisionError: division by zero"):
        run(e, [1], 3)
    assert run(e, [1], 3).generated == expected([1], 3)


def test_what_a_mask_or_a_listener_raises_is_its_own_sequence_s(driven: tuple[Engine, Checker]) -> None:
    e, _ = driven

    class Broken:
        def allowed(self) -> None:
            raise ValueError("the mask is broken")

        def accept(self, token: int) -> None: ...

    def broken(sequence: Sequence) -> None:
        raise ValueError("the listener is broken")

    good = Sequence([5], GREEDY, max_tokens=30)
    bad = [Sequence([6], GREEDY, mask=Broken()), Sequence([7], GREEDY, listener=broken)]
    e.submit(good, *bad)
    for sequence, what in zip(bad, ("mask", "listener"), strict=True):
        with pytest.raises(ValueError, match=f"the {what} is broken"):
            e.advance(sequence, 100)
    e.advance(good, 30)
    assert good.generated == expected([5], 30)


def test_a_listener_may_cancel_and_submit(driven: tuple[Engine, Checker]) -> None:
    e, _ = driven
    told = Told()
    after = Sequence([9], GREEDY, max_tokens=2, listener=told)

    def listener(sequence: Sequence) -> None:
        if len(sequence.generated) == 3 and not sequence.cancelled:
            e.cancel(sequence)
            e.submit(after)

    first = Sequence([8], GREEDY, listener=listener)
    e.submit(first)
    assert told.ended.wait(20)
    assert first.finish == "cancelled"
    assert first.generated == expected([8], 3)
    assert after.generated == expected([9], 2)


def test_a_bound_on_the_queue(driven: tuple[Engine, Checker]) -> None:
    e, checker = driven
    run(e, [1], 2)
    checker.gate = threading.Event()
    jobs = [Sequence([i], GREEDY, max_tokens=2) for i in range(7)]
    e.submit(jobs[0], queue=2)
    assert checker.entered.wait(20)
    for job in jobs[1:6]:
        e.submit(job, queue=2)
    with pytest.raises(QueueFull, match="5 requests wait already; try again in 1 s") as caught:
        e.submit(jobs[6], queue=2)
    assert caught.value.retry_after == 1
    with pytest.raises(QueueFull):
        e.submit(jobs[6], Sequence([9], GREEDY), queue=3)  # both or none
    e.submit(jobs[6])  # who does not mind waiting
    checker.gate.set()
    for i, job in enumerate(jobs):
        e.advance(job, 2)
        assert job.generated == expected([i], 2)


def test_closing_ends_everybody() -> None:
    e, checker = engine(sequences=2, pages=20)
    e.start()
    checker.gate = threading.Event()
    told = [Told() for _ in range(5)]
    for i in range(5):
        e.submit(Sequence([i], GREEDY, listener=told[i]))
    assert checker.entered.wait(20)
    closer = threading.Thread(target=e.close)
    closer.start()
    time.sleep(0.05)
    checker.gate.set()
    closer.join(20)
    assert not closer.is_alive()
    assert all(one.ended.wait(20) for one in told)
    with pytest.raises(RequestError, match="closed"):
        e.submit(Sequence([1], GREEDY))
    with pytest.raises(RequestError, match="closed"):
        e.start()
    assert not [t for t in threading.enumerate() if t.name == "phiquant-engine"]


@pytest.mark.parametrize("border", [1 << 30, 50])
@pytest.mark.parametrize("pages", [11, 16, 40])
def test_a_crowd_that_comes_and_goes_gets_what_each_would_get_alone(pages: int, border: int) -> None:
    """Batched, preempted, shared, cancelled and resumed, and across the border of LongRoPE."""
    e, checker = engine(border, sequences=4, pages=pages, tokens=40)
    e.start()
    rng = random.Random(pages)
    jobs, ended = [], []
    for i in range(60):
        told = Told()
        prompt = [rng.randrange(3)] * rng.randrange(1, 70) + [
            rng.randrange(VOCABULARY) for _ in range(rng.randrange(30))
        ]
        jobs.append(Sequence(prompt, GREEDY, max_tokens=rng.randrange(1, 60), listener=told))
        ended.append(told.ended)
        e.submit(jobs[-1])
        if i % 3 == 2:
            e.cancel(jobs[rng.randrange(len(jobs))])
        if i % 10 == 9:
            time.sleep(0.01)
    assert all(one.wait(60) for one in ended)
    e.stop()
    for job in jobs:
        assert job.generated == expected(job.ids[: job.prompt_length], len(job.generated), border)
        assert job.finish == "cancelled" if job.cancelled and job.finish != "length" else job.finish == "length"
    stats = e.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert stats.finished + stats.cancelled == 60
    assert stats.failed == 0
    assert max(len(set(s.slots.tolist())) for s in checker.steps) > 1
    if pages == 11:
        assert stats.preempted > 0


def test_a_shared_beginning_is_computed_once_also_by_those_that_come_together() -> None:
    e, checker = engine(sequences=4, pages=40, tokens=24)
    shared = [7 * i % VOCABULARY for i in range(70)]
    prompts = [[*shared, i, i] for i in range(4)]
    jobs = [Sequence(prompt, GREEDY, max_tokens=5) for prompt in prompts]
    e.submit(*jobs)
    for job in jobs:
        e.advance(job, 76)
    assert [job.generated for job in jobs] == [expected(prompt, 5) for prompt in prompts]
    prompt_tokens = sum(len(s.tokens) for s in checker.steps) - 4 * 4
    assert prompt_tokens <= 72 + 3 * (72 - 64), "whole pages are computed once"
    assert [job.shared for job in jobs] == [0, 70, 70, 70], "and what is in a page that others fill is copied"


def test_choices_of_one_prompt_share_it() -> None:
    e, checker = engine(sequences=4, pages=40, tokens=24)
    prompt = [5 * i % VOCABULARY for i in range(60)]
    free = [Sampling(1.0, top_k=0, top_p=1, min_p=0, seed=seed) for seed in (3, 4, 5)]
    alone = [run_with(engine()[0], prompt, s) for s in free]
    jobs = [Sequence(prompt, s, max_tokens=20) for s in free]
    e.submit(*jobs)
    for job in jobs:
        e.advance(job, 79)
    assert [job.generated for job in jobs] == alone
    assert sum(len(s.tokens) for s in checker.steps) == 60 + 2 + 3 * 19
    together = [s for s in checker.steps if len(s.pages) == 3]
    used = {tuple(row[:3].tolist()) for s in together for row in s.pages}
    assert len(used) == 1, "the first three pages are the same for all"


def run_with(e: Engine, prompt: list[int], sampling: Sampling) -> list[int]:
    sequence = Sequence(prompt, sampling, max_tokens=20)
    e.submit(sequence)
    e.advance(sequence, len(prompt) + 19)
    return sequence.generated


def test_who_does_not_want_to_share_computes_all() -> None:
    e, checker = engine()
    for _ in range(2):
        sequence = Sequence([3] * 40, GREEDY, max_tokens=1, reuse=False)
        e.submit(sequence)
        e.advance(sequence, 40)
        assert sequence.shared == 0
    assert sum(len(s.tokens) for s in checker.steps) == 80


def test_prompts_take_little_of_a_step_while_others_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Speed, "room", lambda self, prompts: 8 * (1 + prompts))
    e, checker = engine(sequences=3, pages=40, tokens=64)
    talking = Sequence([1], GREEDY, max_tokens=150)
    e.submit(talking)
    e.advance(talking, 3)
    before, length = len(checker.steps), len(talking.ids)
    long, short = Sequence([2] * 100, GREEDY, max_tokens=1), Sequence([3] * 8, GREEDY, max_tokens=1)
    e.submit(long)
    e.submit(short)
    e.advance(short, 8)
    assert len(checker.steps) - before == 1, "a short prompt does not wait for a long one"
    e.advance(long, 100)
    during = checker.steps[before:]
    assert [len(s.tokens) for s in during[:3]] == [25, 17, 17], "more while two wait"
    assert max(len(s.tokens) for s in during[3:]) == 17
    assert len(talking.ids) - length == len(during), "a token in every step"
    e.cancel(talking)
    last = Sequence([4] * 100, GREEDY, max_tokens=1)
    e.submit(last)
    e.advance(last, 100)
    assert [len(s.tokens) for s in checker.steps[-2:]] == [64, 36], "alone it takes whole batches"


def test_short_prompts_do_not_starve_a_long_one() -> None:
    e, checker = engine(sequences=4, pages=60, tokens=32)
    long = Sequence([2] * 120, GREEDY, max_tokens=1)
    e.submit(long)
    shorts = [Sequence([3 + i % 5, i % 7] * 5, GREEDY, max_tokens=1) for i in range(40)]
    e.submit(*shorts)
    e.advance(long, 120)
    assert len(checker.steps) <= 120 // (32 // 2) + 1
    done = sum(short.ended for short in shorts)
    assert 5 <= done < 20, "some went first, and the others wait"
    for short in shorts:
        e.advance(short, 10)
        assert short.generated == expected(short.ids[:10], 1)


def test_what_fits_a_step_follows_from_what_steps_took() -> None:
    speed = Speed()
    assert speed.room(1) >= LEAST
    speed.stepped(0, 512, 0.512)  # 1 ms a token
    assert speed.room(1) == 192, "200 would fit, in whole tiles 192"
    assert speed.room(3) == 400, "twice the time for two more"
    assert speed.room(50) == 992, "a second is the most"
    for _ in range(50):
        speed.stepped(4, 0, 0.05)  # a step of others takes 50 ms by itself
    assert speed.room(1) == 144
    for _ in range(100):
        speed.stepped(4, 16, 0.05 + 16 * 0.002)  # prompts have become slower
    assert speed.room(1) == 64
    for _ in range(100):
        speed.stepped(4, 0, 5.0)
    assert speed.room(1) == speed.room(100) == LEAST, "however slow the machine"
    assert speed.retry_after(4) == 1
    speed.ended(40)
    assert speed.retry_after(4) == 10


def test_hidden_states_beside_logits() -> None:
    e, checker = engine(sequences=3, pages=40, outputs=10)
    rows: list[tuple[int, list[list[float]]]] = []
    prompt = [i % VOCABULARY for i in range(30)]
    hidden = Sequence(prompt, None, hidden=True, sink=lambda at, found: rows.append((at, found.tolist())))
    text, logits = Sequence([4], GREEDY, max_tokens=40), Sequence([5] * 20, None)
    e.submit(text, hidden, logits)
    e.advance(text, 40)
    e.advance(hidden, 30)
    e.advance(logits, 20)
    assert text.generated == expected([4], 40)
    assert [at for at, _ in rows] == list(np.cumsum([0, *[len(found) for _, found in rows]])[:-1])
    assert [row for _, found in rows for row in found] == [[sum(prompt[: i + 1]), i + 1] for i in range(30)]
    assert logits.logits is not None
    assert {s.hidden for s in checker.steps} == {True, False}
    with pytest.raises(ContextError):
        e.submit(Sequence([1] * 161, None, hidden=True))


def test_a_sequence_on_hold_lets_others_go_on(driven: tuple[Engine, Checker]) -> None:
    e, _ = driven
    found: list[int] = []

    def sink(position: int, rows: np.ndarray) -> None:
        found.append(position)
        slow.hold = True

    slow = Sequence([1] * 60, None, sink=sink)
    e.submit(slow)
    assert run(e, [2], 30).generated == expected([2], 30)
    assert found == [0]
    while slow.finish is None:
        slow.hold = False
        e.step(slow)
    assert len(found) == 3


def test_a_sequence_on_hold_gives_its_place_to_others_and_no_row_comes_twice() -> None:
    e, _ = engine()
    prompt = [i % VOCABULARY for i in range(90)]
    found: list[tuple[int, int]] = []

    def sink(position: int, rows: np.ndarray) -> None:
        found.extend((position + i, int(row.argmax())) for i, row in enumerate(rows))
        slow.hold = True

    slow = Sequence(prompt, None, sink=sink, first=5)
    e.submit(slow)
    while slow.finish is None:
        slow.hold = False
        e.step(slow)
        assert run(e, [2] * 130, 20).generated == expected([2] * 130, 20), "it needs the place, and all pages"
    assert found == [(i, following(prompt[: i + 1], False)) for i in range(5, 90)]
    assert e.stats().preempted >= 3


@pytest.mark.parametrize("hidden", [False, True])
def test_rows_come_once_also_where_pages_run_out(hidden: bool) -> None:
    e, _ = engine(sequences=4, pages=10, tokens=40, outputs=30)
    prompts = [[(i + k) % VOCABULARY for i in range(60 + 20 * k)] for k in range(4)]
    found: list[list[int]] = [[] for _ in prompts]

    def sink(k: int, position: int, rows: np.ndarray) -> None:
        found[k].extend(range(position, position + len(rows)))

    jobs = [Sequence(prompt, None, hidden=hidden, sink=partial(sink, k)) for k, prompt in enumerate(prompts)]
    text = Sequence([1], GREEDY, max_tokens=150)
    e.submit(text, *jobs)
    e.advance(text, 150)
    for job in jobs:
        e.advance(job, 1000)
    assert found == [list(range(len(prompt))) for prompt in prompts]
    assert text.generated == expected([1], 150)


def test_pages_are_kept_and_put_back() -> None:
    e, checker = engine(pages=20)
    text = run(e, [6] * 40, 20)
    with e.kept_pages(text.ids) as pages:
        assert len(pages) == 3
        data = [e.read_page(page) for page in pages]
    with e.kept_pages([1, 2, 3]) as none:
        assert none == []
    other = Engine(checker, e._rope, 160, np.array([], np.int64))  # knows nothing of what the cache holds
    other.write_pages(text.ids, iter(data))
    with other.kept_pages(text.ids) as again:
        assert len(again) == 3
    more = run(other, text.ids, 5)
    assert more.shared == 48
    assert more.generated == expected(text.ids, 5)
    assert other.stats().pages_used == 0
