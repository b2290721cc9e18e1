"""Quantizers of the formats of 32 weights in vector code, one block to a lane, as `quants.legacy` defines them."""

from __future__ import annotations

from phiquant.gguf.types import GGMLType
from phiquant.quants import Format

from .emit import F32, I16, I32, I64, Emitter, Value, vec
from .quantize_lanes import INFINITE_INPUT, INFINITE_SCALE, Arguments, Column, Kernel, widen
from .quantize_search import RangeSearch, absolute_peak, fit_range, fit_symmetric, range_level, symmetric_level
from .simd import float_to_bfloat, float_to_half, reduce, round_away

__all__ = ["emit_floats", "emit_legacy", "emit_mean_squares"]

_CENTRED = {GGMLType.Q4_0: 8, GGMLType.Q5_0: 16}
_RANGED = {GGMLType.Q4_1: 15, GGMLType.Q5_1: 31}


def emit_legacy(e: Emitter, entry: Format, source: GGMLType, weighted: bool, arguments: Arguments) -> None:
    """The body of a kernel that quantizes `arguments.blocks` blocks of 32 weights."""
    k = Kernel(e, entry, source, arguments)
    x = k.column(32)
    w, importance = (k.column(32), k.column(32)) if weighted else (None, None)
    scratch = k.column(32) if weighted and entry.type in _RANGED else None

    def group(first: Value) -> None:
        k.load(x, first)
        if w is not None and importance is not None:
            k.load_importance(importance, first)
            mean = k.load_mean_squares(first)

            def weigh(i: Value) -> None:
                v = x.at(i)
                w.put(i, importance.at(i) * e.sqrt(mean + v * v))

            k.each(32, weigh)
        if entry.type in _CENTRED:
            fields = _centred(k, x, w, _CENTRED[entry.type])
        elif entry.type in _RANGED:
            fields = _ranged(k, x, w, scratch, _RANGED[entry.type])
        else:
            fields = _q8_0(k, x)
        fields.update({plane.field: k.pack(plane, x) for plane in entry.planes})
        k.store(first, fields)

    k.groups(group)


def _truncated(k: Kernel, v: Value) -> Value:
    """Towards zero; 0 for what no 32-bit integer holds, as in the reference."""
    return k.e.where(k.e.abs(v) < 2.0**31, v, k.real(0)).to_int()


def _centred(k: Kernel, x: Column, w: Column | None, centre: int) -> dict[str, Value | Column]:
    e = k.e
    if w is None:
        d = absolute_peak(k, x, 32) / float(-centre)
        inverse = k.reciprocal(d)
        # bounded by 2 * centre + 0.5, so that the reference's 8-bit integers do not wrap
        k.each(32, lambda i: x.put(i, e.min(_truncated(k, x.at(i) * inverse + (centre + 0.5)), 2 * centre - 1)))
    else:
        d, inverse = fit_symmetric(k, x, 32, centre, w)
        k.each(32, lambda i: x.put(i, symmetric_level(k, inverse * x.at(i), centre).to_int() + centre))
    return {"d": k.half(d)[0]}


def _ranged(k: Kernel, x: Column, w: Column | None, scratch: Column | None, top: int) -> dict[str, Value | Column]:
    e = k.e
    if w is None or scratch is None:
        low, high = e.var(x.at(0)), e.var(x.at(0))

        def extent(i: Value) -> None:
            v = x.at(i)
            low.set(e.where(v < low.get(), v, low.get()))
            high.set(e.where(v > high.get(), v, high.get()))

        k.each(32, extent)
        m = low.get()
        d = (high.get() - m) / float(top)
        inverse = k.reciprocal(d)
        k.each(32, lambda i: x.put(i, e.min(_truncated(k, (x.at(i) - m) * inverse + 0.5), top)))
    else:
        search = RangeSearch(top, -0.9, 0.05, 36)
        ((d, offset, inverse, lowest),) = fit_range(k, [x], [w], 32, search, scratch)
        m = -offset
        k.each(32, lambda i: x.put(i, range_level(k, inverse * (x.at(i) - lowest), top)))
    return {"d": k.half(d)[0], "m": k.half(m)[0]}


def _q8_0(k: Kernel, x: Column) -> dict[str, Value | Column]:
    e = k.e
    d = e.abs(absolute_peak(k, x, 32)) / 127.0
    inverse = k.reciprocal(d)

    def level(i: Value) -> None:
        v = x.at(i) * inverse
        x.put(i, round_away(e, e.where(e.abs(v) < 2.0**23, v, k.real(0))))

    k.each(32, level)
    return {"d": k.half(d)[0]}


def emit_mean_squares(e: Emitter, source: GGMLType, x: Value, out: Value, rows: Value, columns: Value) -> None:
    """out[row] = the mean square of a row, its squares added in order. `columns` is a multiple of 32."""
    with e.loop(0, rows) as row:
        total = e.var(e.const(F32, 0))
        with e.loop(0, columns, 8) as i:
            v = widen(e, x + (row * columns + i) * source.block_bytes, source, 8)
            squares = v * v
            for lane in range(8):
                total.set(total.get() + squares.lane(lane))
        e.store(total.get() / columns.to_float(F32), out + row * 4)


def emit_floats(e: Emitter, source: GGMLType, to: GGMLType, x: Value, out: Value, count: Value, flags: Value) -> None:
    """Convert `count` floats; flags as a quantizer's, INFINITE_SCALE where a value became infinite on the way."""
    whole = count - count % 16
    bad_input, bad_output = e.var(0), e.var(0)
    for lanes, start, stop in ((16, e.integer(0), whole), (1, whole, count)):
        words = vec(I32, lanes)
        largest_in, largest_out = e.var(e.const(words, 0)), e.var(e.const(words, 0))
        infinity = {GGMLType.F32: 0x7F800000, GGMLType.F16: 0x7C00, GGMLType.BF16: 0x7F80}[to]
        with e.loop(start, stop, lanes) as i:
            v = widen(e, x + i * source.block_bytes, source, lanes)
            largest_in.set(e.max(largest_in.get(), v.bits(words) & 0x7FFFFFFF))
            if to is GGMLType.F32:
                bits = v.bits(words)
            elif to is source:  # not through float32, which would make signalling NaNs quiet
                bits = e.load(x + i * 2, vec(I16, lanes))
            else:
                bits = float_to_half(e, v) if to is GGMLType.F16 else float_to_bfloat(e, v)
            largest_out.set(e.max(largest_out.get(), bits.zext(I32) & infinity))
            e.store(bits, out + i * to.block_bytes)
        for largest, bound, bad in ((largest_in, 0x7F800000, bad_input), (largest_out, infinity, bad_output)):
            top = reduce(e, largest.get(), "max") if lanes > 1 else largest.get().lane(0)
            bad.set(bad.get() | (top >= bound).zext(I64))
    e.store(bad_input.get() * INFINITE_INPUT + bad_output.get() * INFINITE_SCALE, flags)
