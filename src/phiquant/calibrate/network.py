"""A model in stages, run on some sequences by `backward.Pass`: its logits, and the derivatives of a divergence."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from phiquant.calibrate.attending import Attending
from phiquant.calibrate.backward import Pass
from phiquant.calibrate.stages import Stages
from phiquant.calibrate.tuned import Tuned

__all__ = ["Network", "divergence"]

Array = NDArray[Any]
Ids = NDArray[np.int32]


class Network:
    """The stages of a model and its weights as they are now.

    Between stages only the residual stream is kept, so a step holds `stages * tokens * width` numbers, and what one
    stage computes.
    """

    def __init__(self, stages: Stages, tuned: Tuned, attending: Attending) -> None:
        self._stages, self._tuned, self._attending = stages, tuned, attending
        *self._inner, self._last = stages.stages

    def logits(self, ids: Ids) -> Array:
        """Of sequences [n, context], float32 [n * context, vocabulary]."""
        return self.ended(self._entries(ids)[-1])

    def ended(self, rows: Array) -> Array:
        """Logits of what the last stage reads [tokens, width]."""
        return self._pass(len(self._inner), record=False).forward(self._x, rows, self._stages.program.logits)

    def learn(self, ids: Ids, target: Array) -> float:
        """Divergence of the predictions for sequences [n, context] from those by `target`, the mean over tokens.

        `target`: logits [n * context, vocabulary], which are overwritten. The derivatives of the mean are added up.
        """
        entries = self._entries(ids)
        last = self._pass(len(self._inner))
        logits = last.forward(self._x, entries.pop(), self._stages.program.logits)
        found = divergence(target, logits, slope=True)
        logits /= len(logits)
        by = last.backward(self._stages.program.logits, logits, self._x)
        del logits, last
        for index in reversed(range(len(self._inner))):
            stage = self._pass(index)
            stage.forward(self._x, entries.pop(), self._x)
            by = stage.backward(self._x, by, self._x)
        self._embed_back(ids, by)
        return float(found.mean())

    @property
    def _x(self) -> Any:
        return self._stages.embed.out

    def _pass(self, index: int, *, record: bool = True) -> Pass:
        return Pass(self._stages.stages[index].operations, self._tuned, self._attending, record=record)

    def _entries(self, ids: Ids) -> list[Array]:
        """What every stage reads."""
        entries = [self._embedded(ids)]
        for index in range(len(self._inner)):
            entries.append(self._pass(index, record=False).forward(self._x, entries[-1], self._x))
        return entries

    def _embedded(self, ids: Ids) -> Array:
        used, places = np.unique(ids.reshape(-1), return_inverse=True)
        rows: Array = self._tuned.some_rows(self._stages.embed.weight, used)[places]
        return rows * self._stages.embed.scale

    def _embed_back(self, ids: Ids, by: Array) -> None:
        used, places = np.unique(ids.reshape(-1), return_inverse=True)
        order = np.argsort(places, kind="stable")
        firsts = np.searchsorted(places[order], np.arange(len(used)))
        summed = np.add.reduceat(by[order], firsts, axis=0) * self._stages.embed.scale
        self._tuned.add_some_rows(self._stages.embed.weight, used, summed)


def divergence(base: Array, logits: Array, *, slope: bool = False) -> Array:
    """KL(base || logits) of every row, of logits [rows, vocabulary]; both are overwritten.

    With `slope` what is left in `logits` is the derivative of a row's divergence by its logits.
    """
    for scores in (base, logits):
        scores -= scores.max(axis=1, keepdims=True)
    # sum p (log p - log q) = sum p (x - y) - log sum exp x + log sum exp y
    difference = base - logits
    np.exp(base, out=base)
    np.exp(logits, out=logits)
    sums, other = base.sum(axis=1, keepdims=True), logits.sum(axis=1, keepdims=True)
    base /= sums
    found: Array = np.einsum("rv,rv->r", base, difference) + (np.log(other) - np.log(sums))[:, 0]
    if slope:
        logits /= other
        logits -= base
    return found
