"""Float types, and the formats of 32 weights to a block: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

value of an element: d * (q - 8), d * q + m, d * (q - 16), d * q + m, d * q
"""

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Floats, Format, Plane, join, split
from phiquant.quants.search import fit_range, fit_symmetric, largest, reciprocal, round_away, signed_peak, smallest

__all__ = ["BF16", "F16", "F32", "FORMATS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]

F32 = np.dtype([("x", "<f4")])
F16 = np.dtype([("x", "<f2")])
BF16 = np.dtype([("x", "<u2")])  # the upper half of a float32

# qs: byte j holds element j in its low and element j + 16 in its high nibble; qh: bit j is the fifth bit of element j
Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
Q5_0 = np.dtype([("d", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)])
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)])
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])

NIBBLES = (Plane("qs", bits=4, run=16),)
FIVE_BITS = (*NIBBLES, Plane("qh", bits=1, run=1, shift=4))


def _read_f32(blocks: Blocks) -> Floats:
    return blocks["x"].astype(np.float32)[:, None]


def _read_bf16(blocks: Blocks) -> Floats:
    return (blocks["x"].astype(np.uint32) << 16).view(np.float32)[:, None]


def _write_f32(x: Floats, importance: Floats | None) -> Blocks:
    return np.ascontiguousarray(x).astype("<f4").view(F32)


def _write_f16(x: Floats, importance: Floats | None) -> Blocks:
    return np.ascontiguousarray(x).astype("<f2").view(F16)


def _write_bf16(x: Floats, importance: Floats | None) -> Blocks:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # half to even; infinity stays, the largest values reach it
    quiet = (bits >> 16) | 0x40
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype("<u2").view(BF16)


def _read_centred(blocks: Blocks, planes: tuple[Plane, ...], centre: int) -> Floats:
    values: Floats = blocks["d"].astype(np.float32)[:, None] * (split(blocks, planes) - centre).astype(np.float32)
    return values


def _read_ranged(blocks: Blocks, planes: tuple[Plane, ...]) -> Floats:
    d, m = (blocks[field].astype(np.float32)[:, None] for field in ("d", "m"))
    values: Floats = d * split(blocks, planes).astype(np.float32) + m
    return values


def _read_q8_0(blocks: Blocks) -> Floats:
    values: Floats = blocks["d"].astype(np.float32)[:, None] * blocks["qs"].astype(np.float32)
    return values


def _columns(x: Floats) -> Floats:
    return np.ascontiguousarray(x.reshape(-1, 32).T)


def _weights(x: Floats, importance: Floats) -> Floats:
    """Importance times the root of mean square of the row plus own square, [32, blocks]."""
    squares = x * x
    mean = np.add.accumulate(squares, axis=1, dtype=np.float32)[:, -1:] / np.float32(x.shape[1])
    return _columns(importance * np.sqrt(mean + squares))


def _truncated(v: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """Towards zero; zero where no 32-bit integer holds the value (a block so small that 1 / d is infinite)."""
    return np.where(np.abs(v) < np.float32(2.0**31), v, np.float32(0)).astype(np.int32)


def _write_centred(
    x: Floats, importance: Floats | None, dtype: np.dtype[np.void], planes: tuple[Plane, ...], centre: int
) -> Blocks:
    columns = _columns(x)
    blocks = np.zeros(columns.shape[1], dtype)
    if importance is None:
        # the peak, sign included, becomes the lowest level
        d = signed_peak(columns) / np.float32(-centre)
        scaled = columns * reciprocal(d)
        # the conversion to 8 bits wraps before the minimum is taken
        levels = np.minimum(_truncated(scaled + np.float32(centre + 0.5)).astype(np.int8), 2 * centre - 1).astype(
            np.int32
        )
    else:
        d, levels = fit_symmetric(columns, centre, _weights(x, importance))
    blocks["d"] = d
    join(blocks, planes, levels.T)
    return blocks.reshape(len(x), -1)


def _write_ranged(
    x: Floats, importance: Floats | None, dtype: np.dtype[np.void], planes: tuple[Plane, ...], top: int
) -> Blocks:
    columns = _columns(x)
    blocks = np.zeros(columns.shape[1], dtype)
    if importance is None:
        m = smallest(columns)
        d = (largest(columns) - m) / np.float32(top)
        scaled = (columns - m) * reciprocal(d)
        levels = np.minimum(_truncated(scaled + np.float32(0.5)), top)
    else:
        d, offset, levels = fit_range(columns, top, _weights(x, importance), -0.9, 0.05, 36)
        m = -offset
    blocks["d"], blocks["m"] = d, m
    join(blocks, planes, levels.T)
    return blocks.reshape(len(x), -1)


def _write_q8_0(x: Floats, importance: Floats | None) -> Blocks:
    columns = _columns(x)
    d = np.abs(columns).max(axis=0) / np.float32(127)
    rounded = round_away(columns * reciprocal(d))
    blocks = np.zeros(columns.shape[1], Q8_0)
    blocks["d"], blocks["qs"] = d, _truncated(rounded).astype(np.int8).T
    return blocks.reshape(len(x), -1)


FORMATS = (
    Format(GGMLType.F32, F32, _read_f32, _write_f32),
    Format(GGMLType.F16, F16, _read_f32, _write_f16),
    Format(GGMLType.BF16, BF16, _read_bf16, _write_bf16),
    Format(
        GGMLType.Q4_0,
        Q4_0,
        lambda blocks: _read_centred(blocks, NIBBLES, 8),
        lambda x, w: _write_centred(x, w, Q4_0, NIBBLES, 8),
        NIBBLES,
    ),
    Format(
        GGMLType.Q4_1,
        Q4_1,
        lambda blocks: _read_ranged(blocks, NIBBLES),
        lambda x, w: _write_ranged(x, w, Q4_1, NIBBLES, 15),
        NIBBLES,
    ),
    Format(
        GGMLType.Q5_0,
        Q5_0,
        lambda blocks: _read_centred(blocks, FIVE_BITS, 16),
        lambda x, w: _write_centred(x, w, Q5_0, FIVE_BITS, 16),
        FIVE_BITS,
    ),
    Format(
        GGMLType.Q5_1,
        Q5_1,
        lambda blocks: _read_ranged(blocks, FIVE_BITS),
        lambda x, w: _write_ranged(x, w, Q5_1, FIVE_BITS, 31),
        FIVE_BITS,
    ),
    Format(GGMLType.Q8_0, Q8_0, _read_q8_0, _write_q8_0, (Plane("qs", bits=8, run=32),)),
)
