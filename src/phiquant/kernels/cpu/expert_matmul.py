"""ExpertMatMul: the rows that are routed to an expert times its matrix, for all experts in one operation.

The rows of a step are rounded in the order of the experts (`route.Routes.order`), so that those of an expert are
neighbours and its matrix meets them as a matrix multiplication meets all rows: through the same tiles, with the same
bits. A result goes to the row of its route. Tickets run through the experts one after the other; an expert without rows
has none, and nothing of it is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from ..ops import Weight
from . import activations, matmul, matmul_tiles
from .emit import I64, Emitter, Value
from .library import function
from .matmul import Packed
from .matmul_tiles import LANES, Format
from .memory import release
from .operation import Arguments, NativeOp, Region, aligned
from .pack import SLACK
from .pointwise import Pointwise
from .route import Routes
from .target import Target

__all__ = ["ARGUMENTS", "bind", "body", "prepare", "scratch_bytes"]

ARGUMENTS = Arguments(
    "count",
    "weights",
    "x",
    "out",
    "rows",
    "columns",
    "panel_bytes",
    "ticket",
    "row_bytes",
    "buffers",
    "out_bytes",
    "starts",
    "order",
    "experts",
    "expert_bytes",
)


def prepare(
    weight: Weight,
    *,
    threads: int = 0,
    target: Target | None = None,
    pack_now: bool = True,
    bf16_dot: bool = False,
) -> Packed:
    """Repack the matrices of the experts, one after the other; arguments and errors as for `matmul.prepare`.

    Of a mapped file no more than one expert is kept in memory on the way.
    """
    if len(weight.shape) != 3:
        raise KernelError(f"tensor {weight.name} of shape {weight.shape} does not hold the matrices of experts")
    outlined = matmul.outline(weight, target=target, pack_now=pack_now, bf16_dot=bf16_dot)
    if not pack_now:
        return replace(outlined, data=np.ascontiguousarray(weight.data))
    size = matmul.panels_bytes(outlined)
    panels = aligned(weight.matrices * size + SLACK)
    for i in range(weight.matrices):
        source, place = weight.matrix(i), panels[i * size : (i + 1) * size]
        matmul.prepare(source, threads=threads, target=target, bf16_dot=bf16_dot, out=place)
        release(source.data)
    return replace(outlined, data=panels)


def scratch_bytes(packed: Packed, rows: int) -> int:
    """Bytes of scratch memory that `bind` needs for steps of up to `rows` routes.

    A tile may begin at any row, so that more than the padding of all may be read beyond the last one.
    """
    return matmul.scratch_bytes(packed, rows) + activations.PADDING * packed.format.activations.stride


def bind(
    packed: Packed,
    routes: Routes,
    x: Region,
    out: Region,
    *,
    scratch: NDArray[np.uint8],
    threads: int,
    buffers: NDArray[np.uint8] | None = None,
    before: Pointwise | None = None,
    rounded: bool = False,
) -> list[NativeOp]:
    """The operations of out[r] = W[expert of r] x[r], or x[token of r] where there is a row of x for each token.

    Args:
        packed: the matrices.
        routes: which rows are whose.
        x: float32 [tokens or routes, inputs]; with the count of the routes they are routes.
        out: float32 [routes, outputs], maybe columns of wider rows; must not overlap x.
        scratch: at least `scratch_bytes(packed, routes.capacity)`; free for others once the operations are done.
        threads: size of the team.
        buffers: at least `matmul.buffer_bytes(packed, threads)`, aligned to 64 bytes; free for others as `scratch`.
        before: x is the input of this operation, its parts * inputs wide, and the matrices meet its output.
        rounded: `scratch` holds the rows of x already, from the operation before with the same x, routes and form of
            activations; they are left as they are.

    Raises:
        KernelError: a shape, an element type or a size does not fit.
    """
    f, target = packed.format, packed.target
    buffers = np.empty(0, np.uint8) if buffers is None else buffers
    divisor = 1 if x.count == routes.count else routes.used
    matmul.check(
        packed,
        x,
        out,
        (packed.matrices == routes.experts, f"its {packed.matrices} matrices meet {routes.experts} experts"),
        (x.capacity * divisor >= routes.capacity, f"{routes.capacity} routes meet {x.capacity} rows of inputs"),
        (out.capacity >= routes.capacity, f"{routes.capacity} routes meet {out.capacity} rows of outputs"),
        (out.count == routes.count, "routes and outputs differ in their number"),
        scratch=scratch,
        needed=scratch_bytes(packed, routes.capacity),
        threads=threads,
        buffers=buffers,
        before=before,
    )
    form, panel_bytes = f.activations, f.panel_bytes(packed.columns)
    name = f"expert_matmul.{packed.kind}" + ("" if packed.panels else ".unpacked")
    multiply = function(name, 4, body(f, packed=packed.panels), target)
    panels = -(-packed.rows // LANES)
    row_bytes = packed.data.size // (packed.matrices * packed.rows)  # of the file's rows; not asked for in panels
    address, out_bytes = out.strided
    block = ARGUMENTS.pack(
        count=routes.count,
        weights=packed.data.ctypes.data,
        x=scratch.ctypes.data,
        out=address,
        rows=packed.rows,
        columns=packed.columns,
        panel_bytes=panel_bytes,
        ticket=matmul.ticket_panels(panels, panel_bytes, threads),
        row_bytes=row_bytes,
        buffers=buffers.ctypes.data,
        out_bytes=out_bytes,
        starts=routes.starts.ctypes.data,
        order=routes.order.ctypes.data,
        experts=packed.matrices,
        expert_bytes=panels * panel_bytes if packed.panels else packed.rows * row_bytes,
    )
    product = NativeOp(multiply, block, (packed.data, scratch, out.array, buffers, routes))
    if rounded:
        return [product]
    return [activations.bind(form, x, scratch, packed.columns, before, target, routes), product]


def body(f: Format, *, packed: bool = True) -> Callable[..., None]:
    """The kernel of a format: out [routes, rows] = x [routes in the order of experts, columns] times their matrices."""

    def kernel(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        a = dict(zip(ARGUMENTS.names, ARGUMENTS.read_all(e, block), strict=True))
        matmul_tiles.complete(e, f, a, thread, packed=packed)
        few = matmul_tiles.few_tickets(a)

        def columns(expert: Value) -> tuple[Value, Value, Value]:
            """Of an expert: its first column, how many it has, and how many tickets they make."""
            first = e.load(a["starts"] + 8 * expert, I64)
            count = e.load(a["starts"] + 8 * expert + 8, I64) - first
            many = matmul_tiles.many_tickets(e, f, a | {"count": count})
            return first, count, e.where(count == 0, 0, e.where(count <= matmul_tiles.FEW, few, many))

        # Tickets ascend, and so do the experts that a thread gets: it never looks back.
        expert, before = e.var(0), e.var(0)  # before: tickets of the experts that have been passed
        with e.forever() as done:
            ticket = e.atomic_add(counter, 1)
            with e.forever() as found:
                found(expert.get() >= a["experts"])
                mine = columns(expert.get())[2]
                found(ticket < before.get() + mine)
                before.set(before.get() + mine)
                expert.set(expert.get() + 1)
            done(expert.get() >= a["experts"])
            first, count, _ = columns(expert.get())
            its = a | {
                "count": count,
                "weights": a["weights"] + expert.get() * a["expert_bytes"],
                "x": a["x"] + first * f.activations.stride,
                "places": a["order"] + 4 * first,
            }
            with e.choose(count <= matmul_tiles.FEW) as (yes, no):
                with yes:
                    matmul_tiles.few(e, f, its, ticket - before.get())
                with no:
                    matmul_tiles.many(e, f, its, ticket - before.get())

    return kernel
