"""Scales fitted again to what was rounded: a block's levels stay, and its scales move where the error is least.

With the levels fixed the error is a quadratic in every scale. With g = errors @ M, a change of the values by t * u
lessens it by 2 t (g . u) - t**2 (u M u), so t = (g . u) / (u M u) is best, rounded to what the format stores. One after
the other: scale and offset of every sub-block, then the block's common factors of both. Each step can only lessen the
error, and leaves g as it is after it.
"""

from __future__ import annotations

from phiquant.quants.feedback import Stepped
from phiquant.quants.feedback_points import Pointed

from .emit import F32, Emitter, Value
from .feedback_product import ROWS, Panels, lanes, product, room
from .quantize_lanes import Lanes
from .simd import float_to_half, half_to_float, multiply_add

__all__ = ["REFIT", "emit_refit"]

_LINE = 4 * ROWS
_LARGEST = 65504.0  # of half precision

REFIT = (
    "now", "entries", "errors", "wide", "gradient", "image", "total", "narrow", "scale", "offset", "steps", "drops",
    "scales", "unit", "least", "units", "matrix", "stride", "sums", "width", "panels",
)  # fmt: skip
"""Arguments of the kernel: as those of a sweep; `image` and `total` are room beside `gradient`. `steps` and `drops`
are the whole numbers of scales and offsets, `unit` and `least` their factors (`units` bytes from panel to panel); of
formats without such they are not used. `sums` are those of the matrix over the rows of each sub-block,
[sub-blocks, width]."""


