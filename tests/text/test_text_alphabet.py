import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from phiquant.text.alphabet import BYTES, CHARACTERS, read, spell


def test_the_alphabet_is_that_of_tokenizers() -> None:
    assert sorted(BYTES) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (CHARACTERS[0x20], CHARACTERS[0x0A], CHARACTERS[0x41], CHARACTERS[0xAD]) == ("Ġ", "Ċ", "A", "Ń")


@given(st.binary())
def test_reading_is_the_inverse_of_spelling(data: bytes) -> None:
    assert read(spell(data)) == data


@given(st.text())
def test_words_are_spelled_as_tokenizers_spells_them(text: str) -> None:
    step = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert spell(text.encode()) == "".join(word for word, _ in step.pre_tokenize_str(text))


def test_other_characters_cannot_be_read() -> None:
    assert read("a b") is None
    assert read("日") is None
    assert read("") == b""
