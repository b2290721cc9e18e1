"""llama.cpp's own converter as an oracle: every key and every tensor of its file against ours."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

from phiquant.convert import convert
from phiquant.gguf import GGUFFile

pytestmark = [pytest.mark.interop, pytest.mark.cpu]

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"

EXPLAINED = {
    "general.name": "keeps its hyphens, so that llama.cpp takes the special tokens for Phi-3's",
    "tokenizer.ggml.eot_token_id": "from generation_config.json; llama.cpp's converter leaves it to be guessed",
    "tokenizer.chat_templates": "the names in the checkpoint's order; llama.cpp's are in that of a set",
    "phiquant.tokenizer.added_tokens": "our own",
    "phiquant.tokenizer.eos_token_ids": "our own",
    "phiquant.version": "our own",
    "phiquant.norm": "our own",
    "phiquant.router": "our own",
    "phiquant.router.jitter": "our own",
    "phiquant.rope.attention_factor_short": "our own",
    "phiquant.rope.attention_factor_long": "our own",
    "phiquant.checksum": "our own",
    "phiquant.checksum.tensors": "our own",
}
CARD = """---
license: mit
license_link: https://example.org/LICENSE
language:
- en
- no
pipeline_tag: text-generation
tags:
- nlp
base_model:
- microsoft/Phi-3-mini-4k-instruct
- https://huggingface.co/org/Model-v1.5-3B
datasets: org/stories-v2
---
text
"""
LONG = {"long_factor": [1.0 + i / 4 for i in range(16)], "short_factor": [1.0 + i / 64 for i in range(16)]}
MSCALES = {"short_mscale": 1.2, "long_mscale": 1.3, "original_max_position_embeddings": 256}
MOE = {
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
}
GENERATION = {"eos_token_id": [32007, 32001, 32000], "temperature": 0.7, "top_k": 40, "repetition_penalty": 1.05}

CASES: dict[str, dict[str, Any]] = {
    "phi3-tiny": {"copy": TINY},
    "Phi-3-mini-4k-instruct": {"card": CARD, "generation": GENERATION, "config": {"sliding_window": 2047}},
    "Phi-3.5-mini-instruct": {"rope": {"type": "longrope", **LONG}, "dtype": "F16", "generation": GENERATION},
    "Phi-3-mini-128k-instruct": {"rope": {"type": "su", **LONG}, "dtype": "F32"},
    "old-yarn": {"rope": {"type": "yarn", **LONG}},
    "untied-grouped": {"config": {"tie_word_embeddings": False, "num_key_value_heads": 1}, "shards": 3},
    "phi-3-partial": {
        "config": {"partial_rotary_factor": 0.5, "hidden_size": 128},
        "rope": {"type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8},
    },
    "phi3-named-templates": {
        "templates": [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}],
        "card": "---\nmodel_name: My own Phi-3\nmodel_creator: Me\n---\n",
    },
    "Phi-3.5-MoE-instruct": {
        "config": {**MOE, "sliding_window": 131072},
        "rope": {"type": "longrope", **LONG, **MSCALES},
        "generation": GENERATION,
        "card": CARD,
        "shards": 3,
    },
    "Phi-mini-MoE-instruct": {"config": {**MOE, "sliding_window": 2047}, "dtype": "F16"},
    "phi3-without-tokenizer-json": {"without": ["tokenizer.json"], "config": {"unk_token_id": 0}},
}


def write(directory: Path, case: dict[str, Any]) -> Path:
    """A checkpoint of two layers with the Phi-3 vocabulary, as the case wants it."""
    if "copy" in case:
        return Path(shutil.copytree(case["copy"], directory))
    config = {
        **json.loads((TINY / "config.json").read_text()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2 if "hidden_size" not in case.get("config", {}) else 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 256,
        "rope_scaling": case.get("rope"),
        "rope_theta": 10000.0,
        **case.get("config", {}),
    }
    del config["rope_parameters"]
    directory.mkdir()
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        if name not in case.get("without", []):
            shutil.copyfile(TINY / name, directory / name)
    (directory / "config.json").write_text(json.dumps(config))
    if "generation" in case:
        (directory / "generation_config.json").write_text(json.dumps(case["generation"]))
    if "card" in case:
        (directory / "README.md").write_text(case["card"])
    if "templates" in case:
        tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
        (directory / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": case["templates"]}))
    _write_weights(directory, config, case)
    return directory


def _write_weights(directory: Path, config: dict[str, Any], case: dict[str, Any]) -> None:
    rng = np.random.default_rng(8)
    dtype = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[case.get("dtype", "BF16")]
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.input_layernorm": (hidden,),
            f"model.layers.{i}.post_attention_layernorm": (hidden,),
        }
        if config["model_type"] == "phimoe":
            shapes |= _moe_layer(f"model.layers.{i}", hidden, ffn, kv, config["num_local_experts"])
            continue
        shapes |= {
            f"model.layers.{i}.self_attn.qkv_proj": (hidden + 2 * kv, hidden),
            f"model.layers.{i}.self_attn.o_proj": (hidden, hidden),
            f"model.layers.{i}.mlp.gate_up_proj": (2 * ffn, hidden),
            f"model.layers.{i}.mlp.down_proj": (hidden, ffn),
        }
    tensors = {f"{name}.weight": rng.normal(0, 0.05, shape).astype(dtype) for name, shape in shapes.items()}
    if config["model_type"] == "phimoe":
        biased = [name for name in shapes if "norm" in name or "self_attn" in name or name == "lm_head"]
        tensors |= {f"{name}.bias": rng.normal(0, 0.05, shapes[name][0]).astype(dtype) for name in biased}
    shards = case.get("shards", 1)
    names = [
        f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)
    ]
    where = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i::shards])
        where |= dict.fromkeys(part, name)
        safetensors.save_file(part, directory / name, {"format": "pt"})
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _moe_layer(layer: str, hidden: int, ffn: int, kv: int, experts: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.block_sparse_moe.gate": (experts, hidden)}
    for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
        shapes[f"{layer}.self_attn.{part}_proj"] = (rows, hidden)
    for expert in range(experts):
        for part, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
            shapes[f"{layer}.block_sparse_moe.experts.{expert}.{part}"] = shape
    return shapes


def compare(ours: Path, theirs: Path) -> set[str]:
    """Assert equality but for what is explained; the explained keys that do differ."""
    with GGUFFile.open(ours) as a, GGUFFile.open(theirs) as b:
        different = set(a.fields) ^ set(b.fields)
        for key in set(a.fields) & set(b.fields):
            x, y = a.fields[key], b.fields[key]
            if (x.type, x.item_type) != (y.type, y.item_type) or not np.array_equal(x.value, y.value):
                different.add(key)
        assert different <= set(EXPLAINED), {
            key: tuple(repr(f.fields[key].value)[:200] if key in f.fields else None for f in (a, b))
            for key in different - set(EXPLAINED)
        }
        assert list(a.tensors) == list(b.tensors)
        for name, info in a.tensors.items():
            assert (info.shape, info.type) == (b.tensors[name].shape, b.tensors[name].type), name
            assert np.array_equal(a.data(name), b.data(name)), name
    return different


@pytest.mark.parametrize("name", CASES)
def test_every_key_and_tensor(their_convert: Any, tmp_path: Path, name: str) -> None:
    directory = write(tmp_path / name, CASES[name])
    theirs = their_convert(directory, tmp_path / "theirs.gguf", "--outtype", "auto")
    ours = convert(directory, tmp_path / "ours.gguf", "auto").plan.path
    assert compare(ours, theirs) >= {"phiquant.version", "phiquant.tokenizer.added_tokens"}


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_every_outtype(their_convert: Any, tmp_path: Path, outtype: str) -> None:
    directory = write(tmp_path / "Phi-3.5-mini-instruct", CASES["Phi-3.5-mini-instruct"])
    theirs = their_convert(directory, tmp_path / "theirs.gguf", "--outtype", outtype)
    compare(convert(directory, tmp_path / "ours.gguf", outtype).plan.path, theirs)


def test_llama_cpp_computes_the_same_from_both(their_convert: Any, llama_cpp: Any, tmp_path: Path) -> None:
    directory = write(tmp_path / "phi3-tiny", CASES["phi3-tiny"])
    theirs = their_convert(directory, tmp_path / "theirs.gguf", "--outtype", "f16")
    ours = convert(directory, tmp_path / "ours.gguf", "f16").plan.path
    ids = llama_cpp.tokenize(ours, [(TINY / "page.txt").read_text(encoding="utf-8")])[0][:256]
    np.testing.assert_array_equal(llama_cpp.logits(ours, ids), llama_cpp.logits(theirs, ids))


def test_llama_cpp_reads_chats_from_our_file_as_the_checkpoint_does(llama_cpp: Any, tmp_path: Path) -> None:
    """Its Phi-3 rule strips whitespace after special tokens, if the name of the file's model says phi3 or phi-3."""
    import tokenizers

    ours = convert(TINY, tmp_path / "ours.gguf", "q8_0").plan.path
    published = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    texts = [
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "<|system|>\nBe brief.<|end|>\n<|user|>\n  Two spaces, and a tab\t.<|end|>\n<|assistant|>\n",
        "Hi <|end|> there",
        " Hello",
        "½ of 4 months; \U0001f600 naïve 中文",
    ]
    expected = [published.encode(text, add_special_tokens=False).ids for text in texts]
    assert llama_cpp.tokenize(ours, texts) == expected
    from phiquant.text import Tokenizer

    with GGUFFile.open(ours) as file:
        tokenizer = Tokenizer.from_gguf(file)
        assert [tokenizer.encode(text, add_bos=False) for text in texts] == expected
