"""Dequantizers of the lattice formats, IQ1 to IQ3: 8 weights to a vector, a point of 8 components or two of 4."""

from __future__ import annotations

from collections.abc import Callable

from phiquant.gguf.types import GGMLType
from phiquant.quants.grids import GRIDS, points
from phiquant.quants.iquants import SIGNS

from .dequantize_block import Block
from .emit import F32, I8, I16, I32, I64, Value, vec
from .simd import half_to_float

__all__ = ["LATTICE_EMITTERS"]

_BITS = [1, 2, 4, 8, 16, 32, 64, 128]


class _Run:
    """The 32 weights of a block that `ib` numbers, 0..7."""

    def __init__(self, block: Block, ib: Value, to: Value) -> None:
        self.block, self.e, self.ib = block, block.e, ib
        self.to = to + ib * 128
        self.type = block.entry.type
        self._points = self.e.table(points(self.type).tobytes())

    def load(self, field: str, index: Value, kind: object) -> Value:
        """Element `index` of a field of that type, as an unsigned i32."""
        size = {id(I8): 1, id(I16): 2, id(I32): 4}[id(kind)]
        return self.e.load(self.block.at(field) + index * size, kind).zext(I32)

    def byte(self, field: str, index: Value) -> Value:
        """A byte of a field."""
        return self.load(field, index, I8)

    def grid(self, *indices: Value) -> Value:
        """Components of one point of 8, or two of 4, as float32 × 8."""
        e, size = self.e, GRIDS[self.type].dimension
        parts = [e.load(self._points + index.zext(I64) * size, vec(I8, size)) for index in indices]
        whole = parts[0] if len(parts) == 1 else e.join(*parts)
        return whole.sext(I32).to_float()

    def signs(self, code: Value) -> Value:
        """The byte of signs that a code of seven bits stands for."""
        return self.e.load(self.e.table(SIGNS.tobytes()) + code.zext(I64), I8).zext(I32)

    def put(self, group: int, scale: Value, levels: Value, signs: Value | None = None) -> None:
        """Scale times levels, negative where a sign is set; group 0..3."""
        e = self.e
        value = e.splat(scale, 8) * levels
        if signs is not None:
            value = e.where((e.splat(signs, 8) & e.const(vec(I32, 8), _BITS)) != 0, -value, value)
        e.store(value, self.to + group * 32)


def _half_steps(run: _Run, scale: Value, part: float) -> Value:
    return run.block.half("d") * (scale.to_float() + 0.5) * part


def _iq2_xxs(run: _Run) -> None:
    where, coded = (run.load("qs", run.ib * 2 + i, I32) for i in range(2))
    scale = _half_steps(run, coded.lsr(28), 0.25)
    for group in range(4):
        run.put(group, scale, run.grid(where.lsr(8 * group) & 255), run.signs(coded.lsr(7 * group) & 127))


def _nibble_scales(run: _Run) -> list[Value]:
    """Scales of both halves of a run, from the nibbles of a byte."""
    byte = run.byte("scales", run.ib)
    return [_half_steps(run, nibble, 0.25) for nibble in (byte & 15, byte.lsr(4))]


def _iq2_xs(run: _Run) -> None:
    scales = _nibble_scales(run)
    for group in range(4):
        word = run.load("qs", run.ib * 4 + group, I16)
        run.put(group, scales[group // 2], run.grid(word & 511), run.signs(word.lsr(9)))


def _iq2_s(run: _Run) -> None:
    scales, tops = _nibble_scales(run), run.byte("qh", run.ib)
    for group in range(4):
        at = run.ib * 4 + group
        index = run.byte("qs", at) | ((tops.lsr(2 * group) & 3) << 8)
        run.put(group, scales[group // 2], run.grid(index), run.byte("signs", at))


def _iq3_xxs(run: _Run) -> None:
    coded = run.load("signs", run.ib, I32)
    scale = _half_steps(run, coded.lsr(28), 0.5)
    for group in range(4):
        pair = (run.byte("qs", run.ib * 8 + (2 * group + i)) for i in range(2))
        run.put(group, scale, run.grid(*pair), run.signs(coded.lsr(7 * group) & 127))


def _iq3_s(run: _Run) -> None:
    shift = ((run.ib & 1) * 4).trunc(I32)
    step = run.byte("scales", run.ib >> 1).lsr(shift) & 15
    scale = run.block.half("d") * (step * 2 + 1).to_float()
    tops = run.byte("qh", run.ib)
    for group in range(4):
        pair = (run.byte("qs", run.ib * 8 + k) | ((tops.lsr(k) & 1) << 8) for k in range(2 * group, 2 * group + 2))
        run.put(group, scale, run.grid(*pair), run.byte("signs", run.ib * 4 + group))


def _shifted(run: _Run, levels: Value, negative: Value) -> Value:
    return levels + run.e.where(negative != 0, run.e.const(F32, -0.125), 0.125)


def _iq1_s(run: _Run) -> None:
    word = run.load("qh", run.ib, I16)
    scale = run.block.half("d") * ((word.lsr(12) & 7) * 2 + 1).to_float()
    for group in range(4):
        index = run.byte("qs", run.ib * 4 + group) | ((word.lsr(3 * group) & 7) << 8)
        run.put(group, scale, _shifted(run, run.grid(index), word & 0x8000))


def _iq1_m(run: _Run) -> None:
    e = run.e
    tops = [run.load("scales", e.integer(i), I16).lsr(12) << (4 * i) for i in range(4)]
    d = half_to_float(e, (tops[0] | tops[1] | tops[2] | tops[3]).trunc(I16))
    steps = run.load("scales", run.ib >> 1, I16).lsr(((run.ib & 1) * 6).trunc(I32))
    for group in range(4):
        scale = d * ((steps.lsr(group // 2 * 3) & 7) * 2 + 1).to_float()
        high = run.byte("qh", run.ib * 2 + group // 2).lsr(group % 2 * 4)
        index = run.byte("qs", run.ib * 4 + group) | ((high & 7) << 8)
        run.put(group, scale, _shifted(run, run.grid(index), high & 8))


def _each_run(body: Callable[[_Run], None]) -> Callable[[Block, Value], None]:
    def emit(block: Block, to: Value) -> None:
        with block.e.loop(0, 8) as ib:
            body(_Run(block, ib, to))

    return emit


LATTICE_EMITTERS: dict[GGMLType, Callable[[Block, Value], None]] = {
    GGMLType.IQ2_XXS: _each_run(_iq2_xxs),
    GGMLType.IQ2_XS: _each_run(_iq2_xs),
    GGMLType.IQ2_S: _each_run(_iq2_s),
    GGMLType.IQ3_XXS: _each_run(_iq3_xxs),
    GGMLType.IQ3_S: _each_run(_iq3_s),
    GGMLType.IQ1_S: _each_run(_iq1_s),
    GGMLType.IQ1_M: _each_run(_iq1_m),
}
