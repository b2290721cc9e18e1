"""The loops that all matrix multiplications share: tickets, tiles of rows and columns, chunks along k.

A panel is 16 rows of the matrix, interleaved so that a lane is a row. Two ways lead through it, with the same
floating-point operations in the same order for every element, so that a row's result does not depend on its company:

few columns   memory bound. A ticket is about a megabyte of panels; weights are unpacked in registers, and prefetched.
many columns  bound by the dot product. A ticket is some panels times a block of columns; a chunk of 256 weights of each
              row is unpacked once into the first-level cache and meets all columns of the block, tile by tile, whose
              sums wait in the same cache between chunks.

A matrix may also stay as the file has it ("unpacked"): a panel is then made in a buffer of the thread before it is
multiplied, which costs time in every step and saves the memory of the panels.

What is done for one ticket stands by itself (`few`, `many`), so that `expert_matmul` can give out tickets of several
matrices, each with columns of its own.

The sums of a row begin with its bias, or with a 0 that is read just so: no branch tells a product with a bias from one
without.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from .activations import CHUNK, Activations, chunk_stride
from .emit import F32, I32, I64, Emitter, Value, vec
from .operation import Arguments, tickets
from .target import Target

__all__ = [
    "ARGUMENTS",
    "FEW",
    "LANES",
    "Floats",
    "Format",
    "body",
    "complete",
    "few",
    "few_tickets",
    "many",
    "many_tickets",
]

LANES = 16  # rows of a panel
FEW = 16  # up to so many columns weights are unpacked in registers, once for each tile
BLOCK = 264  # most columns that share an unpacked chunk; a multiple of every tile

ARGUMENTS = Arguments(
    "count", "weights", "x", "out", "rows", "columns", "panel_bytes", "ticket", "add", "row_bytes", "buffers",
    "out_bytes", "bias", "bias_bytes",
)  # fmt: skip

Floats = list[list[Value]]  # [panel][column] of float32 × 16


class Format(ABC):
    """How weights of one type are laid out in panels and multiplied."""

    activations: Activations
    chunk_bytes: int  # of a panel, for 256 columns

    @abstractmethod
    def panel_bytes(self, columns: int) -> int:
        """Bytes of 16 rows."""

    @abstractmethod
    def pack(self, e: Emitter, rows: list[Value], panel: Value, columns: Value) -> None:
        """Emit the interleaving of 16 rows, given by their addresses in the file's layout, into a panel."""

    def panels(self, target: Target) -> int:
        """Panels of a tile for many columns."""
        return 2 if target.vector_bytes == 64 else 1

    def tile(self, target: Target) -> int:
        """Columns of a tile for many columns; divides BLOCK."""
        return 6 if target.vector_bytes == 64 else 2

    def few_tile(self, target: Target) -> int:
        """Columns of the larger tile for few columns."""
        return 4 if target.vector_bytes == 64 else 2

    @abstractmethod
    def unpacked_bytes(self, panels: int) -> int:
        """Bytes of a chunk in the form that `many` reads."""

    @abstractmethod
    def unpack(self, e: Emitter, chunks: list[Value], scratch: Value, left: Value) -> list[Value]:
        """Emit the unpacking of one chunk (`left` columns of it exist) of each panel; where `many` finds it."""

    @abstractmethod
    def many(self, e: Emitter, weights: list[Value], x: list[Value], sums: Floats, left: Value) -> Floats:
        """Emit a tile's chunk: what `unpack` returned times the chunks `x` of its columns, added to `sums`."""

    @abstractmethod
    def few(self, e: Emitter, chunk: Value, x: list[Value], sums: list[Value], left: Value) -> list[Value]:
        """Emit the same for one panel as it is stored."""


