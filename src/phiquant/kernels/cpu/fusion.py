"""What neighbouring operations of a Program share: found once, when it is bound."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from .. import ops
from .matmul import Packed

__all__ = ["done_before", "read", "rounded"]


def done_before(program: ops.Program) -> dict[int, ops.SwiGLU | ops.GELU | ops.GeGELU]:
    """By the matrix multiplication that comes next and alone reads its output, every pointwise operation for which so.

    Such a multiplication does it itself, on the way: what lies between is neither written nor read.
    """
    operations = program.operations
    found = {}
    for i, (op, after) in enumerate(itertools.pairwise(operations)):
        if not isinstance(op, ops.SwiGLU | ops.GELU | ops.GeGELU):
            continue
        if isinstance(after, ops.MatMul | ops.ExpertMatMul) and after.x is op.out:
            wanted = op.out in (program.logits, program.hidden) or read(op.out, operations[i + 2 :])
            if not wanted and after.out.base is not op.x:  # which the multiplication then reads
                found[id(after)] = op
    return found


def read(buffer: ops.Buffer, operations: Sequence[ops.Operation]) -> bool:
    """Whether a buffer, or some of its columns, is read before it is written again as a whole."""
    for op in operations:
        named = {name: b for name, b in vars(op).items() if isinstance(b, ops.Buffer) and b.base is buffer}
        out = named.pop("out", None)
        if named or (out and (getattr(op, "add", False) or isinstance(op, ops.Combine))):
            return True
        if out is buffer:
            return False
    return False


def rounded(program: ops.Program, packed: Mapping[int, Packed]) -> set[int]:
    """Every matrix multiplication that finds its activations in the scratch memory as the one just before left them.

    It reads the same buffer, which that one has not written, for a matrix that takes it in the same form, and by the
    same routes if it is one of experts. (What is done before a multiplication yields what only that one reads, so
    neither of the two does that.)
    """
    found = set()
    for before, op in itertools.pairwise(program.operations):
        if isinstance(op, ops.MatMul | ops.ExpertMatMul) and type(before) is type(op) and before.x is op.x:
            forms = [(packed[id(o.weight)].format.activations, getattr(o, "route", None)) for o in (before, op)]
            if forms[0] == forms[1] and before.out.base is not op.x.base:
                found.add(id(op))
    return found
