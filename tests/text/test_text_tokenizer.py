import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phiquant.errors import RequestError, TokenError, TokenizerError, UnsupportedError
from phiquant.gguf import GGUFFile, GGUFWriter, ValueType
from phiquant.text import AddedToken, Tokenizer, TokenType, Vocabulary, added_tokens_from_hf, added_tokens_to_json
from phiquant.text.pieces import PieceEncoder
from phiquant.text.words import SHORT_TEXT

MODEL = Path(__file__).parents[2] / "models" / "phi3-tiny"
SPECIALS = [
    *("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder6|>"),
    *("<|system|>", "<|end|>", "<|user|>"),
]
NASTY = [
    *(
        "",
        " ",
        "  ",
        "   ",
        " " * 15,
        " " * 16,
        " " * 17,
        " " * 33,
        " " * 100,
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\t\t \n \t",
        "\0",
        "a\0b",
    ),
    *(
        "Hello",
        " Hello",
        "  Hello",
        "Hello ",
        "Hello  world",
        "Hello\n\n  world\n",
        "don't",
        "1234567890",
        "ied 4 ½ months",
    ),
    *(
        "日本語のテキスト",
        "한국어",
        "中文，標點。",
        "مرحبا بالعالم",
        "שלום",
        "ไทย",
        "हिन्दी",
        "🙂",
        "👩‍👩‍👧‍👦",
        "🇫🇷",
        "e\u0301",
        "é",
    ),
    *(
        "\u200d",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "\ufffe",
        "\U0010ffff",
        "\u2028",
        "\x85",
        "\xa0x",
        "\u3000x",
        "\x1cx",
        "▁",
        "▁▁a ▁",
    ),
    *(
        "<",
        "<|",
        "<|user",
        "|>",
        "<|end|",
        "<s",
        "</s",
        "<0x0A>",
        "<0x41>",
        "[PAD32011]",
        "<unk",
        "<<s>>",
        "<|<|end|>|>",
    ),
    *(
        " <|end|> ",
        "Hi <|end|> there",
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "<s> x",
        "<s>x</s>  y",
        "</s>\u3000x",
        "<|end|>\x1cx",
    ),
    *(
        "<|end|>\x85\xa0 x",
        "a<|endoftext|> \n b",
        "<|end|><|end|>",
        "<|end|> <|end|>",
        "  <|user|>  \n  ",
        "x\n<|user|>",
        "<unk>\n x",
    ),
]

words = st.sampled_from([*SPECIALS, *NASTY])
texts = st.one_of(st.text(), st.lists(st.one_of(words, st.text(max_size=8)), max_size=8).map("".join))


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_get_the_published_ids(
    tokenizer: Tokenizer, published_ids: Callable[[str], list[int]], text: str
) -> None:
    assert tokenizer.encode(text) == published_ids(text)


@settings(max_examples=600, deadline=None)
@given(texts)
def test_any_text_gets_the_published_ids(
    tokenizer: Tokenizer, published_ids: Callable[[str], list[int]], plain: tokenizers.Tokenizer, text: str
) -> None:
    assert tokenizer.encode(text) == published_ids(text)
    assert tokenizer.encode(text, special=False) == plain.encode(text, add_special_tokens=False).ids


def prose() -> str:
    return (MODEL / "README.md").read_text() + (MODEL / "train.py").read_text()


