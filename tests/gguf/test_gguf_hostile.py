"""Hostile files: every field of the header broken, cut or flipped gives one GGUFError and costs no memory."""

import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phiquant.errors import GGUFError
from phiquant.gguf import GGMLType, GGUFFile

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
Pair = tuple[bytes, int, bytes]
Line = tuple[bytes, Sequence[int], int, int]


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def array(item: int, count: int, items: bytes) -> bytes:
    return struct.pack("<iQ", item, count) + items


def number(value: int) -> bytes:
    return struct.pack("<I", value)


GOOD_PAIRS: list[Pair] = [
    (b"general.architecture", STRING, text(b"phi3")),
    (b"phi3.block_count", U32, number(2)),
    (b"flag", BOOL, b"\1"),
    (b"words", ARRAY, array(STRING, 3, text(b"a") + text("é".encode()) + text(b""))),
    (b"numbers", ARRAY, array(F32, 2, struct.pack("<ff", 1, 2))),
    (b"flags", ARRAY, array(BOOL, 2, b"\0\1")),
]
GOOD_LINES: list[Line] = [(b"one", (4,), GGMLType.F32, 0), (b"two", (32, 2), GGMLType.Q8_0, 32)]


def build(
    pairs: Sequence[Pair] = GOOD_PAIRS,
    lines: Sequence[Line] = GOOD_LINES,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    pair_count: int | None = None,
    line_count: int | None = None,
    data: int = 128,
    alignment: int = 32,
) -> bytes:
    out = magic + struct.pack(
        "<Iqq",
        version,
        len(lines) if line_count is None else line_count,
        len(pairs) if pair_count is None else pair_count,
    )
    for key, kind, value in pairs:
        out += text(key) + struct.pack("<i", kind) + value
    for name, extents, kind, offset in lines:
        out += text(name) + struct.pack(f"<I{len(extents)}qiQ", len(extents), *extents, kind, offset)
    return out + bytes(-len(out) % alignment) + bytes(data)


def with_pair(key: bytes, kind: int, value: bytes) -> bytes:
    return build([*GOOD_PAIRS, (key, kind, value)])


def with_line(name: bytes, extents: Sequence[int], kind: int, offset: int = 0) -> bytes:
    return build(lines=[(name, extents, kind, offset)])


def with_text_length(length: int) -> bytes:
    return with_pair(b"k", STRING, text(b"abc", length))


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    def read(content: bytes) -> GGUFFile:
        path = tmp_path / "hostile.gguf"
        path.write_bytes(content)
        return GGUFFile.open(path)

    return read


def consume(file: GGUFFile) -> None:
    """Touch all that an accepted file offers: none of it may fail once the header was accepted."""
    with file:
        for field in file.fields.values():
            repr(field)
            _ = field.value
        for name, info in file.tensors.items():
            assert len(file.data(name)) == info.nbytes


def test_the_intact_file_is_accepted(read: Callable[[bytes], GGUFFile]) -> None:
    with read(build()) as file:
        assert file.metadata["words"] == ["a", "é", ""]
        assert list(file.tensors) == ["one", "two"]


