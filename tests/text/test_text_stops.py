import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import RequestError
from phiquant.text import StopStrings

small = st.text("ab", max_size=12)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@settings(max_examples=500)
@given(st.lists(small, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_streaming_equals_searching_the_whole(parts: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    out, shown, stopped = "", 0, False
    for part in parts:
        shown += len(part)
        emitted, stopped = matcher.push(part)
        out += emitted
        if stopped:
            break
        # nothing is held back but what may still begin a stop string
        seen = "".join(parts)[:shown]
        held = seen[len(out) :]
        assert out + held == seen
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
    assert (out + matcher.finish(), stopped) == naive("".join(parts), stops)


def test_the_string_that_ends_first_counts_and_the_longest_of_those() -> None:
    assert StopStrings(["abcd", "c"]).push("xabcd") == ("xab", True)
    assert StopStrings(["c", "bc"]).push("abc") == ("a", True)


def test_held_text_is_released() -> None:
    matcher = StopStrings(["\nUser:"])
    assert matcher.push("Hi\nUs") == ("Hi", False)
    assert matcher.push("ual") == ("\nUsual", False)
    assert matcher.push("\nUser") == ("", False)
    assert matcher.finish() == "\nUser"
    assert matcher.push("\nUser: x") == ("", True)
    assert matcher.stopped == "\nUser:"
    assert matcher.push("more") == ("", True)


def test_empty_stops() -> None:
    assert StopStrings([]).push("abc") == ("abc", False)
    with pytest.raises(RequestError, match="empty"):
        StopStrings(["a", ""])
