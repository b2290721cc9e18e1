"""Matrix multiplication on the CPU: packs a weight once, binds it to activations.

    packed = prepare(weight)
    scratch = numpy.empty(scratch_bytes(packed, rows), numpy.uint8)
    operations = bind(packed, x, out, add=False, scratch=scratch, threads=2)

The operations run one after the other, each by all threads of the team: the first brings the activations of the step
into `scratch`, rounded to 8 bits for quantized weights; the second multiplies. Of products that follow one another and
read the same x, those whose weights take activations in the form that is in `scratch` need no first operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError, UnsupportedError
from ...gguf.types import GGMLType
from ..ops import Weight
from . import activations, matmul_tiles
from .library import function
from .matmul_float import BFloatDot, FloatFormat
from .matmul_kquants import K_FORMATS
from .matmul_lattice import LATTICE_FORMATS
from .matmul_legacy import LEGACY_FORMATS
from .matmul_points import POINT_FORMATS
from .matmul_small import SMALL_FORMATS
from .matmul_tables import TABLE_FORMATS
from .matmul_tiles import LANES, Format
from .operation import NativeOp, Region, aligned
from .pack import SLACK, pack, pack_kernel
from .pointwise import Pointwise
from .target import Target, host
from .team import available_threads

__all__ = [
    "FORMATS",
    "NO_BFLOAT_DOT",
    "Packed",
    "bind",
    "buffer_bytes",
    "check",
    "outline",
    "packing_kernel",
    "panels_bytes",
    "prepare",
    "scratch_bytes",
    "ticket_panels",
]

_GROUPS: tuple[Mapping[str, Format], ...] = (
    LEGACY_FORMATS,
    K_FORMATS,
    TABLE_FORMATS,
    LATTICE_FORMATS,
    SMALL_FORMATS,
    POINT_FORMATS,
)
FORMATS: dict[GGMLType, Format] = {
    GGMLType.F32: FloatFormat("float"),
    GGMLType.F16: FloatFormat("half"),
    GGMLType.BF16: FloatFormat("bfloat"),
    **{GGMLType[name]: f for group in _GROUPS for name, f in group.items()},
}
"""The types that can be multiplied."""

NO_BFLOAT_DOT = "the processor, or the lowering that was asked for, lacks AVX512_BF16"

_BFLOAT_DOT = BFloatDot()


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in panels of 16 interleaved rows, for the kernels of one target; or as it is in the file.

    Attributes:
        name, type, rows, columns: of the Weight it was made from.
        data: the panels, aligned to 64 bytes, or the rows.
        panels: which of them.
        matrices: matrices in it, one after the other (`expert_matmul`).
        bfloat_dot: the matrix is BF16 and meets activations that are rounded to that, too.
    """

    name: str
    type: GGMLType
    rows: int
    columns: int
    data: NDArray[np.uint8]
    target: Target
    panels: bool = True
    matrices: int = 1
    bfloat_dot: bool = False

    @property
    def format(self) -> Format:
        """How the panels are laid out."""
        return _BFLOAT_DOT if self.bfloat_dot else FORMATS[self.type]

    @property
    def kind(self) -> str:
        """Of the kernels, for their names."""
        return self.type.name + (".dot" if self.bfloat_dot else "")


