"""Values of a kernel under construction: types, and arithmetic with operators.

`emit` says what the rules of the arithmetic are, and makes values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llvmlite import ir

if TYPE_CHECKING:
    from .emit import Emitter

__all__ = [
    "BOOL",
    "F16",
    "F32",
    "F64",
    "FLOATS",
    "I8",
    "I16",
    "I32",
    "I64",
    "VOID",
    "Number",
    "Value",
    "element_of",
    "is_float",
    "vec",
]

BOOL, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64, VOID = ir.HalfType(), ir.FloatType(), ir.DoubleType(), ir.VoidType()
FLOATS = (ir.HalfType, ir.FloatType, ir.DoubleType)

Number = int | float


def vec(element: ir.Type, lanes: int) -> ir.VectorType:
    """The type of a vector."""
    return ir.VectorType(element, lanes)


def element_of(t: ir.Type) -> ir.Type:
    """The type of a vector's elements, or the scalar type itself."""
    return t.element if isinstance(t, ir.VectorType) else t


def is_float(t: ir.Type) -> bool:
    """Whether a type is of floats or vectors of them."""
    return isinstance(element_of(t), FLOATS)


def _retyped(t: ir.Type, element: ir.Type) -> ir.Type:
    return vec(element, t.count) if isinstance(t, ir.VectorType) else element


