"""Formats of one, one and a half, and two bits with one scale to a block: Q1_0, Q2_0, TQ1_0, TQ2_0.

value of an element: d or -d (Q1_0), d * (q - 1) (the others); q is 0, 1, 2 in the ternary formats and up to 3 in Q2_0
"""

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.quants.block import Blocks, Bytes, Floats, Format, Plane, split

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


FORMATS = (
    Format(
        GGMLType.Q1_0,
        Q1_0,
        lambda blocks: _read(blocks, (2 * split(blocks, ONE_BIT) - 1).astype(np.float32)),
        None,
        ONE_BIT,
    ),
    Format(
        GGMLType.Q2_0,
        Q2_0,
        lambda blocks: _read(blocks, (split(blocks, TWO_BITS) - 1).astype(np.float32)),
        None,
        TWO_BITS,
    ),
    Format(GGMLType.TQ1_0, TQ1_0, _read_tq1_0, None),
    Format(
        GGMLType.TQ2_0,
        TQ2_0,
        lambda blocks: _read(blocks, (split(blocks, TWO_BITS_IN_RUNS) - 1).astype(np.float32)),
        None,
        TWO_BITS_IN_RUNS,
    ),
)
