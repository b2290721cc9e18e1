"""From planned chunks to a Step, and from its logits back to the chunks."""

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.scheduler import Chunk
from phiquant.kernels.ops import Executable, Step
from phiquant.model import Rope

__all__ = ["Runner"]


class Runner:
    """Runs steps on an Executable."""

    def __init__(self, executable: Executable, rope: Rope) -> None:
        self._executable, self._rope = executable, rope

    def run(self, chunks: list[Chunk]) -> list[NDArray[np.float32]]:
        """Rows [wanted outputs, vocabulary, or width of hidden states] of each chunk; valid until the next run."""
        rows = self._executable.run(self._step(chunks))
        ends = np.cumsum([len(chunk.outputs) for chunk in chunks])
        return np.split(rows, ends[:-1])

    def _step(self, chunks: list[Chunk]) -> Step:
        positions = [np.arange(chunk.start, chunk.stop, dtype=np.int32) for chunk in chunks]
        rotations = [self._rope.rotation(p, c.regime) for p, c in zip(positions, chunks, strict=True)]
        tables = [chunk.sequence.table.pages if chunk.sequence.table else [] for chunk in chunks]
        pages = np.zeros((len(chunks), max(map(len, tables))), np.int32)
        for row, table in zip(pages, tables, strict=True):
            row[: len(table)] = table
        begins = np.cumsum([0] + [len(p) for p in positions])
        outputs = [
            np.array(chunk.outputs, np.int32) + (begin - chunk.start)
            for chunk, begin in zip(chunks, begins, strict=False)
        ]
        return Step(
            tokens=np.concatenate([np.array(c.tokens, np.int32) for c in chunks]),
            positions=np.concatenate(positions),
            slots=np.repeat(np.arange(len(chunks), dtype=np.int32), [len(p) for p in positions]),
            pages=pages,
            cos=np.concatenate([cos for cos, _ in rotations]),
            sin=np.concatenate([sin for _, sin in rotations]),
            outputs=np.concatenate(outputs).astype(np.int32),
            hidden=chunks[0].sequence.hidden,
        )