BAD: dict[str, tuple[bytes, str]] = {
    "magic": (build(magic=b"GGML"), "not a GGUF file"),
    "version 0": (build(version=0), "version 0"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "negative pairs": (build(pair_count=-1), "announces -1 keys"),
    "absurd pairs": (build(pair_count=2**62), "more than its"),
    "one pair too many": (build(pair_count=7), "key 6|tensor|value"),
    "negative tensors": (build(line_count=-1), "announces -1 tensors"),
    "absurd tensors": (build(line_count=2**62), "more than its"),
    "empty key": (with_pair(b"", U8, b"\0"), "is empty"),
    "duplicate key": (with_pair(b"flag", U8, b"\0"), "'flag' occurs twice"),
    "key not UTF-8": (with_pair(b"\xff", U8, b"\0"), "UTF-8"),
    "key of a surrogate": (with_pair(b"\xed\xa0\x80", U8, b"\0"), "UTF-8"),
    "key too long": (with_pair(b"k" * 1025, U8, b"\0"), "1025 bytes"),
    "unknown value type": (with_pair(b"k", 13, b"\0" * 8), "unknown type 13"),
    "negative value type": (with_pair(b"k", -1, b"\0" * 8), "unknown type -1"),
    "bool of 2": (with_pair(b"k", BOOL, b"\2"), "bool"),
    "string beyond the file": (with_text_length(10_000), "ends within"),
    "string above the limit": (with_text_length(2**30 + 1), "refused"),
    "string of 2^64-1": (with_text_length(2**64 - 1), "refused"),
    "string not UTF-8": (with_pair(b"k", STRING, text(b"a\xc3")), "UTF-8"),
    "overlong UTF-8": (with_pair(b"k", STRING, text(b"\xc0\x80")), "UTF-8"),
    "array of arrays": (with_pair(b"k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0"))), "array of arrays"),
    "array of an unknown type": (with_pair(b"k", ARRAY, array(99, 1, b"\0")), "unknown type 99"),
    "array beyond the file": (with_pair(b"k", ARRAY, array(U64, 10_000, b"")), "more than the file"),
    "array of 2^64-1": (with_pair(b"k", ARRAY, array(U8, 2**64 - 1, b"")), "more than the file"),
    "strings beyond the file": (with_pair(b"k", ARRAY, array(STRING, 2**61, b"")), "more than the file"),
    "item beyond the file": (with_pair(b"k", ARRAY, array(STRING, 1, text(b"abc", 2**40))), "item 0"),
    "item of 2^64-1": (with_pair(b"k", ARRAY, array(STRING, 1, text(b"abc", 2**64 - 1))), "item 0"),
    "item not UTF-8": (with_pair(b"k", ARRAY, array(STRING, 2, text(b"a") + text(b"\x80"))), "item 1"),
    "bools of 7": (with_pair(b"k", ARRAY, array(BOOL, 2, b"\1\7")), "bool"),
    "alignment of 0": (with_pair(b"general.alignment", U32, number(0)), "power of two"),
    "alignment of 48": (with_pair(b"general.alignment", U32, number(48)), "power of two"),
    "alignment as u64": (with_pair(b"general.alignment", U64, b"\x20" + bytes(7)), "must be UINT32"),
    "alignment as text": (with_pair(b"general.alignment", STRING, text(b"32")), "must be UINT32"),
    "tensor name of 64": (with_line(b"n" * 64, (4,), 0), "64 bytes"),
    "tensor name empty": (with_line(b"", (4,), 0), "is empty"),
    "tensor name not UTF-8": (with_line(b"\xfe", (4,), 0), "UTF-8"),
    "tensor twice": (build(lines=[(b"n", (8,), 0, 0), (b"n", (8,), 0, 32)]), "'n' occurs twice"),
    "5 dimensions": (with_line(b"n", (1, 1, 1, 1, 1), 0), "5 dimensions"),
    "negative extent": (with_line(b"n", (-1,), 0), "negative extent"),
    "overflowing product": (with_line(b"n", (2**62, 2**62), 0), "63 bits"),
    "overflow hidden by zero": (with_line(b"n", (0, 2**62, 2**62), 0), "63 bits"),
    "wrapping to a small size": (with_line(b"n", (2**32, 2**32), 0), "63 bits"),
    "more bytes than the file": (with_line(b"n", (2**61,), 0), "more than the whole file"),
    "removed type": (with_line(b"n", (32,), 4), "unknown type 4"),
    "type 43": (with_line(b"n", (32,), 43), "unknown type 43"),
    "type -1": (with_line(b"n", (32,), -1), "unknown type -1"),
    "row not whole": (with_line(b"n", (33,), GGMLType.Q8_0), "block of 32"),
    "scalar of a block type": (with_line(b"n", (), GGMLType.Q8_0), "block of 32"),
    "unaligned offset": (with_line(b"n", (4,), 0, 4), "multiple of the alignment"),
    "first offset not 0": (with_line(b"n", (4,), 0, 32), "end at 0"),
    "overlap": (build(lines=[(b"a", (16,), 0, 0), (b"b", (4,), 0, 32)]), "end at 64"),
    "gap": (build(lines=[(b"a", (4,), 0, 0), (b"b", (4,), 0, 64)]), "end at 32"),
    "offset of 2^64-32": (with_line(b"n", (4,), 0, 2**64 - 32), "end at 0"),
    "data beyond the file": (build(data=64), "ends beyond the end"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_broken_field_is_refused(read: Callable[[bytes], GGUFFile], case: str) -> None:
    content, message = BAD[case]
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=message):
            read(content)
        assert tracemalloc.get_traced_memory()[1] < 512 * 1024
    finally:
        tracemalloc.stop()


