"""The real vocabularies of Phi-2, Phi-4 and Phi-4-mini, where their files are at hand.

PHIQUANT_VOCABULARIES names a directory with the files that tiktoken downloads: encoder.json, vocab.bpe,
cl100k_base.tiktoken, o200k_base.tiktoken. Of them tokenizer.json files with the published structure are made here, to
be run by `tokenizers` and to be converted.
"""

import ast
import base64
import hashlib
import itertools
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from phiquant.convert.vocabulary import TokenizerFiles, tokenizer_keys
from phiquant.text import Tokenizer
from phiquant.text.alphabet import spell

pytestmark = pytest.mark.interop

FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "cl100k_base.tiktoken": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base.tiktoken": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}
KINDS = {"phi-2": ("phi-2", 51200), "phi-4": ("dbrx", 100352), "phi-4-mini": ("gpt-4o", 200064)}
PROSE = Path(__file__).parents[2] / "models" / "phi3-tiny"


@pytest.fixture(scope="module")
def real() -> Path:
    place = os.environ.get("PHIQUANT_VOCABULARIES")
    if not place:
        pytest.skip("PHIQUANT_VOCABULARIES names no directory with tiktoken's files")
    for name, digest in FILES.items():
        assert hashlib.sha256((Path(place) / name).read_bytes()).hexdigest() == digest, name
    return Path(place)


def merges_of(ranks: dict[bytes, int]) -> list[list[str]]:
    """The two parts that every token is made of, by merging its bytes with the ranks below its own."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            at = found.index(min(found))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([spell(parts[0]), spell(parts[1])])
    return merges


def added_of(kind: str) -> dict[int, str]:
    if kind == "phi-2":
        runs = [*(" " * n for n in range(31, 1, -1)), *("\t" * n for n in range(9, 1, -1))]
        return {50256: "<|endoftext|>", **dict(enumerate(runs, 50257))}
    if kind == "phi-4":
        names = {100257: "<|endoftext|>", 100258: "<|fim_prefix|>", 100259: "<|fim_middle|>", 100260: "<|fim_suffix|>"}
        names |= {100264: "<|im_start|>", 100265: "<|im_end|>", 100266: "<|im_sep|>", 100276: "<|endofprompt|>"}
        others = (i for i in range(100256, 100352) if i not in names)
        return {**{i: f"<|dummy_{n}|>" for n, i in enumerate(others)}, **names}
    names = ["assistant", "end", "user", "system", "tool", "/tool", "tool_call", "/tool_call", "tool_response", "tag"]
    return {199999: "<|endoftext|>", 200018: "<|endofprompt|>", **{200019 + i: f"<|{n}|>" for i, n in enumerate(names)}}


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest, real: Path, byte_level: Callable[[str], dict[str, Any]], tmp_path_factory: Any
) -> tuple[str, Path, dict[str, Any]]:
    """Kind, a directory with tokenizer.json and tokenizer_config.json, and the former's content."""
    kind: str = request.param
    state = byte_level(kind)
    if kind == "phi-2":
        state["model"]["vocab"] = json.loads((real / "encoder.json").read_text("utf-8"))
        lines = (real / "vocab.bpe").read_text("utf-8").split("\n")[1:]
        state["model"]["merges"] = [line.split(" ") for line in lines if line]
    else:
        name = "cl100k_base" if kind == "phi-4" else "o200k_base"
        lines = (real / f"{name}.tiktoken").read_text().split("\n")
        ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
        state["model"]["vocab"] = {spell(token): rank for token, rank in ranks.items()}
        state["model"]["merges"] = merges_of(ranks)
    pattern = {text["content"]: text for text in state["added_tokens"]}
    state["added_tokens"] = []
    for index, text in added_of(kind).items():
        like = pattern.get(text, pattern["<|endoftext|>"])
        state["added_tokens"].append({**like, "id": index, "content": text})
        if not text.isspace():
            state["model"]["vocab"][text] = index
    directory: Path = tmp_path_factory.mktemp(kind)
    (directory / "tokenizer.json").write_text(json.dumps(state))
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>" if kind == "phi-4" else "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **end}))
    return kind, directory, state


def test_converted_they_give_the_ids_of_tokenizer_json(
    made: tuple[str, Path, dict[str, Any]], hard_texts: list[str], llama_cpp_source: Path
) -> None:
    kind, directory, state = made
    pre, size = KINDS[kind]
    published = tokenizers.Tokenizer.from_str(json.dumps(state))
    found = {entry.key: entry.value for entry in tokenizer_keys(TokenizerFiles.read(directory, {}), size)}
    assert found["tokenizer.ggml.pre"] == pre
    ours = Tokenizer.from_metadata(found)
    without = Tokenizer.from_metadata({key: value for key, value in found.items() if not key.startswith("phiquant.")})
    assert without.added_tokens == ours.added_tokens
    specials = [token["content"] for token in state["added_tokens"]]
    rng = random.Random(7)
    texts = [*hard_texts, *specials, *(f"a {special} b{special}" for special in specials)]
    for _ in range(5000):
        parts = rng.choices([*hard_texts, *specials[:12], "", " ", "x", "\n"], k=rng.randrange(1, 8))
        texts.append("".join(parts) + chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])))
    once = "".join(
        (PROSE / name).read_text() for name in ("calibration.txt", "evaluation.txt", "README.md", "train.py")
    )
    texts.append(once * (1_000_000 // len(once) + 1))
    for text in texts:
        expected = published.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, text[:100]
    plain = ours.encode(once, special=False)
    assert ours.decode(plain) == once

    # llama.cpp's converter names the pre-tokenizer by a hash of the ids of one text.
    source = (llama_cpp_source / "conversion" / "base.py").read_text("utf-8")
    probe = re.search(r"^        chktxt = ('.*')$", source[source.index("def get_vocab_base_pre") :], re.MULTILINE)
    assert probe is not None
    ids = ours.encode(ast.literal_eval(probe[1]))
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    named = re.search(rf'chkhsh == "{digest}":.*?res = "(.*?)"', source, re.DOTALL)
    assert named is not None
    assert named[1] == pre
