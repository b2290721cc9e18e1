"""The contract between models and processors: some operations, recorded once and then executed.

A model is a Python function that calls the methods of a `Recorder`; the result is a `Program`, a flat list of
operations over buffers whose number of rows is only known when a step runs. A `Backend` turns a Program into an
`Executable`, which runs `Step`s. The NumPy backend in `reference/` is the definition of what each operation means.

    operations.py   the operations, weights and buffers
    recorder.py     Recorder and Program
    execution.py    Capacity, Step, Executable, Backend
"""

from .execution import Backend, Capacity, Executable, Step
from .operations import (
    GELU,
    Attention,
    AttentionShape,
    BlockSparse,
    Buffer,
    Combine,
    Embed,
    ExpertMatMul,
    GeGELU,
    Keep,
    LayerNorm,
    MatMul,
    Operation,
    RMSNorm,
    RotateStore,
    Route,
    Select,
    SumSquares,
    SwiGLU,
    Weight,
)
from .recorder import Program, Recorder

__all__ = [
    "GELU",
    "Attention",
    "AttentionShape",
    "Backend",
    "BlockSparse",
    "Buffer",
    "Capacity",
    "Combine",
    "Embed",
    "Executable",
    "ExpertMatMul",
    "GeGELU",
    "Keep",
    "LayerNorm",
    "MatMul",
    "Operation",
    "Program",
    "RMSNorm",
    "Recorder",
    "RotateStore",
    "Route",
    "Select",
    "Step",
    "SumSquares",
    "SwiGLU",
    "Weight",
]
