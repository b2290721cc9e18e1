"""A sweep over a block's columns, each moved to the level that is best for what the columns before it left over.

With `gradient` g and a matrix M a column k wants to stand at

    now[k] + g[k] / M[k, k]

and is put to the nearest level there; the move d = now[k] - new then changes g[j] by d * M[k, j] for all later j. Two
sweeps are of this form:

    the first one         now = the weights, M = unit (whose diagonal is 1), g = errors @ unit
    coordinate descent    now = the values, M = the moments H, g = errors @ H
"""

from __future__ import annotations

from dataclasses import dataclass

from phiquant.quants.feedback import Stepped

from .emit import F32, Emitter, Value
from .feedback_product import GROUP, ROWS, Panels, lanes, product, room
from .quantize_lanes import Lanes
from .quantize_nonlinear import nearest_entry
from .simd import multiply_add

__all__ = ["DESCEND", "Block", "emit_descend"]

_LINE = 4 * ROWS
_BOUND = 135.0  # of what is looked up in a table

DESCEND = (
    "now", "entries", "errors", "wide", "gradient", "moves", "narrow", "scale", "offset", "scales",
    "matrix", "stride", "inverse", "width", "panels",
)  # fmt: skip
"""Arguments of the kernel: addresses of the block's columns in the arrays of a slab (`now`, `entries`, `errors`:
panels `wide` bytes apart; `gradient`, `moves`: `narrow`; `scale`, `offset`: `scales`), the matrix from the block's
diagonal on, the inverses of that, the block's width and the number of panels."""


@dataclass(frozen=True)
class Block:
    """What stands at some columns for the rows of one vector."""

    now: Value
    entries: Value
    errors: Value
    gradient: Value
    moves: Value


def emit_descend(e: Emitter, how: Stepped, unit: int, *arguments: Value) -> None:
    """The body of the kernel for a format with a scale to every `unit` columns."""
    a = dict(zip(DESCEND, arguments, strict=True))
    scratch, panels = room(e), a["panels"]
    gradient, moves = Panels(a["gradient"], a["narrow"]), Panels(a["moves"], a["narrow"])
    with e.loop(0, a["width"], GROUP) as first:
        at = first * _LINE
        product(
            e,
            Panels(gradient.address + at, a["narrow"]),
            moves,
            a["matrix"] + first * 4,
            a["stride"],
            first,
            e.integer(GROUP),
            panels,
            scratch,
        )
        corner = a["matrix"] + first * (a["stride"] + 4)
        with e.loop(0, panels) as panel, e.loop(0, ROWS, lanes(e)) as row:
            wide, narrow = panel * a["wide"] + at + row * 4, panel * a["narrow"] + at + row * 4
            scales = panel * a["scales"] + first // unit * _LINE + row * 4
            block = Block(
                a["now"] + wide, a["entries"] + wide, a["errors"] + wide, a["gradient"] + narrow, a["moves"] + narrow
            )
            _columns(
                e, how, block, a["scale"] + scales, a["offset"] + scales, corner, a["stride"], a["inverse"] + first * 4
            )


def _columns(
    e: Emitter, how: Stepped, block: Block, scale: Value, offset: Value, corner: Value, stride: Value, inverse: Value
) -> None:
    """Sixteen columns of the rows of one vector, all of which have one scale."""
    k = Lanes(e)
    factor, minus = e.load(scale, k.floats), e.load(offset, k.floats)
    per = k.reciprocal(factor)
    left = [e.load(block.gradient + c * _LINE, k.floats) for c in range(GROUP)]
    for c in range(GROUP):
        now = e.load(block.now + c * _LINE, k.floats)
        wanted = multiply_add(e, left[c], e.splat(e.load(inverse + 4 * c, F32), k.count), now)
        entry = _nearest(k, how, (wanted + minus) * per)
        new = factor * entry - minus
        move = now - new
        e.store(entry, block.entries + c * _LINE)
        e.store(new, block.now + c * _LINE)
        e.store(move, block.moves + c * _LINE)
        e.store(e.load(block.errors + c * _LINE, k.floats) + move, block.errors + c * _LINE)
        for later in range(c + 1, GROUP):
            coupling = e.splat(e.load(corner + c * stride + 4 * later, F32), k.count)
            left[later] = multiply_add(e, move, coupling, left[later])


def _nearest(k: Lanes, how: Stepped, v: Value) -> Value:
    """The entry nearest to v."""
    if how.table is not None:
        return nearest_entry(k, k.e.max(k.e.min(v, _BOUND), -_BOUND))[1]
    return k.round(k.clamp(v, how.low, how.top))
