"""A recorded model with observations before its matrix multiplications.

The model stays as it is recorded: its Program is a list of operations, and a `SumSquares` before a `MatMul` reads what
the MatMul reads. A mixture of experts, one operation that gives every expert rows of its own, will have an observation
with one row of sums and one count for each expert; what is made of them here, and the files, hold such already.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import WeightsError
from phiquant.kernels.ops import Buffer, MatMul, Operation, Program, SumSquares

__all__ = ["Observation", "observe"]


@dataclass(frozen=True, eq=False)
class Observation:
    """What the weights `names` are given, all the same: `sums` float64 [matrices, columns] of squares, `counts` int64
    [matrices] of rows. Both grow while the model runs.
    """

    names: tuple[str, ...]
    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    def check(self) -> None:
        """WeightsError if something that is not a number came by."""
        if not np.isfinite(self.sums).all():
            raise WeightsError(
                f"The inputs of {self.names[0]} are not finite: the model computes NaN or infinity on this text; "
                "check the file with another one of the same model."
            )


def observe(program: Program, wanted: Callable[[str], bool]) -> tuple[Program, list[Observation]]:
    """The Program with an observation before every MatMul whose weight's name is `wanted`, and the observations.

    Weights that read the same rows share one.
    """
    operations: list[Operation] = []
    observations: list[Observation] = []
    current: dict[int, int] = {}  # buffers whose rows are observed as they are now: index of their observation
    for operation in program.operations:
        if isinstance(operation, MatMul) and wanted(operation.weight.name):
            x, name = operation.x, operation.weight.name
            index = current.get(id(x))
            if index is None:
                current[id(x)] = len(observations)
                made = Observation((name,), np.zeros((1, x.width)), np.zeros(1, np.int64))
                observations.append(made)
                operations.append(SumSquares(x, made.sums, made.counts))
            else:
                observations[index] = replace(observations[index], names=(*observations[index].names, name))
        for written in ("out", "q_out"):
            buffer = getattr(operation, written, None)
            if isinstance(buffer, Buffer):
                current.pop(id(buffer), None)
        operations.append(operation)
    return replace(program, operations=tuple(operations)), observations
