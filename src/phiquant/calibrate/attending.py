"""Rotation and attention of whole sequences that are equally long, forwards and backwards, in NumPy."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phiquant.kernels.ops import AttentionShape, BlockSparse

__all__ = ["Attending"]

Array = NDArray[Any]


class Attending:
    """What the attention of a model does to sequences of one length.

    Args:
        shape: of the heads.
        cos, sin: float32 [tokens of a sequence, rotary / 2].
    """

    def __init__(self, shape: AttentionShape, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        self.shape, self._cos, self._sin = shape, cos[None, :, None], sin[None, :, None]
        self._context = len(cos)

    def rotated(self, x: Array) -> Array:
        """Heads [tokens, heads * head_size] of whole sequences, turned by their positions."""
        return self._turned(x, self._sin)

    def rotated_back(self, by: Array) -> Array:
        """The derivative by what was rotated, of that by what it became."""
        return self._turned(by, -self._sin)

    def _turned(self, x: Array, sin: NDArray[np.float32]) -> Array:
        shape, half = self.shape, self.shape.rotary // 2
        heads = x.reshape(-1, self._context, x.shape[1] // shape.head_size, shape.head_size)
        first, second = (
            (np.s_[..., 0 : 2 * half : 2], np.s_[..., 1 : 2 * half : 2])
            if shape.neighbours
            else (np.s_[..., :half], np.s_[..., half : 2 * half])
        )
        a, b, turned = heads[first], heads[second], heads.copy()
        turned[first] = a * self._cos - b * sin
        turned[second] = b * self._cos + a * sin
        return turned.reshape(x.shape)

    def attended(self, q: Array, k: Array, v: Array, sparse: BlockSparse | None) -> Array:
        """What the queries [tokens, q_width] see, alike, of keys and values [tokens, kv_width] of their sequences."""
        out = np.empty_like(q)
        mask = self._mask(sparse)
        for rows, queries, keys, values in self._sequences(q, k, v):
            out[rows] = self._joined(self._weights(queries, keys, mask) @ values)
        return out

    def back(
        self, q: Array, k: Array, v: Array, sparse: BlockSparse | None, by_out: Array
    ) -> tuple[Array, Array, Array]:
        """Derivatives by q, k and v, of that by what `attended` gave."""
        by_q, by_k, by_v = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        mask = self._mask(sparse)
        for rows, queries, keys, values in self._sequences(q, k, v):
            by = self._parted(by_out[rows])
            weights = self._weights(queries, keys, mask)
            by_v[rows] = self._together(weights.swapaxes(1, 2) @ by)
            scores = by @ values.swapaxes(1, 2)
            scores -= np.einsum("hqk,hqk->hq", scores, weights)[:, :, None]
            scores *= weights
            scores *= self.shape.scale
            by_q[rows] = self._joined(scores @ keys)
            by_k[rows] = self._together(scores.swapaxes(1, 2) @ queries)
        return by_q, by_k, by_v

    def _sequences(self, q: Array, k: Array, v: Array) -> Iterator[tuple[slice, Array, Array, Array]]:
        """Sequence by sequence its rows, queries [kv_heads, group * tokens, head_size], keys and values alike."""
        for start in range(0, len(q), self._context):
            rows = slice(start, start + self._context)
            keys, values = (
                x[rows].reshape(self._context, self.shape.kv_heads, self.shape.head_size).swapaxes(0, 1) for x in (k, v)
            )
            yield rows, self._parted(q[rows]), keys, values

    def _parted(self, x: Array) -> Array:
        """[tokens, q_width] to [kv_heads, group * tokens, head_size]."""
        shape = self.shape
        parts = x.reshape(self._context, shape.heads, shape.head_size).swapaxes(0, 1)
        return np.ascontiguousarray(parts).reshape(shape.kv_heads, -1, shape.head_size)

    def _joined(self, x: Array) -> Array:
        """And back."""
        heads = x.reshape(self.shape.heads, self._context, self.shape.head_size)
        return heads.swapaxes(0, 1).reshape(self._context, -1)

    def _together(self, x: Array) -> Array:
        """[kv_heads, tokens, head_size] to [tokens, kv_width]."""
        return x.swapaxes(0, 1).reshape(self._context, -1)

    def _weights(self, queries: Array, keys: Array, mask: NDArray[np.bool_]) -> Array:
        """Softmax of the scores [kv_heads, group * tokens, tokens]."""
        scores = queries @ keys.swapaxes(1, 2)
        scores *= self.shape.scale
        heads = scores.reshape(self.shape.heads, self._context, self._context)
        np.copyto(heads, -np.inf, where=~mask)
        heads -= heads.max(axis=2, keepdims=True)
        np.exp(heads, out=heads)
        heads /= heads.sum(axis=2, keepdims=True)
        return scores

    def _mask(self, sparse: BlockSparse | None) -> NDArray[np.bool_]:
        """Which keys a query sees: bool [heads or 1, tokens, tokens]."""
        at = np.arange(self._context)
        query, key = at[:, None], at[None]
        seen = key <= query
        if self.shape.window:
            seen = seen & (query - key < self.shape.window)
        if sparse is None:
            return seen[None]
        head = np.arange(self.shape.heads)[:, None, None]
        q_block, k_block = query // sparse.block, key // sparse.block
        near = q_block - k_block < sparse.local
        mask: NDArray[np.bool_] = seen & (near | ((k_block + head + 1) % sparse.stride == 0))
        return mask