class _Refit:
    def __init__(self, e: Emitter, how: Stepped | Pointed, a: dict[str, Value]) -> None:
        self.e, self.how, self.a, self.k = e, how, a, Lanes(e)
        self.size = how.unit

    def each(self, name: str, pitch: str, panel: Value, row: Value) -> Value:
        """Where the rows of a vector are in an array."""
        return self.a[name] + panel * self.a[pitch] + row * 4

    def load(self, address: Value) -> Value:
        return self.e.load(address, self.k.floats)

    def half(self, v: Value) -> Value:
        """Rounded to half precision."""
        bounded = self.e.min(self.e.max(v, -_LARGEST), _LARGEST)
        return half_to_float(self.e, float_to_half(self.e, bounded))

    def number(self, address: Value) -> Value:
        """One number for all rows."""
        return self.e.splat(self.e.load(address, F32), self.k.count)

    def ratio(self, part: Value, whole: Value) -> Value:
        """part / whole, or 0 where that would be no step."""
        safe = whole > 0.0
        return self.e.where(safe, part / self.e.where(safe, whole, 1.0), 0.0)

    def parts(self, step: Value) -> Value:
        """What a stored scale is multiplied by the common factor as."""
        return step * self.how.slope + self.how.base

    def sub_block(self, j: Value, panel: Value, row: Value) -> None:
        """Scale and offset of sub-block j, whose image (entries @ matrix) was made."""
        e, k, how = self.e, self.k, self.how
        at = j * (self.size * _LINE)
        entries = self.each("entries", "wide", panel, row) + at
        gradient, image = self.each("gradient", "narrow", panel, row), self.each("image", "narrow", panel, row)
        curve, slope = e.var(k.real(0)), e.var(k.real(0))
        with e.loop(0, self.size) as c:
            z = self.load(entries + c * _LINE)
            curve.set(multiply_add(e, z, self.load(image + at + c * _LINE), curve.get()))
            slope.set(multiply_add(e, z, self.load(gradient + at + c * _LINE), slope.get()))
        place = j * _LINE
        scale = self.each("scale", "scales", panel, row) + place
        old = self.load(scale)
        if how.steps is not None:
            steps = self.each("steps", "scales", panel, row) + place
            unit = self.load(self.each("unit", "units", panel, row))
            step = self.load(steps)
            by = unit * how.slope
            move = k.round(self.ratio(slope.get(), curve.get() * e.abs(by)))
            move = e.where(by < 0.0, -move, move)
            step = k.clamp(step + move, *how.steps)
            step = e.where(by == 0.0, self.load(steps), step)
            e.store(step, steps)
            new = unit * self.parts(step)
        else:
            new = self.half(old + self.ratio(slope.get(), curve.get()))
        e.store(new, scale)
        less = old - new
        total = self.each("total", "narrow", panel, row)
        with e.loop(0, self.a["width"]) as c:
            seen = self.load(image + c * _LINE)
            e.store(multiply_add(e, less, seen, self.load(gradient + c * _LINE)), gradient + c * _LINE)
            if how.shared:
                e.store(multiply_add(e, self.parts(step), seen, self.load(total + c * _LINE)), total + c * _LINE)
        if how.ranged:
            self.offset(j, panel, row, gradient)

    def offset(self, j: Value, panel: Value, row: Value, gradient: Value) -> None:
        """The offset of sub-block j."""
        e, k, how = self.e, self.k, self.how
        at, place = j * self.size, j * _LINE
        sums = self.a["sums"] + j * (self.a["width"] * 4)
        curve, slope = e.var(k.real(0)), e.var(k.real(0))
        with e.loop(at, at + self.size) as c:
            curve.set(curve.get() + self.number(sums + c * 4))
            slope.set(slope.get() - self.load(gradient + c * _LINE))
        offset = self.each("offset", "scales", panel, row) + place
        old = self.load(offset)
        if how.steps is not None:
            drops = self.each("drops", "scales", panel, row) + place
            least = self.load(self.each("least", "units", panel, row))
            move = k.round(self.ratio(slope.get(), curve.get() * least))
            drop = k.clamp(self.load(drops) + move, 0, how.steps[1])
            e.store(drop, drops)
            new = least * drop
        else:
            new = -self.half(-(old + self.ratio(slope.get(), curve.get())))
        e.store(new, offset)
        more = new - old
        with e.loop(0, self.a["width"]) as c:
            moved = multiply_add(e, more, self.number(sums + c * 4), self.load(gradient + c * _LINE))
            e.store(moved, gradient + c * _LINE)

    def common(self, panel: Value, row: Value) -> None:
        """The factor of all scales, and that of all offsets."""
        e, k = self.e, self.k
        entries = self.each("entries", "wide", panel, row)
        gradient, total = self.each("gradient", "narrow", panel, row), self.each("total", "narrow", panel, row)
        steps, drops = (self.each(name, "scales", panel, row) for name in ("steps", "drops"))
        count = self.a["width"] // self.size
        curve, slope = e.var(k.real(0)), e.var(k.real(0))
        with e.loop(0, count) as j:
            part = self.parts(self.load(steps + j * _LINE))
            with e.loop(j * self.size, (j + 1) * self.size) as c:
                z = part * self.load(entries + c * _LINE)
                curve.set(multiply_add(e, z, self.load(total + c * _LINE), curve.get()))
                slope.set(multiply_add(e, z, self.load(gradient + c * _LINE), slope.get()))
        unit = self.each("unit", "units", panel, row)
        old = self.load(unit)
        new = self.half(old + self.ratio(slope.get(), curve.get()))
        e.store(new, unit)
        with e.loop(0, self.a["width"]) as c:
            moved = multiply_add(e, old - new, self.load(total + c * _LINE), self.load(gradient + c * _LINE))
            e.store(moved, gradient + c * _LINE)
        with e.loop(0, count) as j:
            scale = self.each("scale", "scales", panel, row) + j * _LINE
            e.store(new * self.parts(self.load(steps + j * _LINE)), scale)
        if not self.how.ranged:
            return
        image = self.each("image", "narrow", panel, row)
        with e.loop(0, self.a["width"]) as c:  # the offsets' image
            seen = e.var(k.real(0))
            with e.loop(0, count) as j:
                sums = self.number(self.a["sums"] + (j * self.a["width"] + c) * 4)
                seen.set(multiply_add(e, self.load(drops + j * _LINE), sums, seen.get()))
            e.store(seen.get(), image + c * _LINE)
        curve, slope = e.var(k.real(0)), e.var(k.real(0))
        with e.loop(0, count) as j:
            drop = self.load(drops + j * _LINE)
            with e.loop(j * self.size, (j + 1) * self.size) as c:
                curve.set(multiply_add(e, drop, self.load(image + c * _LINE), curve.get()))
                slope.set(multiply_add(e, -drop, self.load(gradient + c * _LINE), slope.get()))
        least = self.each("least", "units", panel, row)
        old = self.load(least)
        new = self.half(e.max(old + self.ratio(slope.get(), curve.get()), 0.0))
        e.store(new, least)
        with e.loop(0, self.a["width"]) as c:
            moved = multiply_add(e, new - old, self.load(image + c * _LINE), self.load(gradient + c * _LINE))
            e.store(moved, gradient + c * _LINE)
        with e.loop(0, count) as j:
            offset = self.each("offset", "scales", panel, row) + j * _LINE
            e.store(new * self.load(drops + j * _LINE), offset)

    def values(self, panel: Value, row: Value) -> None:
        """The values as they are with the new scales."""
        e = self.e
        now, entries, errors = (self.each(name, "wide", panel, row) for name in ("now", "entries", "errors"))
        with e.loop(0, self.a["width"] // self.size) as j:
            scale = self.load(self.each("scale", "scales", panel, row) + j * _LINE)
            offset = self.load(self.each("offset", "scales", panel, row) + j * _LINE)
            with e.loop(j * self.size, (j + 1) * self.size) as c:
                new = scale * self.load(entries + c * _LINE) - offset
                move = self.load(now + c * _LINE) - new
                e.store(new, now + c * _LINE)
                e.store(self.load(errors + c * _LINE) + move, errors + c * _LINE)


def emit_refit(e: Emitter, how: Stepped | Pointed, *arguments: Value) -> None:
    """The body of the kernel for a format."""
    a = dict(zip(REFIT, arguments, strict=True))
    fit, scratch, panels = _Refit(e, how, a), room(e), a["panels"]
    image, total = Panels(a["image"], a["narrow"]), Panels(a["total"], a["narrow"])

    def clear(which: Panels) -> None:
        with e.loop(0, panels) as panel, e.loop(0, a["width"] * ROWS, fit.k.count) as i:
            e.store(fit.k.real(0), which.of(panel) + i * 4)

    clear(total)
    with e.loop(0, a["width"] // how.unit) as j:
        clear(image)
        first = j * how.unit
        entries = Panels(a["entries"] + first * _LINE, a["wide"])
        product(
            e, image, entries, a["matrix"] + first * a["stride"], a["stride"], e.integer(how.unit), a["width"], panels,
            scratch,
        )  # fmt: skip
        with e.loop(0, panels) as panel, e.loop(0, ROWS, lanes(e)) as row:
            fit.sub_block(j, panel, row)
    with e.loop(0, panels) as panel, e.loop(0, ROWS, lanes(e)) as row:
        if how.shared:
            fit.common(panel, row)
        fit.values(panel, row)
