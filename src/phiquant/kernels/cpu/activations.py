"""Rows of activations brought into the form that matrix multiplication reads.

A row is cut into chunks of 256 values. A chunk holds its values, rounded to 8 bits (or as float32 for F32, F16 and BF16
weights, or rounded to bfloat16 for dot products of those), their scales, and the sums that the weight format needs:

    offset  0          256            256 + 4 s
            int8[256]  float32[s]     sums               s = 256 / group: 1 for K-quants, 8 for blocks of 32

Chunks are stored [chunk][row]: the same chunk of neighbouring rows is adjacent, at a distance that is a constant of the
kernel, so that a tile of several columns is addressed from one register and streams through the cache.

Where the activations are what a pointwise operation yields (SwiGLU, GELU) and nothing else reads, it is done on the
way: a row is then what that operation reads, and what it yields is never written as float32.

For a mixture of experts the rows are taken in the order of the experts that they go to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .emit import F32, I8, I16, I32, I64, Emitter, Value, vec
from .library import function
from .operation import Arguments, NativeOp, Region, float_bits, tickets
from .pointwise import Pointwise
from .route import Routes
from .simd import concatenate, dot_quads, float_to_bfloat, nearest_int, reduce
from .target import Target

__all__ = ["CHUNK", "PADDING", "Activations", "bind", "body", "chunk_stride"]

CHUNK = 256  # values of a row that are handled together
PADDING = 12  # rows are padded to a multiple of this, which every tile divides, so that tiles may read beyond the last
_UNITS = 16  # chunks to a ticket
_TINY = 1e-36  # below this 127 / amax overflows; such a group is rounded to zeros

ARGUMENTS = Arguments("count", "x", "out", "columns", "limit", "order", "divisor")


@dataclass(frozen=True)
class Activations:
    """The form of one chunk.

    Attributes:
        group: values that share a scale, 256 or 32; 0 leaves them floats.
        span: values to a sum, 16 or 32.
        sums: "pairs": int16 sums of the rounded values; "start": int32, sums times -centre, from which a dot product
            with levels biased by `centre` starts; "scaled": float32, sums times the group's scale.
        centre: bias of the levels.
        bfloat: floats are rounded to bfloat16; one zero follows an odd number of them.
    """

    group: int
    span: int = 32
    sums: Literal["none", "pairs", "start", "scaled"] = "none"
    centre: int = 0
    bfloat: bool = False

    @property
    def name(self) -> str:
        """For the kernel's name."""
        if self.bfloat:
            return "bfloat"
        return f"{self.group}.{self.span}.{self.sums}.{self.centre}"

    @property
    def scale_offset(self) -> int:
        """Of the first scale within a chunk."""
        return CHUNK

    @property
    def sums_offset(self) -> int:
        """Of the first sum within a chunk."""
        return CHUNK + 4 * (CHUNK // self.group)

    @property
    def stride(self) -> int:
        """Bytes of a chunk."""
        if not self.group:
            size = 2 if self.bfloat else 4
            return size * CHUNK + 64  # not a multiple of a power of two, which would crowd few cache sets
        size = {"none": 0, "pairs": 2, "start": 4, "scaled": 4}[self.sums]
        return -(-(self.sums_offset + size * (CHUNK // self.span)) // 16) * 16


def chunk_stride(count: Value, form: Activations) -> Value:
    """Bytes between consecutive chunks of a row when a step has `count` rows."""
    return (count + (PADDING - 1)).udiv(PADDING) * (PADDING * form.stride)


Source = Callable[["Value | int", int], Value]
"""Reads float32 lanes at an offset in bytes."""


def bind(
    form: Activations,
    x: Region,
    scratch: NDArray[np.uint8],
    columns: int,
    before: Pointwise | None,
    target: Target,
    routes: Routes | None = None,
) -> NativeOp:
    """Fill `scratch` with x, float32 [rows, columns], or with what `before` makes of x, [rows, its parts * columns].

    With `routes` it is filled with a row for each of them, in their order: x has a row for each token, or with the
    count of the routes for each of those.
    """
    name = f"activations.{form.name}" + (f".{before.name}" if before else "") + (".routed" if routes else "")
    block = ARGUMENTS.pack(
        count=routes.count if routes else x.count,
        x=x.address,
        out=scratch.ctypes.data,
        columns=columns,
        limit=float_bits(before.limit) if before else 0,
        order=routes.order.ctypes.data if routes else 0,
        divisor=routes.used if routes and x.count != routes.count else 1,
    )
    kernel = function(name, 4, body(form, before, routed=routes is not None), target)
    return NativeOp(kernel, block, (x.array, scratch, routes))


def body(form: Activations, before: Pointwise | None = None, *, routed: bool = False) -> Callable[..., None]:
    """The kernel that fills a scratch area with all rows of a step.

    Row i is that of x, or if `routed` the one of number order[i] / divisor, rounded down; the order is int32.
    """
    parts = before.parts if before else 1

    def kernel(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        count_at, x, out, columns, limit, order, divisor = ARGUMENTS.read_all(e, block)
        count = e.load(count_at, x.type, align=8)
        chunks = (columns + (CHUNK - 1)).udiv(CHUNK)
        between = chunk_stride(count, form)
        units = count * chunks

        with tickets(e, counter, (units + (_UNITS - 1)).udiv(_UNITS)) as ticket:
            first = ticket * _UNITS
            with e.loop(first, e.min(first + _UNITS, units)) as unit:
                row = unit.udiv(chunks)
                chunk = unit - row * chunks
                place = e.load(order + 4 * row, I32).sext(I64).udiv(divisor) if routed else row
                source = _source(e, x + (place * columns * parts + chunk * CHUNK) * 4, columns, before, limit)
                target = out + chunk * between + row * form.stride
                left = e.min(columns - chunk * CHUNK, CHUNK)
                if form.bfloat:
                    _round_floats(e, source, target, left)
                elif not form.group:
                    _copy(e, source, target, left)
                elif form.group == CHUNK:
                    _round_chunk(e, form, source, target)
                else:
                    _round_groups(e, form, source, target, left)

    return kernel


def _source(e: Emitter, at: Value, columns: Value, before: Pointwise | None, limit: Value) -> Source:
    def plain(offset: Value | int, lanes: int) -> Value:
        return e.load(at + offset, vec(F32, lanes))

    def computed(offset: Value | int, lanes: int) -> Value:
        assert before is not None
        parts = [plain(4 * i * columns + offset, lanes) for i in range(before.parts)]
        return before.apply(e, limit.trunc(I32).bits(F32), *parts)

    return computed if before else plain


def _copy(e: Emitter, source: Source, target: Value, left: Value) -> None:
    whole = left & ~15
    with e.loop(0, whole, 16) as i:
        e.store(source(i * 4, 16), target + i * 4)
    with e.loop(whole, left) as i:
        e.store(source(i * 4, 1), target + i * 4)


def _round_floats(e: Emitter, source: Source, target: Value, left: Value) -> None:
    whole = left & ~15
    with e.loop(0, whole, 16) as i:
        e.store(float_to_bfloat(e, source(i * 4, 16)), target + i * 2)
    with e.loop(whole, left) as i:
        e.store(float_to_bfloat(e, source(i * 4, 1)), target + i * 2)
    with e.when((left & 1) != 0):
        e.store(e.const(I16, 0), target + left * 2)


def _magnitude(e: Emitter, parts: list[Value]) -> Value:
    """Bits of the largest magnitude; as integers they order like the floats, with infinity and NaN on top."""
    bits = [p.bits(vec(I32, p.lanes)) & 0x7FFFFFFF for p in parts]
    while len(bits) > 1:
        bits = [e.max(a, b) for a, b in zip(bits[::2], bits[1::2], strict=True)]
    return reduce(e, bits[0], "max")


def _scales(e: Emitter, magnitude: Value) -> tuple[Value, Value]:
    """The scale of a group and what its values are multiplied with; NaN as scale if a value is not finite."""
    amax = magnitude.bits(F32)
    finite = magnitude < 0x7F800000
    usable = amax >= _TINY
    inverse = e.where(usable, 127.0 / amax, e.const(F32, 0.0))
    scale = e.where(usable, amax / 127.0, e.const(F32, 0.0))
    return e.where(finite, scale, e.const(I32, 0x7FC00000).bits(F32)), inverse


def _folded(v: Value, times: int) -> Value:
    """Neighbouring lanes added, `times` times over."""
    for _ in range(times):
        v = v.shuffle(range(0, v.lanes, 2)) + v.shuffle(range(1, v.lanes, 2))
    return v


def _round_chunk(e: Emitter, form: Activations, source: Source, target: Value) -> None:
    """256 values with one scale. llama.cpp's sign of the scale is dropped: it cancels in every product."""
    parts = [source(64 * i, 16) for i in range(16)]
    scale, inverse = _scales(e, _magnitude(e, parts))
    sums = []
    for i in range(4):
        quads = [nearest_int(e, p * inverse).trunc(I8) for p in parts[4 * i : 4 * i + 4]]
        levels = concatenate(e, quads)
        e.store(levels, target + 64 * i)
        fours = dot_quads(e, e.const(vec(I32, 16), 0), e.const(vec(I8, 64), 1), levels, below=2)
        sums.append(_folded(fours, 2 if form.span == 16 else 3))
    e.store(scale, target + form.scale_offset)
    total = concatenate(e, sums)
    if form.sums == "pairs":
        e.store(total.trunc(I16), target + form.sums_offset)
    elif form.sums == "start":
        e.store(total * -form.centre, target + form.sums_offset)


def _round_groups(e: Emitter, form: Activations, source: Source, target: Value, left: Value) -> None:
    """Up to 8 groups of 32 values, each with its scale and sum."""
    with e.loop(0, left.udiv(form.group)) as g:
        parts = [source(g * (4 * form.group) + offset, 16) for offset in (0, 64)]
        scale, inverse = _scales(e, _magnitude(e, parts))
        low, high = (nearest_int(e, p * inverse) for p in parts)
        e.store(e.join(low.trunc(I8), high.trunc(I8)), target + g * form.group)
        e.store(scale, target + form.scale_offset + g * 4)
        # Integers: their sums are exact in any order.
        totals = [reduce(e, low), reduce(e, high)] if form.span == 16 else [reduce(e, low + high)]
        for i, total in enumerate(totals):
            at_sum = target + form.sums_offset + (g * len(totals) + i) * 4
            if form.sums == "start":
                e.store(total * -form.centre, at_sum)
            elif form.sums == "scaled":
                e.store(total.to_float() * scale, at_sum)
