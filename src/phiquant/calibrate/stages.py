"""A recorded model cut where only the residual stream connects what comes before with what comes after.

Most blocks become two stages, attention and feed-forward network; one in which both read the same norm becomes one.
What follows the last block is a stage of its own, `layer` None, that makes logits.

    Embed -> x | norm, q, k, v, attention, output -> x | norm, up, down -> x | ... | select, norm, output -> logits

Within a stage, matrices that read the same rows are a group; those that come later read what those before them made.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import UnsupportedError
from phiquant.gguf import GGMLType
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.ops import (
    Attention,
    Buffer,
    Combine,
    Embed,
    ExpertMatMul,
    Keep,
    MatMul,
    Operation,
    Program,
    RotateStore,
    Route,
    Select,
    Weight,
)
from phiquant.kernels.quantize import quantize_rows

__all__ = ["Group", "Stage", "Stages"]

_INPUT = "residual stream"  # name of the weight through which activations enter a Program


@dataclass(frozen=True, eq=False)
class Group:
    """Matrices that read the same rows, by the same routes.

    Attributes:
        weights: in the order in which they are multiplied.
        x: what they read.
        route: of experts; None for one matrix each.
        before: how many operations of the stage make x.
        adds: whether what they make is added to the residual stream as it is.
        ends: whether it goes there, as it is or weighted by a router.
    """

    weights: tuple[Weight, ...]
    x: Buffer
    route: Route | None
    before: int
    adds: bool
    ends: bool

    @property
    def names(self) -> tuple[str, ...]:
        """GGUF's names of the weights."""
        return tuple(weight.name for weight in self.weights)

    @property
    def matrices(self) -> int:
        """How many experts have moments of their own; 1 without."""
        return self.weights[0].matrices


@dataclass(frozen=True, eq=False)
class Stage:
    """Operations between two places where only the residual stream is alive.

    Attributes:
        operations: in their order.
        layer: of the key-value cache, where attention is or was last; None for what follows the last block.
        groups: the matrices in it that were asked for.
    """

    operations: tuple[Operation, ...]
    layer: int | None
    groups: tuple[Group, ...]


@dataclass(frozen=True, eq=False)
class Stages:
    """A model in stages.

    Attributes:
        program: the whole.
        embed: the operation that begins it.
        stages: in their order.
    """

    program: Program
    embed: Embed
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, program: Program, wanted: Callable[[str], bool]) -> "Stages":
        """Cut a Program; groups are made of the weights whose names are `wanted`.

        UnsupportedError if it does not begin with an embedding whose rows are all that later blocks read of earlier
        ones.
        """
        first, *rest = program.operations
        if not isinstance(first, Embed):
            raise UnsupportedError("the model does not begin with an embedding, so it cannot be run block by block")
        cuts = [i for i in range(len(rest)) if _alive(rest[i:]) == {id(first.out)}]
        if not cuts or cuts[0] != 0:
            raise UnsupportedError("the blocks of the model share more than one stream, so they cannot be run alone")
        stages: list[Stage] = []
        layer: int | None = None
        for start, stop in zip(cuts, [*cuts[1:], len(rest)], strict=True):
            part = tuple(rest[start:stop])
            own = [op.layer for op in part if isinstance(op, Attention)]
            layer = own[-1] if own else layer
            last = any(isinstance(op, Select) for op in part)
            stages.append(Stage(part, None if last else layer, tuple(_groups(part, wanted, first.out))))
        return cls(program, first, tuple(stages))

    @property
    def width(self) -> int:
        """Columns of the residual stream."""
        return self.embed.out.width

    def embedded(
        self, ids: NDArray[np.int32], weight: Weight | None = None, type: GGMLType | None = None
    ) -> NDArray[np.float32]:
        """What the first stage reads of tokens, in their order: float32 [tokens, width].

        `weight`: in the place of the model's embedding; `type`: what the rows are rounded to, without calibration.
        """
        weight = self.embed.weight if weight is None else weight
        used, places = np.unique(ids.reshape(-1), return_inverse=True)
        rows = dequantize_rows(weight.data.reshape(weight.rows, -1)[used], weight.type, len(used), weight.columns)
        if type is not None and type is not weight.type:
            rows = dequantize_rows(quantize_rows(rows, GGMLType.F32, type), type, *rows.shape)
        return rows[places] * np.float32(self.embed.scale)

    def whole(
        self,
        stage: Stage,
        rows: NDArray[np.float32],
        made: Mapping[str, Weight],
        keeps: Sequence[tuple[Group, Keep]] = (),
    ) -> Program:
        """What the stage makes of the residual stream `rows`, float32 [tokens, width]: that stream after it.

        Tokens of a step are numbers of rows. `made`: weights in the place of those of the same name; `keeps`: groups
        whose inputs are kept on the way. Of the last stage the Program gives the stream as it is.
        """
        return self._program(stage, len(stage.operations), rows, made, keeps)

    def until(
        self, stage: Stage, keeps: Sequence[tuple[Group, Keep]], rows: NDArray[np.float32], made: Mapping[str, Weight]
    ) -> Program:
        """So much of the stage as makes what the groups read, which is kept."""
        return self._program(stage, max(group.before for group, _ in keeps), rows, made, keeps)

    def _program(
        self,
        stage: Stage,
        stop: int,
        rows: NDArray[np.float32],
        made: Mapping[str, Weight],
        keeps: Sequence[tuple[Group, Keep]],
    ) -> Program:
        entry = Embed(Weight(_INPUT, GGMLType.F32, rows.shape, rows.reshape(-1).view(np.uint8)), self.embed.out)
        operations: list[Operation] = [entry]
        for i in range(stop + 1):
            operations += [keep for group, keep in keeps if group.before == i]
            if i < stop:
                operations.append(_in_place(stage.operations[i], made))
        out = Buffer("stream", self.width, "outputs")
        operations.append(Select(self.embed.out, out))
        buffers = {id(b.base): b.base for op in operations for b in vars(op).values() if isinstance(b, Buffer)}
        routed = any(isinstance(op, Route) for op in operations)
        return replace(
            self.program,
            operations=tuple(operations),
            buffers=tuple(buffers.values()),
            layers=1,
            vocab_size=len(rows),
            logits=out,
            routes=self.program.routes if routed else 0,
            hidden=None,
        )


