"""One ticket of attention: the rows of a tile, block by block of their keys."""

from __future__ import annotations

from dataclasses import dataclass

from .attention_passes import BLOCK, GROUP, GROUPS, PASSES, Pass, Passes
from .cache_elements import Elements
from .emit import F32, I32, I64, Emitter, Value, vec
from .operation import Arguments
from .simd import reduce

__all__ = ["ARGS", "Kernel", "Tile"]

ARGS = Arguments(
    "q", "out", "row_bytes", "positions", "slots", "pages", "columns", "tiles", "first_tile", "last_tile", "cache",
    "page_bytes", "plane_bytes", "page_tokens", "kv_heads", "group", "scale", "window", "scratch", "scratch_bytes",
    "rows", "sparse_block", "sparse_local", "sparse_stride",
)  # fmt: skip

_NOTHING = -1e30  # below any score: finite, so that its difference to itself is 0


@dataclass(frozen=True, eq=False)
class Tile:
    """Tokens of one sequence, adjacent in the step, with one key-value head.

    Attributes:
        first, tokens: the first of the step's tokens in it, and how many.
        lowest, stop: position of the first, and the one after that of the last.
        table: address of the pages of their sequence.
        head: the key-value head.
    """

    first: Value
    tokens: Value
    lowest: Value
    stop: Value
    table: Value
    head: Value


class Kernel(Passes):
    """Emits attention to all keys, or to those of a window; the rows of a tile are in the order token, query head."""

    def __init__(self, e: Emitter, head_size: int, elements: Elements, block: Value, thread: Value) -> None:
        a = dict(zip(ARGS.names, ARGS.read_all(e, block), strict=True))
        super().__init__(e, head_size, elements, a, a["scratch"] + thread * a["scratch_bytes"])

    def run(self, tile: Value, head: Value) -> None:
        """One ticket."""
        e, a, group = self.e, self.a, self.a["group"]
        entry = a["tiles"] + 16 * tile
        first, tokens, lowest, highest = (e.load(entry + 4 * i, I32).sext(I64) for i in range(4))
        slot = e.load(a["slots"] + 4 * first, I32).sext(I64)
        t = Tile(first, tokens, lowest, highest + 1, a["pages"] + 4 * slot * a["columns"], head)
        offset = first * a["row_bytes"] + 4 * self.size * group * head
        with e.loop(0, tokens) as token, e.loop(0, group) as member:
            row = self.row(t, token, member)
            self._begin(row, offset + token * a["row_bytes"] + 4 * self.size * member)
            self.place(t, row, e.load(a["positions"] + 4 * (first + token), I32), member)
        self.blocks(t)
        with e.loop(0, tokens) as token, e.loop(0, group) as member:
            self._finish(self.row(t, token, member), offset + token * a["row_bytes"] + 4 * self.size * member)

    def row(self, t: Tile, token: Value, member: Value) -> Value:
        """The row of a query head, one of those that share the tile's, of a token of the tile."""
        return token * self.a["group"] + member

    def place(self, t: Tile, row: Value, position: Value, member: Value) -> None:
        """Remember what a row sees."""
        self.e.store(position, self.places + 4 * row)

    def blocks(self, t: Tile) -> None:
        """Every block of keys that some row sees."""
        e = self.e
        start = e.max(t.lowest + 1 - self.a["window"], 0)
        with e.loop(start - start % BLOCK, t.stop, BLOCK) as block:
            self.locate(t, block)
            done = e.integer(0)
            rows = t.tokens * self.a["group"]
            for p in PASSES[e.target.lowering]:
                end = rows - (rows - done) % p.rows
                with e.loop(done, end, p.rows) as row:
                    low = e.load(self.places + 4 * row, I32).sext(I64)
                    high = e.load(self.places + 4 * (row + p.rows - 1), I32).sext(I64)
                    begin = e.max(low + 1 - self.a["window"], block)
                    self.one_pass(p, row, block, begin, e.min(high + 1, block + BLOCK))
                done = end

    def one_pass(self, p: Pass, row: Value, block: Value, start: Value, stop: Value) -> None:
        """Take the keys from `start` to `stop` of a block into account; rows that see fewer are masked."""
        e = self.e
        with e.when(start < stop):
            for g in range(0, GROUPS, p.groups):
                with e.when(block + GROUP * g < stop):
                    self.scores(p, row, g)
            with e.loop(0, p.rows) as r:
                self.softmax(row + r, block)
            if self.elements.block:
                self.scale_weights(p, row)
            self.results(p, row, block, start - block, stop - block)

    def _begin(self, row: Value, offset: Value) -> None:
        e = self.e
        for i in range(0, 4 * self.size, 4 * self.lanes):
            e.store(e.load(self.a["q"] + offset + i, self.vector), self.q + 4 * self.size * row + i)
            e.store(e.const(self.vector, 0.0), self.totals + 4 * self.size * row + i)
        e.store(e.const(vec(F32, GROUP), 0.0), self.sums + 4 * GROUP * row)
        e.store(e.const(F32, _NOTHING), self.highest + 4 * row)

    def _finish(self, row: Value, offset: Value) -> None:
        e = self.e
        inverse = 1.0 / reduce(e, e.load(self.sums + 4 * GROUP * row, vec(F32, GROUP)))
        for i in range(0, 4 * self.size, 4 * self.lanes):
            v = e.load(self.totals + 4 * self.size * row + i, self.vector) * inverse
            # -0.0 becomes 0.0: a block that contributes nothing would have made it so.
            e.store(v + 0.0, self.a["out"] + offset + i)

    def locate(self, t: Tile, block: Value) -> None:
        """Write the addresses of the block's groups of keys and of values."""
        e, a = self.e, self.a
        final = (t.stop - 1) // GROUP * GROUP
        for g in range(GROUPS):
            # Beyond the last key there may be no page: the last group is read again, and masked.
            at = e.min(block + GROUP * g, final)
            page = e.load(t.table + 4 * (at // a["page_tokens"]), I32).sext(I64)
            within = at % a["page_tokens"]
            keys = a["cache"] + page * a["page_bytes"] + 2 * t.head * a["plane_bytes"]
            token = self.elements.token_bytes(self.size)
            e.store(keys + self.elements.key_bytes * within, self.tables + 8 * g)
            e.store(keys + a["plane_bytes"] + token * within, self.tables + 8 * (GROUPS + g))
            if self.elements.block:
                for i, plane in ((2, keys), (3, keys + a["plane_bytes"])):
                    e.store(plane + token * a["page_tokens"] + 2 * within, self.tables + 8 * (i * GROUPS + g))
        if self.fetching:
            page = e.load(t.table + 4 * (e.min(block + BLOCK, final) // a["page_tokens"]), I32).sext(I64)
            e.store(a["cache"] + page * a["page_bytes"] + 2 * t.head * a["plane_bytes"], self.next)
