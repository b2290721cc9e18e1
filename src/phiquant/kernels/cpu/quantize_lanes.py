"""What the compiled quantizers share: blocks brought into lanes, and levels packed back into blocks.

A group of blocks is quantized together, one block to a lane. Element i of all of them is one vector, kept in scratch
memory (a `Column` of n vectors), so that every sum runs over a block's elements in order, as it does in the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format, Plane

from .emit import F32, I8, I16, I32, I64, Emitter, Value, vec
from .simd import bfloat_to_float, float_to_half, half_to_float, transpose

__all__ = ["INFINITE_INPUT", "INFINITE_SCALE", "Arguments", "Column", "Kernel", "Lanes", "Quantizer", "widen"]

INFINITE_INPUT, INFINITE_SCALE = 1, 2  # bits of the word that a kernel leaves behind

_MAGIC = 12582912.0  # 1.5 * 2**23, see simd.nearest_int
_INFINITY_BITS = 0x7F800000


def widen(e: Emitter, address: Value, source: GGMLType, lanes: int) -> Value:
    """`lanes` consecutive values of a float type, as float32."""
    if source is GGMLType.F32:
        return e.load(address, vec(F32, lanes))
    bits = e.load(address, vec(I16, lanes))
    return half_to_float(e, bits) if source is GGMLType.F16 else bfloat_to_float(e, bits)


class Column:
    """n vectors in scratch memory, one after the other: n numbers for each lane."""

    def __init__(self, lanes: Lanes, address: Value) -> None:
        self.lanes, self.address = lanes, address

    def at(self, i: int | Value) -> Value:
        """Vector i, as float32."""
        return self.lanes.e.load(self._address(i), self.lanes.floats, align=self.lanes.stride)

    def int_at(self, i: int | Value) -> Value:
        """Vector i, as int32."""
        return self.lanes.e.load(self._address(i), self.lanes.ints, align=self.lanes.stride)

    def put(self, i: int | Value, v: Value) -> None:
        """Write vector i, float32 or int32."""
        self.lanes.e.store(v, self._address(i), align=self.lanes.stride)

    def start(self, i: Value) -> Column:
        """The vectors from i on."""
        return Column(self.lanes, self._address(i))

    def _address(self, i: int | Value) -> Value:
        return self.address + i * self.lanes.stride


class Lanes:
    """Vector helpers for one kernel: as many lanes as a register of the target holds, and at least eight."""

    def __init__(self, e: Emitter) -> None:
        self.e = e
        self.count = 16 if e.target.vector_bytes == 64 else 8
        self.stride = 4 * self.count
        self.floats, self.ints = vec(F32, self.count), vec(I32, self.count)

    def column(self, count: int) -> Column:
        """Fresh scratch memory for `count` vectors."""
        return Column(self, self.e.scratch(count * self.stride))

    def real(self, value: float) -> Value:
        """A constant vector."""
        return self.e.const(self.floats, value)

    def whole(self, value: int) -> Value:
        """A constant vector of integers."""
        return self.e.const(self.ints, value)

    def each(self, count: int, body: Callable[[Value], None], unroll: int = 4) -> None:
        """body(i) for i in 0..count-1, in order."""
        step = next(u for u in range(min(unroll, count), 0, -1) if count % u == 0)
        with self.e.loop(0, count, step) as i:
            for u in range(step):
                body(i + u)

    def total(self, count: int, term: Callable[[Value], Value]) -> Value:
        """The sum of term(i), added in order."""
        total = self.e.var(self.real(0))
        self.each(count, lambda i: total.set(total.get() + term(i)))
        return total.get()

    def round(self, v: Value) -> Value:
        """Halves to even, still float32; for magnitudes below 2**22."""
        if self.e.target.lowering == "generic":
            return (v + _MAGIC) - _MAGIC
        return self.e.rint(v)

    def clamp(self, v: Value, low: int, high: int) -> Value:
        """Float32 or int32 kept within low..high; NaN becomes low."""
        return self.e.min(self.e.max(v, low), high)

    def reciprocal(self, v: Value) -> Value:
        """1 / v, or 0 where v is 0."""
        return self.e.where(v != 0.0, 1.0 / v, self.real(0))

    def any(self, mask: Value) -> Value:
        """Whether the condition holds in some lane."""
        return mask.bits({8: I8, 16: I16}[self.count]) != 0


@dataclass(frozen=True)
class Arguments:
    """What a kernel is called with, all of it as I64: addresses and counts."""

    x: Value  # source rows, contiguous
    out: Value  # blocks, contiguous
    blocks: Value  # number of blocks, at least 1
    per_row: Value  # blocks in a row
    importance: Value  # float32, one for each column; unused without importance
    mean_squares: Value  # float32, one for each row; filled with importance where `Quantizer.row_mean`
    flags: Value  # an int64 that receives INFINITE_INPUT and INFINITE_SCALE
    tables: Value  # what `Quantizer.tables` made, if anything

    COUNT = 8


@dataclass(frozen=True)
class Quantizer:
    """How a type is quantized by compiled code.

    Attributes:
        emit: emit(e, format, source, weighted, arguments) writes the body of the kernel.
        row_mean: whether the weights of elements depend on the mean square of the whole row.
        tables: makes (once) the constant tables that the kernel reads, as one contiguous array.
    """

    emit: Callable[[Emitter, Format, GGMLType, bool, Arguments], None]
    row_mean: bool = False
    tables: Callable[[], npt.NDArray[Any]] | None = None


class Kernel(Lanes):
    """One quantizer being emitted: its group of blocks, and the checks it makes on the way."""

    def __init__(self, e: Emitter, entry: Format, source: GGMLType, arguments: Arguments) -> None:
        super().__init__(e)
        self.entry, self.source, self.arguments = entry, source, arguments
        self.elements = entry.type.block_elements
        self._largest = e.var(self.whole(0))  # bits of the largest magnitude read
        self._scales = e.var(self.whole(0))  # exponent bits of the largest scale written

    def groups(self, body: Callable[[Value], None]) -> None:
        """body(first block) for every group of lanes; at the end the flags are written."""
        with self.e.loop(0, self.arguments.blocks, self.count) as first:
            body(first)
        infinite = self.any(self._largest.get() >= _INFINITY_BITS).zext(I64)
        overflow = self.any(self._scales.get() == 0x7C00).zext(I64)
        self.e.store(infinite * INFINITE_INPUT + overflow * INFINITE_SCALE, self.arguments.flags)

    def index(self, first: Value, lane: int | Value) -> Value:
        """The block of a lane; the last lanes of the last group repeat the last block."""
        return self.e.min(first + lane, self.arguments.blocks - 1)

    def load(self, column: Column, first: Value) -> None:
        """The weights of the group's blocks, as float32."""
        size = self.source.block_bytes * self.elements
        starts = [self.arguments.x + self.index(first, lane) * size for lane in range(self.count)]
        self._transposed(column, starts, self.source, check=True)

    def load_importance(self, column: Column, first: Value) -> None:
        """The importance of the group's weights."""
        starts = [
            self.arguments.importance + self.index(first, lane) % self.arguments.per_row * (4 * self.elements)
            for lane in range(self.count)
        ]
        self._transposed(column, starts, GGMLType.F32, check=False)

    def load_mean_squares(self, first: Value) -> Value:
        """The mean square of the row that each block lies in."""
        address = self.arguments.mean_squares
        together = self.real(0)
        for lane in range(self.count):
            row = self.index(first, lane) // self.arguments.per_row
            together = together.with_lane(lane, self.e.load(address + row * 4, F32))
        return together

    def _transposed(self, column: Column, starts: list[Value], source: GGMLType, check: bool) -> None:
        with self.e.loop(0, self.elements, self.count) as i:
            rows = [widen(self.e, start + i * source.block_bytes, source, self.count) for start in starts]
            if check:
                for row in rows:
                    self._largest.set(self.e.max(self._largest.get(), row.bits(self.ints) & 0x7FFFFFFF))
            for j, vector in enumerate(transpose(self.e, rows)):
                column.put(i + j, vector)

    def half(self, scale: Value) -> tuple[Value, Value]:
        """A scale as stored, half precision in an int32, and as it is read back."""
        bits = float_to_half(self.e, scale)
        wide = bits.zext(I32)
        self._scales.set(self.e.max(self._scales.get(), wide & 0x7C00))
        return wide, half_to_float(self.e, bits)

    def overflow(self, mask: Value) -> None:
        """Flag INFINITE_SCALE if the condition holds in some lane."""
        self._scales.set(self.e.where(mask, self.whole(0x7C00), self._scales.get()))

    def pack(self, plane: Plane, levels: Column) -> Column:
        """One field's words of 4 bytes from the levels (int32)."""
        per_byte = 8 // plane.bits
        words = self.column(self.entry.dtype[plane.field].itemsize // 4)
        mask = 2**plane.bits - 1

        def word(element: Callable[[int, int], int | Value]) -> Value:
            made: Value | None = None
            for byte in range(4):
                for turn in range(per_byte):
                    part = levels.int_at(element(byte, turn)).lsr(plane.shift) & mask
                    part = part << (8 * byte + plane.bits * turn)
                    made = part if made is None else made | part
            assert made is not None
            return made

        if plane.run % 4:  # a word holds the bits of consecutive elements
            places = {plane.place(i): i for i in range(4 * per_byte)}
            with self.e.loop(0, self.entry.dtype[plane.field].itemsize // 4) as i:
                first = i * (4 * per_byte)
                words.put(i, word(lambda byte, turn: first + places[byte, plane.bits * turn]))
            return words
        with self.e.loop(0, self.elements // (plane.run * per_byte)) as group:
            base, to = group * (plane.run * per_byte), group * (plane.run // 4)
            with self.e.loop(0, plane.run // 4) as i:
                at = base + i * 4
                words.put(to + i, word(lambda byte, turn: at + (turn * plane.run + byte)))
        return words

    def words(self, values: list[Value]) -> Column:
        """A field's words from its bytes, each the low byte of an int32."""
        words = self.column(len(values) // 4)
        for i in range(0, len(values), 4):
            a, b, c, d = (value & 255 for value in values[i : i + 4])
            words.put(i // 4, a | (b << 8) | (c << 16) | (d << 24))
        return words

    def store(self, first: Value, fields: Mapping[str, Value | Column]) -> None:
        """Write the group's blocks: every field of the format, as words or (one or two bytes) the low bits of one."""
        e, dtype = self.e, self.entry.dtype
        columns = {}
        for name in dtype.names or ():
            made = fields[name]
            if isinstance(made, Value):
                columns[name] = self.column(1)
                columns[name].put(0, made)
            else:
                columns[name] = made
        with e.loop(0, e.min(self.arguments.blocks - first, self.count)) as lane:
            to = self.arguments.out + (first + lane) * dtype.itemsize
            for name in dtype.names or ():
                offset, size = dtype.fields[name][1], dtype[name].itemsize  # type: ignore[index]
                at = columns[name].address + lane * 4
                if size < 4:
                    e.store(e.load(at, I32).trunc({1: I8, 2: I16}[size]), to + offset)
                    continue
                unroll = next(u for u in (8, 4, 3, 2, 1) if size // 4 % u == 0)
                with e.loop(0, size // 4, unroll) as i:
                    for u in range(unroll):
                        e.store(e.load(at + (i + u) * self.stride, I32), to + (i + u) * 4 + offset)
