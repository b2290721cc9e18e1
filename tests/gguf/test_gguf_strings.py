"""Arrays of strings: the fast way and the plain way agree on every array, whole or broken."""

import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from phiquant.gguf import strings
from phiquant.gguf.strings import BadString, check_strings, read_strings

Mapper = Callable[[bytes], mmap.mmap]


@pytest.fixture
def mapped(tmp_path: Path) -> Iterator[Mapper]:
    opened: list[mmap.mmap] = []

    def make(content: bytes) -> mmap.mmap:
        (tmp_path / "strings").write_bytes(content)
        with (tmp_path / "strings").open("rb") as file:
            opened.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def pack(items: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(item)) + item for item in items)


def expected(items: list[bytes]) -> list[str] | None:
    try:
        return [item.decode() for item in items]
    except UnicodeDecodeError:
        return None


pieces = st.one_of(
    st.text(max_size=12).map(str.encode),
    st.sampled_from(
        [b"", b"\0", b"\0" * 7, b"\0" * 9, b"a" * 127, b"a" * 128, b"\x80" * 169, "é".encode() * 64, b"b" * 300]
    ),
    st.sampled_from([b"\xc3", b"a\xc3", b"\xa9", b"\xe2\x96", b"\xff"]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=9).map(str.encode) | pieces, max_size=30), st.binary(max_size=20))
@example([b"\xc3", b"x" * 40, b"\xc3", b"\xa9" * 169], b"")
@example([b"ab", b"\xc3"], b"\xa9\0\0\0\0\0\0\0" + b"x" * 169)
@example([b"ab"], b"\1\0\0\0\0\0\0\0a")
def test_every_array_is_read_or_refused_as_a_whole(
    mapped: Mapper, monkeypatch: pytest.MonkeyPatch, items: list[bytes], rest: bytes
) -> None:
    monkeypatch.setattr(strings, "_WINDOW", 64)
    monkeypatch.setattr(strings, "_PLAIN_RUN", 3)
    monkeypatch.setattr(strings, "_FEW", 2)
    content = b"front" + pack(items)
    source = mapped(content + rest)
    texts = expected(items)
    if texts is None:
        with pytest.raises(BadString, match="not valid UTF-8"):
            check_strings(source, 5, len(items), 1 << 30)
    else:
        assert check_strings(source, 5, len(items), 1 << 30) == len(content)
        assert read_strings(source, 5, len(items)) == texts
        for count in range(0, len(items), 4):
            assert read_strings(source, 5, count) == texts[:count]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=9).map(str.encode), min_size=1, max_size=30), st.data())
def test_a_changed_length_never_leads_astray(
    mapped: Mapper, monkeypatch: pytest.MonkeyPatch, items: list[bytes], data: st.DataObject
) -> None:
    content = bytearray(pack(items))
    at = sum(8 + len(item) for item in items[: data.draw(st.integers(0, len(items) - 1))])
    content[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, 40) | st.integers(0, 2**64 - 1)))
    source = mapped(bytes(content))

    def outcome() -> tuple[int, list[str]] | str:
        try:
            return check_strings(source, 0, len(items), 1 << 30), read_strings(source, 0, len(items))
        except BadString as error:
            return str(error)

    fast = outcome()
    monkeypatch.setattr(strings, "_short_strings", lambda *_: (0, 0))
    assert fast == outcome()
    monkeypatch.undo()


def test_an_array_that_ends_with_the_file(mapped: Mapper) -> None:
    source = mapped(pack([b"abc"]))
    assert check_strings(source, 0, 1, 1 << 30) == 11
    with pytest.raises(BadString, match="item 1 lies beyond the end"):
        check_strings(source, 0, 2, 1 << 30)


def test_the_fast_way_is_taken_for_a_vocabulary(mapped: Mapper, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"▁word{index}" for index in range(20_000)]
    source = mapped(pack([word.encode() for word in words]))
    monkeypatch.setattr(strings, "_LENGTH", None)  # what the plain way reads lengths with
    assert check_strings(source, 0, len(words), 1 << 30) == len(source)
    assert read_strings(source, 0, len(words)) == words


def test_odd_strings_do_not_make_it_slow(mapped: Mapper, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = strings._short_strings

    def counted(window: bytes, limit: int) -> tuple[int, int]:
        nonlocal calls
        calls += 1
        return real(window, limit)

    monkeypatch.setattr(strings, "_short_strings", counted)
    for item in (b"", b"\0", b"\0\0", b"x" * 200):
        calls = 0
        source = mapped(pack([item] * 30_000))
        assert check_strings(source, 0, 30_000, 1 << 30) == len(source)
        assert calls < 20
        assert read_strings(source, 0, 30_000) == [item.decode()] * 30_000
        assert calls < 40
