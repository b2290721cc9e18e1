"""Pages: sharing by prefix, copy on write, eviction by last use."""

import random

import pytest

from phiquant.engine.cache import PageCache, PageTable

SIZE = 4


class Device:
    """Remembers what every page holds, as a processor's cache would."""

    def __init__(self, pages: int) -> None:
        self.content: list[list[object]] = [[None] * SIZE for _ in range(pages)]
        self.copies: list[tuple[int, int]] = []

    def copy(self, source: int, target: int) -> None:
        self.copies.append((source, target))
        self.content[target] = list(self.content[source])


def compute(cache: PageCache, device: Device, table: PageTable, ids: list[int], start: int, root: bytes) -> None:
    """What a step does: writes the keys of `ids[start:]`, which depend on all before them."""
    assert cache.grow(table, len(ids))
    for i in range(start, len(ids)):
        device.content[table.pages[i // SIZE]][i % SIZE] = (root, tuple(ids[: i + 1]))
    cache.record(table, ids, start, len(ids))


def holds(device: Device, table: PageTable, ids: list[int], root: bytes) -> bool:
    return all(device.content[table.pages[i // SIZE]][i % SIZE] == (root, tuple(ids[: i + 1])) for i in range(len(ids)))


def made(pages: int = 8) -> tuple[Device, PageCache]:
    device = Device(pages)
    return device, PageCache(pages, SIZE, device.copy)


def begin(cache: PageCache, device: Device, ids: list[int], root: bytes = b"short") -> tuple[PageTable, int]:
    table, known = cache.adopt(ids, root)
    assert holds(device, table, ids[:known], root)
    compute(cache, device, table, ids, known, root)
    assert holds(device, table, ids, root)
    return table, known


def test_full_pages_are_shared_while_both_run() -> None:
    device, cache = made()
    first, _ = begin(cache, device, [1, 2, 3, 4, 5, 6])
    second, known = begin(cache, device, [1, 2, 3, 4, 9, 9])
    assert known == 4
    assert second.pages[0] == first.pages[0]
    assert second.pages[1] != first.pages[1]
    assert holds(device, first, [1, 2, 3, 4, 5, 6], b"short")


def test_a_page_in_use_is_copied_before_it_is_written() -> None:
    device, cache = made()
    first, _ = begin(cache, device, [1, 2, 3, 4, 5, 6])
    second, known = begin(cache, device, [1, 2, 3, 4, 5, 6, 7])
    assert known == 6
    assert device.copies == [(first.pages[1], second.pages[1])]
    compute(cache, device, first, [1, 2, 3, 4, 5, 6, 8], 6, b"short")
    assert holds(device, first, [1, 2, 3, 4, 5, 6, 8], b"short")
    assert holds(device, second, [1, 2, 3, 4, 5, 6, 7], b"short")


def test_a_conversation_goes_on_in_its_own_pages() -> None:
    device, cache = made()
    table, _ = begin(cache, device, [1, 2, 3, 4, 5, 6])
    pages = list(table.pages)
    cache.release(table)
    table, known = begin(cache, device, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert known == 6
    assert table.pages[:2] == pages
    assert device.copies == []


def test_a_released_page_that_goes_on_differently_is_kept_for_others() -> None:
    device, cache = made()
    cache.release(begin(cache, device, [1, 2, 3, 4, 5, 6, 7])[0])
    table, known = begin(cache, device, [1, 2, 3, 4, 5, 9])
    assert known == 5
    cache.release(table)
    assert cache.adopt([1, 2, 3, 4, 5, 6, 7, 8], b"short")[1] == 7


def test_the_last_token_is_always_computed() -> None:
    device, cache = made()
    cache.release(begin(cache, device, [1, 2, 3, 4, 5, 6, 7, 8])[0])
    assert cache.adopt([1, 2, 3, 4, 5, 6, 7, 8], b"short")[1] == 7
    assert cache.adopt([1], b"short")[1] == 0


def test_regimes_share_nothing() -> None:
    device, cache = made()
    cache.release(begin(cache, device, [1, 2, 3, 4, 5])[0])
    assert begin(cache, device, [1, 2, 3, 4, 5], b"long")[1] == 0


def test_the_same_tokens_elsewhere_are_not_shared() -> None:
    device, cache = made()
    cache.release(begin(cache, device, [1, 2, 3, 4, 5, 6, 7, 8])[0])
    assert begin(cache, device, [5, 6, 7, 8, 9])[1] == 0


def test_the_least_recently_used_goes_first_from_its_end() -> None:
    device, cache = made(pages=5)
    cache.release(begin(cache, device, [1, 1, 1, 1, 2, 2, 2, 2])[0])
    cache.release(begin(cache, device, [3, 3, 3, 3, 4, 4, 4, 4])[0])
    cache.release(begin(cache, device, [1, 1, 1, 1, 2, 2, 2, 2, 5])[0])  # used again: now the younger
    begin(cache, device, [7, 7, 7])
    assert cache.adopt([3, 3, 3, 3, 4, 4, 4, 4, 5], b"short")[1] == 4
    assert cache.adopt([1, 1, 1, 1, 2, 2, 2, 2, 5], b"short")[1] == 8


def test_growing_stops_when_pages_run_out() -> None:
    device, cache = made(pages=3)
    begin(cache, device, [1] * 8)
    table, _ = cache.adopt([2] * 9, b"short")
    assert not cache.grow(table, 9)
    assert len(table.pages) == 1
    cache.release(table)
    assert cache.available == 1


def test_adopting_without_a_page_for_the_copy() -> None:
    device, cache = made(pages=2)
    begin(cache, device, [1, 2, 3, 4, 5, 6])
    table, known = cache.adopt([1, 2, 3, 4, 5, 6, 7], b"short")
    assert known == 4
    assert len(table.pages) == 1


@pytest.mark.parametrize("seed", range(30))
def test_no_sequence_ever_sees_anothers_keys(seed: int) -> None:
    """Random lives on a small cache; `begin` and `holds` compare what is there with what must be."""
    chance = random.Random(seed)
    device, cache = made(pages=12)
    live: list[tuple[PageTable, list[int], bytes]] = []
    for _ in range(300):
        action = chance.random()
        if action < 0.4 and len(live) < 4:
            root = chance.choice([b"short", b"long"])
            ids = [chance.randrange(2) for _ in range(chance.randrange(1, 11))]
            table, known = cache.adopt(ids, root)
            assert holds(device, table, ids[:known], root)
            if cache.grow(table, len(ids)):
                compute(cache, device, table, ids, known, root)
                live.append((table, ids, root))
            else:
                cache.release(table)
        elif action < 0.8 and live:
            table, ids, root = chance.choice(live)
            if cache.grow(table, len(ids) + 1):
                ids.append(chance.randrange(2))
                compute(cache, device, table, ids, len(ids) - 1, root)
        elif live:
            cache.release(live.pop(chance.randrange(len(live)))[0])
        assert all(holds(device, table, ids, root) for table, ids, root in live)
    for table, _, _ in live:
        cache.release(table)
    assert cache.available == 12


def test_whole_pages_are_held_for_whoever_keeps_them() -> None:
    device, cache = made()
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    table, _ = begin(cache, device, ids)
    held, tokens = cache.adopt_whole(ids, b"short")
    assert tokens == 8
    assert held.pages == table.pages[:2]
    assert cache.adopt_whole(ids, b"long")[1] == 0
    assert cache.adopt_whole([1, 2, 3, 4, 9, 9, 9, 9], b"short")[1] == 4
    assert cache.adopt_whole([1, 2, 3], b"short")[1] == 0
    cache.release(table)
    assert cache.known == 1, "the others are held"
    begin(cache, device, [11] * 20)
    assert holds(device, held, ids[:8], b"short"), "nobody takes them"
