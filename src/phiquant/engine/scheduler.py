"""Who computes what in the next step.

Continuous batching with one path for all: a sequence that is generating has one token to compute, a new one has its
prompt, one that lost its pages has everything again. Sequences keep the order in which they came.
"""

from collections import deque
from dataclasses import dataclass

from phiquant.engine.cache import PageCache
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
        """Positions whose logits are wanted: all from the first that is, or the last one if the sequence ends here."""
        if self.sequence.wants_all_logits:
            return range(min(max(self.start, self.sequence.first), self.stop), self.stop)
        if self.draft:
            return range(self.start, self.stop)
        return range(self.stop - 1, self.stop) if self.stop == len(self.sequence.ids) else range(0)


class Scheduler:
    """Plans steps within a capacity; sequences wait until there is a place, and give their pages up when they must."""

    def __init__(self, capacity: Capacity, cache: PageCache, rope: Rope) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._capacity, self._cache, self._rope = capacity, cache, rope
        self._regimes: dict[Sequence, Regime] = {}

    def add(self, sequence: Sequence) -> None:
        """At the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, or nobody wants it any more; its pages stay known to the cache."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._vacate(sequence)

    def plan(self) -> list[Chunk]:
        """The next step: whoever is generating gets a token, then prompts fill what room is left; may be empty."""
        while self.waiting and len(self.running) < self._capacity.sequences:
            self.running.append(self.waiting.popleft())
            self._begin(self.running[-1])
        for sequence in self.running:
            self._cross_border(sequence)
        tokens, outputs = self._capacity.tokens, self._capacity.outputs
        chunks: list[Chunk] = []
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
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

    def _begin(self, sequence: Sequence) -> None:
        """Start with whatever the cache knows of it; where all logits are wanted, all must be computed."""
        regime = self._rope.regime(len(sequence.ids))
        known = sequence.ids[:1] if sequence.wants_all_logits else sequence.ids
        sequence.table, sequence.computed = self._cache.adopt(known, regime.value.encode())
        if len(sequence.ids) == sequence.prompt_length:
            sequence.shared = sequence.computed
        self._regimes[sequence] = regime

    def _vacate(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self._cache.release(sequence.table)
        sequence.table, sequence.computed = None, 0
        self._regimes.pop(sequence, None)

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
            younger = self.running[self.running.index(sequence) + 1 :]
            victim = next((s for s in reversed(younger) if s not in planned), None)
            if victim is None:
                if planned:
                    return False
                victim = next(s for s in reversed(self.running) if s is not sequence)
            self.running.remove(victim)
            self._vacate(victim)
            self.waiting.appendleft(victim)
        return True
