"""The key-value cache: for each layer an array of pages, which the operating system backs when they are first used.

A page holds `page_tokens` tokens of every key-value head:

    page      [kv_heads][2 planes]
    plane 0   keys,   transposed: [head_size][page_tokens]
    plane 1   values             [page_tokens][head_size]

so that scores are computed with keys in the lanes and results with channels in the lanes: no sum runs across lanes.
`cache_elements` says what the elements are, and where a plane of quantized ones has its scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from ..cache_types import check_cache
from ..ops import AttentionShape, Capacity
from .cache_elements import elements_of
from .operation import aligned

__all__ = ["KVCache", "StepTables"]


class KVCache:
    """Memory for the keys and values of all layers. Errors: KernelError if heads do not fit the type of the cache.

    Attributes:
        elements: how they are stored.
        plane_bytes, page_bytes: sizes of one plane of a head, and of a page.
        layers: uint8 [pages * page_bytes] of each layer.
    """

    def __init__(self, shape: AttentionShape, layers: int, capacity: Capacity) -> None:
        self.shape, self.pages, self.page_tokens = shape, capacity.pages, capacity.page_tokens
        check_cache(capacity.cache_type, shape.head_size)
        self.elements = elements_of(capacity.cache_type)
        self.plane_bytes = self.elements.plane_bytes(shape.head_size, capacity.page_tokens)
        self.page_bytes = 2 * shape.kv_heads * self.plane_bytes
        self.layers = [aligned(capacity.pages * self.page_bytes) for _ in range(layers)]

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page in all layers. Errors: KernelError if there is no such page."""
        if not (0 <= source < self.pages and 0 <= target < self.pages):
            raise KernelError(f"page {source} or {target} is outside the cache of {self.pages} pages")
        for layer in self.layers:
            pages = layer.reshape(self.pages, self.page_bytes)
            pages[target] = pages[source]

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """A copy of a page's bytes, layer by layer. Errors: KernelError if there is no such page."""
        return np.concatenate([layer[self._place(page)] for layer in self.layers])

    def write_page(self, page: int, data: NDArray[np.uint8]) -> None:
        """Put such bytes back. Errors: KernelError if there is no such page, or they do not fit."""
        size = len(self.layers) * self.page_bytes
        if data.shape != (size,) or data.dtype != np.uint8:
            raise KernelError(f"a page has {size} bytes, not {data.nbytes}")
        for layer, part in zip(self.layers, data.reshape(len(self.layers), -1), strict=True):
            layer[self._place(page)] = part

    def _place(self, page: int) -> slice:
        if not 0 <= page < self.pages:
            raise KernelError(f"page {page} is outside the cache of {self.pages} pages")
        return slice(page * self.page_bytes, (page + 1) * self.page_bytes)


@dataclass(frozen=True, eq=False)
class StepTables:
    """The arrays of a step at fixed addresses, sized for the Capacity; what they hold is checked before a step runs.

    Attributes:
        tokens, positions, slots, outputs: int32, as in `ops.Step`.
        pages: int32 [sequences, pages_per_sequence].
        cos, sin: float32 [tokens, rotary // 2].
        tiles: int32 [tokens, 4], see `attention.tile`.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    outputs: NDArray[np.int32]
    pages: NDArray[np.int32]
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    tiles: NDArray[np.int32]

    @classmethod
    def of(cls, shape: AttentionShape, capacity: Capacity) -> StepTables:
        """Room for any step of the capacity."""
        n, half = capacity.tokens, shape.rotary // 2
        return cls(
            tokens=np.zeros(n, np.int32),
            positions=np.zeros(n, np.int32),
            slots=np.zeros(n, np.int32),
            outputs=np.zeros(capacity.outputs, np.int32),
            pages=np.zeros((capacity.sequences, capacity.pages_per_sequence), np.int32),
            cos=np.zeros((n, half), np.float32),
            sin=np.zeros((n, half), np.float32),
            tiles=np.zeros((n, 4), np.int32),
        )
