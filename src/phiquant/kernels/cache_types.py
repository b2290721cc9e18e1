"""What a key-value cache may hold, and which heads fit."""

from __future__ import annotations

from typing import Final

from ..errors import KernelError
from ..gguf.types import GGMLType

__all__ = ["CACHE_TYPES", "check_cache"]

CACHE_TYPES: Final = {t.name.lower(): t for t in (GGMLType.F16, GGMLType.F32, GGMLType.Q8_0, GGMLType.Q4_0)}
"""Types of the elements, by the names that people give."""


def check_cache(type: GGMLType, head_size: int | None = None) -> None:
    """Refuse a type that there is no cache of, or whose blocks do not divide a head. Errors: KernelError."""
    if type not in CACHE_TYPES.values():
        raise KernelError(f"the cache cannot hold {type.name}; it can hold {', '.join(CACHE_TYPES)}")
    if head_size is not None and head_size % type.block_elements:
        raise KernelError(
            f"a {type.name} cache has blocks of {type.block_elements} channels, which do not divide this model's heads "
            f"of {head_size}; use f16"
        )
