import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.text import pretokenizers
from phiquant.text.pretokenizers import BY_ID, CL100K, GPT2, O200K, by_pattern, id_of, recognize

# As tiktoken and tokenizer.json files have them, written out.
WRITTEN = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": CL100K,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)"
    r"|\s+": CL100K,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": O200K,
}


def cut(pattern: str, text: str) -> list[str]:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed", invert=True)
    return [text[a:b] for _, (a, b) in split.pre_tokenize_str(text)]


def test_the_patterns_are_the_published_ones() -> None:
    assert {pattern: by_pattern(pattern) for pattern in WRITTEN} == WRITTEN
    assert by_pattern(r"\s+") is None


texts = st.one_of(
    st.text(), st.lists(st.sampled_from(["'LL", "'s", " ", "\n", "\r", "x", "É", "1", "/", "!"])).map("".join)
)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_every_character_belongs_to_a_word_and_spellings_agree(text: str) -> None:
    found: dict[str, list[str]] = {}
    for pattern, known in WRITTEN.items():
        words = cut(pattern, text)
        assert "".join(words) == text
        assert found.setdefault(known.name, words) == words


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("phi-2", "I'm I'M 12345  x\n\n", ["I", "'m", " I", "'", "M", " 12345", " ", " x", "\n\n"]),
        ("dbrx", "I'm I'M 12345  x\n\n y", ["I", "'m", " I", "'M", " ", "123", "45", " ", " x", "\n\n", " y"]),
        ("gpt-4o", "I'm camelCase HTTPServer a//\n", ["I'm", " camel", "Case", " HTTPServer", " a", "//\n"]),
        ("gpt-4o", "ÉcoleÉCOLE e\u0301E\u0301", ["École", "ÉCOLE", " e\u0301", "E\u0301"]),
    ],
)
def test_known_cuts(name: str, text: str, words: list[str]) -> None:
    assert cut(BY_ID[name].pattern, text) == words


def tokens_with(**texts: str) -> list[str]:
    tokens = ["x"] * 200_100
    for index, text in texts.items():
        tokens[int(index[1:])] = text
    return tokens


def test_vocabularies_are_recognized_by_their_end_of_text() -> None:
    assert recognize(tokens_with(_50256="<|endoftext|>")) == "gpt-2"
    assert recognize(tokens_with(_50256="<|endoftext|>", _50257=" " * 31)) == "phi-2"
    assert recognize(tokens_with(_100257="<|endoftext|>")) == "dbrx"
    assert recognize(tokens_with(_199999="<|endoftext|>")) == "gpt-4o"
    assert recognize(tokens_with(_7="<|endoftext|>")) is None
    assert recognize([]) is None


def test_ids_of_the_ways_to_cut() -> None:
    assert id_of(GPT2, tokens_with(_50256="<|endoftext|>", _50257=" " * 31)) == "phi-2"
    assert (id_of(GPT2, []), id_of(CL100K, []), id_of(O200K, [])) == ("gpt-2", "dbrx", "gpt-4o")
    assert {id_of(known, []) for known in pretokenizers.BY_ID.values()} < set(BY_ID)