def test_unusual_but_valid_tensors(read: Callable[[bytes], GGUFFile]) -> None:
    lines = [(b"scalar", (), GGMLType.F32, 0), (b"none", (0, 5), GGMLType.F32, 32), (b"four", (1, 2, 3, 4), 0, 32)]
    with read(build(lines=lines)) as file:
        assert [info.shape for info in file.tensors.values()] == [(), (5, 0), (4, 3, 2, 1)]
        assert [info.nbytes for info in file.tensors.values()] == [4, 0, 96]


def test_alignment_of_one_gives_unaligned_data(read: Callable[[bytes], GGUFFile]) -> None:
    pairs = [(b"general.alignment", U32, number(1))]
    lines: list[Line] = [(b"a", (1,), GGMLType.I8, 0), (b"b", (1,), GGMLType.F32, 1)]
    with read(build(pairs, lines, alignment=1, data=5)) as file:
        assert file.tensors["b"].offset == 1
        assert file.data("b").tobytes() == bytes(4)


def test_every_truncation_is_refused(read: Callable[[bytes], GGUFFile]) -> None:
    content = build()
    needed = len(content) - 128 + 32 + 68  # the data, without the padding after the last tensor
    for length in range(needed):
        with pytest.raises(GGUFError):
            read(content[:length])
    consume(read(content[:needed]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_are_refused_or_harmless(read: Callable[[bytes], GGUFFile], data: st.DataObject) -> None:
    content = bytearray(build())
    header = len(content) - 128
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        change = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=1),
                st.sampled_from(
                    [b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\x80", b"\1" + bytes(7)]
                ),
            )
        )
        content[at : at + len(change)] = change
    try:
        file = read(bytes(content))
    except GGUFError as error:
        message = str(error)
    else:
        message = "harmless."
        consume(file)
    assert message.isprintable()
    assert message.endswith(".")


values: st.SearchStrategy[tuple[int, bytes]] = st.one_of(
    st.tuples(st.integers(-1, 14), st.binary(max_size=24)),
    st.tuples(st.just(STRING), st.builds(text, st.binary(max_size=8), st.none() | st.integers(0, 2**64 - 1))),
    st.tuples(
        st.just(ARRAY),
        st.builds(array, st.integers(-1, 14), st.integers(0, 12) | st.integers(0, 2**64 - 1), st.binary(max_size=40)),
    ),
)
small = st.integers(0, 40) | st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pairs=st.lists(st.tuples(st.binary(min_size=0, max_size=3), values), max_size=3),
    lines=st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=2),
            st.lists(small, max_size=5),
            st.integers(-1, 44),
            st.sampled_from([0, 0, 32, 64]) | st.integers(0, 2**64 - 1),
        ),
        max_size=3,
    ),
    pair_count=st.none() | st.integers(-(2**63), 2**63 - 1),
    line_count=st.none() | st.integers(-(2**63), 2**63 - 1),
)
def test_made_up_headers_are_refused_or_harmless(
    read: Callable[[bytes], GGUFFile],
    pairs: list[tuple[bytes, tuple[int, bytes]]],
    lines: list[Line],
    pair_count: int | None,
    line_count: int | None,
) -> None:
    flat = [(key, kind, value) for key, (kind, value) in pairs]
    content = build(flat, lines, pair_count=pair_count, line_count=line_count)
    try:
        file = read(content)
    except GGUFError:
        return
    consume(file)


