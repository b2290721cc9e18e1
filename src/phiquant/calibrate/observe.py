"""A recorded model with observations before its matrix multiplications.

The model stays as it is recorded: its Program is a list of operations, and a `SumSquares` before a `MatMul` reads what
the MatMul reads. Before an `ExpertMatMul` it adds up for every expert what is routed to it: a row of sums and a count
for each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import WeightsError
from phiquant.kernels.ops import Buffer, ExpertMatMul, MatMul, Operation, Program, Route, SumSquares

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
    """The Program with an observation before every multiplication whose weight's name is `wanted`, and those.

    Weights that read the same rows, by the same routes, share one.
    """
    operations: list[Operation] = []
    observations: list[Observation] = []
    # Buffers whose rows are observed as they are now, and how they are routed: index of their observation.
    current: dict[tuple[Buffer, Route | None], int] = {}
    for operation in program.operations:
        if isinstance(operation, MatMul | ExpertMatMul) and wanted(operation.weight.name):
            x, name, matrices = operation.x, operation.weight.name, operation.weight.matrices
            route = operation.route if isinstance(operation, ExpertMatMul) else None
            index = current.get((x, route))
            if index is None:
                current[x, route] = len(observations)
                made = Observation((name,), np.zeros((matrices, x.width)), np.zeros(matrices, np.int64))
                observations.append(made)
                operations.append(SumSquares(x, made.sums, made.counts, route))
            else:
                observations[index] = replace(observations[index], names=(*observations[index].names, name))
        for written in ("out", "q_out"):
            buffer = getattr(operation, written, None)
            if isinstance(buffer, Buffer):
                current = {key: index for key, index in current.items() if key[0].base is not buffer.base}
        operations.append(operation)
    return replace(program, operations=tuple(operations)), observations
