"""Arrays of strings in a mapped file: found, checked and read many at a time.

A vocabulary is hundreds of thousands of short strings, each behind a length of eight bytes, and taking them one by one
is most of what opening a file costs. Where every length is from 1 to 127 and no text holds a zero byte, seven zeros in
a row are the upper bytes of a length and nothing else, so NumPy finds a window's lengths at once:

    05 00 00 00 00 00 00 00  h  e  l  l  o  03 00 00 00 00 00 00 00  a  b  c  ...
     `---- seven zeros ---'                  `---- seven zeros ---'

Each length must then lead exactly to the next one. Whatever does not look so is taken string by string. Measured for
200,000 tokens and as many merges, in processor time: 12 ms to check where the plain loop takes 118, and 81 ms to read
where it takes 95.
"""

import codecs
import mmap
import struct
from typing import Final

import numpy as np

__all__ = ["BadString", "check_strings", "check_utf8", "read_strings"]

_WINDOW: Final = 1 << 17  # bytes looked at together; bounds the memory that checking takes
# A window that gives fewer strings than this did not pay, and a run of strings is taken one by one before the next try:
# so an array made of odd strings costs a few times the plain loop at most.
_FEW: Final = 256
_PLAIN_RUN: Final = 2048
_PIECE: Final = 1 << 20  # bytes of a long string decoded at a time to check it
_SEVEN: Final = "\0" * 7
_LENGTH: Final = struct.Struct("<Q").unpack_from


class BadString(Exception):  # noqa: N818 (never leaves the reader, which turns it into a GGUFError)
    """An item of the array is not what it must be; the text says how."""


def check_utf8(mapped: mmap.mmap, start: int, end: int) -> bool:
    """Whether the bytes are UTF-8, decoding a bounded piece at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(start, end, _PIECE):
            decoder.decode(mapped[at : min(at + _PIECE, end)])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def check_strings(mapped: mmap.mmap, at: int, count: int, longest: int) -> int:
    """Check the `count` strings that start at `at`, none over `longest` bytes, and return where they end.

    BadString says which one is broken; memory stays within a few windows whatever the file holds.
    """
    size = len(mapped)
    done = 0
    while done < count:
        window = mapped[at : at + _WINDOW]
        found, length = _short_strings(window, count - done)
        if found and _is_utf8(window[:length]):
            done += found
            at += length
            if found >= _FEW:
                continue
        for index in range(done, min(done + _PLAIN_RUN, count)):
            if at + 8 > size:
                raise BadString(f"item {index} lies beyond the end of the file")
            (length,) = _LENGTH(mapped, at)
            start = at + 8
            at = start + length
            if length > longest or at > size:
                raise BadString(f"item {index} is {length} bytes long, more than the file holds or is allowed")
            good = _is_utf8(mapped[start:at]) if length <= _PIECE else check_utf8(mapped, start, at)
            if not good:
                raise BadString(f"item {index} is not valid UTF-8")
        done = min(done + _PLAIN_RUN, count)
    return at


def read_strings(mapped: mmap.mmap, at: int, count: int) -> list[str]:
    """The `count` strings that start at `at`, which `check_strings` has accepted."""
    strings: list[str] = []
    while len(strings) < count:
        window = mapped[at : at + _WINDOW]
        found, length = _short_strings(window, count - len(strings))
        if found:
            # Between the zeros of two lengths stand a text and the next length's lowest byte, an ASCII character.
            pieces = window[:length].decode().split(_SEVEN)
            strings += [piece[:-1] for piece in pieces[1:-1]]
            strings.append(pieces[-1])
            at += length
            if found >= _FEW:
                continue
        for _ in range(min(_PLAIN_RUN, count - len(strings))):
            end = at + 8 + _LENGTH(mapped, at)[0]
            strings.append(mapped[at + 8 : end].decode())
            at = end
    return strings


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _short_strings(window: bytes, limit: int) -> tuple[int, int]:
    """How many strings of 1 to 127 bytes without zeros the window starts with, at most `limit`, and their bytes.

    All lengths in what is found are ASCII characters, so it is UTF-8 as a whole exactly if every string is: a character
    that a string leaves unfinished would have to be continued by a length.
    """
    content = np.frombuffer(window, np.uint8)
    zeros = np.flatnonzero(content == 0)
    runs = zeros[: len(zeros) // 7 * 7].reshape(-1, 7)[:limit]
    starts = runs[:, 0] - 1
    lengths = content[starts].astype(np.int64)
    ends = starts + 8 + lengths
    good = (runs[:, 6] - runs[:, 0] == 6) & (lengths < 128) & (ends <= len(window))
    good[:1] &= starts[:1] == 0
    good[1:] &= starts[1:] == ends[:-1]
    after = zeros[7::7][: len(runs)]  # the first zero behind each length, which must lie behind the text too
    good[: len(after)] &= after >= ends[: len(after)]
    found = len(good) if good.all() else int(good.argmin())
    return found, int(ends[found - 1]) if found else 0
