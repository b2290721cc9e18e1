"""When a sequence has a step to itself: how many tokens are guessed, and by whom."""

from phiquant.engine.draft import LONGEST, Pace
from phiquant.engine.sequence import Sequence
from phiquant.kernels.ops import Capacity
from phiquant.model import Rope

__all__ = ["Speculation"]


class Speculation:
    """Asks the drafters of a sequence.

    Attributes:
        pace: what steps of one sequence take.
    """

    def __init__(self, rope: Rope, capacity: Capacity, context: int) -> None:
        self.pace = Pace()
        self._rope, self._capacity, self._context = rope, capacity, context

    def guess(self, sequence: Sequence) -> None:
        """Note in the sequence what may follow, if that pays."""
        sequence.draft = ()
        if not sequence.drafters or sequence.pending != 1 or len(sequence.ids) == sequence.prompt_length:
            return
        most = self._most(sequence)
        for drafter, odds in sequence.drafters:
            count = self.pace.guesses(odds.chance, drafter.seconds, most)
            if count == 0:
                odds.idled()
                continue
            sequence.draft = tuple(drafter.draft(sequence.ids, count))
            if sequence.draft:
                sequence.odds = odds
                return

    def _most(self, sequence: Sequence) -> int:
        """Guesses that there is room and need for."""
        length, capacity = len(sequence.ids), self._capacity
        most = min(LONGEST, self._context - 1 - length, capacity.tokens - 1, capacity.outputs - 1)
        if sequence.max_tokens is not None:
            most = min(most, sequence.max_tokens - (length - sequence.prompt_length) - 1)
        while most > 0 and self._rope.regime(length + most) is not self._rope.regime(length):
            most -= 1  # beyond the border all keys are others
        return most
