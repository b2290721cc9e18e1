"""Byte-level vocabularies and llama.cpp: its converter's keys, and the ids that it gives from our file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.convert.vocabulary import TokenizerFiles, tokenizer_keys
from phiquant.gguf import GGUFFile, GGUFWriter, ValueType
from phiquant.text import Tokenizer

pytestmark = pytest.mark.interop

KINDS = {"phi-2": "gpt-2", "phi-4": "dbrx", "phi-4-mini": "gpt-4o"}
SIZE = 1600

# Its converter tells pre-tokenizers by the ids of one text, which our small vocabularies do not give.
_CONVERT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base
import convert_hf_to_gguf
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: NAME
sys.argv = sys.argv[2:]
convert_hf_to_gguf.main()
"""


def checkpoint(directory: Path, state: dict[str, Any]) -> Path:
    """A directory with a tokenizer and a configuration, without weights."""
    by_text = {token["content"]: token["id"] for token in state["added_tokens"]}
    end = "<|im_end|>" if "<|im_end|>" in by_text else "<|endoftext|>"
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "bos_token_id": by_text["<|endoftext|>"],
        "eos_token_id": by_text[end],
    }
    special = {"bos_token": "<|endoftext|>", "eos_token": end, "unk_token": "<|endoftext|>"}
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in state["added_tokens"]}
    files = {
        "config": config,
        "tokenizer": state,
        "tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder, **special},
    }
    directory.mkdir()
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_its_converter(
    their_convert: Any, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], kind: str
) -> None:
    directory = checkpoint(tmp_path / "model", byte_level(kind))
    program = _CONVERT.replace("NAME", repr(KINDS[kind]))
    out = their_convert(directory, tmp_path / "theirs.gguf", "--vocab-only", program=program)
    config = json.loads((directory / "config.json").read_text())
    ours = {entry.key: entry for entry in tokenizer_keys(TokenizerFiles.read(directory, config), SIZE)}
    with GGUFFile.open(out) as file:
        theirs = {key: field for key, field in file.fields.items() if key.startswith("tokenizer.")}
        assert set(ours) - set(theirs) == {"phiquant.tokenizer.added_tokens", "phiquant.tokenizer.eos_token_ids"}
        assert len(theirs) == 10
        for key, field in theirs.items():
            assert (ours[key].type, ours[key].item_type) == (field.type, field.item_type), key
            assert np.array_equal(ours[key].value, field.value), key


TEXTS = [
    "Hello, world! I'm here; it's 12345 o'clock.\n\n    indented\tcode = x[1:]\n",
    "  two spaces,   three, and a line \n \n of nothing  ",
    "Das Übermaß und l'été: naïve café — “quoted” …",
    "日本語と中文。 한국어 문장. Привет, мир! Γειά σου",
    "🙂 🇫🇷 3.14 $100 a@b.c #tag http://x.y/z?q=1",
    "def f(a, b):\n\treturn {'k': [a + b, a // b]}\n",
    "<|endoftext|>x<|endoftext|>",
]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_reads_our_file_and_gives_the_same_ids(
    llama_cpp: Any, tmp_path: Path, byte_level: Callable[[str], dict[str, Any]], kind: str
) -> None:
    """On text without combining marks, and without spaces beside special tokens."""
    directory = checkpoint(tmp_path / "model", byte_level(kind))
    config = json.loads((directory / "config.json").read_text())
    path = tmp_path / "vocabulary.gguf"
    counts = {"context_length": 128, "embedding_length": 64, "feed_forward_length": 96, "block_count": 1}
    counts |= {"attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 32}
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "phi3", ValueType.STRING)
        for name, value in counts.items():
            writer.add(f"phi3.{name}", value, ValueType.UINT32)
        writer.add("phi3.attention.layer_norm_rms_epsilon", 1e-5, ValueType.FLOAT32)
        for entry in tokenizer_keys(TokenizerFiles.read(directory, config), SIZE):
            writer.add(entry.key, entry.value, entry.type, entry.item_type)
        writer.begin()
        writer.commit()
    with GGUFFile.open(path) as file:
        ours = Tokenizer.from_gguf(file)
        expected = [ours.encode(text) for text in TEXTS]
    assert llama_cpp.tokenize(path, TEXTS) == expected
    # What differs is llama.cpp's: it strips no whitespace, and combining marks do not belong to words.
    if kind != "phi-2":
        text = "a <|im_end|> b" if kind == "phi-4" else "a<|end|> b"
        assert llama_cpp.tokenize(path, [text])[0] != ours.encode(text)
    if kind == "phi-4-mini":
        assert llama_cpp.tokenize(path, ["हिन्दी में"])[0] != ours.encode("हिन्दी में")
