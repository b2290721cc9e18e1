"""The K formats: 256 weights to a super-block of 16 x 16 (Q2_K, Q3_K, Q6_K) or 8 x 32 (Q4_K, Q5_K).

value of an element, with scale and offset of its sub-block:

    Q2_K          d * scale * q - dmin * offset            scale, offset of 4 bits, q of 2
    Q4_K, Q5_K    d * scale * q - dmin * offset            scale, offset of 6 bits, q of 4 or 5
    Q3_K          d * (scale - 32) * (q - 4)               scale of 6 bits, q of 3
    Q6_K          d * scale * (q - 32)                     scale a signed byte, q of 6
"""

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Bytes, Floats, Format, Levels, Plane, join, split
from phiquant.quants.search import (
    EPSILON,
    fit_descent,
    fit_range,
    fit_symmetric,
    fit_unsigned,
    levels_of,
    nearest,
    ordered_sum,
    signed_peak,
)

__all__ = ["FORMATS", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]

# scales of Q2_K: low nibble the scale, high nibble the offset of sub-block j
Q2_K = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])
# scales of Q3_K, sub-block j, byte:   0 ... 7           8 ... 11
#                               bits 7 6 5 4 3 2 1 0    7 6|5 4|3 2|1 0
#                          low 4 of: j + 8  |  j        top 2 of j + 12 | j + 8 | j + 4 | j
Q3_K = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])
# scales of Q4_K and Q5_K, byte: j = 0 ... 3             j + 4                     j + 8
#                       bits 7 6|5 4 3 2 1 0     7 6|5 4 3 2 1 0          7 6 5 4|3 2 1 0
#             top 2 of scale j+4 | scale j    of offset j+4 | offset j   low 4 of offset j+4 | scale j+4
Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])
Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])

TWO_BITS = (Plane("qs", bits=2, run=32),)
THREE_BITS = (*TWO_BITS, Plane("hmask", bits=1, run=32, shift=2))
FOUR_BITS = (Plane("qs", bits=4, run=32),)
FIVE_BITS = (*FOUR_BITS, Plane("qh", bits=1, run=32, shift=4))
SIX_BITS = (Plane("ql", bits=4, run=64), Plane("qh", bits=2, run=32, shift=4))


def _spread(per_block: Floats, times: int) -> Floats:
    """Values [n, sub-blocks] repeated for each element: [n, 256]."""
    return np.repeat(per_block, times, axis=1)


def _float(blocks: Blocks, field: str) -> Floats:
    values: Floats = blocks[field].astype(np.float32)
    return values


def unpack_pairs(scales: Bytes) -> tuple[Bytes, Bytes]:
    """Scales and offsets [n, 8] of six bits from the 12 bytes of Q4_K and Q5_K."""
    low, middle, high = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    first = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=1)
    second = np.concatenate((middle & 63, (high >> 4) | (middle >> 6 << 4)), axis=1)
    return first, second


def pack_pairs(first: Bytes, second: Bytes) -> Bytes:
    """The inverse of `unpack_pairs`."""
    low = first[:, :4] | (first[:, 4:] >> 4 << 6)
    middle = second[:, :4] | (second[:, 4:] >> 4 << 6)
    high = (first[:, 4:] & 15) | (second[:, 4:] << 4)
    return np.concatenate((low, middle, high), axis=1)


def unpack_signed(scales: Bytes) -> Bytes:
    """Scales [n, 16] of six bits, biased by 32, from the 12 bytes of Q3_K."""
    low, high = scales[:, :8], scales[:, 8:]
    tops = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale: Bytes = np.concatenate((low & 15, low >> 4), axis=1) | (tops << 4)
    return scale


def pack_signed(scales: Bytes) -> Bytes:
    """The inverse of `unpack_signed`."""
    low = (scales[:, :8] & 15) | (scales[:, 8:] << 4)
    tops = (scales >> 4).reshape(-1, 4, 4) << np.array([[0], [2], [4], [6]], np.uint8)
    return np.concatenate((low, np.bitwise_or.reduce(tops, axis=1)), axis=1)


def pairs(blocks: Blocks) -> tuple[Bytes, Bytes]:
    """Integer scales and offsets of Q2_K, Q4_K or Q5_K blocks."""
    packed: Bytes = blocks["scales"]
    if packed.shape[1] == 16:
        return np.bitwise_and(packed, np.uint8(15)), np.right_shift(packed, np.uint8(4))
    return unpack_pairs(packed)


