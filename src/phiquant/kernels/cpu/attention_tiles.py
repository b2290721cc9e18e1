"""Which tokens of a step attend together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from ..ops import BlockSparse

__all__ = ["sparse_share", "tile", "tile_tokens"]

_TILE_ROWS = 32


def tile_tokens(group: int) -> int:
    """Most tokens of a tile, `group` query heads to a key-value head."""
    return max(1, _TILE_ROWS // group)


def tile(
    positions: NDArray[np.int32], slots: NDArray[np.int32], group: int, window: int, out: NDArray[np.int32]
) -> tuple[int, NDArray[np.int64]]:
    """Cut the tokens of a step into tiles, those with most keys first.

    Args:
        positions, slots: int32 [n], as in `ops.Step`.
        group: query heads for each key-value head.
        window: as in `ops.AttentionShape`.
        out: int32 [at least n, 4], receives (first token, tokens, lowest position, highest position) of each tile.

    Returns:
        The number of tiles, and for each its multiplications of a query row by a key, for one key-value head.

    Raises:
        KernelError: the positions of a sequence do not ascend.
    """
    n = len(positions)
    same = slots[1:] == slots[:-1]
    if np.any(same & (positions[1:] <= positions[:-1])):
        raise KernelError("the positions of a sequence must ascend within a step")
    starts = np.concatenate([[0], np.flatnonzero(~same) + 1])
    stops = np.append(starts[1:], n)
    most = tile_tokens(group)
    first = np.concatenate([np.arange(a, b, most) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])
    last = np.append(first[1:], n)
    low, high = positions[first].astype(np.int64), positions[last - 1].astype(np.int64)
    seen = high + 1 - (np.maximum(low + 1 - window, 0) if window else 0)
    cost = seen * (last - first) * group
    order = np.argsort(-cost, kind="stable")
    out[: len(first)] = np.stack([first, last - first, low, high], axis=1)[order]
    return len(first), cost[order]


def sparse_share(tiles: NDArray[np.int32], sparse: BlockSparse) -> NDArray[np.float64]:
    """About the share of the keys up to the last token of each tile that are met where heads see some blocks only."""
    keys = tiles[:, 3] + 1.0
    near = np.minimum(keys, sparse.local * sparse.block)
    share: NDArray[np.float64] = (near + (keys - near) / sparse.stride) / keys
    return share