def test_library_and_python_agree_on_long_texts(
    tokenizer: Tokenizer, published_ids: Callable[[str], list[int]]
) -> None:
    random_ = random.Random(0)
    pieces = [piece for piece in tokenizer.vocabulary.tokens[3:32000] if "\u2581" not in piece]
    soup = "".join(random_.choice(pieces) + " " * random_.choice((0, 0, 1, 1, 2, 7)) for _ in range(25000))
    encoder = PieceEncoder(tokenizer.vocabulary)
    for text in (prose(), soup, " " * 70000, "\n" * 70000, "日本" * 35000, "🙂" * 17000, "a" * 70000):
        expected = published_ids(text)
        normalized = "\u2581" + text.replace(" ", "\u2581")
        assert encoder.encode_short(normalized) == expected
        assert encoder.library().encode(normalized, add_special_tokens=False).ids == expected
        assert tokenizer.encode(text) == expected
    assert len(soup) > SHORT_TEXT


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_sentencepiece_agrees_on_ordinary_text(
    tokenizer: Tokenizer, sentencepiece_model: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    if any(special in text for special in SPECIALS) or not text:
        return
    assert tokenizer.encode(text, special=False) == sentencepiece_model.encode(text)


@pytest.mark.parametrize("text", [text for text in NASTY if text and not any(s in text for s in SPECIALS)])
def test_sentencepiece_agrees_on_nasty_text(
    tokenizer: Tokenizer, sentencepiece_model: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert tokenizer.encode(text, special=False) == sentencepiece_model.encode(text)


def test_merges_are_those_of_the_published_file_in_its_order(tokenizer: Tokenizer) -> None:
    merges = PieceEncoder(tokenizer.vocabulary).ordered_merges()
    published = json.loads((MODEL / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == 61249
    assert merges == [tuple(merge) for merge in published]


@settings(max_examples=400, deadline=None)
@given(texts)
@example("\u2581 \u2581")
@example("   leading")
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    # U+2581 is how the vocabulary writes a space, so it cannot be told from one.
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text.replace("\u2581", " ")


@settings(max_examples=300, deadline=None)
@given(texts)
def test_no_control_token_comes_out_of_ordinary_text(tokenizer: Tokenizer, text: str) -> None:
    types = tokenizer.vocabulary.types[np.array(tokenizer.encode(text, special=False), dtype=np.int64)]
    assert set(types.tolist()) <= {TokenType.NORMAL, TokenType.BYTE}


@settings(max_examples=250, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 32010), st.integers(0, 300)), max_size=20), st.booleans())
def test_decoding_equals_tokenizers_but_for_broken_utf8(
    tokenizer: Tokenizer, published: tokenizers.Tokenizer, ids: list[int], skip_special: bool
) -> None:
    text = tokenizer.decode(ids, skip_special=skip_special)
    if "\ufffd" not in text:
        assert text == published.decode(ids, skip_special_tokens=skip_special)


@settings(max_examples=250, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 32063), st.integers(0, 300)), max_size=30), st.booleans(), st.booleans())
def test_stream_gives_whole_characters_that_add_up(
    tokenizer: Tokenizer, ids: list[int], skip: bool, continuation: bool
) -> None:
    data = b"".join(tokenizer.token_bytes(i) for i in ids)
    stream = tokenizer.stream(continuation=continuation, skip_special=skip)
    parts = [stream.push(i) for i in ids]
    whole = "".join(parts) + stream.finish()
    if not continuation:
        assert whole == tokenizer.decode(ids, skip_special=skip)
    elif skip:
        assert whole == data.decode("utf-8", "replace")


def test_stream_never_splits_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂€", special=False)
    assert ids == [29871, 243, 162, 156, 133, 30181]  # a space, the four bytes of the first, the second
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert [part for part in parts if part] == ["🙂", "€"]
    assert stream.finish() == ""
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def test_a_continued_text_keeps_its_space(tokenizer: Tokenizer) -> None:
    prompt, there = tokenizer.encode("Hello"), tokenizer.encode("there")
    assert tokenizer.continues(prompt)
    assert tokenizer.stream(continuation=True).push(there[0]) == " there"
    turn = tokenizer.encode("<|user|>\nHi<|end|>\n<|assistant|>\n")
    assert not tokenizer.continues(turn)
    assert not tokenizer.continues([])
    assert tokenizer.stream().push(there[0]) == "there"


