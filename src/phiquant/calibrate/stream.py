"""The residual stream of a whole text: the one thing that is kept from one stage of a model to the next."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant.calibrate.chunks import Chunks
from phiquant.calibrate.moments import Moments
from phiquant.calibrate.shortfall import Shortfall
from phiquant.calibrate.stages import Group, Stage, Stages
from phiquant.kernels.ops import Backend, Capacity, Keep, Program, Step, Weight
from phiquant.model import Rope

__all__ = ["Stream"]

STEP_TOKENS: Final = 2048
_PAGE_TOKENS: Final = 64
_STEPS: Final = 4  # that are enough to be halved

Floats = NDArray[np.float32]


class Stream:
    """Activations of all tokens of a text between two stages, and the running of stages on them.

    Every chunk of the text is a sequence of its own, with an empty cache; several are computed in one step.

    Args:
        stages: the model.
        chunks: the text.
        rows: float32 [tokens, width], what the first stage reads.
        rope: of the model.
        backend: what computes.
        threads: native threads; 0 for as many as the process may use.

    Attributes:
        rows: as above; of the stage that comes next.
    """

    def __init__(
        self, stages: Stages, chunks: Chunks, rows: Floats, rope: Rope, backend: Backend, *, threads: int = 0
    ) -> None:
        self.rows = rows
        self._stages, self._backend, self._threads = stages, backend, threads
        self._context = chunks.context
        self._together = max(1, STEP_TOKENS // chunks.context)
        self._cos, self._sin = rope.rotation(np.arange(chunks.context, dtype=np.int32), rope.regime(chunks.context))

    def moments(
        self, stage: Stage, groups: Sequence[Group], made: dict[str, Weight], read: Callable[[int], None] | None = None
    ) -> list[Moments]:
        """Of what the groups of a stage read, with the weights `made` in it; the stream stays as it is."""
        return self._observed(self._stages.until, stage, groups, made, None, read)

    def advance(
        self,
        stage: Stage,
        made: dict[str, Weight],
        groups: Sequence[Group] = (),
        read: Callable[[int], None] | None = None,
    ) -> list[Moments]:
        """Bring the stream through a stage, with the weights `made`; moments of groups on the way, if there are."""
        return self._observed(self._stages.whole, stage, groups, made, self.rows, read)

    def shortfall(self, stage: Stage, group: Group, made: dict[str, Weight], whole: "Stream") -> Shortfall:
        """What the products of a group, with the weights `made` before it, lack of those of the unrounded model.

        `whole`: the stream of the unrounded model; before the stage, if the group is not one that `adds`, and behind it
        if it is. Then everything that the stream lacks behind the stage counts.
        """
        keep = self._keep(group)
        if group.adds:
            found = Shortfall.of_stream(group.x.width, self._stages.width)
            recorded = self._stages.whole(stage, rows=self.rows, made=made, keeps=[(group, keep)])
            for start, stop, out in self._run(recorded):
                for half, part in self._halves(start, stop):
                    found.add(keep.kept[part], whole.rows[start:stop][part] - out[part], half)
        else:
            found, beside = Shortfall.of_inputs(group.x.width), self._keep(group)
            recorded = self._stages.until(stage, rows=self.rows, made=made, keeps=[(group, keep)])
            other = self._stages.until(stage, rows=whole.rows, made={}, keeps=[(group, beside)])
            for (start, stop, _), _same in zip(self._run(recorded), whole._run(other), strict=True):
                for half, part in self._halves(start, stop):
                    found.add(keep.kept[part], beside.kept[part] - keep.kept[part], half)
        return found

    def _halves(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Which half of the text the rows of a step belong to: every other step, or chunk if there are few steps."""
        step, first = self._capacity.tokens, start
        size = step if len(self.rows) >= _STEPS * step else self._context
        while start < stop:
            end = min(stop, (start // size + 1) * size)
            yield start // size % 2, slice(start - first, end - first)
            start = end

    def _observed(
        self,
        program: Callable[..., Program],
        stage: Stage,
        groups: Sequence[Group],
        made: dict[str, Weight],
        target: Floats | None,
        read: Callable[[int], None] | None,
    ) -> list[Moments]:
        keeps = [self._keep(group) for group in groups]
        moments = [Moments.none(group.matrices, group.x.width) for group in groups]
        recorded = program(stage, rows=self.rows, made=made, keeps=list(zip(groups, keeps, strict=True)))
        for start, stop, out in self._run(recorded):
            if target is not None:
                target[start:stop] = out
            for group, keep, found in zip(groups, keeps, moments, strict=True):
                count = stop - start
                used = group.route.used if group.route is not None else 1
                rows = keep.kept[: count * used if group.x.rows == "routes" else count]
                found.add(rows, None if keep.chosen is None else keep.chosen[: count * used])
            if read is not None:
                read(stop - start)
        for group, found in zip(groups, moments, strict=True):
            found.check(group.names[0])
        return moments

    def _keep(self, group: Group) -> Keep:
        tokens = self._capacity.tokens
        routes = tokens * (group.route.used if group.route is not None else 0)
        kept = np.empty((routes if group.x.rows == "routes" else tokens, group.x.width), np.float32)
        return Keep(group.x, kept, group.route, np.empty(routes, np.int32) if group.route is not None else None)

    @property
    def _capacity(self) -> Capacity:
        tokens = min(self._together * self._context, STEP_TOKENS, len(self.rows))
        pages = -(-self._context // _PAGE_TOKENS)
        return Capacity(
            tokens=tokens,
            outputs=tokens,
            sequences=self._together,
            pages=pages * self._together,
            page_tokens=_PAGE_TOKENS,
            pages_per_sequence=pages,
            threads=self._threads,
        )

    def _run(self, program: Program) -> Iterator[tuple[int, int, Floats]]:
        """First and last token of every step, and what the Program makes of them."""
        capacity = self._capacity
        executable = self._backend.prepare(program, capacity)
        try:
            start = 0
            while start < len(self.rows):
                stop = min(start + capacity.tokens, len(self.rows))
                if self._context > capacity.tokens:  # a chunk takes several steps, the last of which ends with it
                    stop = min(stop, (start // self._context + 1) * self._context)
                yield start, stop, executable.run(self._step(start, stop, capacity))
                start = stop
        finally:
            executable.close()

    def _step(self, start: int, stop: int, capacity: Capacity) -> Step:
        tokens = np.arange(start, stop, dtype=np.int32)
        positions = tokens % np.int32(self._context)
        slots = tokens // np.int32(self._context) - np.int32(start // self._context)
        pages = np.arange(capacity.pages, dtype=np.int32).reshape(self._together, -1)
        return Step(
            tokens=tokens,
            positions=positions,
            slots=slots,
            pages=pages,
            cos=self._cos[positions],
            sin=self._sin[positions],
            outputs=np.arange(stop - start, dtype=np.int32),
        )
