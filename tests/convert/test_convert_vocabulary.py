"""tokenizer.*: pieces, scores, types, special ids, chat templates."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.convert.vocabulary import TokenizerFiles, tokenizer_keys
from phiquant.errors import CheckpointError, PhiquantError, UnsupportedError

CONFIG = {"vocab_size": 32064, "eos_token_id": 32000, "bos_token_id": 1, "pad_token_id": 32000}


@pytest.fixture
def files(tmp_path: Path, tiny: Path) -> Path:
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        shutil.copyfile(tiny / name, tmp_path / name)
    return tmp_path


def keys(directory: Path, vocab_size: int = 32064, **config: Any) -> dict[str, Any]:
    entries = tokenizer_keys(TokenizerFiles.read(directory, {**CONFIG, **config}), vocab_size)
    assert len({entry.key for entry in entries}) == len(entries)
    return {entry.key: entry.value for entry in entries}


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_the_vocabulary_of_phi_3(files: Path) -> None:
    found = keys(files)
    tokens, scores, types = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert len(tokens) == len(scores) == len(types) == 32064
    assert dict(zip(*np.unique(types, return_counts=True), strict=True)) == {1: 31741, 3: 13, 4: 1, 5: 53, 6: 256}
    assert tokens[3:259] == [f"<0x{i:02X}>" for i in range(256)]
    assert tokens[32007] == "<|end|>"
    assert tokens[32063] == "[PAD32063]"
    assert (scores[0], scores[259], scores[260], scores[32007], scores[32063]) == (
        -1000,
        np.float32(-1e9),
        -1,
        -1000,
        -10000,
    )
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.pre"] == "default"
    ids = {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")}
    assert ids == {"bos": 1, "eos": 32000, "unknown": 0, "padding": 32000}
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is False
    added = {token["id"]: token for token in json.loads(found["phiquant.tokenizer.added_tokens"])}
    assert added[32007]["rstrip"]
    assert not added[32000]["rstrip"]
    assert len(added) == 14


def test_scores_from_tokenizer_json_alone_give_the_same_ids(files: Path, tiny: Path, tmp_path: Path) -> None:
    import tokenizers

    from phiquant.gguf import GGUFFile, GGUFWriter
    from phiquant.text import Tokenizer

    (files / "tokenizer.model").unlink()
    (files / "added_tokens.json").unlink()
    entries = tokenizer_keys(TokenizerFiles.read(files, CONFIG), 32064)
    with GGUFWriter(tmp_path / "vocabulary.gguf") as writer:
        for entry in entries:
            writer.add(entry.key, entry.value, entry.type, entry.item_type)
        writer.begin()
        writer.commit()
    theirs = tokenizers.Tokenizer.from_file(str(tiny / "tokenizer.json"))
    rng = np.random.default_rng(5)
    texts = [paragraph for paragraph in (tiny / "README.md").read_text().split("\n\n") if paragraph]
    texts += [
        "",
        " ",
        "   leading",
        "trailing   ",
        "a\n\nb\tc",
        "über ½ 日本語 🙂",
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
    ]
    texts += ["".join(chr(int(c)) for c in rng.integers(32, 0x2FFF, 40)) for _ in range(100)]
    with GGUFFile.open(tmp_path / "vocabulary.gguf") as gguf:
        ours = Tokenizer.from_gguf(gguf)
        for text in texts:
            assert ours.encode(text, add_bos=False) == theirs.encode(text, add_special_tokens=False).ids, text


def test_merges_without_scores_are_refused(files: Path) -> None:
    (files / "tokenizer.model").unlink()
    tokenizer = json.loads((files / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    merges.append(merges[0])
    (files / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedError, match=r"add the checkpoint's tokenizer\.model"):
        keys(files)


@pytest.mark.parametrize(
    "model",
    [
        None,
        {},
        {"type": "Unigram"},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": False},
        {"type": "BPE", "vocab": {"a": "b"}, "merges": [], "byte_fallback": True},
        {"type": "BPE", "vocab": {"a": 99999}, "merges": [], "byte_fallback": True},
        {"type": "BPE", "vocab": {}, "merges": ["a b c"], "byte_fallback": True},
        {"type": "BPE", "vocab": {}, "merges": [7], "byte_fallback": True},
    ],
)
def test_other_models_in_tokenizer_json(files: Path, model: Any) -> None:
    (files / "tokenizer.model").unlink()
    (files / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(PhiquantError):
        keys(files)


def test_what_is_no_tokenizer(files: Path) -> None:
    (files / "tokenizer.model").write_bytes(b"junk" * 100)
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        keys(files)
    (files / "tokenizer.model").unlink()
    (files / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        keys(files)
    edit(files / "tokenizer_config.json", tokenizer_class="GPT2TokenizerFast")
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor vocab\.json"):
        keys(files)


def test_a_vocabulary_larger_than_the_model(files: Path) -> None:
    with pytest.raises(CheckpointError, match="vocab_size 31999"):
        keys(files, 31999)
    with pytest.raises(CheckpointError, match="32005, but config"):
        keys(files, 32005)
    edit(files / "added_tokens.json", **{"<|far|>": 50000})  # ignored, as in llama.cpp
    assert "<|far|>" not in keys(files)["tokenizer.ggml.tokens"]


def test_tokens_of_added_tokens_json_alone(files: Path) -> None:
    edit(files / "added_tokens.json", **{"<mine>": 32050})
    found = keys(files)
    assert found["tokenizer.ggml.tokens"][32050] == "<mine>"
    assert found["tokenizer.ggml.token_type"][32050] == 4
    assert json.loads(found["phiquant.tokenizer.added_tokens"])[-1]["content"] == "<mine>"
    edit(files / "added_tokens.json", **{"<mine>": "x"})
    with pytest.raises(CheckpointError, match="no id"):
        keys(files)


def test_special_ids_without_tokenizer_json(files: Path) -> None:
    expected = keys(files)
    (files / "tokenizer.json").unlink()
    found = keys(files)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_ends_of_turn(files: Path) -> None:
    found = keys(files)
    assert found["phiquant.tokenizer.eos_token_ids"].tolist() == [32000]
    assert "tokenizer.ggml.eot_token_id" not in found
    edit(files / "generation_config.json", eos_token_id=[32001, 32007, 32000])
    found = keys(files)
    assert found["phiquant.tokenizer.eos_token_ids"].tolist() == [32001, 32007, 32000]
    assert found["tokenizer.ggml.eos_token_id"] == 32000
    assert found["tokenizer.ggml.eot_token_id"] == 32007
    for bad in ("x", [32064], -1, [True], 1.5):
        edit(files / "generation_config.json", eos_token_id=bad)
        with pytest.raises(CheckpointError, match="eos_token_id"):
            keys(files)


def test_a_post_processor_overrules_add_bos(files: Path) -> None:
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    edit(files / "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": single})
    found = keys(files)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False


class TestTemplates:
    def test_in_tokenizer_config(self, files: Path) -> None:
        (files / "chat_template.jinja").write_text("other")
        assert "<|user|>" in keys(files)["tokenizer.chat_template"]

    def test_in_a_jinja_file_with_more_beside(self, files: Path) -> None:
        edit(files / "tokenizer_config.json", chat_template=None)
        assert "tokenizer.chat_template" not in keys(files)
        (files / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
        assert keys(files)["tokenizer.chat_template"] == "from json"
        (files / "chat_template.jinja").write_text("from jinja é")
        assert keys(files)["tokenizer.chat_template"] == "from jinja é"
        (files / "additional_chat_templates").mkdir()
        (files / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
        found = keys(files)
        assert found["tokenizer.chat_template.tool_use"] == "tools"
        assert found["tokenizer.chat_templates"] == ["tool_use"]
        assert found["tokenizer.chat_template"] == "from jinja é"

    def test_several_with_names(self, files: Path) -> None:
        named = [
            {"name": "default", "template": "d"},
            {"name": "tool-use", "template": "t"},
            {"name": "rag", "template": "r"},
        ]
        edit(files / "tokenizer_config.json", chat_template=named)
        found = keys(files)
        assert found["tokenizer.chat_template"] == "d"
        assert found["tokenizer.chat_template.tool_use"] == "t"
        assert found["tokenizer.chat_templates"] == ["tool_use", "rag"]

    @pytest.mark.parametrize("template", [7, [7], [{"name": "x"}], {"x": 1}])
    def test_of_a_wrong_kind(self, files: Path, template: Any) -> None:
        edit(files / "tokenizer_config.json", chat_template=template)
        with pytest.raises(CheckpointError, match="chat_template"):
            keys(files)


def test_text_that_is_no_unicode(checkpoint: Callable[..., Path]) -> None:
    from phiquant.convert.source import CheckpointSource

    directory = checkpoint()
    edit(directory / "tokenizer_config.json", chat_template="\ud800")
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template a text that is not valid Unicode"):
        CheckpointSource(directory)
    edit(directory / "tokenizer_config.json", chat_template=[{"name": "x" * 300, "template": "t"}])
    with pytest.raises(CheckpointError, match="too long for GGUF"):
        CheckpointSource(directory)


def test_a_name_that_llama_cpp_knows_as_phi_3(checkpoint: Callable[..., Path]) -> None:
    from phiquant.convert.source import CheckpointSource

    for directory, name in (("phi3-x", "phi3-x"), ("Phi-3.5-mini", "Phi-3.5-mini"), ("mine", "mine (phi-3)")):
        with CheckpointSource(checkpoint(directory)) as source:
            assert {entry.key: entry.value for entry in source.entries(0)}["general.name"] == name
