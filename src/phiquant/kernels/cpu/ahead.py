"""Kernels compiled by threads of their own, while the thread that will ask for them does something else.

    with compiling(jobs, threads=2):
        ...  # arrange weights, then ask for the kernels: they are there, or one waits for them

Nothing is said here of a job that fails: who needs its kernel asks for it again, and gets the exception where it can
be handled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator

__all__ = ["THREADS", "compiling"]

THREADS = 4  # at most: a fifth of compiling holds the interpreter's lock


@contextlib.contextmanager
def compiling(jobs: Iterable[Callable[[], object]], threads: int) -> Iterator[None]:
    """Does jobs, in order, by at most so many threads, which have ended when the block has.

    A block that ends well waits for all jobs; one that raises, for those that have begun.
    """
    left, stopped = iter(tuple(jobs)), threading.Event()
    lock = threading.Lock()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                job = next(left, None)
            if job is None:
                return
            with contextlib.suppress(Exception):
                job()

    # No daemons: the interpreter must not go away under a thread that is in LLVM.
    workers = [threading.Thread(target=work, name=f"phiquant-compiler-{i}") for i in range(min(threads, THREADS))]
    started: list[threading.Thread] = []
    try:
        for worker in workers:
            worker.start()
            started.append(worker)
        yield
    except BaseException:
        stopped.set()
        raise
    finally:
        for worker in started:
            worker.join()
