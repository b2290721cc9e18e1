"""Who computes what in the next step.

Continuous batching with one path for all: a sequence that is generating has one token to compute, a new one has its
prompt, one that lost its pages has everything again. Sequences have places in the order in which they came.

    places     a sequence gets one when there is one and pages for what it has; or when it would be the only one
    a step     first a token for everybody who is generating, then prompts: short ones in half of the room at most,
               then in order; one that begins as an older one does waits for that one's pages
    pages      run out: the youngest gives its own up and computes them again later
"""

from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from time import perf_counter

from phiquant.engine.cache import PageCache, common_length
from phiquant.engine.sequence import Sequence
from phiquant.kernels.ops import Capacity
from phiquant.model import Regime, Rope

__all__ = ["Chunk", "Scheduler"]


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `stop` - 1 of a sequence, to be computed in one step; the last ones may be guesses."""

    sequence: Sequence
    start: int
    stop: int
    regime: Regime
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """The tokens to be computed."""
        return [*self.sequence.ids[self.start : self.stop], *self.draft]

    @property
    def outputs(self) -> range:
        """Positions whose rows are wanted: all from the first that is, or the last one if the sequence ends here."""
        if self.sequence.wants_all_logits:
            return range(min(max(self.start, self.sequence.first), self.stop), self.stop)
        if self.draft:
            return range(self.start, self.stop)
        return range(self.stop - 1, self.stop) if self.stop == len(self.sequence.ids) else range(0)

    @property
    def generates(self) -> bool:
        """Whether it goes on with a text, as opposed to reading one."""
        return bool(self.draft) or self.stop - self.start == 1


class Scheduler:
    """Plans steps within a capacity; sequences wait until there is a place, and give their pages up when they must.

    Attributes:
        waiting, running: without and with a place, in order of arrival.
        preempted: how often a sequence had to give its pages up.
    """

    def __init__(self, capacity: Capacity, cache: PageCache, rope: Rope) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preempted = 0
        self._capacity, self._cache, self._rope = capacity, cache, rope
        self._regimes: dict[Sequence, Regime] = {}
        self._follows: dict[Sequence, tuple[Sequence, int]] = {}  # who computes a beginning of so many tokens for it
        self._arrivals = 0
        self._hidden = False  # what the last step gave
        self._refused: tuple[Sequence, int] | None = None  # who got no place, and how many pages were available

    def add(self, sequence: Sequence) -> None:
        """At the end of the queue."""
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody wants it any more; its pages stay known to the cache."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._vacate(sequence)

    @property
    def busy(self) -> bool:
        """Whether there is anything that `plan` would plan."""
        return any(not sequence.hold for sequence in chain(self.running, self.waiting))

    def plan(self, room: Callable[[int], int]) -> list[Chunk]:
        """The next step; empty if there is nothing to do.

        `room`: most tokens of prompts in a step in which others generate, for so many prompts.
        """
        self._admit()
        for sequence in self.running:
            self._cross_border(sequence)
        ready = [s for s in self.running if not s.hold and not self._waits(s)]
        if len({s.hidden for s in ready}) == 2:
            self._hidden = not self._hidden  # a step gives either; they take turns
            ready = [s for s in ready if s.hidden == self._hidden]
        elif ready:
            self._hidden = ready[0].hidden
        tokens, outputs = self._capacity.tokens, self._capacity.outputs
        single, prompts = [s for s in ready if s.pending == 1], [s for s in ready if s.pending > 1]
        if any(s.pending == 1 for s in self.running):
            tokens = min(tokens, len(single) + room(len(prompts)))
        chunks: list[Chunk] = []
        for sequence in [*single, *_in_turn(prompts, tokens - len(single))]:
            if sequence not in self.running:
                continue  # it lost its pages to an older one
            draft = sequence.draft if sequence.pending == 1 and len(self.running) == 1 else ()
            count = min(sequence.pending + len(draft), tokens)
            if sequence.wants_all_logits:
                count = min(count, outputs + max(sequence.first - sequence.computed, 0))
            if count == 0 or outputs == 0:
                break
            if not self._make_room(sequence, count, [chunk.sequence for chunk in chunks]):
                continue
            start = sequence.computed
            chunk = Chunk(sequence, start, start + count, self._regimes[sequence], draft)
            chunks.append(chunk)
            tokens -= count
            outputs -= len(chunk.outputs)
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the cache; those of wrong guesses lie beyond what counts as computed."""
        sequence = chunk.sequence
        if sequence.table is not None:
            stop = min(chunk.stop, len(sequence.ids) - 1) if chunk.draft else chunk.stop
            self._cache.record(sequence.table, sequence.ids, chunk.start, stop)
            sequence.computed = stop

    def _admit(self) -> None:
        """Give places to those that waited longest, unless they would take pages that others are going to need."""
        while (sequence := next((s for s in self.waiting if not s.hold), None)) is not None:
            held = any(s.hold for s in self.running)
            if self._refused == (sequence, self._cache.available) and self.running and not held:
                return
            if len(self.running) == self._capacity.sequences and not self._displace():
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=lambda s: s.arrival)
            self._begin(sequence)
            while (short := self._lacks_pages(sequence)) and self._displace():
                pass
            if short and len(self.running) > 1:
                self.running.remove(sequence)
                self._vacate(sequence)
                self.waiting.appendleft(sequence)
                self._refused = sequence, self._cache.available
                return
            sequence.begun = sequence.begun or perf_counter()

    def _lacks_pages(self, sequence: Sequence) -> bool:
        """Whether there are fewer pages than what it has to compute takes."""
        assert sequence.table is not None
        return len(sequence.ids) // self._cache.page_tokens + 1 - len(sequence.table.pages) > self._cache.available

    def _displace(self) -> bool:
        """Take the place of one that is on hold."""
        victim = next((s for s in reversed(self.running) if s.hold), None)
        if victim is not None:
            self._preempt(victim)
        return victim is not None

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._vacate(victim)
        self.waiting.appendleft(victim)
        self.preempted += 1

    def _begin(self, sequence: Sequence) -> None:
        """Start with whatever the cache knows of it, but for the tokens whose rows are wanted."""
        regime = self._rope.regime(len(sequence.ids))
        last = sequence.first if sequence.wants_all_logits else len(sequence.ids)
        known = sequence.ids[: last + 1] if sequence.reuse else sequence.ids[:1]
        sequence.table, sequence.computed = self._cache.adopt(known, regime.value.encode())
        if len(sequence.ids) == sequence.prompt_length:
            sequence.shared = sequence.computed
        self._regimes[sequence] = regime
        older = [s for s in self.running[: self.running.index(sequence)] if not s.wants_all_logits]
        found = [(common_length(s.ids, known[:-1]), -s.arrival, s) for s in older if self._regimes[s] is regime]
        if found:
            length, _, leader = max(found)
            if leader.computed < length and length - sequence.computed >= self._cache.page_tokens:
                self._follows[sequence] = leader, length

    def _waits(self, sequence: Sequence) -> bool:
        """Whether an older sequence is computing what this one begins with; when it has, that is taken over."""
        if sequence not in self._follows:
            return False
        leader, length = self._follows[sequence]
        if self._regimes.get(leader) is self._regimes[sequence] and sequence.computed <= leader.computed < length:
            return True
        self._vacate(sequence)
        self._begin(sequence)
        return sequence in self._follows

    def _vacate(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self._cache.release(sequence.table)
        sequence.table, sequence.computed = None, 0
        self._regimes.pop(sequence, None)
        self._follows.pop(sequence, None)

    def _cross_border(self, sequence: Sequence) -> None:
        """A sequence that has outgrown the short factors begins again with the long ones: all its keys have changed."""
        if self._regimes[sequence] is not self._rope.regime(len(sequence.ids)):
            self._vacate(sequence)
            self._begin(sequence)

    def _make_room(self, sequence: Sequence, count: int, planned: list[Sequence]) -> bool:
        """Pages for `count` more tokens, taken from the youngest if need be; False if it must wait for the others.

        The first in line always succeeds, because the cache holds at least one whole context.
        """
        assert sequence.table is not None
        while not self._cache.grow(sequence.table, sequence.computed + count):
            if self._displace():
                continue
            younger = self.running[self.running.index(sequence) + 1 :]
            victim = next((s for s in reversed(younger) if s not in planned), None)
            if victim is None:
                if planned:
                    return False
                victim = next(s for s in reversed(self.running) if s is not sequence)
            self._preempt(victim)
        return True


def _in_turn(prompts: list[Sequence], room: int) -> list[Sequence]:
    """Those that need little before those that came before them, as long as they leave half of the room."""
    short, left = list[Sequence](), room // 2
    for sequence in sorted(prompts, key=lambda s: s.pending):
        if sequence.pending > left:
            break
        short.append(sequence)
        left -= sequence.pending
    return short + [s for s in prompts if s not in short]
