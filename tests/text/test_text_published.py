"""Files without our key get the attributes of the published vocabulary that they hold."""

from typing import Any

import numpy as np
import pytest

from phiquant.text import AddedToken, Tokenizer, TokenType, Vocabulary
from phiquant.text.added import default_added_tokens
from phiquant.text.alphabet import CHARACTERS

PHI4_NAMES = {
    100257: "<|endoftext|>",
    100258: "<|fim_prefix|>",
    100259: "<|fim_middle|>",
    100260: "<|fim_suffix|>",
    100264: "<|im_start|>",
    100265: "<|im_end|>",
    100266: "<|im_sep|>",
    100276: "<|endofprompt|>",
}
MINI_NAMES = ["assistant", "end", "user", "system", "tool", "/tool", "tool_call", "/tool_call", "tool_response", "tag"]


def phi4() -> dict[int, str]:
    unnamed = (i for i in range(100256, 100352) if i not in PHI4_NAMES)
    return {**{i: f"<|dummy_{n}|>" for n, i in enumerate(unnamed)}, **PHI4_NAMES}


def phi4_mini() -> dict[int, str]:
    return {199999: "<|endoftext|>", 200018: "<|endofprompt|>"} | {
        200019 + i: f"<|{name}|>" for i, name in enumerate(MINI_NAMES)
    }


def phi2() -> dict[int, str]:
    runs = [*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1))]
    return {50256: "<|endoftext|>", **dict(enumerate(runs, 50257))}


def metadata(size: int, added: dict[int, str], **more: Any) -> dict[str, Any]:
    """A file that llama.cpp could have made, its words nonsense but for the bytes."""
    first = min(added)
    tokens = [*CHARACTERS.values(), *(f"{i}" for i in range(10**6, 10**6 + first - 256))]
    tokens += [added.get(i, f"[PAD{i}]") for i in range(first, size)]
    types = np.array([1] * first + [5] * (size - first), np.int32)
    for index, text in added.items():
        types[index] = 4 if text.isspace() else 3
    keys = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": [], **more}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def test_phi_4() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(100352, phi4(), pre="dbrx", eos_token_id=100265))
    assert len(tokenizer.added_tokens) == 96
    assert all(token.lstrip and token.rstrip and token.special for token in tokenizer.added_tokens)
    assert tokenizer.encode("a <|im_end|>\n b") == [*tokenizer.encode("a"), 100265, *tokenizer.encode("b")]
    assert tokenizer.eog_ids == {100257, 100265}
    assert tokenizer.notes == ("the file lacks the attributes of added tokens; those published for Phi-4 are assumed",)


def test_phi_4_mini() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(200064, phi4_mini(), pre="gpt-4o"))
    by_text = {token.content: token for token in tokenizer.added_tokens}
    assert len(by_text) == 12
    assert {text for text, token in by_text.items() if token.rstrip} == {f"<|{name}|>" for name in MINI_NAMES}
    assert {text for text, token in by_text.items() if not token.special} == {f"<|{n}|>" for n in MINI_NAMES[4:9]}
    assert tokenizer.eog_ids == {199999, 200020}
    assert tokenizer.unused_ids.tolist() == [*range(200000, 200018), *range(200029, 200064)]
    assert "Phi-4-mini" in tokenizer.notes[0]


def test_phi_2() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(51200, phi2()))
    assert tokenizer.added_tokens[1] == AddedToken(50257, " " * 31, normalized=True)
    assert len(tokenizer.added_tokens) == 39
    assert tokenizer.encode(" " * 35, special=False) == [50257, 50284]
    assert tokenizer.notes[0] == (
        "the file has no tokenizer.ggml.pre; 'phi-2' is assumed, since its tokens are those of that vocabulary"
    )


def test_a_pre_tokenizer_that_says_default_is_recognized_too() -> None:
    vocabulary = Vocabulary.from_metadata(metadata(100352, phi4(), pre="default"))
    assert vocabulary.pre == "dbrx"
    assert "'dbrx' is assumed" in vocabulary.notes[0]


@pytest.mark.parametrize("index", [100257, 100264, 100265, 100266])
def test_a_vocabulary_that_differs_is_not_phi_4s(index: int) -> None:
    changed = {**phi4(), index: "<|other|>"}
    vocabulary = Vocabulary.from_metadata(metadata(100352, changed, pre="dbrx"))
    assert not any(token.lstrip or token.rstrip for token in default_added_tokens(vocabulary))


def test_types_say_what_is_special_where_nothing_is_published() -> None:
    keys = metadata(300, {256: "<|x|>", 257: "word"}, pre="dbrx")
    keys["tokenizer.ggml.token_type"][257] = TokenType.USER_DEFINED
    tokenizer = Tokenizer.from_metadata(keys)
    assert tokenizer.added_tokens == (AddedToken(256, "<|x|>", special=True), AddedToken(257, "word"))
    assert tokenizer.notes == ()
