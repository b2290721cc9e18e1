"""Text in pieces: however it is cut into tokens, the pieces are its whole characters up to the first stop text."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiquant.compat.llama_cpp.pieces import Pieces
from phiquant.errors import RequestError


def pieces_of(tokens: list[bytes], stops: list[str]) -> tuple[list[tuple[str, list[int]]], Pieces]:
    pieces = Pieces(stops)
    found = []
    for i, data in enumerate(tokens):
        found += pieces.push(i, data, None)
        if pieces.stopped:
            break
    found += pieces.finish()
    return [(piece.text, [mark.token for mark in piece.marks]) for piece in found], pieces


def test_a_piece_for_every_token() -> None:
    found, pieces = pieces_of([b"One", b" two", b"", b" three"], [])
    assert found == [("One", [0]), (" two", [1]), (" three", [2, 3])]
    assert [mark.offset for mark in pieces.marks] == [0, 3, 7, 7]


def test_characters_of_several_tokens_come_whole() -> None:
    found, _ = pieces_of([b"a", b"\xf0\x9f", b"\x99", b"\x82b"], [])
    assert found == [("a", [0]), ("\N{SLIGHTLY SMILING FACE}b", [1, 2, 3])]
    assert pieces_of([b"a\xff", b"\xf0\x9f"], [])[0] == [("a", [0]), ("", [1])]


def test_what_may_become_a_stop_text_waits() -> None:
    pieces = Pieces(["END", "EX"])
    assert [pieces.push(i, data, None) for i, data in enumerate([b"a", b"bE", b"N"])][1:] == [[], []]
    assert [piece.text for piece in pieces.push(3, b"d", None)] == ["bE", "N", "d"]
    assert pieces_of([b"a", b"bE", b"ND", b"c"], ["END"])[0] == [("a", [0]), ("b", [1])]
    assert pieces_of([b"a", b"bE", b"N"], ["END"])[0] == [("a", [0]), ("bE", [1]), ("N", [2])]
    with pytest.raises(RequestError, match="empty"):
        Pieces([""])


@given(
    st.text("abé🙂", max_size=30),
    st.lists(st.text("abé🙂", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(0, 60), max_size=12),
)
def test_any_text_cut_anywhere(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    tokens = [data[a:b] for a, b in pairwise(places)]
    found, pieces = pieces_of(tokens, stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(piece for piece, _ in found) == (text[: min(ends)[1]] if ends else text)
    assert pieces.stopped == bool(ends)
    order = [token for _, marks in found for token in marks]
    assert order == list(range(len(order)))
    if not ends:
        assert len(order) == len(tokens)
