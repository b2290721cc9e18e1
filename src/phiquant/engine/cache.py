"""The key-value cache as pages of tokens: who uses which page, what it holds, and which one is given up first.

A sequence has a `PageTable`, the list of its pages. A page knows which tokens it holds and the digest of everything
before them (the regime of their rotation included), so a new sequence that begins as an earlier one did takes over its
pages instead of computing them again:

    full pages that match               shared; nobody writes to them any more
    a page that ends where we go on     taken over when nobody uses it
    a page that goes on differently     copied (copy on write), and written from where the two part

Pages that nobody uses keep what they hold until they are needed, the least recently used first; within a sequence the
last page goes first, so that what is left is always a beginning.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

__all__ = ["PageCache", "PageTable", "common_length"]


@dataclass
class PageTable:
    """The pages of one sequence.

    Attributes:
        pages: page numbers; position i is in pages[i // page_tokens].
        prefixes: digest of all that comes before each page; one more than there are full pages.
    """

    pages: list[int]
    prefixes: list[bytes]


@dataclass
class _Page:
    users: int = 0
    prefix: bytes = b""
    ids: tuple[int, ...] = field(default=())  # computed tokens, at most page_tokens


class PageCache:
    """Hands out pages; `copy(source, target)` copies a page's content on the device."""

    def __init__(self, pages: int, page_tokens: int, copy: Callable[[int, int], None]) -> None:
        self.page_tokens = page_tokens
        self._copy = copy
        self._pages = [_Page() for _ in range(pages)]
        self._empty = list(range(pages))[::-1]
        self._idle: OrderedDict[int, None] = OrderedDict()  # unused pages that hold something, next victim first
        self._after: dict[bytes, set[int]] = {}  # digest of a prefix -> pages that continue it

    @property
    def available(self) -> int:
        """Pages that `grow` could still hand out."""
        return len(self._empty) + len(self._idle)

    @property
    def known(self) -> int:
        """Pages without a user that still hold what was computed."""
        return len(self._idle)

    def adopt(self, ids: Sequence[int], root: bytes) -> tuple[PageTable, int]:
        """A table for a sequence of `ids`, filled with what is known of its beginning, and how many tokens that is.

        The last token is never taken from the cache, because its logits are what the sequence is here for. `root` keeps
        apart what must not be shared.
        """
        table, known = PageTable([], [blake2b(root, digest_size=16).digest()]), 0
        while known < len(ids) - 1:
            wanted = tuple(ids[known : min(known + self.page_tokens, len(ids) - 1)])
            page, common = self._best(table.prefixes[-1], wanted)
            if page is None:
                break
            self._use(page)
            if common == self.page_tokens:
                table.prefixes.append(_digest(table.prefixes[-1], wanted))
            elif self._pages[page].users > 1 or common < len(self._pages[page].ids):
                own = self._allocate()
                if own is not None:
                    self._copy(page, own)
                self._drop(page)
                if own is None:
                    break
                page = own
            table.pages.append(page)
            known += common
            if common < self.page_tokens:
                break
        return table, known

    def adopt_whole(self, ids: Sequence[int], root: bytes) -> tuple[PageTable, int]:
        """A table of the full pages that are known of `ids`, all to be read only, and how many tokens they hold."""
        table = PageTable([], [blake2b(root, digest_size=16).digest()])
        for start in range(0, len(ids) - self.page_tokens + 1, self.page_tokens):
            wanted = tuple(ids[start : start + self.page_tokens])
            page, common = self._best(table.prefixes[-1], wanted)
            if page is None or common < self.page_tokens:
                break
            self._use(page)
            table.pages.append(page)
            table.prefixes.append(_digest(table.prefixes[-1], wanted))
        return table, len(table.pages) * self.page_tokens

    def grow(self, table: PageTable, tokens: int) -> bool:
        """Make the table long enough for `tokens` tokens; False, with what there was, if pages have run out."""
        while len(table.pages) * self.page_tokens < tokens:
            page = self._allocate()
            if page is None:
                return False
            table.pages.append(page)
        return True

    def record(self, table: PageTable, ids: Sequence[int], start: int, stop: int) -> None:
        """Positions `start` to `stop` - 1 of the sequence `ids` are computed: later sequences may share them."""
        size = self.page_tokens
        for i in range(start // size, -(-stop // size)):
            number, prefix = table.pages[i], table.prefixes[i]
            held = tuple(ids[i * size : min(stop, (i + 1) * size)])
            page = self._pages[number]
            if page.prefix != prefix:
                self._forget(number)
                page.prefix = prefix
                self._after.setdefault(prefix, set()).add(number)
            page.ids = held
            if len(held) == size and len(table.prefixes) == i + 1:
                table.prefixes.append(_digest(prefix, held))

    def release(self, table: PageTable) -> None:
        """The sequence needs its pages no longer; what they hold stays known until they are needed."""
        while table.pages:
            self._drop(table.pages.pop())
        del table.prefixes[1:]

    def _best(self, prefix: bytes, wanted: tuple[int, ...]) -> tuple[int | None, int]:
        """The page after `prefix` that shares most of `wanted`, and how many tokens it shares."""
        best, most = None, 0
        for number in self._after.get(prefix, ()):
            common = common_length(self._pages[number].ids, wanted)
            if common > most:
                best, most = number, common
        return best, most

    def _use(self, page: int) -> None:
        self._pages[page].users += 1
        self._idle.pop(page, None)

    def _drop(self, page: int) -> None:
        self._pages[page].users -= 1
        if self._pages[page].users == 0:
            if self._pages[page].ids:
                self._idle[page] = None
            else:
                self._empty.append(page)

    def _allocate(self) -> int | None:
        if self._empty:
            page = self._empty.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._pages[page].users = 1
        return page

    def _forget(self, number: int) -> None:
        page = self._pages[number]
        if page.prefix:
            followers = self._after[page.prefix]
            followers.discard(number)
            if not followers:
                del self._after[page.prefix]
        page.prefix, page.ids = b"", ()


def common_length(a: list[int] | tuple[int, ...], b: list[int] | tuple[int, ...]) -> int:
    """Length of the longest beginning that two lists, or two tuples, have in common."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves, which are compared without the interpreter
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _digest(prefix: bytes, ids: tuple[int, ...]) -> bytes:
    return blake2b(prefix + np.array(ids, np.int32).tobytes(), digest_size=16).digest()
