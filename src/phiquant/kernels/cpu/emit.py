"""LLVM IR written as arithmetic: values with operators, structured loops and conditions.

A kernel is a Python function that receives an `Emitter` and one `Value` for each 64-bit argument, and describes its
body by computing with them. Unrolling is a Python loop, a parameter of the kernel is a Python argument, and a loop
that runs in the kernel is a `with e.loop(...)` block:

    def scale(e, x, n):                      # x: address of float32, n: count, a multiple of 16
        with e.loop(0, n, 16) as i:
            v = e.load(x + 4 * i, vec(F32, 16))
            e.store(2.0 * v, x + 4 * i)

Rules of the arithmetic: integers are signed unless a method says otherwise; Python numbers and scalar values are
splatted to the other operand's vector type; nothing is converted silently; floating-point operations are exact IEEE
ones in the order written (no contraction, no reassociation), which is what makes results reproducible to the bit.
Addresses are I64 values; loads and stores take any alignment unless told otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from .target import Target
from .values import (
    BOOL,
    F16,
    F32,
    F64,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    VOID,
    Number,
    Value,
    element_of,
    is_float,
    vec,
)

__all__ = ["BOOL", "F16", "F32", "F64", "I8", "I16", "I32", "I64", "VOID", "Emitter", "Value", "Variable", "vec"]


class Variable:
    """A mutable local; LLVM turns it into registers."""

    def __init__(self, e: Emitter, initial: Value) -> None:
        self.e, self.type = e, initial.type
        with e.b.goto_entry_block():
            self.slot = e.b.alloca(self.type)
        self.set(initial)

    def get(self) -> Value:
        """The present value."""
        return Value(self.e, self.e.b.load(self.slot, typ=self.type))

    def set(self, v: Value | Number) -> None:
        """Assign."""
        self.e.b.store(self.e.lift(v, self.type).raw, self.slot)


class Emitter:
    """Builds the body of one function for one target."""

    def __init__(self, b: ir.IRBuilder, target: Target) -> None:
        self.b, self.target, self._in_order = b, target, False

    # -- constants and conversion -------------------------------------------------------------------------------

    def const(self, t: ir.Type, value: Number | Sequence[Number]) -> Value:
        """A constant; one number is splatted over a vector."""
        if isinstance(t, ir.VectorType):
            values = list(value) if isinstance(value, Sequence) else [value] * t.count
            return Value(self, ir.Constant(t, [self._number(t.element, v) for v in values]))
        return Value(self, ir.Constant(t, self._number(t, value)))

    @staticmethod
    def _number(t: ir.Type, v: Any) -> Any:
        if isinstance(t, FLOATS):
            return float(v)
        if not isinstance(v, int):
            raise TypeError(f"{v!r} is not an integer constant")
        return v

    def integer(self, value: int) -> Value:
        """A 64-bit integer constant."""
        return self.const(I64, value)

    def lift(self, v: Value | Number, t: ir.Type) -> Value:
        """`v` as type `t`: numbers become constants, scalars are splatted; anything else must match already."""
        if not isinstance(v, Value):
            return self.const(t, v)
        if v.type == t:
            return v
        if isinstance(t, ir.VectorType) and v.type == t.element:
            return self.splat(v, t.count)
        raise TypeError(f"cannot use {v.type} as {t}")

    def pair(self, a: Value | Number, b: Value | Number) -> tuple[Value, Value]:
        """Both operands with one common type."""
        if not isinstance(a, Value):
            assert isinstance(b, Value)
            return self.const(b.type, a), b
        if not isinstance(b, Value):
            return a, self.const(a.type, b)
        t = a.type if a.lanes >= b.lanes else b.type
        return self.lift(a, t), self.lift(b, t)

    def splat(self, scalar: Value, lanes: int) -> Value:
        """A vector whose elements all equal the scalar."""
        t = vec(scalar.type, lanes)
        one = self.b.insert_element(ir.Constant(t, ir.Undefined), scalar.raw, I32(0))
        zeros = ir.Constant(vec(I32, lanes), [0] * lanes)
        return Value(self, self.b.shuffle_vector(one, ir.Constant(t, ir.Undefined), zeros))

    def join(self, a: Value, b: Value) -> Value:
        """The elements of two vectors of one type, one after the other."""
        return a.shuffle(range(2 * a.lanes), b)

    # -- arithmetic without an operator ---------------------------------------------------------------------------

    def where(self, condition: Value, yes: Value | Number, no: Value | Number) -> Value:
        """Elementwise choice."""
        a, b = self.pair(yes, no)
        return Value(self, self.b.select(condition.raw, a.raw, b.raw))

    def min(self, a: Value | Number, b: Value | Number) -> Value:
        """The smaller (the second operand if either is NaN)."""
        x, y = self.pair(a, b)
        return self.where(x < y, x, y)

    def max(self, a: Value | Number, b: Value | Number) -> Value:
        """The larger (the second operand if either is NaN)."""
        x, y = self.pair(a, b)
        return self.where(x > y, x, y)

    def intrinsic(self, name: str, returns: ir.Type, *args: Value) -> Value:
        """Call an LLVM intrinsic or a C function by its full name."""
        raws = [a.raw for a in args]
        known = self.b.module.globals.get(name)
        f = known or ir.Function(self.b.module, ir.FunctionType(returns, [r.type for r in raws]), name)
        return Value(self, self.b.call(f, raws))

    def _unary(self, name: str, v: Value) -> Value:
        element = {F32: "f32", F64: "f64"}[element_of(v.type)]
        suffix = f"v{v.lanes}{element}" if isinstance(v.type, ir.VectorType) else element
        return self.intrinsic(f"llvm.{name}.{suffix}", v.type, v)

    def fma(self, a: Value, b: Value | Number, c: Value | Number) -> Value:
        """a * b + c with one rounding."""
        t = max((v for v in (a, b, c) if isinstance(v, Value)), key=lambda v: v.lanes).type
        x, y, z = (self.lift(v, t) for v in (a, b, c))
        element = {F32: "f32", F64: "f64"}[element_of(t)]
        suffix = f"v{t.count}{element}" if isinstance(t, ir.VectorType) else element
        return self.intrinsic(f"llvm.fma.{suffix}", t, x, y, z)

    def sqrt(self, v: Value) -> Value:
        """Square root, correctly rounded."""
        return self._unary("sqrt", v)

    def abs(self, v: Value) -> Value:
        """Magnitude of floats or of signed integers."""
        return self._unary("fabs", v) if is_float(v.type) else self.max(v, -v)

    def rint(self, v: Value) -> Value:
        """Round floats to the nearest integer, halves to even."""
        return self._unary("nearbyint", v)

    def floor(self, v: Value) -> Value:
        """Round floats down."""
        return self._unary("floor", v)

    # -- memory ---------------------------------------------------------------------------------------------------

    def _pointer(self, address: Value, t: ir.Type) -> ir.Value:
        return self.b.inttoptr(address.raw, t.as_pointer())

    def load(self, address: Value, t: ir.Type, align: int = 1) -> Value:
        """Read a value of type `t`."""
        v = Value(self, self.b.load(self._pointer(address, t), align=align, typ=t))
        if self._in_order:
            self.b.asm(ir.FunctionType(VOID, []), "", "~{memory}", [], True)
        return v

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Loads inside stay in the order that they are emitted in, which LLVM otherwise does not care for."""
        before, self._in_order = self._in_order, True
        yield
        self._in_order = before

    def store(self, v: Value, address: Value, align: int = 1) -> None:
        """Write a value."""
        self.b.store(v.raw, self._pointer(address, v.type), align=align)

    def prefetch(self, address: Value, *, write: bool = False, locality: int = 3) -> None:
        """Ask for a cache line (locality 3: into every level, 0: used once)."""
        args = (Value(self, self._pointer(address, I8)), *(self.const(I32, v) for v in (int(write), locality, 1)))
        self.intrinsic("llvm.prefetch.p0", VOID, *args)

    def scratch(self, size: int, align: int = 64) -> Value:
        """The address of `size` bytes on the stack, for the whole call; keep it under some tens of kilobytes."""
        with self.b.goto_entry_block():
            slot = self.b.alloca(ir.ArrayType(I8, size))
            slot.align = align
            return Value(self, self.b.ptrtoint(slot, I64))

    def table(self, data: bytes) -> Value:
        """The address of constant bytes that are part of the kernel, aligned to 64; equal bytes are kept once.

        They must come from `quants` or this folder: the cache of kernels knows of changes in those alone.
        """
        name = f"table.{hashlib.sha256(data).hexdigest()[:20]}"
        known = self.b.module.globals.get(name)
        if known is None:
            known = ir.GlobalVariable(self.b.module, ir.ArrayType(I8, len(data)), name)
            known.linkage, known.global_constant, known.align = "private", True, 64
            known.initializer = ir.Constant(known.value_type, bytearray(data))
        return Value(self, self.b.ptrtoint(known, I64))

    def atomic_load(self, address: Value) -> Value:
        """Read a shared 32-bit word, sequentially consistent; as I64."""
        got = self.b.load_atomic(self._pointer(address, I32), "seq_cst", 4, typ=I32)
        return Value(self, self.b.zext(got, I64))

    def atomic_store(self, v: Value | Number, address: Value) -> None:
        """Write the low 32 bits of an I64 to a shared word, sequentially consistent."""
        word = self.lift(v, I64).trunc(I32)
        self.b.store_atomic(word.raw, self._pointer(address, I32), "seq_cst", 4)

    def atomic_add(self, address: Value, v: Value | Number) -> Value:
        """Add to a shared 32-bit word and return what it held before, as I64."""
        amount = self.lift(v, I64).trunc(I32)
        old = self.b.atomic_rmw("add", self._pointer(address, I32), amount.raw, "seq_cst")
        return Value(self, self.b.zext(old, I64))

    # -- control --------------------------------------------------------------------------------------------------

    def var(self, initial: Value | Number) -> Variable:
        """A mutable local; a Python integer makes an I64 one."""
        return Variable(self, initial if isinstance(initial, Value) else self.integer(int(initial)))

    @contextmanager
    def loop(self, start: Value | Number, stop: Value | Number, step: Value | Number = 1) -> Iterator[Value]:
        """A counted loop over I64: `with e.loop(0, n) as i`. Empty when start >= stop."""
        b = self.b
        first, last = self.lift(start, I64), self.lift(stop, I64)
        before = b.block
        head, body, after = (b.append_basic_block(n) for n in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        phi = b.phi(I64)
        phi.add_incoming(first.raw, before)
        i = Value(self, phi)
        b.cbranch((i < last).raw, body, after)
        b.position_at_end(body)
        yield i
        following = i + step
        phi.add_incoming(following.raw, b.block)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def forever(self) -> Iterator[_Exit]:
        """An endless loop, left by `done(condition)`: `with e.forever() as done`."""
        b = self.b
        head, after = b.append_basic_block("head"), b.append_basic_block("after")
        b.branch(head)
        b.position_at_end(head)
        yield _Exit(self, after)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """A block that runs if the condition holds."""
        with self.b.if_then(condition.raw):
            yield

    @contextmanager
    def choose(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Two blocks: `with e.choose(c) as (yes, no): with yes: ...; with no: ...`."""
        with self.b.if_else(condition.raw) as arms:
            yield arms

    def call(self, address: Value, *args: Value) -> None:
        """Call a function of I64 arguments, returning nothing, by its address."""
        t = ir.FunctionType(VOID, [I64] * len(args))
        self.b.call(self.b.inttoptr(address.raw, t.as_pointer()), [a.raw for a in args])


class _Exit:
    def __init__(self, e: Emitter, after: ir.Block) -> None:
        self.e, self.after = e, after

    def __call__(self, condition: Value) -> None:
        """Leave the loop if the condition holds; go on otherwise."""
        b = self.e.b
        on = b.append_basic_block("on")
        b.cbranch(condition.raw, self.after, on)
        b.position_at_end(on)