def prepare(
    weight: Weight,
    *,
    threads: int = 0,
    target: Target | None = None,
    pack_now: bool = True,
    bf16_dot: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> Packed:
    """Repack a matrix; the Weight's bytes are not needed afterwards.

    Args:
        weight: a matrix [outputs, inputs].
        threads: threads to use, 0 for as many as the process may use.
        target: the processor, the host by default.
        pack_now: False leaves the matrix as it is, to be packed piece by piece whenever it is multiplied.
        out: where the panels go, `panels_bytes` aligned to 64, with `SLACK` bytes after them that may be read;
            None for memory of their own.
        bf16_dot: a BF16 matrix is to meet activations rounded to BF16, which is faster.

    Raises:
        UnsupportedError: there is no kernel for the weight's type.
        KernelError: the weight is not a matrix, or is empty; the processor cannot multiply BF16.
    """
    if len(weight.shape) != 2:
        raise KernelError(f"tensor {weight.name} of shape {weight.shape} is not a matrix that can be multiplied")
    outlined = outline(weight, target=target, pack_now=pack_now, bf16_dot=bf16_dot)
    data = np.ascontiguousarray(weight.data)
    if pack_now:
        w, count = weight, threads or available_threads()
        data = pack(outlined.kind, outlined.format, data, w.rows, w.columns, outlined.target, count, out)
    return replace(outlined, data=data.reshape(-1))


def outline(weight: Weight, *, target: Target | None = None, pack_now: bool = True, bf16_dot: bool = False) -> Packed:
    """What `prepare` will make of a matrix, or `expert_matmul.prepare` of several, with the file's bytes instead of
    panels; arguments and errors the same.
    """
    if weight.type not in FORMATS:
        known = ", ".join(t.name for t in FORMATS)
        raise UnsupportedError(f"tensor {weight.name} has type {weight.type.name}; matrices can be of type {known}")
    if len(weight.shape) not in (2, 3) or not weight.data.size:
        raise KernelError(f"tensor {weight.name} of shape {weight.shape} is not a matrix that can be multiplied")
    target = target or host()
    dot = bf16_dot and weight.type is GGMLType.BF16
    if dot and not target.has_bfloat_dot:
        raise KernelError(f"no dot products of BF16 for the tensor {weight.name}: {NO_BFLOAT_DOT}")
    w = weight
    return Packed(w.name, w.type, w.rows, w.columns, w.data, target, pack_now, w.matrices, dot)


def packing_kernel(packed: Packed) -> int:
    """The kernel that makes such panels."""
    return pack_kernel(packed.kind, packed.format, packed.target)


def panels_bytes(packed: Packed) -> int:
    """Bytes of the panels of one matrix."""
    return -(-packed.rows // LANES) * packed.format.panel_bytes(packed.columns)


def scratch_bytes(packed: Packed, rows: int) -> int:
    """Bytes of scratch memory that `bind` needs for steps of up to `rows` rows."""
    chunks, padding = -(-packed.columns // activations.CHUNK), activations.PADDING
    return -(-rows // padding) * padding * chunks * packed.format.activations.stride


def buffer_bytes(packed: Packed, threads: int) -> int:
    """Bytes that `bind` needs for panels that are made while they are multiplied; 0 if they are there."""
    if packed.panels:
        return 0
    return threads * packed.format.panels(packed.target) * packed.format.panel_bytes(packed.columns) + SLACK


def bind(
    packed: Packed,
    x: Region,
    out: Region,
    *,
    add: bool,
    scratch: NDArray[np.uint8],
    threads: int,
    buffers: NDArray[np.uint8] | None = None,
    bias: NDArray[np.float32] | None = None,
    before: Pointwise | None = None,
    rounded: bool = False,
) -> list[NativeOp]:
    """The operations of out = W x + bias, or with `add` of out += W x + bias, for as many rows as x's count says.

    Args:
        packed: the matrix.
        x: float32 [rows, inputs].
        out: float32 [rows, outputs], with the same count; columns of a matrix will do; must not overlap x.
        add: whether to add to what `out` holds.
        scratch: at least `scratch_bytes(packed, x.capacity)`; free for others once the operations are done.
        threads: size of the team.
        buffers: at least `buffer_bytes(packed, threads)`, aligned to 64 bytes; free for others as `scratch`.
        bias: float32 [outputs]; none is 0.
        before: x is the input of this operation, float32 [rows, its parts * inputs], and W meets its output.
        rounded: `scratch` holds x already, from a product bound to the same x and scratch, by a matrix of the same
            `format.activations`.

    Raises:
        KernelError: a shape, an element type or a size does not fit.
    """
    f, target = packed.format, packed.target
    buffers = np.empty(0, np.uint8) if buffers is None else buffers
    biased = bias is None or (bias.dtype == np.float32 and bias.shape == (packed.rows,))
    check(
        packed,
        x,
        out,
        (biased, f"its {packed.rows} outputs need as many float32 biases"),
        (out.capacity >= x.capacity and x.count == out.count, "inputs and outputs differ in their number of rows"),
        scratch=scratch,
        needed=scratch_bytes(packed, x.capacity),
        threads=threads,
        buffers=buffers,
        before=before,
    )
    form, panel_bytes = f.activations, f.panel_bytes(packed.columns)
    name = f"matmul.{packed.kind}" + ("" if packed.panels else ".unpacked")
    multiply = function(name, 4, matmul_tiles.body(f, packed=packed.panels), target)
    panels = -(-packed.rows // LANES)
    start = aligned(4 * LANES * (1 if bias is None else panels)).view(np.float32)
    if bias is not None:
        start[: packed.rows] = bias
    address, out_bytes = out.strided
    block = matmul_tiles.ARGUMENTS.pack(
        count=x.count,
        weights=packed.data.ctypes.data,
        x=scratch.ctypes.data,
        out=address,
        rows=packed.rows,
        columns=packed.columns,
        panel_bytes=panel_bytes,
        ticket=ticket_panels(panels, panel_bytes, threads),
        add=int(add),
        row_bytes=packed.data.size // packed.rows,
        buffers=buffers.ctypes.data,
        out_bytes=out_bytes,
        bias=start.ctypes.data,
        bias_bytes=0 if bias is None else 4 * LANES,
    )
    product = NativeOp(multiply, block, (packed.data, scratch, out.array, buffers, start))
    return [product] if rounded else [activations.bind(form, x, scratch, packed.columns, before, target), product]


def check(
    packed: Packed,
    x: Region,
    out: Region,
    *more: tuple[bool, str],
    scratch: NDArray[np.uint8],
    needed: int,
    threads: int,
    buffers: NDArray[np.uint8],
    before: Pointwise | None,
) -> None:
    """Refuse what does not fit a product, dense or of experts, whose arguments are as for `bind`.

    `needed` are bytes of scratch memory; `more` says what else must hold, and what is wrong where it does not. Errors:
    KernelError.
    """
    inputs = packed.columns * (before.parts if before else 1)
    fits = (
        (x.array.dtype == np.float32 == out.array.dtype, "activations must be float32"),
        (x.width == inputs, f"its {packed.columns} inputs meet rows of {x.width}"),
        (out.width == packed.rows, f"its {packed.rows} outputs meet rows of {out.width}"),
        *more,
        (not np.may_share_memory(x.array, out.array), "inputs and outputs overlap"),
        (scratch.dtype == np.uint8 and scratch.flags.c_contiguous, "scratch memory must be contiguous bytes"),
        (buffers.size >= buffer_bytes(packed, threads), "there is no room to pack panels"),
        (scratch.size >= needed, f"it needs {needed} bytes of scratch memory where there are {scratch.size}"),
    )
    for holds, complaint in fits:
        if not holds:
            raise KernelError(f"cannot multiply by {packed.name}: {complaint}")


def ticket_panels(panels: int, panel_bytes: int, threads: int) -> int:
    """Panels to a ticket for few columns: about a megabyte, fewer where threads would be left without work."""
    return max(1, min((1 << 20) // panel_bytes, panels // (8 * max(threads, 1))))