class Value:
    """An SSA value with arithmetic; created by an Emitter."""

    __slots__ = ("e", "raw")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, e: Emitter, raw: ir.Value) -> None:
        self.e, self.raw = e, raw

    @property
    def type(self) -> ir.Type:
        """The LLVM type."""
        return self.raw.type

    @property
    def lanes(self) -> int:
        """Number of elements; 1 for a scalar."""
        return self.type.count if isinstance(self.type, ir.VectorType) else 1

    def _binary(self, other: Value | Number, integer: str, real: str | None, swap: bool = False) -> Value:
        a, b = self.e.pair(self, other)
        name = real if is_float(a.type) else integer
        if not name:
            raise TypeError(f"no such operation on {a.type}")
        if swap:
            a, b = b, a
        return Value(self.e, getattr(self.e.b, name)(a.raw, b.raw))

    def __add__(self, o: Value | Number) -> Value:
        return self._binary(o, "add", "fadd")

    def __radd__(self, o: Number) -> Value:
        return self._binary(o, "add", "fadd", swap=True)

    def __sub__(self, o: Value | Number) -> Value:
        return self._binary(o, "sub", "fsub")

    def __rsub__(self, o: Number) -> Value:
        return self._binary(o, "sub", "fsub", swap=True)

    def __mul__(self, o: Value | Number) -> Value:
        return self._binary(o, "mul", "fmul")

    def __rmul__(self, o: Number) -> Value:
        return self._binary(o, "mul", "fmul", swap=True)

    def __truediv__(self, o: Value | Number) -> Value:
        return self._binary(o, "", "fdiv")

    def __rtruediv__(self, o: Number) -> Value:
        return self._binary(o, "", "fdiv", swap=True)

    def __floordiv__(self, o: Value | Number) -> Value:
        """Division of integers, rounding towards zero."""
        return self._binary(o, "sdiv", None)

    def __mod__(self, o: Value | Number) -> Value:
        """Remainder of `//`, with the sign of the dividend."""
        return self._binary(o, "srem", None)

    def __and__(self, o: Value | Number) -> Value:
        return self._binary(o, "and_", None)

    def __or__(self, o: Value | Number) -> Value:
        return self._binary(o, "or_", None)

    def __xor__(self, o: Value | Number) -> Value:
        return self._binary(o, "xor", None)

    def __lshift__(self, o: Value | Number) -> Value:
        return self._binary(o, "shl", None)

    def __rshift__(self, o: Value | Number) -> Value:
        """Arithmetic shift: the sign comes in."""
        return self._binary(o, "ashr", None)

    def lsr(self, o: Value | Number) -> Value:
        """Logical shift right: zeros come in."""
        return self._binary(o, "lshr", None)

    def udiv(self, o: Value | Number) -> Value:
        """Unsigned division."""
        return self._binary(o, "udiv", None)

    def __neg__(self) -> Value:
        b = self.e.b
        return Value(self.e, b.fneg(self.raw) if is_float(self.type) else b.neg(self.raw))

    def __invert__(self) -> Value:
        return Value(self.e, self.e.b.not_(self.raw))

    def _compare(self, o: Value | Number, op: str) -> Value:
        a, c = self.e.pair(self, o)
        b = self.e.b
        made = b.fcmp_ordered(op, a.raw, c.raw) if is_float(a.type) else b.icmp_signed(op, a.raw, c.raw)
        return Value(self.e, made)

    def __lt__(self, o: Value | Number) -> Value:
        return self._compare(o, "<")

    def __le__(self, o: Value | Number) -> Value:
        return self._compare(o, "<=")

    def __gt__(self, o: Value | Number) -> Value:
        return self._compare(o, ">")

    def __ge__(self, o: Value | Number) -> Value:
        return self._compare(o, ">=")

    def __eq__(self, o: object) -> Value:  # type: ignore[override]
        return self._compare(o, "==")  # type: ignore[arg-type]

    def __ne__(self, o: object) -> Value:  # type: ignore[override]
        return self._compare(o, "!=")  # type: ignore[arg-type]

    def ult(self, o: Value | Number) -> Value:
        """Unsigned less-than."""
        a, c = self.e.pair(self, o)
        return Value(self.e, self.e.b.icmp_unsigned("<", a.raw, c.raw))

    def unordered(self) -> Value:
        """Whether a float is NaN."""
        return Value(self.e, self.e.b.fcmp_unordered("uno", self.raw, self.raw))

    def _cast(self, op: str, element: ir.Type) -> Value:
        to = _retyped(self.type, element)
        return self if to == self.type else Value(self.e, getattr(self.e.b, op)(self.raw, to))

    def sext(self, element: ir.Type) -> Value:
        """Widen signed integers."""
        return self._cast("sext", element)

    def zext(self, element: ir.Type) -> Value:
        """Widen unsigned integers (and conditions, to 0 and 1)."""
        return self._cast("zext", element)

    def trunc(self, element: ir.Type) -> Value:
        """Keep the low bits of integers."""
        return self._cast("trunc", element)

    def to_float(self, element: ir.Type = F32) -> Value:
        """Signed integers to floats, rounded to nearest."""
        return self._cast("sitofp", element)

    def to_int(self, element: ir.Type = I32) -> Value:
        """Floats to signed integers, rounded towards zero; out of range is undefined, clamp before."""
        return self._cast("fptosi", element)

    def fpext(self, element: ir.Type) -> Value:
        """Widen floats (F32 to F64; half precision goes through `simd.half_to_float`)."""
        return self._cast("fpext", element)

    def fptrunc(self, element: ir.Type) -> Value:
        """Narrow floats, rounded to nearest even (F64 to F32)."""
        return self._cast("fptrunc", element)

    def bits(self, t: ir.Type) -> Value:
        """The same bits as another type of the same total size."""
        return self if t == self.type else Value(self.e, self.e.b.bitcast(self.raw, t))

    def lane(self, i: int | Value) -> Value:
        """One element of a vector."""
        index = i.raw if isinstance(i, Value) else I32(i)
        return Value(self.e, self.e.b.extract_element(self.raw, index))

    def with_lane(self, i: int, scalar: Value) -> Value:
        """The vector with one element replaced."""
        return Value(self.e, self.e.b.insert_element(self.raw, scalar.raw, I32(i)))

    def shuffle(self, indices: Sequence[int], other: Value | None = None) -> Value:
        """Elements picked from this vector (and from `other`, numbered on)."""
        second = other.raw if other is not None else ir.Constant(self.type, ir.Undefined)
        mask = ir.Constant(vec(I32, len(indices)), list(indices))
        return Value(self.e, self.e.b.shuffle_vector(self.raw, second, mask))
