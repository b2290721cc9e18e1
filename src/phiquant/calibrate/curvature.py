"""What an error in the residual stream costs: the derivatives, by the stream, of what the model itself would say next.

Of tokens that are drawn from the model's own predictions, the derivatives g of log p have second moments that are the
Fisher information: an error e of the stream, small and the same wherever it is made, changes the predictions by

    KL = e^T mean(g g^T) e / 2

so it tells which errors of the matrices that are added to the stream may stay and which ones not, and of the rows of an
embedding. What a router chooses is in no such derivative, and costs more: it gets some of its own.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from phiquant.calibrate.attending import Attending
from phiquant.calibrate.backward import Pass
from phiquant.calibrate.chunks import Chunks
from phiquant.calibrate.moments import Moments, check_finite
from phiquant.calibrate.stages import Stage, Stages
from phiquant.calibrate.stream import Stream
from phiquant.calibrate.tuned import Tuned
from phiquant.kernels.ops import Backend, ExpertMatMul, MatMul, Operation, RotateStore, Route, Weight
from phiquant.model import Rope

__all__ = ["Curvature"]

_LARGE: Final = 1 << 30  # weights of a model whose derivatives take long

NEAR: Final = 64.0
"""What it costs that the next router is nearer to another choice, beside what an error behind the last block costs: a
ratio of squares of derivatives. Measured best of 1, 64 and 512."""

FAR: Final = 1.0
"""The same of all routers after that one: measured best of 1 and 8."""

EMBEDDED: Final = 4096.0
"""The same of the first router and the embedding, for whose errors nothing makes up: best of 64, 512 and 4096."""

_TOGETHER: Final = 2048  # tokens of a pass through a stage
_LOGITS: Final = 1 << 25  # of a pass through the last one, if a chunk has not more: 128 MB in float32

Floats = NDArray[np.float32]
Array = NDArray[Any]


class Curvature:
    """Derivatives by what each stage reads: 4 bytes for each stage, token and column, until they are dropped.

    Attributes:
        spread: how far predictions are from certain: the mean over tokens of 1 - sum p^2, which is that of the sum of
            the squares of the derivatives by the logits.
        heads: by name, of matrices that make queries, keys and values, the sums of g g^T of derivatives by each head,
            float32 [heads, head_size, head_size].

    Args:
        rows: of every stage, float32 [tokens, width]; None where they are not known.
    """

    def __init__(self, rows: list[Floats | None], spread: float, heads: dict[str, Floats]) -> None:
        self._rows, self.spread, self.heads = rows, spread, heads

    @classmethod
    def of(
        cls,
        stages: Stages,
        chunks: Chunks,
        rope: Rope,
        backend: Backend,
        *,
        tokens: int,
        first: int = 0,
        threads: int = 0,
        read: Callable[[int, int], None] | None = None,
    ) -> "Curvature":
        """By chunks spread over a text, `tokens` together, at least one; of the stages from the `first` on.

        `read` is told how many tokens went through a stage, of how many. WeightsError if the model computes something
        that is no number; UnsupportedError for an operation that no derivative is known of.
        """
        chosen = _some(chunks, tokens)
        count, total = len(stages.stages), chosen.tokens * (2 * len(stages.stages) - 1 - first)
        done = 0

        def advanced(tokens: int) -> None:
            nonlocal done
            done += tokens
            if read is not None:
                read(done, total)

        rows: list[Floats | None] = [None] * count
        at = stages.embedded(chosen.ids)
        stream = Stream(stages, chosen, at, rope, backend, threads=threads)
        for i, stage in enumerate(stages.stages):
            rows[i] = stream.rows if i >= first else None
            if i + 1 < count:
                stream.rows = stream.rows.copy() if i >= first else stream.rows
                stream.advance(stage, {}, read=advanced)
                check_finite(stream.rows, _first(stages.stages[i + 1]))
        turning = rope.rotation(np.arange(chosen.context, dtype=np.int32), rope.regime(chosen.context))
        back = _Back(stages, Attending(stages.program.attention, *turning), chosen.context)
        spread = back.drawn(stream.rows, advanced)
        by, near = stream.rows, None
        for i in reversed(range(first, count - 1)):
            entry = rows[i]
            assert entry is not None
            choices = back.choices(i, entry)
            if choices is not None:
                near = choices
            elif near is not None:
                near = back.through(i, entry, near)
            by = back.through(i, entry, by, advanced)
            if choices is not None:
                by = by + np.float32(math.sqrt(FAR)) * choices
            rows[i] = by if near is None else by + np.float32(math.sqrt(NEAR if i else EMBEDDED)) * near
        check_finite(by, _first(stages.stages[first]))
        return cls(rows, spread, back.heads)

    @staticmethod
    def default_tokens(weights: int) -> int:
        """Tokens of a text by which derivatives of a model of so many weights are taken, if it has as many.

        8,192 instead of 2,048 made a mixture 5 to 8 % better and dense models up to 6 %, but of a model of 3.8 G
        parameters 2,048 take a tenth of all the time already.
        """
        return 8192 if weights < _LARGE else 2048

    def moments(self, stage: int) -> Moments:
        """Sum of g g^T, of what the stage of that number reads."""
        rows = self._rows[stage]
        assert rows is not None
        found = Moments.none(1, rows.shape[1])
        found.add(rows)
        return found

    def drop(self, stage: int) -> None:
        """Those of a stage are needed no more."""
        self._rows[stage] = None


class _Back:
    """Passes through stages, some whole sequences at a time, that leave derivatives where activations were."""

    def __init__(self, stages: Stages, attending: Attending, context: int) -> None:
        self._stages, self._attending, self._context = stages, attending, context
        self._weights = _Watched(stages)
        self._random, self._largest = np.random.default_rng(0), 0.0

    @property
    def heads(self) -> dict[str, Floats]:
        """See `Curvature`."""
        return self._weights.heads

    def drawn(self, rows: Floats, advanced: Callable[[int], None]) -> float:
        """In the place of what the last stage reads, [tokens, width], derivatives of log p of one drawn token each.

        Returns the mean of 1 - sum p^2.
        """
        squares = 0.0
        x, out = self._stages.embed.out, self._stages.program.logits
        together = max(1, _LOGITS // (self._context * self._stages.program.vocab_size)) * self._context
        for start in range(0, len(rows), together):
            part = slice(start, start + together)
            last = self._pass(len(self._stages.stages) - 1)
            logits = last.forward(x, rows[part], out)
            logits = logits - logits.max(axis=1, keepdims=True)
            chances = np.exp(logits, out=logits)
            chances /= chances.sum(axis=1, keepdims=True)
            squares += float(np.vdot(chances, chances))
            for row, at in zip(chances, self._random.random(len(chances)), strict=True):
                below = np.cumsum(row, dtype=np.float64)
                row[min(int(np.searchsorted(below, at * below[-1], side="right")), len(row) - 1)] -= 1
            rows[part] = last.backward(out, chances, x)
            advanced(len(rows[part]))
        self._largest = float(np.square(rows).sum(axis=1).mean())
        return 1 - squares / len(rows)

    def through(self, index: int, rows: Floats, by: Floats, advanced: Callable[[int], None] | None = None) -> Floats:
        """The derivatives by what a stage reads, `rows`, of what those by its result, `by`, are of."""
        x, together, found = self._stages.embed.out, max(1, _TOGETHER // self._context) * self._context, []
        for start in range(0, len(rows), together):
            part, stage = slice(start, start + together), self._pass(index)
            stage.forward(x, rows[part], x)
            found.append(stage.backward(x, by[part].copy(), x))
            if advanced is not None:
                advanced(len(found[-1]))
        return np.concatenate(found)

    def choices(self, index: int, rows: Floats) -> Floats | None:
        """Those by what a stage reads of what its router chooses, if it has one."""
        operations = self._stages.stages[index].operations
        for i, operation in enumerate(operations):
            if isinstance(operation, Route):
                return self._choices(operation, operations[:i], rows)
        return None

    def _choices(self, route: Route, made: tuple[Operation, ...], rows: Floats) -> Floats:
        """Derivatives by the stream of how far a router is from choosing otherwise; on average as large as `largest`.

        Another choice costs far more than what a quadratic form in the logits would tell, so it is kept away from,
        whatever the token: each expert chosen beside the next best one, with signs drawn at random.
        """
        x, logits = self._stages.embed.out, route.logits
        router = Pass(made, self._weights, self._attending)
        scores = router.forward(x, rows, logits)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : route.used + 1]
        by, every = np.zeros_like(scores), np.arange(len(scores))
        signs = self._random.choice(np.array([-1, 1], np.float32), (best.shape[1] - 1, len(scores)))
        for above, below, sign in zip(best.T, best.T[1:], signs, strict=False):
            by[every, above] += sign
            by[every, below] -= sign
        found: Floats = router.backward(logits, by, x)
        found *= np.float32(math.sqrt(self._largest / max(float(np.square(found).sum(axis=1).mean()), 1e-30)))
        return found

    def _pass(self, index: int) -> Pass:
        return Pass(self._stages.stages[index].operations, self._weights, self._attending)


class _Watched(Tuned):
    """Weights that are only read; what comes by of those that make queries, keys and values is added up."""

    def __init__(self, stages: Stages) -> None:
        super().__init__({}, tune=False)
        self.heads: dict[str, Floats] = {}
        size = stages.program.attention.head_size
        for stage in stages.stages:
            read = {id(op.qkv.base) for op in stage.operations if isinstance(op, RotateStore)}
            for op in stage.operations:
                if isinstance(op, MatMul) and id(op.out.base) in read:
                    self.heads[op.weight.name] = np.zeros((op.weight.rows // size, size, size), np.float32)

    def add_product(self, weight: Weight, by_out: Array, x: Array, matrix: int = 0) -> None:
        """Takes in derivatives by a product, [tokens, rows]."""
        found = self.heads.get(weight.name)
        if found is not None:
            parts = np.ascontiguousarray(by_out.reshape(len(by_out), len(found), -1).swapaxes(0, 1))
            found += parts.swapaxes(1, 2) @ parts


def _first(stage: Stage) -> str:
    """Name of the first matrix of a stage."""
    return next(op.weight.name for op in stage.operations if isinstance(op, MatMul | ExpertMatMul))


def _some(chunks: Chunks, tokens: int) -> Chunks:
    """So many tokens in whole chunks, taken evenly from all."""
    count = min(max(1, tokens // chunks.context), len(chunks.ids))
    picked = np.arange(count) * len(chunks.ids) // count
    return replace(chunks, ids=np.ascontiguousarray(chunks.ids[picked]))
