"""Compiling beside other work: what is done, in which threads, and how it ends."""

import threading
import time

import pytest

from phiquant.kernels.cpu import ahead


def compilers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("phiquant-compiler")]


def test_jobs_are_done_by_other_threads_each_once_and_before_the_end() -> None:
    done: list[tuple[int, int]] = []
    jobs = [lambda i=i: done.append((i, threading.get_ident())) for i in range(50)]
    with ahead.compiling(jobs, 3):
        pass
    assert sorted(i for i, _ in done) == list(range(50))
    assert threading.get_ident() not in {thread for _, thread in done}
    assert not compilers()


@pytest.mark.parametrize(("asked", "got"), [(1, 1), (3, 3), (64, ahead.THREADS)])
def test_there_are_as_many_threads_as_asked_for_up_to_a_few(asked: int, got: int) -> None:
    meeting = threading.Barrier(got, timeout=30)  # nobody leaves a job before all are in one
    with ahead.compiling([meeting.wait] * got, asked):
        pass
    assert not meeting.broken
    seen: list[int] = []
    with ahead.compiling([lambda: seen.append(len(compilers()))] * 5, asked):
        pass
    assert max(seen) <= got


def test_a_job_that_fails_stops_neither_the_others_nor_the_block() -> None:
    def broken() -> None:
        raise ValueError("told to who asks again")

    done: list[int] = []
    with ahead.compiling([broken, lambda: done.append(1), broken, lambda: done.append(2)], 1):
        done.append(0)
    assert sorted(done) == [0, 1, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_block_that_raises_waits_for_what_has_begun_and_leaves_the_rest(error: type[BaseException]) -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go.wait(30)
        time.sleep(0.02)
        done.append(1)

    def interrupted() -> None:
        with ahead.compiling([first, lambda: done.append(2)], 1):
            assert begun.wait(30)
            threading.Timer(0.05, go.set).start()
            raise error

    with pytest.raises(error):
        interrupted()
    assert done == [1]
    assert not compilers()


def test_a_thread_that_cannot_be_started_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"), ahead.compiling([time.time] * 3, 2):
        raise AssertionError("the block is not entered")
    assert not started[0].is_alive()