def signed(blocks: Blocks) -> Levels:
    """Integer scales of Q3_K or Q6_K blocks."""
    if "hmask" in (blocks.dtype.names or ()):
        return unpack_signed(blocks["scales"]).astype(np.int32) - 32
    return blocks["scales"].astype(np.int32)


def units(blocks: Blocks) -> tuple[Floats, Floats]:
    """Scale and offset of every sub-block, [n, sub-blocks], as the reader computes them."""
    scale, offset = pairs(blocks)
    return _float(blocks, "d")[:, None] * scale.astype(np.float32), _float(blocks, "dmin")[:, None] * offset.astype(
        np.float32
    )


def _read_ranged(blocks: Blocks, planes: tuple[Plane, ...]) -> Floats:
    scale, offset = units(blocks)
    times = 256 // scale.shape[1]
    return _spread(scale, times) * split(blocks, planes).astype(np.float32) - _spread(offset, times)


def _read_signed(blocks: Blocks, planes: tuple[Plane, ...], centre: int) -> Floats:
    scale = _float(blocks, "d")[:, None] * signed(blocks).astype(np.float32)
    return _spread(scale, 16) * (split(blocks, planes) - centre).astype(np.float32)


def _columns(x: Floats) -> Floats:
    return np.ascontiguousarray(x.reshape(-1, 256).T)


def _weights(x: Floats, columns: Floats, importance: Floats, times: int) -> Floats:
    """Importance times the root of `times` the super-block's mean square plus own square, [256, n]."""
    squares = columns * columns
    sigma2 = np.float32(times) * ordered_sum(squares) / np.float32(256)
    given = np.broadcast_to(importance, x.shape)
    return _columns(given) * np.sqrt(sigma2 + squares)


def _byte(levels: Levels, most: int = 255) -> Bytes:
    """As an unsigned byte [n, sub-blocks] (a scale that rounding made negative wraps), at most `most`."""
    return np.minimum(levels.astype(np.uint8), np.uint8(most)).T


def _write_ranged(
    x: Floats,
    importance: Floats | None,
    dtype: np.dtype[np.void],
    planes: tuple[Plane, ...],
    plain: tuple[float, float, int],
) -> Blocks:
    """Q2_K, Q4_K, Q5_K. `plain` is first, stride and steps of the search without importance."""
    columns = _columns(x)
    n = columns.shape[1]
    blocks = np.zeros(n, dtype)
    two_bits = dtype == Q2_K
    top = 2 ** sum(plane.bits for plane in planes) - 1
    count, most = (16, 15) if two_bits else (8, 63)
    times = 256 // count
    parts = np.split(columns, count)
    if importance is None:
        if two_bits:
            weights = [np.abs(part) for part in parts]
        else:
            weights = [np.sqrt(ordered_sum(part * part) / np.float32(32)) + np.abs(part) for part in parts]
        fits = [fit_range(part, top, w, *plain, absolute=two_bits) for part, w in zip(parts, weights, strict=True)]
    else:
        weights = np.split(_weights(x, columns, importance, 1 if two_bits else 2), count)
        fits = [fit_range(part, top, w, -0.9, 0.05, 36) for part, w in zip(parts, weights, strict=True)]
    scales, offsets = np.stack([fit[0] for fit in fits]), np.stack([fit[1] for fit in fits])
    if importance is None:
        integers = []
        for field, values in (("d", scales), ("dmin", offsets)):
            peak = np.maximum(values.max(axis=0), np.float32(0))
            inverse = np.where(peak > 0, np.float32(most) / peak, np.float32(0))
            integers.append(_byte(nearest(inverse * values), 255 if two_bits else most))
            blocks[field] = peak / np.float32(most)
    else:
        totals = np.stack([ordered_sum(w) for w in weights])
        integers = []
        for field, values in (("d", scales), ("dmin", offsets)):
            unit, level = fit_unsigned(values, most, totals)
            blocks[field] = unit
            integers.append(_byte(level))
    blocks["scales"] = integers[0] | (integers[1] << 4) if two_bits else pack_pairs(*integers)
    scale, offset = (_spread(unit, times).T for unit in units(blocks))
    again = levels_of((columns + offset) / scale, 0, top)
    levels = np.where(scale != 0, again, np.concatenate([fit[2] for fit in fits]))
    join(blocks, planes, levels.T)
    return blocks.reshape(len(x), -1)


