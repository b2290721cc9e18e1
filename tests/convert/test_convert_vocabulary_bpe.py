"""tokenizer.* of byte-level vocabularies: from tokenizer.json, vocab.json with merges.txt, and tiktoken's ranks."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from phiquant.convert.vocabulary import TokenizerFiles, strips_whitespace, tokenizer_keys
from phiquant.errors import CheckpointError, PhiquantError, UnsupportedError
from phiquant.text import Tokenizer
from phiquant.text.alphabet import CHARACTERS, read

KINDS = {"phi-2": "phi-2", "phi-4": "dbrx", "phi-4-mini": "gpt-4o", "phi-3-small": "dbrx"}
SIZE = 1600


def write(directory: Path, state: dict[str, Any] | None = None, **config: Any) -> Path:
    if state is not None:
        (directory / "tokenizer.json").write_text(json.dumps(state))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **config}))
    return directory


def keys(directory: Path, size: int = SIZE, **config: Any) -> dict[str, Any]:
    entries = tokenizer_keys(TokenizerFiles.read(directory, {"vocab_size": size, **config}), size)
    assert len({entry.key for entry in entries}) == len(entries)
    return {entry.key: entry.value for entry in entries}


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_vocabulary_encodes_as_its_tokenizer_json(
    tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], hard_texts: list[str], kind: str
) -> None:
    state = byte_level(kind)
    found = keys(write(tmp_path, state))
    published = tokenizers.Tokenizer.from_str(json.dumps(state))
    ours = Tokenizer.from_metadata(found)
    specials = [token["content"] for token in state["added_tokens"]]
    for text in [*hard_texts, " x ".join(specials), "".join(specials)]:
        assert ours.encode(text) == published.encode(text, add_special_tokens=False).ids, text
    assert found["tokenizer.ggml.model"] == "gpt2"
    # Phi-2 is told from GPT-2 by its runs of spaces at 50257, which this small vocabulary cannot have.
    assert found["tokenizer.ggml.pre"] == {"phi-2": "gpt-2"}.get(kind, KINDS[kind])
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in state["model"]["merges"]]
    assert "tokenizer.ggml.scores" not in found
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert "phiquant.tokenizer.ignore_merges" not in found


def test_types_and_holes(tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]) -> None:
    found = keys(write(tmp_path, byte_level("phi-4-mini"), bos_token="<|endoftext|>", eos_token={"content": "<|end|>"}))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == SIZE
    assert [tokens[i] for i in (1500, 1501, 1502, 1512, 1599)] == [
        *("[PAD1500]", "<|endoftext|>", "[PAD1502]", "<|tool_call|>", "[PAD1599]"),
    ]
    # What looks like a mark is a control token, special or not, as in llama.cpp's converter.
    assert [int(types[i]) for i in (0, 1499, 1500, 1501, 1502, 1512, 1599)] == [1, 1, 5, 3, 5, 3, 5]
    added = {token["id"]: token for token in json.loads(found["phiquant.tokenizer.added_tokens"])}
    assert (added[1512]["special"], added[1512]["rstrip"], added[1501]["special"]) == (False, True, True)
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1501, 1507)
    phi2 = keys(write(tmp_path, byte_level("phi-2")))
    assert phi2["tokenizer.ggml.tokens"][1501] == " " * 31
    assert phi2["tokenizer.ggml.token_type"][1501] == 4


def test_the_name_of_the_model_does_not_become_phi_3(
    tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]
) -> None:
    """llama.cpp's rule for that name strips whitespace, but knows nothing of what Phi-4's tokens strip before them."""
    assert not strips_whitespace(TokenizerFiles.read(write(tmp_path, byte_level("phi-4")), {}))


@pytest.mark.parametrize("kind", ["phi-2", "phi-4"])
def test_vocab_json_and_merges_txt(tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], kind: str) -> None:
    """Two vocabularies with the published end of text at its id: what cuts words follows from that."""
    state = byte_level(kind)
    end, name = (50256, "phi-2") if kind == "phi-2" else (100257, "dbrx")
    vocab = {text: i for text, i in state["model"]["vocab"].items() if text != "<|endoftext|>"} | {"<|endoftext|>": end}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(" ".join(merge) for merge in state["model"]["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    if kind == "phi-2":
        runs = [*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1))]
        (tmp_path / "added_tokens.json").write_text(json.dumps({run: 50257 + i for i, run in enumerate(runs)}))
    found = keys(write(tmp_path, tokenizer_class="CodeGenTokenizer", eos_token="<|endoftext|>"), end + 100)
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.eos_token_id"] == end
    assert found["tokenizer.ggml.token_type"][end] == 3
    ours = Tokenizer.from_metadata(found)
    state["added_tokens"] = []
    plain = tokenizers.Tokenizer.from_str(json.dumps(state))
    text = "A text of don't 1234 and École"
    assert ours.encode(text + "<|endoftext|>") == [*plain.encode(text).ids, end]
    if kind == "phi-2":
        assert ours.encode("x" + " " * 35) == [*plain.encode("x").ids, 50257, 50284]


def test_vocab_json_of_an_unknown_vocabulary(tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]) -> None:
    state = byte_level("phi-4")
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    with pytest.raises(CheckpointError, match=r"has vocab\.json but no merges\.txt"):
        keys(write(tmp_path))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(merge) for merge in state["model"]["merges"]))
    with pytest.raises(UnsupportedError, match=r"add tokenizer\.json"):
        keys(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(CheckpointError, match="a merge has two parts"):
        keys(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    with pytest.raises(CheckpointError, match=r"vocab\.json gives token 'a' the id 'b', which is no id"):
        keys(tmp_path)


class TestRanks:
    """Phi-3-small has a file of tiktoken, and names its special tokens in code."""

    def ranks(self, state: dict[str, Any]) -> list[bytes]:
        """Tokens by rank: those of a trained vocabulary, whose ids are in the order of its merges."""
        by_id = sorted(state["model"]["vocab"].items(), key=lambda item: item[1])
        found = [read(text) for text, _ in by_id[:1500]]
        assert None not in found
        return [token for token in found if token is not None]

    def write(self, directory: Path, tokens: list[bytes]) -> Path:
        lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
        (directory / "cl100k_base.tiktoken").write_text("\n".join(lines) + "\n")
        return write(
            directory, tokenizer_class="Phi3SmallTokenizer", bos_token="<|endoftext|>", eos_token="<|endoftext|>"
        )

    def test_merges_follow_from_ranks(
        self, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], hard_texts: list[str]
    ) -> None:
        state = byte_level("phi-3-small")
        found = keys(self.write(tmp_path, self.ranks(state)), 100352)
        assert found["tokenizer.ggml.pre"] == "dbrx"
        assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in state["model"]["merges"]]
        tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
        named = {100257: "<|endoftext|>", 100261: "<|system|>", 100262: "<|user|>", 100263: "<|assistant|>"}
        named |= {100266: "<|end|>", 100256: "<|dummy_id_2|>", 100276: "<|endofprompt|>", 100351: "<|dummy_id_86|>"}
        assert {i: tokens[i] for i in named} == named
        assert set(types[100256:].tolist()) == {3}
        assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (100257, 100257)
        ours = Tokenizer.from_metadata(found)
        assert {100257, 100266} == ours.eog_ids
        state["added_tokens"] = []
        plain = tokenizers.Tokenizer.from_str(json.dumps(state))
        for text in hard_texts:
            assert ours.encode(text) == plain.encode(text).ids
        assert ours.encode("<|user|>\nHi <|end|>") == [
            *(100262, *plain.encode("\nHi ").ids, 100266),
        ]

    def test_a_token_that_no_merges_lead_to(self, tmp_path: Path) -> None:
        singles = [bytes([byte]) for byte in range(256)]
        directory = self.write(tmp_path, [*singles, b"bc", b"abcd", b"ab"])
        found = keys(directory, 100352)
        assert found["tokenizer.ggml.merges"] == ["b c", "a b"]  # "abcd" is a, bc, d by the better ones
        assert found["phiquant.tokenizer.ignore_merges"] is True
        ours = Tokenizer.from_metadata(found)
        assert ours.encode("abcd") == [257]
        assert ours.encode("abcde") == [ord("a"), 256, ord("d"), ord("e")]

    @pytest.mark.parametrize("text", ["YQ== x\n", "YQ==\n", "?? 0\n", "YQ== 1\n", "YQ== 0\nYg== 0\n"])
    def test_damaged_ranks(self, tmp_path: Path, text: str) -> None:
        directory = self.write(tmp_path, [])
        (directory / "cl100k_base.tiktoken").write_text(text)
        with pytest.raises(CheckpointError, match="download it again"):
            keys(directory, 100352)

    def test_ranks_without_all_bytes(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="no token for 255 of the 256 bytes, the first is 0x21"):
            keys(self.write(tmp_path, [b" "]), 100352)


def change(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Top-level keys replaced; those that start with model_ within the model."""
    for key, value in changes.items():
        target, name = (state["model"], key[6:]) if key.startswith("model_") else (state, key)
        target[name] = value
    return state


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL]}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, UnsupportedError, "normalizes text"),
        (
            {"pre_tokenizer": split(r"\w+|\W+")},
            UnsupportedError,
            r"a rule that this version does not know.*GPT-2, cl100k",
        ),
        ({"pre_tokenizer": BYTE_LEVEL}, UnsupportedError, "does not know"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, UnsupportedError, "a space before every text"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits"}, {**BYTE_LEVEL, "use_regex": True}],
                }
            },
            UnsupportedError,
            "a step of type Digits",
        ),
        ({"model_continuing_subword_prefix": "##"}, UnsupportedError, "continuing_subword_prefix"),
        ({"model_type": "Unigram"}, UnsupportedError, "no BPE model"),
        ({"model_vocab": [1]}, UnsupportedError, "no BPE model"),
        ({"model_vocab": {"a": True}}, CheckpointError, "no id"),
        ({"model_vocab": {"a": 0}}, UnsupportedError, "255 of the 256 bytes"),
        ({"model_merges": [["a", "b", "c"]]}, CheckpointError, "two parts"),
        ({"model_merges": ["a b c"]}, CheckpointError, "two parts"),
        ({"model_merges": [["qqq", "zzz"]]}, CheckpointError, "no token for what the merge 'qqq zzz' makes"),
    ],
)
def test_what_no_phi_has_is_refused(
    tmp_path: Path,
    byte_level: Callable[[str], dict[str, Any]],
    changes: dict[str, Any],
    error: type[PhiquantError],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        keys(write(tmp_path, change(byte_level("phi-4"), **changes)))


def test_a_space_within_a_merge_is_spelled(tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]) -> None:
    state = byte_level("phi-4")
    assert "Ġthe" in state["model"]["vocab"]
    state["model"]["merges"].append([" t", "he"])
    assert keys(write(tmp_path, state))["tokenizer.ggml.merges"][-1] == "Ġt he"


