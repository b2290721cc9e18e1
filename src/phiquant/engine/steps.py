"""What a step is: who comes and goes, what is computed, and what becomes of it.

All of it happens under the engine's lock, but for what other threads leave in `arrivals` and `departures`.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.cache import PageCache
from phiquant.engine.runner import Runner
from phiquant.engine.scheduler import Chunk, Scheduler
from phiquant.engine.sequence import Sequence
from phiquant.engine.speculation import Speculation
from phiquant.engine.speed import Speed
from phiquant.engine.stats import Stats
from phiquant.engine.taking import take
from phiquant.errors import KernelError, PhiquantError, RequestError
from phiquant.kernels.ops import Executable
from phiquant.model import Rope

__all__ = ["Steps", "was_closed"]


class Steps:
    """Computes steps, one when asked.

    Args:
        executable, rope, context, unused: as `Engine`.
        cache: of the executable's pages.
        told: is called with a sequence to which something has happened, after its own listener.

    Attributes:
        arrivals: sequences that no step has seen.
        departures: those that somebody has cancelled.
        speed: what steps and sequences take.
        closed: there will be no more steps.
    """

    def __init__(
        self,
        executable: Executable,
        rope: Rope,
        cache: PageCache,
        *,
        context: int,
        unused: NDArray[np.int64],
        told: Callable[[Sequence], None],
    ) -> None:
        self._capacity, self._context, self._unused, self._told = executable.capacity, context, unused, told
        self._cache = cache
        self._scheduler = Scheduler(executable.capacity, cache, rope)
        self._runner = Runner(executable, rope)
        self._speculation = Speculation(rope, executable.capacity, context)
        self._counts, self._busy = Counter[str](), 0.0
        self.arrivals, self.departures = deque[Sequence](), deque[Sequence]()
        self.speed = Speed()
        self.closed = False

    @property
    def free(self) -> int:
        """Places that nobody has."""
        return self._capacity.sequences - len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences without a place, those included that no step has seen."""
        return len(self.arrivals) + len(self._scheduler.waiting)

    def stats(self) -> Stats:
        """Numbers of this moment; from any thread."""
        capacity, counts = self._capacity, self._counts
        return Stats(
            running=len(self._scheduler.running),
            waiting=self.waiting,
            parallel=capacity.sequences,
            pages_used=capacity.pages - self._cache.available,
            pages_known=self._cache.known,
            pages_total=capacity.pages,
            page_tokens=capacity.page_tokens,
            steps=counts["steps"],
            busy_seconds=self._busy,
            prompt_tokens=counts["prompt"],
            cached_tokens=counts["shared"],
            generated_tokens=counts["generated"],
            drafted_tokens=counts["drafted"],
            accepted_tokens=counts["accepted"],
            finished=counts["finished"],
            cancelled=counts["cancelled"],
            failed=counts["failed"],
            preempted=self._scheduler.preempted,
        )

    def settle(self) -> None:
        """Take in who came and let go who was cancelled."""
        self._take_in()
        while self.departures:
            sequence = self.departures.popleft()
            self._take_in()  # it may have come, before it was cancelled, since the last look
            if not sequence.ended:
                sequence.finish = "cancelled"
                self._end(sequence)
                self._tell(sequence)

    def _take_in(self) -> None:
        while self.arrivals:
            self._scheduler.add(self.arrivals.popleft())

    def step(self) -> bool:
        """Compute a step, if there is anything to do; returns whether there was.

        Every sequence is consistent if this is interrupted anywhere: what is not recorded is computed again.
        """
        self.settle()
        chunks: list[Chunk] = []
        begin = time.perf_counter()
        try:
            if not self._scheduler.busy or self.closed:
                return False
            if len(self._scheduler.running) == 1 and not self._scheduler.waiting:
                self._speculation.guess(self._scheduler.running[0])  # it has the step to itself
            chunks = self._scheduler.plan(self.speed.room)
            if not chunks:
                raise KernelError("no sequence can go on; this is a mistake in the scheduler")
            begin = time.perf_counter()
            results = self._runner.run(chunks)
        except Exception as error:
            told = was_closed() if self.closed else error
            if chunks:
                self._fail([chunk.sequence for chunk in chunks], told)
            else:
                self.fail_all(told)
            return True
        now = time.perf_counter()
        self._timed(chunks, now - begin)
        for chunk, rows in zip(chunks, results, strict=True):
            self._take(chunk, rows, now)
        self.settle()
        return True

    def fail_all(self, error: Exception) -> None:
        """End everybody by an error."""
        self._fail([*self._scheduler.running, *self._scheduler.waiting], error)

    def _take(self, chunk: Chunk, rows: NDArray[np.float32], now: float) -> None:
        sequence, length = chunk.sequence, len(chunk.sequence.ids)
        if not (sequence.cancelled or sequence.ended):
            if len(rows) and sequence.sampler is not None:  # before `take`: whoever sees the end looks at these
                sequence.first_token, sequence.last_token = sequence.first_token or now, now
            try:
                take(chunk, rows, context=self._context, unused=self._unused)
            except Exception as error:
                sequence.error = error
        self._counts["generated"] += len(sequence.ids) - length
        sequence.shown = len(sequence.ids)
        self._scheduler.computed(chunk)
        if sequence.ended:
            self._end(sequence)
        self._tell(sequence)

    def _end(self, sequence: Sequence) -> None:
        """It has ended: pages and place are free."""
        self._scheduler.remove(sequence)
        how = "failed" if sequence.error else "cancelled" if sequence.finish == "cancelled" else "finished"
        self._counts[how] += 1
        self._counts["prompt"] += sequence.prompt_length
        self._counts["shared"] += sequence.shared
        self._counts["drafted"] += sequence.drafted
        self._counts["accepted"] += sequence.accepted
        if sequence.begun:
            self.speed.ended(time.perf_counter() - sequence.begun)

    def _fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """Each gets an error of its own: one that several threads raise would gather their tracebacks."""
        for sequence in sequences:
            if isinstance(error, PhiquantError):
                sequence.error = type(error)(*error.args)
            else:
                sequence.error = KernelError(f"the step failed: {type(error).__name__}: {error}")
            sequence.error.__cause__ = error.__cause__ or error
            self._end(sequence)
            self._tell(sequence)

    def _tell(self, sequence: Sequence) -> None:
        if sequence.listener is not None:
            try:
                sequence.listener(sequence)
            except Exception as error:
                if not sequence.ended:
                    sequence.error = error
                    self._end(sequence)
        self._told(sequence)

    def _timed(self, chunks: list[Chunk], seconds: float) -> None:
        generating = sum(chunk.generates for chunk in chunks)
        prompt = sum(chunk.stop - chunk.start for chunk in chunks if not chunk.generates)
        self.speed.stepped(generating, prompt, seconds)
        if len(chunks) == 1 and chunks[0].sequence.generated:
            self._speculation.pace.timed(chunks[0].stop - chunks[0].start, seconds)
        self._counts["steps"] += 1
        self._busy += seconds


def was_closed() -> RequestError:
    """What whoever still wants something is told."""
    return RequestError("the model was closed while it worked")
