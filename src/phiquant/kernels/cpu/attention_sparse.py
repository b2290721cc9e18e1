"""One ticket of attention in which a query head sees some blocks of keys only: those near its own, and every so many.

The pattern (`ops.BlockSparse`) is of blocks of B positions, B a multiple of the 16 keys of a group, so that a row sees
each group of keys or does not:

    position of the group's first key >= local[row]         the first position of the row's nearest blocks
    block of the group modulo stride  == remote[row]        the residue for the row's head

Near a query all heads see what it sees, and all rows are computed together, as in dense attention. Farther away the
query heads that share a tile see different blocks: the rows of each are taken alone, which is why they lie together (in
the order query head, token), and what none of them sees is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

from .attention_kernel import Kernel, Tile
from .attention_passes import BLOCK, GROUP, GROUPS, PASSES
from .emit import I32, I64, Value

__all__ = ["SparseKernel"]

_NEVER = (1 << 31) - 1  # a position after every other


class SparseKernel(Kernel):
    """Emits attention by blocks of keys; the rows of a tile are in the order query head, token."""

    def row(self, t: Tile, token: Value, member: Value) -> Value:
        """See `Kernel`."""
        return member * t.tokens + token

    def place(self, t: Tile, row: Value, position: Value, member: Value) -> None:
        """Remember what a row sees."""
        e, stride = self.e, self.a["sparse_stride"]
        super().place(t, row, position, member)
        e.store(self._nearest(position.sext(I64)).trunc(I32), self.local + 4 * row)
        head = t.head * self.a["group"] + member
        e.store((stride - 1 - head % stride).trunc(I32), self.remote + 4 * row)

    def _nearest(self, position: Value) -> Value:
        """Where the blocks begin of which a query at a position sees every key before it."""
        size = self.a["sparse_block"]
        return self.e.max((position // size + 1 - self.a["sparse_local"]) * size, 0)

    def oldest(self, row: Value, block: Value) -> Sequence[Value]:
        """For each group of keys of a block the first position that a row sees, which may be none of the group."""
        e = self.e
        local, remote = e.load(self.local + 4 * row, I32).sext(I64), e.load(self.remote + 4 * row, I32)
        return [
            e.where(
                (block + GROUP * g >= local) | (e.load(self.phases + 4 * g, I32) == remote),
                e.const(I32, 0),
                e.const(I32, _NEVER),
            )
            for g in range(GROUPS)
        ]

    def blocks(self, t: Tile) -> None:
        """Every block of keys that some row sees."""
        e, group = self.e, self.a["group"]
        # The blocks near the first token begin before those near the last.
        some, every = self._nearest(t.lowest), self._nearest(t.stop - 1)
        found = e.var(-1)
        with e.loop(0, t.stop, BLOCK) as block:
            for g in range(GROUPS):
                phase = (block + GROUP * g) // self.a["sparse_block"] % self.a["sparse_stride"]
                e.store(phase.trunc(I32), self.phases + 4 * g)
            near, together = block + BLOCK > some, block >= every
            size = e.where(together, t.tokens * group, t.tokens)  # rows that are taken together
            with e.loop(0, t.tokens * group, size) as first, e.when(near | self._sees(first)):
                with e.when(found.get() != block):
                    self.locate(t, block)
                    found.set(block)
                done = first
                for p in PASSES[e.target.lowering]:
                    end = first + size - (first + size - done) % p.rows
                    with e.loop(done, end, p.rows) as row:
                        self.one_pass(p, row, block, block, e.min(t.stop, block + BLOCK))
                    done = end

    def _sees(self, row: Value) -> Value:
        """Whether the head of a row sees some keys of the block wherever its token is."""
        e = self.e
        remote = e.load(self.remote + 4 * row, I32)
        return reduce(or_, (e.load(self.phases + 4 * g, I32) == remote for g in range(GROUPS)))