def body(f: Format, *, packed: bool = True) -> Callable[..., None]:
    """The kernel of a format: out [count, rows] (+)= bias + x [count, columns] times the transposed weights.

    `weights` are panels, or with `packed` false rows of the file; `buffers` then holds as many panels for each thread
    as a tile has. Rows of `out` are `out_bytes` apart, the 16 biases of neighbouring panels `bias_bytes` (0: they share
    them).
    """

    def kernel(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
        a = dict(zip(ARGUMENTS.names, ARGUMENTS.read_all(e, block), strict=True))
        complete(e, f, a, thread, packed=packed)
        with e.choose(a["count"] <= FEW) as (yes, no):
            with yes, tickets(e, counter, few_tickets(a)) as ticket:
                few(e, f, a, ticket)
            with no, tickets(e, counter, many_tickets(e, f, a)) as ticket:
                many(e, f, a, ticket)

    return kernel


def complete(e: Emitter, f: Format, a: dict[str, Value], thread: Value, *, packed: bool) -> None:
    """Add what follows from the arguments to them, and replace the address of the count by the count."""
    a["count"] = e.load(a["count"], I64, align=8)
    a["between"] = chunk_stride(a["count"], f.activations)
    a["chunks"] = (a["columns"] + (CHUNK - 1)).udiv(CHUNK)
    a["panels"] = (a["rows"] + (LANES - 1)).udiv(LANES)
    if packed:
        del a["buffers"]
    else:
        a["buffers"] = a["buffers"] + thread * f.panels(e.target) * a["panel_bytes"]


def _stored(e: Emitter, f: Format, a: dict[str, Value], panel: Value, slot: int = 0) -> Value:
    """Where a panel is, once it has been made if there is none."""
    if "buffers" not in a:
        return a["weights"] + panel * a["panel_bytes"]
    rows = [a["weights"] + e.min(panel * LANES + i, a["rows"] - 1) * a["row_bytes"] for i in range(LANES)]
    buffer = a["buffers"] + slot * a["panel_bytes"]
    f.pack(e, rows, buffer, a["columns"])
    return buffer


def few_tickets(a: dict[str, Value]) -> Value:
    """Tickets of a matrix with up to FEW columns."""
    return (a["panels"] + a["ticket"] - 1).udiv(a["ticket"])


def few(e: Emitter, f: Format, a: dict[str, Value], ticket: Value) -> None:
    """Emit what one of those tickets asks for."""
    wide, count = f.few_tile(e.target), a["count"]
    edge = e.scratch(4 * LANES * wide)
    first = ticket * a["ticket"]
    with e.loop(first, e.min(first + a["ticket"], a["panels"])) as panel:
        stored = _stored(e, f, a, panel)
        # A tile computes what is beyond the last column rather than leave three, but does not write it.
        start: Value = (count + (1 if wide > 2 else 0)).udiv(wide) * wide
        with e.loop(0, start, wide) as column:
            _few_tile(e, f, a, stored, panel, column, wide, edge)
        if wide > 2:
            pair = e.max(start, start + ((count - start) & ~1))
            with e.loop(start, pair, 2) as column:
                _few_tile(e, f, a, stored, panel, column, 2, edge)
            start = pair
        with e.loop(start, count) as column:
            _few_tile(e, f, a, stored, panel, column, 1, edge)


def _few_tile(
    e: Emitter, f: Format, a: dict[str, Value], weights: Value, panel: Value, column: Value, n: int, edge: Value
) -> None:
    stride = f.activations.stride
    x = a["x"] + column * stride
    start = _bias(e, a, panel)
    sums = [e.var(start) for _ in range(n)]
    with e.loop(0, a["chunks"]) as chunk:
        at = x + chunk * a["between"]
        left = e.min(a["columns"] - chunk * CHUNK, CHUNK)
        got = f.few(
            e, weights + chunk * f.chunk_bytes, [at + c * stride for c in range(n)], [s.get() for s in sums], left
        )
        for s, v in zip(sums, got, strict=True):
            s.set(v)
    for c, s in enumerate(sums):
        e.store(s.get(), edge + c * (4 * LANES), align=64)
    with e.loop(0, e.min(a["count"] - column, n)) as i:
        _write(e, a, edge + i * (4 * LANES), panel, column + i)


def _groups(e: Emitter, f: Format, a: dict[str, Value]) -> tuple[Value, Value]:
    """Groups of panels, and blocks of columns of about one size: none is too small to be worth the unpacking."""
    panels = f.panels(e.target)
    return (a["panels"] + (panels - 1)).udiv(panels), (a["count"] + (BLOCK - 1)).udiv(BLOCK)


def many_tickets(e: Emitter, f: Format, a: dict[str, Value]) -> Value:
    """Tickets of a matrix with more than FEW columns."""
    groups, blocks = _groups(e, f, a)
    return groups * blocks


def many(e: Emitter, f: Format, a: dict[str, Value], ticket: Value) -> None:
    """Emit what one of those tickets asks for."""
    panels, tile, stride = f.panels(e.target), f.tile(e.target), f.activations.stride
    scratch = e.scratch(f.unpacked_bytes(panels))
    total = e.scratch(4 * LANES * panels * BLOCK)  # [column][panel][16]
    tile_bytes, column_bytes = 4 * LANES * panels * tile, 4 * LANES * panels
    groups, blocks = _groups(e, f, a)
    block_columns = (a["count"] + (blocks * tile - 1)).udiv(blocks * tile) * tile
    block = ticket.udiv(groups)
    first_panel, first_column = (ticket - block * groups) * panels, block * block_columns
    columns = e.min(a["count"] - first_column, block_columns)
    tiles = (columns + (tile - 1)).udiv(tile)
    # An odd last panel is computed twice and written once.
    mine = [e.min(first_panel + p, a["panels"] - 1) for p in range(panels)]
    weights = [_stored(e, f, a, panel, slot) for slot, panel in enumerate(mine)]
    biases = [_bias(e, a, panel) for panel in mine]
    with e.loop(0, tiles * tile_bytes, column_bytes) as i:
        for p, bias in enumerate(biases):
            e.store(bias, total + i + p * 64, align=64)
    with e.loop(0, a["chunks"]) as chunk:
        left = e.min(a["columns"] - chunk * CHUNK, CHUNK)
        stored = [w + chunk * f.chunk_bytes for w in weights]
        unpacked = f.unpack(e, stored, scratch, left)
        for here in stored:
            with e.loop(f.chunk_bytes, 2 * f.chunk_bytes, 64) as ahead:
                e.prefetch(here + ahead, locality=2)
        x = a["x"] + chunk * a["between"] + first_column * stride
        with e.loop(0, tiles) as t:
            at, here = x + t * (tile * stride), total + t * tile_bytes
            places = [[here + (c * panels + p) * 64 for c in range(tile)] for p in range(panels)]
            sums = [[e.load(place, vec(F32, LANES), align=64) for place in line] for line in places]
            got = f.many(e, unpacked, [at + c * stride for c in range(tile)], sums, left)
            for line, values in zip(places, got, strict=True):
                for place, value in zip(line, values, strict=True):
                    e.store(value, place, align=64)
    with e.loop(0, columns) as c:
        for p in range(panels):
            _write(e, a, total + c * column_bytes + p * 64, first_panel + p, first_column + c)


def _bias(e: Emitter, a: dict[str, Value], panel: Value) -> Value:
    """What the sums of a panel begin with."""
    if "bias" not in a:
        return e.const(vec(F32, LANES), 0.0)
    return e.load(a["bias"] + panel * a["bias_bytes"], vec(F32, LANES), align=64)


def _write(e: Emitter, a: dict[str, Value], source: Value, panel: Value, column: Value) -> None:
    """Add to or store in `out` the 16 sums at `source`, but for rows that the matrix does not have.

    A column's row of `out` is the one of its number, or where there are `places`, int32, the one that they name.
    """
    first = panel * LANES
    row = e.load(a["places"] + 4 * column, I32).sext(I64) if "places" in a else column
    target = a["out"] + row * a["out_bytes"] + first * 4
    with e.choose(first + LANES <= a["rows"]) as (whole, part):
        with whole:
            _move(e, a, source, target, vec(F32, LANES))
        with part, e.loop(0, a["rows"] - first) as i:
            _move(e, a, source + i * 4, target + i * 4, F32)


def _move(e: Emitter, a: dict[str, Value], source: Value, target: Value, kind: object) -> None:
    value = e.load(source, kind, align=4)
    if "add" not in a:
        e.store(value, target, align=4)
        return
    with e.choose(a["add"] != 0) as (add, store):
        with add:
            e.store(e.load(target, kind, align=4) + value, target, align=4)
        with store:
            e.store(value, target, align=4)
