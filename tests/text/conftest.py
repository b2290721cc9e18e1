"""The Phi-3 vocabulary of the bundled checkpoint as GGUF metadata, and its oracles."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from phiquant.text import Tokenizer, added_tokens_from_hf, added_tokens_to_json

MODEL = Path(__file__).parents[2] / "models" / "phi3-tiny"
VOCAB_SIZE = 32064


@pytest.fixture(scope="session")
def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))


@pytest.fixture(scope="session")
def tokenizer_config() -> dict[str, Any]:
    return json.loads((MODEL / "tokenizer_config.json").read_text())


@pytest.fixture(scope="session")
def metadata(
    sentencepiece_model: sentencepiece.SentencePieceProcessor, tokenizer_config: dict[str, Any]
) -> dict[str, Any]:
    """What a converter writes, built by the rules of the format and not by our own converter."""
    tokens = [f"[PAD{i}]" for i in range(VOCAB_SIZE)]
    scores = np.full(VOCAB_SIZE, -10000, dtype=np.float32)
    types = np.full(VOCAB_SIZE, 5, dtype=np.int32)
    model = sentencepiece_model
    for i in range(model.get_piece_size()):
        tokens[i], scores[i] = model.id_to_piece(i), model.get_score(i)
        types[i] = 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
    for key, entry in tokenizer_config["added_tokens_decoder"].items():
        tokens[int(key)], scores[int(key)], types[int(key)] = entry["content"], -1000, 3 if entry["special"] else 4
    return {
        "general.name": "Somebody's Model",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 32000,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 32000,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer_config["chat_template"],
        "phiquant.tokenizer.added_tokens": added_tokens_to_json(added_tokens_from_hf(tokenizer_config, None)),
    }


@pytest.fixture(scope="session")
def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata)


@pytest.fixture(scope="session")
def published() -> tokenizers.Tokenizer:
    """The checkpoint's own tokenizer.json, run by `tokenizers`: the truth about ids."""
    return tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="session")
def published_ids(published: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: published.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def plain(published: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The published tokenizer with its added tokens removed: all text is ordinary text."""
    state = json.loads(published.to_str())
    state["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def byte_level_metadata(state: dict[str, Any], size: int | None = None, **more: Any) -> dict[str, Any]:
    """What a converter writes for a byte-level tokenizer.json, built by the rules of the format."""
    vocab, listed = state["model"]["vocab"], state["added_tokens"]
    count = 1 + max([*vocab.values(), *(token["id"] for token in listed)])
    tokens = [f"[PAD{i}]" for i in range(size or count)]
    types = np.full(len(tokens), 5, np.int32)
    for text, i in vocab.items():
        tokens[i], types[i] = text, 1
    for token in listed:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = 3 if token["special"] or token["content"].startswith("<|") else 4
    steps = json.dumps(state["pre_tokenizer"])
    pre = "gpt-4o" if "Lu" in steps else "dbrx" if "Split" in steps else "phi-2"
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        **more,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return metadata | {"phiquant.tokenizer.added_tokens": json.dumps(listed)}


@pytest.fixture(scope="session")
def as_metadata() -> Callable[..., dict[str, Any]]:
    return byte_level_metadata