def _write_q3_k(x: Floats, importance: Floats | None) -> Blocks:
    columns = _columns(x)
    blocks = np.zeros(columns.shape[1], Q3_K)
    parts = np.split(columns, 16)
    if importance is None:
        fits = [fit_descent(part, 4) for part in parts]
        scales = np.stack([fit[0] for fit in fits])
        peak = signed_peak(scales)
        inverse = np.float32(-32) / peak
        blocks["d"] = np.where(peak != 0, np.float32(1) / inverse, np.float32(0))
        packed = np.where(peak != 0, levels_of(inverse * scales, -32, 31) + 32, 0)
    else:
        weights = np.split(_weights(x, columns, importance, 2), 16)
        fits = [fit_symmetric(part, 4, w) for part, w in zip(parts, weights, strict=True)]
        totals = np.stack([ordered_sum(w) for w in weights])
        blocks["d"], packed = fit_symmetric(np.stack([fit[0] for fit in fits]), 32, totals)
    blocks["scales"] = pack_signed(packed.astype(np.uint8).T)
    return _finish_signed(x, columns, blocks, THREE_BITS, 4, np.concatenate([fit[1] for fit in fits]))


def _write_q6_k(x: Floats, importance: Floats | None) -> Blocks:
    columns = _columns(x)
    blocks = np.zeros(columns.shape[1], Q6_K)
    weights = [None] * 16 if importance is None else np.split(_columns(np.broadcast_to(importance, x.shape)), 16)
    fits = [fit_symmetric(part, 32, w) for part, w in zip(np.split(columns, 16), weights, strict=True)]
    scales = np.stack([fit[0] for fit in fits])
    peak = signed_peak(scales)
    inverse = np.float32(-128) / peak
    blocks["d"] = np.float32(1) / inverse
    blocks["scales"] = np.minimum(nearest(inverse * scales), 127).astype(np.int8).T
    result = _finish_signed(x, columns, blocks, SIX_BITS, 32, np.concatenate([fit[1] for fit in fits]))
    result.reshape(-1)[np.abs(peak) < EPSILON] = np.zeros((), Q6_K)
    return result


def _finish_signed(
    x: Floats, columns: Floats, blocks: Blocks, planes: tuple[Plane, ...], centre: int, found: Levels
) -> Blocks:
    """Choose the levels again for the scales as stored; sub-blocks whose scale came out zero keep the found ones."""
    scale = _spread(_float(blocks, "d")[:, None] * signed(blocks).astype(np.float32), 16).T
    again = levels_of(columns / scale, -centre, centre - 1) + centre
    join(blocks, planes, np.where(scale != 0, again, found).T)
    return blocks.reshape(len(x), -1)


FORMATS = (
    Format(
        GGMLType.Q2_K,
        Q2_K,
        lambda blocks: _read_ranged(blocks, TWO_BITS),
        lambda x, w: _write_ranged(x, w, Q2_K, TWO_BITS, (-0.5, 0.1, 15)),
        TWO_BITS,
    ),
    Format(GGMLType.Q3_K, Q3_K, lambda blocks: _read_signed(blocks, THREE_BITS, 4), _write_q3_k, THREE_BITS),
    Format(
        GGMLType.Q4_K,
        Q4_K,
        lambda blocks: _read_ranged(blocks, FOUR_BITS),
        lambda x, w: _write_ranged(x, w, Q4_K, FOUR_BITS, (-1.0, 0.1, 20)),
        FOUR_BITS,
    ),
    Format(
        GGMLType.Q5_K,
        Q5_K,
        lambda blocks: _read_ranged(blocks, FIVE_BITS),
        lambda x, w: _write_ranged(x, w, Q5_K, FIVE_BITS, (-0.5, 0.1, 15)),
        FIVE_BITS,
    ),
    Format(GGMLType.Q6_K, Q6_K, lambda blocks: _read_signed(blocks, SIX_BITS, 32), _write_q6_k, SIX_BITS),
)
