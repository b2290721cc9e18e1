"""Formats of one, one and a half, and two bits with one scale to a block: Q1_0, Q2_0, TQ1_0, TQ2_0.

value of an element: d or -d (Q1_0), d * (q - 1) (the others); q is 0, 1, 2 in the ternary formats and up to 3 in Q2_0
"""

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Bytes, Floats, Format, Levels, Plane, join, split
from phiquant.quants.search import ordered_sum, reciprocal, round_away

__all__ = ["FORMATS", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"]

Q1_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])  # bit i of byte j: element 8 j + i
Q2_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])  # bits 2 i, 2 i + 1 of byte j: element 4 j + i
# five digits of base 3 to a byte, the first one most significant, as the fraction byte / 256:
#     qs bytes 0 to 31: element 32 n + byte;  32 to 47: 160 + 16 n + byte;  qh (four digits): 240 + 4 n + byte
TQ1_0 = np.dtype([("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])
TQ2_0 = np.dtype([("qs", "u1", 64), ("d", "<f2")])

ONE_BIT = (Plane("qs", bits=1, run=1),)
TWO_BITS = (Plane("qs", bits=2, run=1),)
TWO_BITS_IN_RUNS = (Plane("qs", bits=2, run=32),)


def _read(blocks: Blocks, levels: Floats) -> Floats:
    values: Floats = blocks["d"].astype(np.float32)[:, None] * levels
    return values


def _digits(data: Bytes, count: int) -> Floats:
    """The first `count` base-3 digits of bytes [n, b], minus 1, as float32 [n, count * b]: all first digits first."""
    powers = np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
    fraction = (data[:, None, :] * powers).astype(np.uint8)  # modulo 256: what is before the point is gone
    digit = (fraction.astype(np.uint16) * 3) >> 8
    return (digit.astype(np.float32) - np.float32(1)).reshape(len(data), -1)


def _read_tq1_0(blocks: Blocks) -> Floats:
    fives, fours = blocks["qs"], blocks["qh"]
    return _read(blocks, np.concatenate([_digits(fives[:, :32], 5), _digits(fives[:, 32:], 5), _digits(fours, 4)], 1))


def _columns(x: Floats, n: int) -> Floats:
    return np.ascontiguousarray(x.reshape(-1, n).T)


def _write_q1_0(x: Floats, importance: Floats | None) -> Blocks:
    columns = _columns(x, 128)
    blocks = np.zeros(columns.shape[1], Q1_0)
    blocks["d"] = ordered_sum(np.abs(columns)) / np.float32(128)
    join(blocks, ONE_BIT, (columns.T >= 0).astype(np.int32))
    return blocks.reshape(len(x), -1)


def _scaled(x: Floats, n: int) -> tuple[Floats, Levels, Levels]:
    """The largest magnitude d of every block, x / d rounded, and where that is a number at all, [n, blocks].

    It is none where d is so small that 1 / d is infinite.
    """
    columns = _columns(x, n)
    d: Floats = np.abs(columns).max(axis=0)
    scaled = columns * reciprocal(d)
    valid = np.isfinite(scaled)
    return d, round_away(np.where(valid, scaled, np.float32(0))).astype(np.int32), valid.astype(np.int32)


def _write_q2_0(x: Floats, importance: Floats | None) -> Blocks:
    d, levels, valid = _scaled(x, 64)
    blocks = np.zeros(len(d), Q2_0)
    blocks["d"] = d
    join(blocks, TWO_BITS, ((levels + 1) * valid).T)
    return blocks.reshape(len(x), -1)


def _write_tq2_0(x: Floats, importance: Floats | None) -> Blocks:
    d, levels, _ = _scaled(x, 256)
    blocks = np.zeros(len(d), TQ2_0)
    blocks["d"] = d
    join(blocks, TWO_BITS_IN_RUNS, (levels + 1).T)
    return blocks.reshape(len(x), -1)


def _fractions(digits: Levels) -> Bytes:
    """Bytes [n, b] from base-3 digits [n, 5, b], the first most significant: the number times 256 / 243, upwards."""
    number = (digits * np.array([81, 27, 9, 3, 1], np.int32)[:, None]).sum(axis=1)
    fractions: Bytes = ((number * 256 + 242) // 243).astype(np.uint8)
    return fractions


def _write_tq1_0(x: Floats, importance: Floats | None) -> Blocks:
    d, levels, _ = _scaled(x, 256)
    digits = (levels + 1).T
    blocks = np.zeros(len(d), TQ1_0)
    blocks["d"] = d
    blocks["qs"][:, :32] = _fractions(digits[:, :160].reshape(-1, 5, 32))
    blocks["qs"][:, 32:] = _fractions(digits[:, 160:240].reshape(-1, 5, 16))
    last = np.zeros((len(d), 5, 4), np.int32)  # the fifth digit is 0
    last[:, :4] = digits[:, 240:].reshape(-1, 4, 4)
    blocks["qh"] = _fractions(last)
    return blocks.reshape(len(x), -1)


FORMATS = (
    Format(
        GGMLType.Q1_0,
        Q1_0,
        lambda blocks: _read(blocks, (2 * split(blocks, ONE_BIT) - 1).astype(np.float32)),
        _write_q1_0,
        ONE_BIT,
    ),
    Format(
        GGMLType.Q2_0,
        Q2_0,
        lambda blocks: _read(blocks, (split(blocks, TWO_BITS) - 1).astype(np.float32)),
        _write_q2_0,
        TWO_BITS,
    ),
    Format(GGMLType.TQ1_0, TQ1_0, _read_tq1_0, _write_tq1_0),
    Format(
        GGMLType.TQ2_0,
        TQ2_0,
        lambda blocks: _read(blocks, (split(blocks, TWO_BITS_IN_RUNS) - 1).astype(np.float32)),
        _write_tq2_0,
        TWO_BITS_IN_RUNS,
    ),
)