def test_known_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("ied 4 ½ months") == [474, 287, 29871, 29946, 29871, 30226, 7378]
    assert tokenizer.encode("") == []
    assert tokenizer.encode("<|user|>\nHi<|end|>\n<|assistant|>\n") == [32010, 6324, 32007, 32001]
    assert tokenizer.encode(" Hello") == [29871, 15043]
    assert tokenizer.encode("Hi <|end|> there") == [6324, 29871, 32007, 727]


def test_bos(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    assert tokenizer.encode("Hi", add_bos=True) == [1, 6324]
    assert tokenizer.encode("", add_bos=True) == [1]
    absent = {key: value for key, value in metadata.items() if not key.endswith("add_bos_token")}
    assert Tokenizer.from_metadata(absent).encode("Hi") == [1, 6324]
    assert Tokenizer.from_metadata(absent).encode("Hi", add_bos=False) == [6324]
    assert tokenizer.decode([1, 6324]) == "Hi"
    assert tokenizer.decode([1, 6324], skip_special=False) == "<s> Hi"


def test_ids_and_sets(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 32000, 32064)
    assert tokenizer.eog_ids == {2, 32000, 32007}
    assert tokenizer.unused_ids.tolist() == list(range(32011, 32064))
    assert tokenizer.token_bytes(6324) == b" Hi"
    assert tokenizer.token_bytes(13) == b"\n"
    assert tokenizer.token_bytes(32007) == b""
    assert tokenizer.token_bytes(2) == b"</s>"
    assert tokenizer.token_bytes(32063) == b""


@pytest.mark.parametrize("token", [-1, 32064, 10**12])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token: int) -> None:
    for call in (tokenizer.token_bytes, tokenizer.stream().push, lambda i: tokenizer.decode([i])):
        with pytest.raises(TokenError, match="outside the vocabulary of 32064"):
            call(token)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"character 1 is U\+D800"):
        tokenizer.encode("a\ud800")


def test_phi3_attributes_are_assumed_without_our_key(metadata: dict[str, Any], tokenizer: Tokenizer) -> None:
    without = {key: value for key, value in metadata.items() if not key.startswith("phiquant.")}
    assert Tokenizer.from_metadata(without).added_tokens == tokenizer.added_tokens
    types = metadata["tokenizer.ggml.token_type"].copy()
    types[32011:] = TokenType.UNKNOWN  # as older converters did
    older = Tokenizer.from_metadata({**without, "tokenizer.ggml.token_type": types})
    assert older.added_tokens == tokenizer.added_tokens
    assert older.unused_ids.tolist() == tokenizer.unused_ids.tolist()
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens[32010] = "<|human|>"
    assert not any(t.rstrip for t in Tokenizer.from_metadata({**without, "tokenizer.ggml.tokens": tokens}).added_tokens)
    tokens[32010], tokens[32044] = "<|user|>", "<|image|>"
    vision = Tokenizer.from_metadata({**without, "tokenizer.ggml.tokens": tokens}).added_tokens
    assert {t.content for t in vision if t.rstrip} == {
        "</s>",
        "<|assistant|>",
        *(f"<|placeholder{i}|>" for i in range(1, 7)),
    }


def test_added_tokens_from_hf(tokenizer_config: dict[str, Any], tokenizer: Tokenizer) -> None:
    tokenizer_json = json.loads((MODEL / "tokenizer.json").read_text())
    found = added_tokens_from_hf(tokenizer_config, tokenizer_json)
    assert found == added_tokens_from_hf({}, tokenizer_json) == list(tokenizer.added_tokens)
    assert found[2] == AddedToken(2, "</s>", rstrip=True)
    changed = {"added_tokens": [{"id": 2, "content": "</s>", "lstrip": True}]}
    assert added_tokens_from_hf(tokenizer_config, changed)[2] == AddedToken(2, "</s>", lstrip=True)
    assert json.loads(added_tokens_to_json(found))[2]["rstrip"] is True


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": "a"}},
        {"added_tokens_decoder": {"1": {"content": ""}}},
        {"added_tokens_decoder": {"1": {"content": "a", "rstrip": "yes"}}},
    ],
)
def test_malformed_added_tokens_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="tokenizer_config"):
        added_tokens_from_hf(config, None)


