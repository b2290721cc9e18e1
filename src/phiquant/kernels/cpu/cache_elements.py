"""How numbers of the key-value cache are stored: as floats, or as levels with one scale for every 32 channels.

A plane is one head's keys, or its values, of the T tokens of a page; n are the channels of the head:

            keys, tokens in the lanes              values, channels in the lanes
    F32     float32 [n][T]                         float32 [T][n]
    F16     half    [n][T]                         half    [T][n]
    Q8_0    int8    [n][T],    half [n / 32][T]    int8    [T][n],    half [n / 32][T]
    Q4_0    byte    [n / 2][T], half [n / 32][T]   byte    [T][n / 2], half [n / 32][T]

A byte of Q4_0 holds channel j of its 32 in bits 0 to 3 and channel j + 16 in bits 4 to 7, as in a GGUF file, but as
signed numbers, -8 to 7, which shifts alone can widen. Scales and levels are those that `quants.quantize` gives. Scales
stand apart and by tokens, for both sides of attention have a number for each token to multiply them into, so that no
channel is ever multiplied by a scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from ...gguf.types import GGMLType
from .emit import F32, I8, I16, I32, I64, Emitter, Value, vec
from .simd import float_to_half, half_to_float, lookup_floats, reduce, round_away, transpose

__all__ = ["Elements", "Place", "elements_of", "spans"]

_Count = TypeVar("_Count", int, Value)

_HALF_BLOCK = 16  # lanes that 32 channels are quantized in, two vectors of them


def spans(e: Emitter, start: Value, stop: Value) -> Iterator[tuple[Value, int]]:
    """Loops that cover start..stop with vectors of 16, of 4 and of 1: yields (index, lanes) inside each."""
    for lanes in (16, 4, 1):
        end = stop - (stop - start) % lanes
        with e.loop(start, end, lanes) as i:
            yield i, lanes
        start = e.max(end, start)


@dataclass(frozen=True)
class Place:
    """Where a token goes: the plane's address, the token's number in it, the channels and the tokens of the plane."""

    plane: Value
    token: Value
    channels: Value
    tokens: Value


class Elements(ABC):
    """A type of element: how kernels read and write it.

    Attributes:
        type: what a GGUF file calls it.
        key_bytes: bytes of a token in one row of keys.
        offsets: the channels that one row of keys holds, counted from its first.
        block: channels that share a scale; 0: there are no scales.
    """

    type: GGMLType
    key_bytes: int
    offsets: tuple[int, ...] = (0,)
    block: int = 0

    @property
    def name(self) -> str:
        """For the names of kernels."""
        return self.type.name.lower()

    def plane_bytes(self, channels: int, tokens: int) -> int:
        """Bytes of a plane."""
        return tokens * self.type.row_bytes(channels)

    def token_bytes(self, channels: _Count) -> _Count:
        """Bytes of the values of one token, scales not included."""
        return channels * self.key_bytes // len(self.offsets)

    @abstractmethod
    def keys(self, e: Emitter, address: Value, lanes: int) -> list[Value]:
        """Of one row of keys and as many tokens as lanes: float32 for each of `offsets`, not scaled."""

    @abstractmethod
    def values(self, e: Emitter, address: Value, index: int, lanes: int) -> Value:
        """Vector `index` of the values of the token at `address`: float32, not scaled."""

    def scales(self, e: Emitter, address: Value, lanes: int) -> Value:
        """Scales of 32 channels of as many tokens as lanes."""
        return half_to_float(e, e.load(address, vec(I16, lanes)))

    @abstractmethod
    def write(self, e: Emitter, x: Value, at: Value, to: Place) -> None:
        """Write the float32 channels at `x` as elements side by side from `at`, and their scales into the plane."""

    def store_value(self, e: Emitter, x: Value, to: Place) -> None:
        """Write the float32 channels at `x` as the value of a token."""
        self.write(e, x, to.plane + self.token_bytes(to.channels) * to.token, to)

    def store_keys(self, e: Emitter, keys: Value, between: int, count: int, to: Place) -> None:
        """Move the elements of `count` keys (1 or 16), which are `between` bytes apart, to the rows of the plane."""
        size = self.key_bytes
        kind, elements = {1: I8, 2: I16, 4: I32}[size], self.token_bytes(to.channels) // size
        whole = elements // count * count
        with e.loop(0, whole, count) as i:
            rows = [e.load(keys + between * t + size * i, vec(kind, count)) for t in range(count)]
            for j, row in enumerate(transpose(e, rows)):
                e.store(row, to.plane + size * ((i + j) * to.tokens + to.token))
        with e.loop(whole, elements) as i:
            for t in range(count):
                element = e.load(keys + between * t + size * i, kind)
                e.store(element, to.plane + size * (i * to.tokens + to.token + t))

    def fetch_keys(self, e: Emitter, to: Place) -> None:
        """Ask for the lines that the key of a token will be written to: each of its elements has one of its own."""
        with e.loop(0, self.token_bytes(to.channels) // self.key_bytes) as i:
            e.prefetch(to.plane + self.key_bytes * (i * to.tokens + to.token), write=True)


class _Floats(Elements):
    def __init__(self, type: GGMLType) -> None:
        self.type, self.key_bytes = type, type.block_bytes

    def _load(self, e: Emitter, address: Value, lanes: int) -> Value:
        if self.type is GGMLType.F32:
            return e.load(address, vec(F32, lanes))
        return half_to_float(e, e.load(address, vec(I16, lanes)))

    def keys(self, e: Emitter, address: Value, lanes: int) -> list[Value]:
        return [self._load(e, address, lanes)]

    def values(self, e: Emitter, address: Value, index: int, lanes: int) -> Value:
        return self._load(e, address + self.key_bytes * lanes * index, lanes)

    def _element(self, e: Emitter, x: Value, lanes: int) -> Value:
        v = e.load(x, vec(F32, lanes))
        return v.bits(vec(I32, lanes)) if self.type is GGMLType.F32 else float_to_half(e, v)

    def write(self, e: Emitter, x: Value, at: Value, to: Place) -> None:
        for i, lanes in spans(e, e.integer(0), to.channels):
            e.store(self._element(e, x + 4 * i, lanes), at + self.key_bytes * i)


class _Levels(Elements):
    """Whole numbers with a scale for 32 channels."""

    key_bytes, block = 1, 32

    @abstractmethod
    def _quantize(self, e: Emitter, x: Value) -> tuple[Value, list[Value]]:
        """Of 32 float32 at `x`: the scale, and the bytes in vectors of 16."""

    def _blocks(self, e: Emitter, x: Value, to: Place) -> Iterator[tuple[Value, list[Value]]]:
        """A loop over the blocks of a token; writes their scales, yields (first byte of the token, bytes)."""
        scales = to.plane + self.token_bytes(to.channels) * to.tokens
        with e.loop(0, to.channels // self.block) as i:
            scale, levels = self._quantize(e, x + 4 * self.block * i)
            e.store(float_to_half(e, scale), scales + 2 * (i * to.tokens + to.token))
            yield i * self.token_bytes(self.block), levels

    def write(self, e: Emitter, x: Value, at: Value, to: Place) -> None:
        for first, levels in self._blocks(e, x, to):
            for i, part in enumerate(levels):
                e.store(part, at + first + part.lanes * i)


def _halves(e: Emitter, x: Value) -> tuple[Value, Value]:
    """32 float32."""
    return e.load(x, vec(F32, _HALF_BLOCK)), e.load(x + 4 * _HALF_BLOCK, vec(F32, _HALF_BLOCK))


def _reciprocal(e: Emitter, d: Value) -> Value:
    return e.where(d == 0.0, 0.0, 1.0 / d)


class _Bytes(_Levels):
    """Q8_0: the largest magnitude becomes 127."""

    type = GGMLType.Q8_0

    def keys(self, e: Emitter, address: Value, lanes: int) -> list[Value]:
        return [e.load(address, vec(I8, lanes)).sext(I32).to_float()]

    def values(self, e: Emitter, address: Value, index: int, lanes: int) -> Value:
        return self.keys(e, address + lanes * index, lanes)[0]

    def _quantize(self, e: Emitter, x: Value) -> tuple[Value, list[Value]]:
        parts = _halves(e, x)
        d = reduce(e, e.max(*(e.abs(v) for v in parts)), "max") / 127.0
        inverse = _reciprocal(e, d)
        # Where 1 / d is infinite, d is 0 in half precision, too, and so are the levels.
        scaled = [v * inverse for v in parts]
        return d, [round_away(e, e.where(e.abs(v) < 2.0**23, v, 0.0)).trunc(I8) for v in scaled]


class _Nibbles(_Levels):
    """Q4_0: the value of largest magnitude becomes -8, sign included; levels are -8 to 7."""

    type, offsets = GGMLType.Q4_0, (0, _HALF_BLOCK)

    def _level(self, e: Emitter, packed: Value, high: bool) -> Value:
        """Of bytes, the low or the high four bits as float32."""
        word = packed.sext(I32)
        if e.target.lowering == "avx512vnni":
            return lookup_floats(e, (*range(8), *range(-8, 0)), word.lsr(4) & 15 if high else word & 15)
        return (word >> 4 if high else (word << 28) >> 28).to_float()

    def keys(self, e: Emitter, address: Value, lanes: int) -> list[Value]:
        packed = e.load(address, vec(I8, lanes))
        return [self._level(e, packed, high) for high in (False, True)]

    def values(self, e: Emitter, address: Value, index: int, lanes: int) -> Value:
        block, channel = divmod(lanes * index, self.block)
        at = address + (_HALF_BLOCK * block + channel % _HALF_BLOCK)
        return self._level(e, e.load(at, vec(I8, lanes)), channel >= _HALF_BLOCK)

    def _quantize(self, e: Emitter, x: Value) -> tuple[Value, list[Value]]:
        parts = _halves(e, x)
        sizes = [e.abs(v) for v in parts]
        largest = reduce(e, e.max(*sizes), "max")
        numbers = [e.const(vec(I32, _HALF_BLOCK), range(first, first + _HALF_BLOCK)) for first in (0, _HALF_BLOCK)]
        found = [e.where(size == largest, i, self.block - 1) for size, i in zip(sizes, numbers, strict=True)]
        peak = e.load(x + 4 * reduce(e, e.min(*found), "min").sext(I64), F32)  # the first of largest magnitude
        d = e.where(peak == 0.0, 0.0, peak) / -8.0
        inverse = _reciprocal(e, d)
        scaled = [v * inverse + 8.5 for v in parts]
        low, high = (e.min(e.where(e.abs(v) < 2.0**31, v, 0.0).to_int(), 15).trunc(I8) for v in scaled)
        return d, [(low | (high << 4)) ^ -0x78]  # 0x88: from 8 higher to signed numbers


_KNOWN: dict[GGMLType, Elements] = {
    GGMLType.F32: _Floats(GGMLType.F32),
    GGMLType.F16: _Floats(GGMLType.F16),
    GGMLType.Q8_0: _Bytes(),
    GGMLType.Q4_0: _Nibbles(),
}


def elements_of(type: GGMLType) -> Elements:
    """How a cache of that type (one of `CACHE_TYPES`) is read and written."""
    return _KNOWN[type]
