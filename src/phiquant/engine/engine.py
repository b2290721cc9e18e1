"""The engine: sequences in, tokens out.

All sequences share the steps. Somebody has to compute them: the thread that `start` makes, for callers that do not wait
themselves; or else whoever waits for a sequence (`advance`), so that a single caller pays for no hand-over, and several
are batched nonetheless.

Sequences come and go from any thread at any time (`submit`, `cancel`): they are left where the next step finds them.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ids
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.cache import PageCache
from phiquant.engine.sequence import Sequence
from phiquant.engine.stats import Stats
from phiquant.engine.steps import Steps, was_closed
from phiquant.errors import ContextError, QueueFull, RequestError, TokenError
from phiquant.kernels.ops import Executable
from phiquant.model import Rope

__all__ = ["Engine"]


class Engine:
    """Computes sequences of one model on one Executable; safe to use from several threads.

    Args:
        executable: the model, bound to a processor; its pages must hold at least one whole context.
        rope: rotations of the model.
        context: most tokens of a sequence, prompt included.
        unused: ids that are never sampled, int64 [count].
    """

    def __init__(self, executable: Executable, rope: Rope, context: int, unused: NDArray[np.int64]) -> None:
        capacity = executable.capacity
        room = capacity.page_tokens * min(capacity.pages, capacity.pages_per_sequence)
        if room < context or capacity.outputs < capacity.sequences:
            raise ContextError(f"a context of {context} tokens does not fit {capacity}")
        self.context = context
        self._executable, self._rope = executable, rope
        self._cache = PageCache(capacity.pages, capacity.page_tokens, executable.copy_page)
        self._steps = Steps(executable, rope, self._cache, context=context, unused=unused, told=self._wake)
        self._lock = threading.Lock()  # of a step, and of all that steps change
        self._turn = threading.Lock()  # held by whoever waits for the lock to do something between two steps
        self._door = threading.Lock()  # of the queue's length, and of the thread
        self._followers: dict[threading.Event, Sequence] = {}  # who waits, and for what
        self._work_came = threading.Event()
        self._thread: threading.Thread | None = None
        self._users = 0  # who want the thread

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self._executable.threads

    @property
    def parallel(self) -> int:
        """Most sequences of a step."""
        return self._executable.capacity.sequences

    def check(self, sequence: Sequence) -> None:
        """Refuse, before any work, a sequence that cannot be computed: TokenError, ContextError."""
        vocabulary = self._executable.program.vocab_size
        if min(sequence.ids) < 0 or max(sequence.ids) >= vocabulary:
            bad = next(i for i in sequence.ids if not 0 <= i < vocabulary)
            raise TokenError(f"token id {bad} is outside the vocabulary of {vocabulary}")
        room = self.context if sequence.wants_all_logits else self.context - 1
        if len(sequence.ids) > room:
            raise ContextError(
                f"a prompt of {len(sequence.ids)} tokens does not fit the context of {self.context}; "
                "shorten it, or load the model with a larger context"
            )

    def submit(self, *sequences: Sequence, queue: int | None = None) -> None:
        """Queue sequences, all or none, without waiting for a step.

        Raises:
            TokenError, ContextError: as `check`.
            QueueFull: more than `queue` sequences would wait for a place.
            RequestError: the engine was closed.
        """
        for sequence in sequences:
            self.check(sequence)
            if sequence.wants_all_logits and sequence.sink is None:
                sequence.logits = np.empty((len(sequence.ids), self._executable.program.vocab_size), np.float32)
        with self._door:
            if self._steps.closed:
                raise was_closed()
            if queue is not None and self.waiting + len(sequences) > queue + self._steps.free:
                seconds = self._steps.speed.retry_after(self.parallel)
                raise QueueFull(f"{self.waiting} requests wait already; try again in {seconds:.0f} s", seconds)
            for sequence in sequences:
                sequence.submitted = time.perf_counter()
                self._steps.arrivals.append(sequence)
        self._work_came.set()

    def cancel(self, *sequences: Sequence) -> None:
        """Forget sequences, whatever their state, without waiting for a step; those that ended stay as they ended."""
        for sequence in sequences:
            if not sequence.ended:
                sequence.cancelled = True
                self._steps.departures.append(sequence)
        self._work_came.set()
        self._hand_over()

    @property
    def waiting(self) -> int:
        """Sequences without a place, those included that no step has seen."""
        return self._steps.waiting

    def stats(self) -> Stats:
        """Numbers of this moment; a step that is running may be half in them."""
        return self._steps.stats()

    # What was computed can be kept, and put back.

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the cache."""
        return self._executable.page_bytes

    @property
    def page_tokens(self) -> int:
        """Tokens of a page of the cache."""
        return self._executable.capacity.page_tokens

    @contextmanager
    def kept_pages(self, ids: Ids[int]) -> Iterator[list[int]]:
        """The full pages that the cache holds of a sequence's beginning, in order; meanwhile nobody writes them."""
        with self._alone():
            table, _ = self._cache.adopt_whole(ids, self._root(ids))
        try:
            yield list(table.pages)
        finally:
            with self._alone():
                self._cache.release(table)

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """The bytes of a page, uint8 [page_bytes]."""
        with self._alone():
            return self._executable.read_page(page)

    def write_pages(self, ids: Ids[int], pages: Iterable[NDArray[np.uint8]]) -> None:
        """Put pages that `kept_pages` gave of the same `ids` into the cache.

        Raises:
            TokenError, ContextError: the engine could not have such a sequence.
            RequestError: others use too much of the cache.
        """
        self.check(Sequence(ids, None))
        size = self.page_tokens
        with self._alone():
            table, known = self._cache.adopt_whole(ids, self._root(ids))
        try:
            for start, data in zip(range(0, len(ids) - size + 1, size), pages, strict=False):
                if start < known:
                    continue
                with self._alone():
                    if not self._cache.grow(table, start + size):
                        raise RequestError("the cache has no room, because others use it; try again later")
                    self._executable.write_page(table.pages[start // size], data)
                    self._cache.record(table, ids, start, start + size)
        finally:
            with self._alone():
                self._cache.release(table)

    def _root(self, ids: Ids[int]) -> bytes:
        return self._rope.regime(len(ids)).value.encode()

    # Who computes.

    def advance(self, sequence: Sequence, seen: int) -> None:
        """Work, or wait for whoever does, until the sequence has more than `seen` tokens or has ended.

        Raises what went wrong with it.
        """
        self._drive(sequence, lambda: sequence.shown > seen)

    def step(self, sequence: Sequence) -> None:
        """The same for one step with this sequence in it."""
        before = sequence.computed, sequence.shown
        self._drive(sequence, lambda: (sequence.computed, sequence.shown) != before)

    def _drive(self, sequence: Sequence, done: Callable[[], bool]) -> None:
        came = threading.Event()
        self._followers[came] = sequence
        try:
            while not sequence.ended and not done():
                came.clear()
                with self._turn:
                    pass
                if self._thread is None and self._lock.acquire(blocking=False):
                    try:
                        if not (sequence.ended or done() or self._steps.step()):
                            if self._steps.closed:  # and whoever closes has not come to tell the sequence yet
                                raise was_closed()
                            raise RequestError("the engine was asked to go on with a sequence that it does not know")
                    finally:
                        self._lock.release()
                        self._hand_over()
                elif not (sequence.ended or done()):
                    self._work_came.set()
                    came.wait()
        finally:
            del self._followers[came]
        if sequence.error is not None:
            raise sequence.error

    def start(self) -> None:
        """Have a thread compute, until `stop` has been called as often as this."""
        with self._door:
            if self._steps.closed:
                raise was_closed()
            self._users += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="phiquant-engine", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """See `start`; sequences that are left go on only if somebody waits for them."""
        with self._door:
            self._users = max(0, self._users - 1)
            thread = self._thread if self._users == 0 else None
            if thread is not None:
                self._thread = None
        if thread is not None:
            self._work_came.set()
            if thread is not threading.current_thread():
                thread.join()
            self._hand_over()

    def _loop(self) -> None:
        me = threading.current_thread()
        while self._thread is me and not self._steps.closed:
            self._work_came.clear()
            try:
                if self.work():
                    continue
            except Exception as error:  # nothing that a sequence is to blame for, so none of them can be trusted
                with self._alone():
                    self._steps.fail_all(error)
                continue
            if self._thread is me and not self._steps.closed:
                self._work_came.wait()
        self._work_came.set()  # a thread that was started meanwhile looks again: the call may have been for it

    def work(self) -> bool:
        """Compute one step, if there is anything to do; returns whether there was."""
        with self._turn:
            pass  # others first: a thread that lets the lock go and takes it again leaves them no time
        try:
            with self._lock:
                return self._steps.step()
        finally:
            self._hand_over()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Between two steps."""
        try:
            with self._turn, self._lock:
                yield
        finally:
            self._hand_over()

    def _hand_over(self) -> None:
        """The lock is free, for all that is known here: let go who was cancelled meanwhile, and let others work."""
        while self._steps.departures and self._lock.acquire(blocking=False):
            try:
                self._steps.settle()
            finally:
                self._lock.release()
        if self._thread is None:
            for came in self._followers.copy():
                came.set()

    def _wake(self, sequence: Sequence) -> None:
        """Who waits for this one shall look at it."""
        for came, followed in self._followers.copy().items():
            if followed is sequence:
                came.set()

    def close(self) -> None:
        """End the running step and the thread, and free the processor's memory and threads."""
        with self._door:
            self._steps.closed = True
            thread, self._thread = self._thread, None
        self._executable.cancel()
        self._work_came.set()
        with self._alone():
            self._steps.settle()
            self._steps.fail_all(was_closed())
            self._executable.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._hand_over()