def _in_place(operation: Operation, made: Mapping[str, Weight]) -> Operation:
    """The operation with the weight that was made for it, and with the first layer of the cache for its own."""
    if isinstance(operation, MatMul | ExpertMatMul) and operation.weight.name in made:
        return replace(operation, weight=made[operation.weight.name])
    if isinstance(operation, RotateStore | Attention):
        return replace(operation, layer=0)
    return operation


def _groups(operations: Sequence[Operation], wanted: Callable[[str], bool], stream: Buffer) -> Iterator[Group]:
    found: list[Group] = []
    current: dict[tuple[Buffer, Route | None], int] = {}  # what buffers hold now, and the group that reads it
    for i, operation in enumerate(operations):
        if isinstance(operation, MatMul | ExpertMatMul) and wanted(operation.weight.name):
            route = operation.route if isinstance(operation, ExpertMatMul) else None
            at = current.setdefault((operation.x, route), len(found))
            if at == len(found):
                adds = isinstance(operation, MatMul) and operation.add and operation.out is stream
                ends = adds or any(
                    isinstance(op, Combine) and op.x is operation.out and op.out is stream for op in operations[i:]
                )
                found.append(Group((operation.weight,), operation.x, route, i, adds, ends))
            else:
                found[at] = replace(found[at], weights=(*found[at].weights, operation.weight))
        for written in _written(operation):
            current = {key: at for key, at in current.items() if key[0].base is not written.base}
    yield from found


def _written(operation: Operation) -> Iterator[Buffer]:
    for name in ("out", "q_out"):
        buffer = getattr(operation, name, None)
        if isinstance(buffer, Buffer):
            yield buffer


def _alive(operations: Sequence[Operation]) -> set[Hashable]:
    """What the operations read before they write it: buffers by identity, routes, layers of the cache.

    A buffer of which columns are written counts as written whole: no model writes some columns and reads others that
    were made earlier.
    """
    alive: set[Hashable] = set()
    for operation in reversed(operations):
        out: set[Hashable] = {id(buffer.base) for buffer in _written(operation)}
        adds = getattr(operation, "add", False) or isinstance(operation, Combine)
        if not adds:
            alive -= out
        if isinstance(operation, RotateStore):
            alive.discard(("layer", operation.layer))
        if isinstance(operation, Route):
            alive.discard(("route", id(operation)))
        alive |= {id(b.base) for n, b in vars(operation).items() if isinstance(b, Buffer) and n not in ("out", "q_out")}
        alive |= out if adds else set()
        if isinstance(operation, Attention):
            alive.add(("layer", operation.layer))
        if isinstance(operation, ExpertMatMul | Combine):
            alive.add(("route", id(operation.route)))
    return alive
