"""A smaller model as the drafter of a larger one with the same vocabulary."""

import time
from collections.abc import Sequence as Ids
from typing import Final

from phiquant.engine.engine import Engine
from phiquant.engine.sampling import Sampling
from phiquant.engine.sequence import Sequence
from phiquant.engine.speed import mean

__all__ = ["ModelDraft"]

_LIKELIEST: Final = Sampling(0)


class ModelDraft:
    """Guesses the likeliest continuation of another engine.

    What that engine has computed for the same sequence before it finds in its own cache of pages.
    """

    def __init__(self, engine: Engine) -> None:
        self.seconds = 0.0
        self._engine = engine

    def draft(self, ids: Ids[int], most: int) -> list[int]:
        """As `Drafter` says; nothing where the smaller model's context ends."""
        most = min(most, self._engine.context - len(ids))
        if most < 1:
            return []
        job = Sequence(ids, _LIKELIEST, max_tokens=most)
        self._engine.submit(job)
        try:
            self._engine.advance(job, len(ids))  # may read a whole prompt first, which is not the price of a guess
            begin = time.perf_counter()
            self._engine.advance(job, len(ids) + most - 1)
        finally:
            self._engine.cancel(job)
        if most > 1:
            self.seconds = mean(self.seconds, (time.perf_counter() - begin) / (most - 1))
        return job.generated