def peak(read: Callable[[bytes], Any], content: bytes) -> int:
    """Bytes of Python and NumPy memory that opening takes at most, beyond the content itself."""
    tracemalloc.start()
    try:
        read(content).close()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_string_arrays_cost_no_memory_when_opened(read: Callable[[bytes], GGUFFile]) -> None:
    count = 150_000  # as Python objects 10 MB
    for item in (b"ab", b"\0\0"):  # the fast way and the plain one
        content = build([(b"k", ARRAY, array(STRING, count, text(item) * count))], [])
        assert peak(read, content) < 4 << 20


def test_a_long_string_costs_a_bounded_piece(read: Callable[[bytes], GGUFFile]) -> None:
    # One character outside the basic plane makes Python keep four bytes for every other one.
    content = build([(b"k", STRING, text(b"a" * 24_000_000 + "\N{OWL}".encode()))], [])
    assert peak(read, content) < 8 << 20


def test_number_arrays_cost_no_memory_when_opened(read: Callable[[bytes], GGUFFile]) -> None:
    content = build([(b"k", ARRAY, array(F64, 1_000_000, bytes(8_000_000)))], [])
    assert peak(read, content) < 256 * 1024


def test_many_empty_tensors_are_bounded(read: Callable[[bytes], GGUFFile]) -> None:
    lines: list[Line] = [(b"%05d" % index, (0,), 0, 0) for index in range(32768)]
    head = b"".join(text(name) + struct.pack("<IqiQ", 1, *extents, kind, at) for name, extents, kind, at in lines)
    content = b"GGUF" + struct.pack("<Iqq", 3, len(lines), 0) + head + bytes(64)
    assert peak(read, content) < 24 << 20
    content = b"GGUF" + struct.pack("<Iqq", 3, len(lines) + 1, 0) + head + bytes(64)
    with pytest.raises(GGUFError, match="32768 are refused"):
        read(content)


def test_many_keys_are_bounded(read: Callable[[bytes], GGUFFile]) -> None:
    pairs = b"".join(text(b"%05d" % index) + struct.pack("<iB", U8, 0) for index in range(16385))
    with pytest.raises(GGUFError, match="16384 are refused"):
        read(b"GGUF" + struct.pack("<Iqq", 3, 0, 16385) + pairs)
    assert peak(read, b"GGUF" + struct.pack("<Iqq", 3, 0, 16384) + pairs) < 12 << 20


def test_names_from_a_file_cannot_steer_a_terminal(read: Callable[[bytes], GGUFFile]) -> None:
    key = b"\x1b[2J\n" + b"k" * 200
    with pytest.raises(GGUFError) as caught:
        read(build([(key, U8, b"\0"), (key, U8, b"\0")], []))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 300


def test_strings_across_the_checking_step_are_whole(read: Callable[[bytes], GGUFFile]) -> None:
    content = "é" * 800_000  # the step of 1 MiB falls between the two bytes of a character at an odd start
    with read(build([(b"k", STRING, text(b"a" + content.encode()))], [])) as file:
        assert file.metadata["k"] == "a" + content
    items = text(b"x") + text(b"a" + content.encode())
    with read(build([(b"k", ARRAY, array(STRING, 2, items))], [])) as file:
        assert file.metadata["k"] == ["x", "a" + content]
    cut = text(b"a" + content.encode()[:-1])
    with pytest.raises(GGUFError, match="UTF-8"):
        read(build([(b"k", STRING, cut)], []))


def test_numbers_are_independent_of_the_file(read: Callable[[bytes], GGUFFile]) -> None:
    with read(build()) as file:
        numbers = file.metadata["numbers"]
    assert numbers.tolist() == [1, 2]
    assert isinstance(numbers, np.ndarray)