def test_ignore_merges_is_kept(tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]) -> None:
    state = change(byte_level("phi-4"), model_ignore_merges=True)
    assert keys(write(tmp_path, state))["phiquant.tokenizer.ignore_merges"] is True


class TestBadSizes:
    def test_a_vocabulary_larger_than_the_embedding(
        self, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]
    ) -> None:
        directory = write(tmp_path, byte_level("phi-4"))
        with pytest.raises(CheckpointError, match="vocab_size 1000; take both from the same repository"):
            keys(directory, 1000)
        with pytest.raises(CheckpointError, match=r"1502, but config\.json has vocab_size 1502"):  # an added token
            keys(directory, 1502)

    def test_a_smaller_one_is_filled_with_what_is_never_sampled(
        self, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]
    ) -> None:
        ours = Tokenizer.from_metadata(keys(write(tmp_path, byte_level("phi-4")), 1700))
        assert ours.unused_ids.tolist() == list(range(1507, 1700))


class TestConflicts:
    def test_tokenizer_model_beside_a_byte_level_vocabulary(
        self, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], tiny: Path
    ) -> None:
        directory = write(tmp_path, byte_level("phi-4"), tokenizer_class="PreTrainedTokenizerFast")
        assert keys(directory)["tokenizer.ggml.model"] == "gpt2"
        (directory / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
        with pytest.raises(CheckpointError, match=r"tokenizer\.json, which is byte-level, but tokenizer\.model is not"):
            keys(directory)
        (directory / "tokenizer.json").unlink()
        assert keys(directory, 32064)["tokenizer.ggml.model"] == "llama"
        write(directory)
        with pytest.raises(CheckpointError, match=r"GPT2Tokenizer, which is byte-level, but tokenizer\.model is not"):
            keys(directory, 32064)

    def test_a_class_that_tokenizer_json_is_not(self, tmp_path: Path, tiny: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
        with pytest.raises(CheckpointError, match=r"GPT2Tokenizer, which is byte-level, but tokenizer\.json is not"):
            keys(write(tmp_path), 32064)

    def test_pieces_that_disagree(self, tmp_path: Path, tiny: Path) -> None:
        state = json.loads((tiny / "tokenizer.json").read_text())
        (tmp_path / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
        vocab = state["model"]["vocab"]
        vocab["▁changed"] = vocab.pop("▁Hello")
        write(tmp_path, state, tokenizer_class="LlamaTokenizer")
        with pytest.raises(CheckpointError, match=r"names token 15043 '▁Hello' and tokenizer\.json '▁changed'"):
            keys(tmp_path, 32064)

    @pytest.mark.parametrize(
        ("decoder", "words"),
        [
            (
                {"1503": {"content": "<|other|>"}},
                r"tokenizer_config\.json names token 1503 '<\|other\|>', tokenizer\.json",
            ),
            ({"1599": {"content": "<|im_start|>"}}, r"gives token '<\|im_start\|>' the id 1599, tokenizer\.json 1503"),
            ({"3": {"content": "<|z|>"}}, r"gives token '<\|z\|>' the id 3, which the vocabulary gives"),
        ],
    )
    def test_added_tokens_that_disagree(
        self, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], decoder: dict[str, Any], words: str
    ) -> None:
        directory = write(tmp_path, byte_level("phi-4"), added_tokens_decoder=decoder)
        with pytest.raises(CheckpointError, match=words):
            keys(directory)

    @pytest.mark.parametrize(
        ("listed", "words"),
        [
            ({"<|other|>": 1503}, r"added_tokens\.json names token 1503 '<\|other\|>', tokenizer\.json '<\|im_start"),
            (
                {"<|im_start|>": 1599},
                r"added_tokens\.json gives token '<\|im_start\|>' the id 1599, tokenizer\.json 1503",
            ),
            ({"<|z|>": 3}, r"added_tokens\.json gives token '<\|z\|>' the id 3, which the vocabulary gives"),
        ],
    )
    def test_added_tokens_json_that_disagrees(
        self, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], listed: dict[str, int], words: str
    ) -> None:
        directory = write(tmp_path, byte_level("phi-4"))
        (directory / "added_tokens.json").write_text(json.dumps(listed))
        with pytest.raises(CheckpointError, match=words):
            keys(directory)

    def test_attributes_are_tokenizer_jsons(self, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]) -> None:
        decoder = {"1503": {"content": "<|im_start|>", "lstrip": False, "rstrip": False, "special": True}}
        found = keys(write(tmp_path, byte_level("phi-4"), added_tokens_decoder=decoder))
        added = {token["id"]: token for token in json.loads(found["phiquant.tokenizer.added_tokens"])}
        assert added[1503]["lstrip"]

    def test_a_word_may_be_an_added_token_too(
        self, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]
    ) -> None:
        state = byte_level("phi-4")
        bang = state["model"]["vocab"]["!"]
        found = keys(write(tmp_path, state, added_tokens_decoder={str(bang): {"content": "!", "special": True}}))
        assert found["tokenizer.ggml.token_type"][bang] == 3
        ours = Tokenizer.from_metadata(found)
        assert ours.encode("a!", special=False)[-1] == bang


