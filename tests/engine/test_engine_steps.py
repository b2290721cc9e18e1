"""What happens between two steps, and at their edges, while others come, go, wait, interrupt and close."""

import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_checker import GREEDY, engine, expected, run

from phiquant.engine import Sequence
from phiquant.errors import RequestError


def test_who_comes_and_is_cancelled_between_two_looks_is_let_go_once() -> None:
    e, checker = engine()
    late = Sequence([1], GREEDY)

    class Departures(deque[Sequence]):
        """Looked at, for the first time, after those who came."""

        def __bool__(self) -> bool:
            if not late.submitted:
                e.submit(late)
                e.cancel(late)
            return len(self) > 0

    e._steps.departures = Departures()
    while e.work():
        pass
    assert late.finish == "cancelled"
    assert checker.steps == []
    stats = e.stats()
    assert (stats.cancelled, stats.waiting, stats.running) == (1, 0, 0)


def test_nothing_comes_after_the_end_where_an_interrupt_kept_it_from_being_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    e, _ = engine(sequences=2, pages=20)
    short, long = Sequence([1], GREEDY, max_tokens=3), Sequence([2], GREEDY, max_tokens=9)
    e.submit(short, long)
    computed = e._steps._scheduler.computed

    def interrupted(chunk: object) -> None:
        if short.finish is not None:
            monkeypatch.setattr(e._steps._scheduler, "computed", computed)
            raise KeyboardInterrupt
        computed(chunk)  # type: ignore[arg-type]

    monkeypatch.setattr(e._steps._scheduler, "computed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        e.advance(long, 10)
    e.advance(long, 9)
    assert short.generated == expected([1], 3)
    assert long.generated == expected([2], 9)
    assert (e.stats().running, e.stats().finished) == (0, 2)


def test_several_threads_may_wait_for_one_sequence() -> None:
    for _ in range(20):
        e, checker = engine(sequences=2, pages=20)
        checker.pause = 0.0005
        one = Sequence([1], GREEDY, max_tokens=40)
        e.submit(one)
        with ThreadPoolExecutor(5) as pool:
            waits = [pool.submit(e.advance, one, seen) for seen in (2, 40, 3, 40)]
            other = pool.submit(run, e, [2], 20)
            for wait in waits:
                wait.result(20)
            assert other.result(20).generated == expected([2], 20)
        assert one.generated == expected([1], 40)


def test_who_goes_on_while_the_engine_closes_is_told_so() -> None:
    e, _ = engine()
    sequence = Sequence([1], GREEDY)
    e.submit(sequence)

    class Closing:
        """A lock that somebody gets just before who closes does."""

        def __init__(self) -> None:
            self._lock = threading.Lock()

        def acquire(self, blocking: bool = True) -> bool:
            e._steps.closed = True
            return self._lock.acquire(blocking)

        def release(self) -> None:
            self._lock.release()

    e._lock = Closing()  # type: ignore[assignment]
    with pytest.raises(RequestError, match="the model was closed while it worked"):
        e.advance(sequence, 1)
