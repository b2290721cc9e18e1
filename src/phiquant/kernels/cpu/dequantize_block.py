"""Fields and levels of one block in memory, for the dequantizers."""

from __future__ import annotations

from phiquant.quants import Format, Plane

from .emit import I8, I16, I32, Emitter, Value, vec
from .simd import half_to_float

__all__ = ["LANES", "Block"]

LANES = 16  # consecutive elements of a block to a vector


class Block:
    """Fields of the block at an address."""

    def __init__(self, e: Emitter, entry: Format, address: Value) -> None:
        self.e, self.entry, self.address = e, entry, address

    def at(self, field: str, index: int = 0) -> Value:
        """The address of a byte of a field."""
        offset: int = self.entry.dtype.fields[field][1]  # type: ignore[index]
        return self.address + (offset + index)

    def half(self, field: str) -> Value:
        """A half-precision field as float32."""
        return half_to_float(self.e, self.e.load(self.at(field), I16))

    def byte(self, field: str, index: int) -> Value:
        """A byte as an unsigned int32."""
        return self.e.load(self.at(field, index), I8).zext(I32)

    def bits(self, plane: Plane, element: int) -> Value:
        """One plane's bits of 16 elements, in place in their levels."""
        e = self.e
        byte, bit = plane.place(element)
        below = (1 << plane.bits) - 1
        if plane.run == 1:  # consecutive elements lie in consecutive bits
            word = e.load(self.at(plane.field, byte), {1: I16, 2: I32}[plane.bits]).zext(I32)
            turns = e.const(vec(I32, LANES), [plane.bits * i for i in range(LANES)])
            return (e.splat(word, LANES).lsr(turns) & below) << plane.shift
        width = min(plane.run, LANES)
        found = e.load(self.at(plane.field, byte), vec(I8, width)).lsr(bit) & below
        if width < LANES:  # two turns of 8 bytes
            found = e.join(found, e.load(self.at(plane.field, byte), vec(I8, width)).lsr(bit + plane.bits) & below)
        return found.zext(I32) << plane.shift

    def levels(self, element: int) -> Value:
        """The levels of 16 elements."""
        total = self.bits(self.entry.planes[0], element)
        for plane in self.entry.planes[1:]:
            total = total | self.bits(plane, element)
        return total