def test_old_checkpoints_name_their_end_in_config_json_alone(
    tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]
) -> None:
    state = byte_level("phi-2")
    state["added_tokens"] = []
    found = keys(write(tmp_path, state), eos_token_id=1500, bos_token_id=1500)
    assert found["tokenizer.ggml.token_type"][1500] == 3
    assert [token["id"] for token in json.loads(found["phiquant.tokenizer.added_tokens"])] == [1500]
    the = state["model"]["vocab"]["Ġthe"]
    word = keys(tmp_path, eos_token_id=the)  # what a merge makes stays a word
    assert word["tokenizer.ggml.eos_token_id"] == the
    assert word["tokenizer.ggml.token_type"][the] == 1


def test_a_byte_level_post_processor_adds_nothing(tmp_path: Path, byte_level: Callable[[str], dict[str, Any]]) -> None:
    state = byte_level("phi-4")
    assert keys(write(tmp_path, state, add_bos_token=True))["tokenizer.ggml.add_bos_token"] is False
    state["post_processor"] = None
    assert keys(write(tmp_path, state, add_bos_token=True))["tokenizer.ggml.add_bos_token"] is True
    assert np.array_equal(keys(write(tmp_path, state))["tokenizer.ggml.tokens"][:1], ["!"])
    assert CHARACTERS[0x21] == "!"


@pytest.mark.parametrize("steps", [7, {"type": "Sequence"}, {"type": "Sequence", "processors": [7, {"single": 7}]}])
def test_a_post_processor_that_is_none_adds_nothing(
    tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], steps: Any
) -> None:
    found = keys(write(tmp_path, {**byte_level("phi-4"), "post_processor": steps}))
    assert "tokenizer.ggml.add_bos_token" not in found