def small(tokens: list[str], scores: list[float], types: list[int], **more: Any) -> dict[str, Any]:
    keys = {"tokens": tokens, "scores": scores, "token_type": types, "model": "llama", "add_bos_token": False, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


attributes = st.fixed_dictionaries({name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized")})


@settings(max_examples=400, deadline=None)
@given(
    st.lists(attributes, min_size=3, max_size=3),
    st.lists(
        st.sampled_from(["ab", "a", "abc", " ", "\n", "\u3000", "\x1c", "x", "_", "é", "9", "-"]), max_size=12
    ).map("".join),
)
def test_attributes_mean_what_tokenizers_means(flags: list[dict[str, bool]], text: str) -> None:
    tokens = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "c",
        "x",
        "\u2581a",
        "ab",
        "abc",
    ]
    vocabulary = Vocabulary.from_metadata(
        small(tokens, [0.0] * 257 + [-float(i) for i in range(8)], [2] + [6] * 256 + [1] * 8)
    )
    contents = ("ab", "abc", "x")
    added = [AddedToken(tokens.index(content), content, **flag) for content, flag in zip(contents, flags, strict=True)]
    merges = [("\u2581", "a"), ("a", "b"), ("ab", "c")]
    model = tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges, byte_fallback=True)
    oracle = tokenizers.Tokenizer(model)
    normalizers = tokenizers.normalizers
    oracle.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    oracle.add_tokens([tokenizers.AddedToken(content, **flag) for content, flag in zip(contents, flags, strict=True)])
    assert Tokenizer(vocabulary, added).encode(text) == oracle.encode(text, add_special_tokens=False).ids


BROKEN: list[tuple[str, Any, type[Exception], str]] = [
    ("tokenizer.ggml.model", None, TokenizerError, "no tokenizer"),
    ("tokenizer.ggml.model", "bert", UnsupportedError, "'bert' is not supported.*'llama'.*'gpt2'"),
    ("tokenizer.ggml.model", 7, TokenizerError, "must be a string"),
    ("tokenizer.ggml.tokens", None, TokenizerError, "non-empty array of strings"),
    ("tokenizer.ggml.tokens", ["a", 1], TokenizerError, "non-empty array of strings"),
    ("tokenizer.ggml.scores", None, TokenizerError, "lacks tokenizer.ggml.scores"),
    ("tokenizer.ggml.scores", np.zeros(5, np.float32), TokenizerError, "5 entries for 32064"),
    ("tokenizer.ggml.scores", np.full(32064, np.nan, np.float32), TokenizerError, "NaN or infinity at token 0"),
    ("tokenizer.ggml.scores", "abc", TokenizerError, "array of numbers"),
    ("tokenizer.ggml.token_type", np.full(32064, 9, np.int32), TokenizerError, "says 9 of token 0"),
    ("tokenizer.ggml.token_type", np.ones(32064, np.float32), TokenizerError, "array of numbers"),
    ("tokenizer.ggml.eos_token_id", 32064, TokenizerError, "eos_token_id is 32064"),
    ("tokenizer.ggml.eot_token_id", 2**32 - 1, TokenizerError, "eot_token_id is 4294967295"),
    ("tokenizer.ggml.bos_token_id", "1", TokenizerError, "must be an integer"),
    ("tokenizer.ggml.add_bos_token", 1, TokenizerError, "true or false"),
    ("phiquant.tokenizer.added_tokens", 1, TokenizerError, "string of JSON"),
    ("phiquant.tokenizer.added_tokens", "[" * 100000, TokenizerError, "not valid JSON"),
    ("phiquant.tokenizer.added_tokens", "{}", TokenizerError, "JSON list"),
    ("phiquant.tokenizer.added_tokens", "[1]", TokenizerError, "must be an object"),
    ("phiquant.tokenizer.added_tokens", '[{"id":5,"content":"a"}]', TokenizerError, "disagrees"),
    ("phiquant.tokenizer.added_tokens", '[{"id":99999,"content":"a"}]', TokenizerError, "disagrees"),
]


@pytest.mark.parametrize(("key", "value", "error", "message"), BROKEN)
def test_contradictory_metadata_is_refused(
    metadata: dict[str, Any], key: str, value: Any, error: type[Exception], message: str
) -> None:
    broken = {**metadata, key: value}
    if value is None:
        del broken[key]
    with pytest.raises(error, match=message):
        Tokenizer.from_metadata(broken)


def test_missing_byte_tokens_are_named() -> None:
    tokenizer = Tokenizer.from_metadata(small(["<unk>", "\u2581", "a"], [0, -1, -2], [2, 1, 1]))
    assert tokenizer.encode("a a") == [1, 2, 1, 2]
    with pytest.raises(TokenizerError, match="'b' nor the byte token <0x62>"):
        tokenizer.encode("b" * (SHORT_TEXT + 1))


def test_pieces_with_inner_spaces_and_duplicates_and_no_prefix() -> None:
    tokens = ["<unk>", "\u2581", "a", "b", "a\u2581", "a\u2581b", "a", "", ""]
    tokenizer = Tokenizer.from_metadata(
        small(tokens, [0, -9, -8, -7, -2, -1, -8, 0, 0], [2, 1, 1, 1, 1, 1, 1, 1, 1], add_space_prefix=False)
    )
    assert tokenizer.encode("a bb") == [5, 3]
    assert tokenizer.encode("a") == [6]
    assert tokenizer.decode([5, 3]) == "a bb"
    assert tokenizer.decode([1, 5]) == " a b"
    assert tokenizer.unused_ids.tolist() == [7, 8]


def test_vocabulary_takes_plain_lists(metadata: dict[str, Any]) -> None:
    lists = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
    assert len(Vocabulary.from_metadata(lists)) == 32064


def test_from_a_gguf_file(tmp_path: Path, metadata: dict[str, Any], tokenizer: Tokenizer) -> None:
    path = tmp_path / "vocabulary.gguf"
    kinds = {str: ValueType.STRING, bool: ValueType.BOOL, int: ValueType.UINT32}
    with GGUFWriter(path) as writer:
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add(key, value, ValueType.ARRAY, ValueType.STRING)
            elif isinstance(value, np.ndarray):
                writer.add(
                    key, value, ValueType.ARRAY, ValueType.FLOAT32 if value.dtype.kind == "f" else ValueType.INT32
                )
            else:
                writer.add(key, value, kinds[type(value)])
        writer.begin()
        writer.commit()
    with GGUFFile.open(path) as gguf:
        loaded = Tokenizer.from_gguf(gguf)
    text = "<|user|>\nHi 🙂<|end|>\n<|assistant|>\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.added_tokens == tokenizer.added_tokens
    assert loaded.chat_template is not None
    assert loaded.chat_template.is_known
    assert loaded.eog_ids == tokenizer.eog_ids


def test_every_end_id_of_the_checkpoint_ends_a_reply(metadata: dict[str, Any]) -> None:
    key = "phiquant.tokenizer.eos_token_ids"
    assert 32001 not in Tokenizer.from_metadata(metadata).eog_ids
    more = Tokenizer.from_metadata({**metadata, key: np.array([32007, 32001, 32000], np.uint32)})
    assert {32000, 32001, 32007} <= more.eog_ids
    for bad in ([1, 2], np.array([1.5]), np.array([32064]), np.array([-1])):
        with pytest.raises(TokenizerError, match=key):
            Tokenizer.from_metadata({**metadata, key: bad})
