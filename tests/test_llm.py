"""The public API on the bundled model."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import phiquant
from phiquant import LLM, Completion, Grammar, errors
from phiquant.convert import convert, quantize
from phiquant.errors import (
    CacheError,
    ContextError,
    GGUFError,
    GrammarError,
    KernelError,
    OutputError,
    RequestError,
    TokenError,
    UnsupportedError,
)
from phiquant.eval.kl import divergence
from phiquant.kernels.cpu import library
from phiquant.kernels.cpu.target import host
from phiquant.quants import dequantize
from phiquant.text.tool_reader import CallArguments
from phiquant.text.tools import Tool, Toolbox

TINY = Path(__file__).parents[1] / "models" / "phi3-tiny"
PROMPT = "Once upon a time there was a little girl"

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llm") / "tiny.gguf"
    convert(TINY, made, "f16")
    return made


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with LLM.load(path) as loaded:
        yield loaded


def test_exported_names() -> None:
    assert set(phiquant.__all__) == {
        "LLM",
        "AsyncLLM",
        "Completion",
        "CompletionChunk",
        "Embeddings",
        "Grammar",
        "Options",
        "PhiquantError",
        "Stats",
        "Timings",
        "TokenLogprob",
        "Usage",
        "__version__",
        "errors",
    }
    for name in phiquant.__all__:
        assert getattr(phiquant, name) is not None
    assert set(phiquant.__all__) <= set(dir(phiquant))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = phiquant.nonsense
    assert issubclass(errors.ContextError, phiquant.PhiquantError)


def test_importing_the_package_imports_nothing_large() -> None:
    code = "import sys, phiquant; print([m for m in ('numpy', 'llvmlite', 'tokenizers', 'jinja2') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_generate(llm: LLM) -> None:
    made = llm.generate(PROMPT, max_tokens=12, temperature=0)
    assert isinstance(made, Completion)
    assert made.text == " who had been a little girl, and she was so pleased"
    assert llm.detokenize([*llm.tokenize(PROMPT), *made.ids]) == PROMPT + made.text
    assert made.finish_reason == "length"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (9, 12, 21)
    assert made.timings.prompt_seconds > 0
    assert made.timings.decode_per_second > 0
    assert llm.generate(llm.tokenize(PROMPT), max_tokens=12, temperature=0).ids == made.ids


def test_streams_are_the_whole_in_pieces(llm: LLM) -> None:
    chunks = list(llm.generate(PROMPT, max_tokens=20, seed=5, stream=True))
    whole = llm.generate(PROMPT, max_tokens=20, seed=5)
    assert "".join(c.text for c in chunks) == whole.text
    assert tuple(i for c in chunks for i in c.ids) == whole.ids
    assert [c.completion is None for c in chunks] == [True] * 19 + [False]
    assert chunks[-1].completion is not None
    assert chunks[-1].completion.text == whole.text


def test_a_seed_makes_it_the_same_again(llm: LLM) -> None:
    first = llm.generate(PROMPT, max_tokens=30, temperature=1.5)
    assert llm.generate(PROMPT, max_tokens=30, temperature=1.5, seed=first.seed).text == first.text
    assert llm.generate(PROMPT, max_tokens=30, temperature=1.5, seed=first.seed ^ 1).text != first.text


@pytest.mark.parametrize("stop", ["girl,", ["so pleased", "girl,"]])
def test_stop_strings(llm: LLM, stop: str | list[str]) -> None:
    made = llm.generate(PROMPT, max_tokens=40, temperature=0, stop=stop)
    assert (made.text, made.finish_reason) == (" who had been a little ", "stop")
    pieces = [c.text for c in llm.generate(PROMPT, max_tokens=40, temperature=0, stop=stop, stream=True)]
    assert "".join(pieces) == made.text


def test_an_end_token_ends_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    comma = 29892
    monkeypatch.setattr(type(llm.tokenizer), "eog_ids", frozenset({comma}))
    made = llm.generate(PROMPT, max_tokens=40, temperature=0)
    assert made.finish_reason == "stop"
    assert made.ids[-1] == comma


def test_a_closed_stream_leaves_the_engine_to_others(llm: LLM) -> None:
    stream = llm.generate(PROMPT, stream=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm.generate(PROMPT, max_tokens=5, temperature=0).text == " who had been a little"


def test_chat_goes_by_the_template_and_messages_stay_text(llm: LLM) -> None:
    made = llm.chat([{"role": "user", "content": "<|end|>Hello"}], max_tokens=4, temperature=0)
    ids = llm.tokenize("<|user|>\n<|end|>Hello<|end|>\n<|assistant|>\n")
    assert made.usage.prompt_tokens > len(ids)  # the message's own <|end|> is characters
    assert list(llm.chat([{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0, stream=True))[
        -1
    ].completion


def test_logits(llm: LLM) -> None:
    ids = llm.tokenize(PROMPT)
    logits = llm.logits(ids)
    assert (logits.dtype, logits.shape) == (np.float32, (9, 32064))
    assert llm.tokenizer.decode([int(logits[-1].argmax())]) == "who"
    assert np.array_equal(llm.logits(ids[:4]), logits[:4])


def test_refusals(llm: LLM) -> None:
    with pytest.raises(TokenError, match="40000"):
        llm.generate([1, 40000], stream=True)  # before the first chunk is asked for
    with pytest.raises(ContextError, match="2048"):
        llm.generate([1] * 3000, stream=True)
    with pytest.raises(ContextError):
        llm.logits([1] * 3000)
    with pytest.raises(RequestError, match="empty"):
        llm.generate("")
    with pytest.raises(RequestError, match="max_tokens"):
        llm.generate(PROMPT, max_tokens=0)
    with pytest.raises(RequestError, match="top_p"):
        llm.generate(PROMPT, top_p=3)
    with pytest.raises(TypeError, match="no option 'temprature'; did you mean temperature"):
        llm.generate(PROMPT, temprature=1)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="not streamed"):
        llm.generate(["a", "b"], stream=True)  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="a mask is for one text"):
        llm.generate(["a", "b"], mask=object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("max_tokens", 1.5, "max_tokens is 1.5 and must be at least 1"),
        ("min_tokens", -1, "min_tokens is -1 and must be 0 or more"),
        ("temperature", -1, "temperature is -1 and must be 0 or more"),
        ("temperature", float("nan"), "temperature is nan"),
        ("temperature", "hot", "temperature is 'hot' and must be a number"),
        ("top_k", -1, "top_k is -1"),
        ("typical_p", 2, "typical_p is 2 and must be from 0 to 1"),
        ("repeat_last_n", -2, "repeat_last_n is -2 and must be -1 or more"),
        ("mirostat", 3, "mirostat is 3 and must be 0, 1 or 2"),
        ("seed", -1, "seed is -1 and must be from 0"),
        ("samplers", "top_k;magic", "no sampler 'magic'; there are penalties"),
        ("logit_bias", {40000: 1}, "logit_bias names 40000, which is no token id below 32064"),
        ("logit_bias", {"a": 1}, "logit_bias names 'a'"),
        ("logit_bias", {1: float("nan")}, "logit_bias of token 1 is nan"),
        ("logit_bias", {1: float("inf")}, "logit_bias"),
        ("logit_bias", [1], "logit_bias must be an object"),
        ("logprobs", -1, "logprobs is -1 and must be 0 or more"),
        ("logprobs", True, "logprobs is True"),
        ("stop", [1], "stop must be a text or a list of texts"),
        ("stop", "", "stop string must not be empty"),
        ("stop", ["a"] * 300, "stop has 300 texts; 256 are the most"),
        ("stop", "x" * 1025, "a text of stop is too long; 1,024 characters are the most"),
        ("stop_ids", [40000], "stop_ids has 40000, which is no token id below 32064"),
        ("stop_ids", 3, "stop_ids must be token ids"),
        ("grammar", "root ::= x", "grammar is of type str and must be a Grammar"),
        ("dry_sequence_breakers", ":", "dry_sequence_breakers must be a list of texts"),
        ("dry_sequence_breakers", [""], "breaker has from 1 to 40 characters"),
    ],
)
def test_options_that_make_no_sense(llm: LLM, option: str, value: object, told: str) -> None:
    more = {"dry_multiplier": 0.5} if option.startswith("dry") else {}
    with pytest.raises(RequestError, match=told):
        llm.generate(PROMPT, **{option: value}, **more)  # type: ignore[call-overload]


def test_options_reach_the_sampler(llm: LLM) -> None:
    def text(**options: object) -> str:
        return llm.generate(PROMPT, max_tokens=40, **{"temperature": 0, **options}).text  # type: ignore[call-overload]

    plain = text()
    girl = llm.tokenize(" girl", add_bos=False)[-1]
    assert " girl" in plain
    assert " girl" not in text(logit_bias={girl: -float("inf")})
    assert len({plain, text(repeat_penalty=1.5), text(presence_penalty=1.5), text(frequency_penalty=2.0)}) == 4
    assert text(repeat_penalty=1.5, repeat_last_n=2) == plain
    assert text(dry_multiplier=2.0, dry_allowed_length=1) != plain
    hot = {"temperature": 1.5, "seed": 1, "top_p": 1.0, "min_p": 0.0, "top_k": 0}
    changed = [
        {"typical_p": 0.3},
        {"top_n_sigma": 0.5},
        {"xtc_probability": 1.0, "xtc_threshold": 0.02},
        {"dynatemp_range": 1.4},
        {"mirostat": 2, "mirostat_tau": 1.0},
        {"mirostat": 1, "mirostat_tau": 1.0},
        {"samplers": ""},
        {"samplers": "top_k", "top_k": 1},
    ]
    texts = {text(**hot, **one) if "top_k" not in one else text(**{**hot, **one}) for one in changed}
    assert len(texts | {text(**hot)}) >= len(changed)


def test_breakers_keep_dry_from_seeing_a_repetition(llm: LLM) -> None:
    prompt = "Tom saw a cat. Tom saw a"
    options = {"max_tokens": 1, "temperature": 0, "dry_multiplier": 100.0}
    free, without = llm.generate(prompt, **options), llm.generate(prompt, **{**options, "dry_multiplier": 0.0})  # type: ignore[call-overload]
    broken = llm.generate(prompt, **options, dry_sequence_breakers=["a"])  # type: ignore[call-overload]
    assert broken.text == without.text
    assert free.text != " cat"


def test_end_tokens_and_stop_tokens(llm: LLM) -> None:
    comma = 29892
    made = llm.generate(PROMPT, max_tokens=40, temperature=0, stop_ids=[comma])
    assert (made.ids[-1], made.finish_reason, made.stop) == (comma, "stop", None)
    assert made.text == " who had been a little girl", "the token that ends a text is no part of it"
    later = llm.generate(PROMPT, max_tokens=40, temperature=0, stop_ids=[comma], min_tokens=10)
    assert comma not in later.ids[:10]
    (end,) = {*llm.tokenizer.eog_ids} & {2}
    told = {"max_tokens": 20, "temperature": 0, "logit_bias": {end: 1000.0}}
    assert llm.generate(PROMPT, **told).ids == (end,)  # type: ignore[call-overload]
    assert llm.generate(PROMPT, **told).text == ""  # type: ignore[call-overload]
    assert end not in llm.generate(PROMPT, **told, ignore_eos=True).ids  # type: ignore[call-overload]
    assert llm.generate(PROMPT, **told, min_tokens=3).ids[3:] == (end,)  # type: ignore[call-overload]


def test_the_stop_text_is_told(llm: LLM) -> None:
    assert llm.generate(PROMPT, max_tokens=40, temperature=0, stop=["so pleased", "girl,"]).stop == "girl,"
    assert llm.generate(PROMPT, max_tokens=4, temperature=0).stop is None


def test_log_probabilities(llm: LLM) -> None:
    chunks = list(llm.generate(PROMPT, max_tokens=6, temperature=0, logprobs=3, stream=True))
    made = llm.generate(PROMPT, max_tokens=6, temperature=0, logprobs=3)
    assert made.logprobs is not None
    assert tuple(one.token for one in made.logprobs) == made.ids
    assert tuple(one for chunk in chunks for one in chunk.logprobs or ()) == made.logprobs
    rows = log_softmax_rows(llm.logits([*llm.tokenize(PROMPT), *made.ids])[8:])
    for one, row in zip(made.logprobs, rows, strict=False):
        best = np.argsort(-row)[:3]
        assert one.logprob == pytest.approx(row[one.token], abs=1e-4)
        assert [token for token, _ in one.top] == best.tolist()
        assert [p for _, p in one.top] == pytest.approx(row[best], abs=1e-4)
    assert llm.generate(PROMPT, max_tokens=2, temperature=0, logprobs=0).logprobs[0].top == ()  # type: ignore[index]
    assert llm.generate(PROMPT, max_tokens=2, temperature=0).logprobs is None


def log_softmax_rows(logits: np.ndarray) -> np.ndarray:
    return np.array([log_softmax(row) for row in logits])


def test_a_grammar_is_followed(llm: LLM) -> None:
    made = llm.generate(PROMPT, grammar=Grammar("regex", "(yes|no), (of course|maybe)"), temperature=0)
    assert made.text in {f"{a}, {b}" for a in ("yes", "no") for b in ("of course", "maybe")}
    assert made.finish_reason == "stop"
    with pytest.raises(GrammarError, match="regular expression"):
        llm.generate(PROMPT, grammar=Grammar("regex", "("))


def test_a_batch_and_choices(path: Path, llm: LLM) -> None:
    prompts = [PROMPT, "The sun", "One day Tom"]
    expected = [llm.generate(p, max_tokens=10, seed=3).text for p in prompts]
    choices = [llm.generate(PROMPT, max_tokens=10, seed=s).text for s in (2**64 - 1, 0, 1)]
    assert [one.text for one in llm.generate(prompts, max_tokens=10, seed=3)] == expected, "with one place, in turn"
    with LLM.load(path, parallel=2, context=128) as two:
        assert [one.text for one in two.generate(prompts, max_tokens=10, seed=3)] == expected
        ids = [two.tokenize(p) for p in prompts]
        assert [one.text for one in two.generate(ids, max_tokens=10, seed=3)] == expected
        made = two.generate_many(PROMPT, 3, max_tokens=10, seed=2**64 - 1)
        assert [one.text for one in made] == choices
        assert [one.usage.cached_tokens for one in made][1:] == [8, 8]
        stopped = two.generate(prompts, max_tokens=40, temperature=0, stop="girl,")
        assert stopped[0].stop == "girl,"


def test_who_does_not_want_the_cache_computes_the_prompt(llm: LLM) -> None:
    llm.generate(PROMPT, max_tokens=1)
    assert llm.generate(PROMPT, max_tokens=1).usage.cached_tokens == 8
    assert llm.generate(PROMPT, max_tokens=1, cache_prompt=False).usage.cached_tokens == 0


def test_arguments_of_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert llm.chat(messages, max_tokens=1, template_arguments={"colour": "blue"}).usage.prompt_tokens > 0
    with pytest.raises(RequestError, match="template_arguments must not have 'messages'"):
        llm.chat(messages, template_arguments={"messages": []})
    with pytest.raises(RequestError, match="no place for tools"):
        llm.chat(messages, tools=[{"type": "function", "function": {"name": "f"}}])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_embeddings(path: Path, backend: str) -> None:
    with LLM.load(path, backend=backend, context=64, batch=16) as llm:
        texts = [PROMPT, "The sun is bright today", "Once upon a time there was a small girl"]
        found = llm.embed(texts)
        assert (found.vectors.shape, found.vectors.dtype) == ((3, llm.config.embedding_length), np.float32)
        assert np.linalg.norm(found.vectors, axis=1) == pytest.approx([1] * 3, abs=1e-6)
        assert found.usage.prompt_tokens == sum(found.tokens) == sum(len(llm.tokenize(text)) for text in texts)
        near = found.vectors @ found.vectors.T
        assert near[0, 2] > near[0, 1]
        every = llm.embed(PROMPT, pooling="none").vectors
        assert len(every) == 9
        assert np.array_equal(llm.embed(PROMPT, pooling="last").vectors[0], every[-1])
        assert np.array_equal(llm.embed(llm.tokenize(PROMPT)).vectors[0], found.vectors[0])
        # what the logits are made of
        output = llm._loaded.gguf
        name = "output.weight" if "output.weight" in output.tensors else "token_embd.weight"
        info = output.tensors[name]
        logits = every @ dequantize(output.data(name), info.type, info.shape)[:1000].T
        rows = llm.logits(llm.tokenize(PROMPT))[:, :1000]
        scale = (rows * logits).sum(axis=1) / (logits * logits).sum(axis=1)  # the vectors have been made as long as 1
        assert np.allclose(rows, scale[:, None] * logits, atol=1e-3)
        assert scale.min() > 1
        for bad, told in (([], "empty"), ("word " * 70, "64"), ([["a"]], "text or a list")):
            with pytest.raises(RequestError, match=told):
                llm.embed(bad)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="pooling is 'max' and must be one of mean, last, none"):
            llm.embed(PROMPT, pooling="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_a_conversation_is_kept_and_gone_on_with(path: Path, tmp_path: Path, cache_type: str) -> None:
    prompt, file = "Tom had a dog and the dog had a bone. " * 10, tmp_path / "kept.safetensors"
    with LLM.load(path, context=512, cache_type=cache_type) as llm:
        first = llm.generate(prompt, max_tokens=40, temperature=0)
        ids = [*llm.tokenize(prompt), *first.ids]
        assert llm.save_cache(file, ids) == (len(ids) - 1) // 64 * 64
        expected = llm.generate(ids, max_tokens=20, temperature=0)
    with LLM.load(path, context=512, cache_type=cache_type) as llm:
        with pytest.raises(RequestError, match="nothing of these"):
            llm.save_cache(tmp_path / "none", ids)
        assert llm.load_cache(file) == ids
        again = llm.generate(ids, max_tokens=20, temperature=0)
        assert again.usage.cached_tokens == (len(ids) - 1) // 64 * 64
        assert again.ids == expected.ids
        assert llm.load_cache(file) == ids, "what is known already stays"
        with pytest.raises(OutputError, match="cannot be written"):
            llm.save_cache(tmp_path / "no" / "folder", ids)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]
    with safe_open(file, "np") as opened:
        assert opened.get_tensor("ids").tolist() == ids
        assert opened.get_tensor("pages").shape[0] == (len(ids) - 1) // 64


def test_saved_caches_that_do_not_fit(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kept"
    with LLM.load(path, context=256) as llm:
        ids = llm.tokenize("Tom had a dog and the dog had a bone. " * 10)
        llm.generate(ids, max_tokens=1)
        llm.save_cache(file, ids)
        whole = file.read_bytes()
        header = int.from_bytes(whole[:8], "little")
        damaged = {
            "no saved cache": [b"", b"x" * 7, b"not a cache at all", whole[:100], b"\xff" * 8 + whole[8:], whole[8:]],
            "is damaged": [
                whole[:-1],
                whole + b"x",
                whole[: 8 + header + 4 * len(ids) + 1000]
                + bytes([whole[8 + header + 4 * len(ids) + 1000] ^ 1])
                + whole[8 + header + 4 * len(ids) + 1001 :],
                whole.replace(b'"U8"', b'"I8"'),
                whole.replace(b'"sums"', b'"sumz"'),
                whole.replace(b'"I32", "shape": [1', b'"I32", "shape": [2'),
            ],
        }
        for told, files in damaged.items():
            for data in files:
                (tmp_path / "damaged").write_bytes(data)
                with pytest.raises(CacheError, match=told):
                    llm.load_cache(tmp_path / "damaged")
        with pytest.raises(CacheError, match="cannot be read"):
            llm.load_cache(tmp_path / "missing")
        assert llm.generate(ids, max_tokens=1).usage.cached_tokens == len(ids) - 1
    with (
        LLM.load(path, context=256, cache_type="f32") as other,
        pytest.raises(CacheError, match="cache of F16, and this"),
    ):
        other.load_cache(file)
    with LLM.load(path, context=256, backend="reference") as other, pytest.raises(CacheError, match="backend cpu"):
        other.load_cache(file)
    with LLM.load(path, context=64) as other, pytest.raises(ContextError):
        other.load_cache(file)
    quantize(path, tmp_path / "q.gguf", "Q8_0", allow_requantize=True, quiet=True)
    with LLM.load(tmp_path / "q.gguf", context=256) as other, pytest.raises(CacheError, match="saved with the model"):
        other.load_cache(file)


PAGE = Path(__file__).parents[1] / "docs" / "howto" / "python.md"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_the_examples_of_the_page_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").symlink_to(path)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})


def test_by_default_the_cache_takes_no_more_than_half_of_the_free_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM.load(path, context=256, parallel=8) as llm:
        assert (llm.cache_tokens, llm.notes) == (8 * 256, [])
        token = llm.cache_bytes // llm.cache_tokens
        config: Any = llm.config
        assert token == 2 * 2 * config.block_count * config.head_count_kv * config.head_size
        free = llm.weight_bytes + 2 * token * (3 * 256 + 5)
    monkeypatch.setattr("phiquant.loading.free_memory", lambda: free)
    with LLM.load(path, context=256, parallel=8) as llm:
        assert llm.cache_tokens == 3 * 256
        (note,) = llm.notes
        assert note.startswith("the cache holds 768 tokens, 0.0 GB, instead of 8 times 256")
        made = llm.generate([PROMPT] * 8, max_tokens=200, temperature=0, ignore_eos=True)
        assert len({one.text for one in made}) == 1
    with LLM.load(path, context=256, parallel=8, cache_tokens=2048) as llm:
        assert llm.cache_tokens == 2048  # what is asked for is done, and said
        assert "more memory than the" in llm.notes[0]
    free = 1
    with LLM.load(path, context=256, parallel=8) as llm:
        assert llm.cache_tokens == 256  # one whole sequence must fit
    monkeypatch.setattr("phiquant.loading.free_memory", lambda: None)
    with LLM.load(path, context=256, parallel=8) as llm:
        assert llm.cache_tokens == 8 * 256


def test_a_cache_smaller_than_all_contexts(path: Path) -> None:
    with pytest.raises(RequestError, match="cache_tokens is 100, less than the context of 256"):
        LLM.load(path, context=256, cache_tokens=100)
    with LLM.load(path, context=256, cache_tokens=320, parallel=4) as llm:
        assert llm.stats().pages_total == 5
        made = llm.generate([PROMPT] * 4, max_tokens=150, temperature=0, ignore_eos=True)
        assert len({one.text for one in made}) == 1


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"backend": "abacus"}, UnsupportedError, "abacus"),
        ({"cache_type": "q1"}, RequestError, "cache_type"),
        ({"context": -1}, RequestError, "context"),
        ({"threads": -1}, RequestError, "threads"),
        ({"batch": 0}, RequestError, "batch"),
        ({"parallel": 0}, RequestError, "parallel"),
    ],
)
def test_wrong_options(path: Path, options: dict[str, object], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        LLM.load(path, **options)  # type: ignore[arg-type]


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(GGUFError):
        LLM.load(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_text("this is not a model, but it is long enough")
    with pytest.raises(GGUFError):
        LLM.load(tmp_path / "text.gguf")


def test_the_context_is_at_most_the_models(path: Path) -> None:
    for asked, got in ((100, 100), (0, 2048), (100_000, 2048)):
        with LLM.load(path, context=asked) as llm:
            assert llm.context == got
    with LLM.load(path, context=12) as llm:
        made = llm.generate(PROMPT, temperature=0)
        assert (len(made.ids), made.finish_reason) == (3, "length")


def test_gpu_layers_are_noted(path: Path) -> None:
    with LLM.load(path, gpu_layers=99) as llm:
        assert llm.backend == "cpu"
        assert len(llm.notes) == 1
        assert "GPU" in llm.notes[0]


def test_streamed_logits_are_the_logits(path: Path) -> None:
    sequences = [list(range(100, 100 + n)) for n in (40, 7, 33, 64, 1)]
    with LLM.load(path, context=64, batch=48, parallel=3) as llm:
        whole = [llm.logits(ids) for ids in sequences]
        for first in (0, 5, 39):
            parts: list[list[np.ndarray]] = [[] for _ in sequences]
            following = [first] * len(sequences)
            for index, position, rows in llm.stream_logits(iter(sequences), first=first):
                assert position == following[index]
                following[index] += len(rows)
                parts[index].append(rows)
            for logits, part in zip(whole, parts, strict=True):
                assert sum(map(len, part)) == max(len(logits) - first, 0)
                assert not part or np.array_equal(np.concatenate(part), logits[first:])
        with pytest.raises(ContextError):
            list(llm.stream_logits([[1], [1] * 65]))
        stream = llm.stream_logits([[1] * 64] * 3)
        next(stream)
        stream.close()
        assert np.array_equal(llm.logits(sequences[1]), whole[1]), "what was given up is out of the way"
    with LLM.load(path, context=64, batch=16) as llm:
        stream = llm.stream_logits(sequences)
        parts = [[] for _ in sequences]
        for index, _, rows in stream:
            parts[index].append(rows)
            llm.generate([1, 2, 3], max_tokens=2)  # needs the only place
        for logits, part in zip(whole, parts, strict=True):
            assert np.array_equal(np.concatenate(part), logits)


def test_closing(path: Path) -> None:
    llm = LLM.load(path)
    stream = llm.generate(PROMPT, stream=True)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        next(stream)
    with pytest.raises(RequestError, match="closed"):
        llm.generate(PROMPT)
    with pytest.raises(RequestError, match="closed"):
        llm.logits([1])


def test_two_models_in_one_process(path: Path) -> None:
    with LLM.load(path) as first, LLM.load(path) as second:
        a, b = (llm.generate(PROMPT, stream=True, temperature=0, max_tokens=10) for llm in (first, second))
        assert [x.text for x in a] == [x.text for x in b]


@pytest.mark.slow
@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0", "Q5_1", "Q4_K_M", "Q6_K", "Q2_K", "Q3_K_M"])
def test_backends_agree_on_quantized_models(path: Path, tmp_path: Path, type_: str) -> None:
    """Both round activations to 8 bits alike and sum exactly, so most tokens differ by the last bits of a float alone.

    Those bits can tip an activation to the next of its 255 levels, in about every fifth token of this model; from then
    on the two are as far apart as rounding is from not rounding (1e-3). Hence single tokens, and the median.
    """
    quantize(path, tmp_path / "q.gguf", type_, allow_requantize=True)
    with (
        LLM.load(tmp_path / "q.gguf", backend="reference", cache_type="f32") as reference,
        LLM.load(tmp_path / "q.gguf", backend="cpu", cache_type="f32") as cpu,
    ):
        divergences = []
        for token in range(300, 6300, 300):
            p, q = (log_softmax(llm.logits([token])[0]) for llm in (reference, cpu))
            divergences.append(float((np.exp(p) * (p - q)).sum()))
    assert np.median(divergences) < 1e-10
    assert max(divergences) < 0.05


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64) - logits.max()
    return wide - np.log(np.exp(wide).sum())


REPEATING = "The cat sat on the mat and the dog lay on the rug. " * 6


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_speculation_changes_nothing_but_the_time(path: Path, llm: LLM, temperature: float) -> None:
    request = {"max_tokens": 120, "temperature": temperature, "seed": 11}
    with LLM.load(path, speculate=False) as plain, LLM.load(path, draft_model=path) as with_smaller:
        for prompt in (REPEATING, PROMPT):
            for stop in ((), ("the dog",)):
                expected = plain.generate(prompt, stop=stop, **request)  # type: ignore[call-overload]
                chunks = list(llm.generate(prompt, stop=stop, stream=True, **request))  # type: ignore[call-overload]
                others = [chunks[-1].completion, with_smaller.generate(prompt, stop=stop, **request)]  # type: ignore[call-overload]
                for found in others:
                    assert (found.text, found.ids) == (expected.text, expected.ids)
                    assert (found.finish_reason, found.usage.completion_tokens) == (
                        expected.finish_reason,
                        expected.usage.completion_tokens,
                    )
                assert "".join(chunk.text for chunk in chunks) == expected.text
                assert all(len(chunk.ids) <= 1 for chunk in chunks)
                assert expected.timings.drafted == 0


def test_a_smaller_model_of_another_vocabulary_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = LLM.load.__func__  # type: ignore[attr-defined]

    def other(cls: type[LLM], *arguments: object, **more: object) -> LLM:
        loaded: LLM = load(cls, *arguments, **more)
        vocabulary = loaded.tokenizer.vocabulary
        if not more.get("speculate", True):
            loaded.tokenizer.vocabulary = replace(vocabulary, tokens=[*vocabulary.tokens[:-1], "another"])
        return loaded

    monkeypatch.setattr(LLM, "load", classmethod(other))
    with pytest.raises(RequestError, match="another vocabulary"):
        LLM.load(path, draft_model=path)


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_running_from_the_file_itself_gives_the_same_bits(tmp_path: Path, kind: str) -> None:
    made = tmp_path / "x.gguf"
    quantize(TINY, made, kind, quiet=True)
    with LLM.load(made) as packed, LLM.load(made, pack=False) as direct:
        ids = packed.tokenize(PROMPT)
        assert np.array_equal(packed.logits(ids).view(np.uint32), direct.logits(ids).view(np.uint32))
        assert (
            direct.generate(PROMPT, max_tokens=3, temperature=0).ids
            == packed.generate(PROMPT, max_tokens=3, temperature=0).ids
        )


@pytest.mark.parametrize(
    ("cache_type", "backend", "most"), [("q8_0", "cpu", 2e-5), ("q4_0", "cpu", 5e-3), ("q4_0", "reference", 5e-3)]
)
def test_a_quantized_cache_costs_little(path: Path, llm: LLM, cache_type: str, backend: str, most: float) -> None:
    """Measured: 7.7e-6 with Q8_0, 2.2e-3 with Q4_0; more than nothing, or it would not be quantized."""
    text = (TINY / "evaluation.txt").read_text(encoding="utf-8")
    with LLM.load(path, cache_type=cache_type, backend=backend) as quantized:
        found = divergence(llm, quantized, text, limit=512)
    assert most / 10 < found.mean < most


@pytest.mark.skipif(not host().has_bfloat_dot, reason="the processor lacks AVX512_BF16")
def test_dot_products_of_bf16_cost_what_is_said_of_them(tmp_path: Path) -> None:
    """Documented: 1.2e-5 nats per token; more than nothing, or the option would do nothing."""
    made = tmp_path / "x.gguf"
    convert(TINY, made, "bf16", quiet=True)
    text = (TINY / "evaluation.txt").read_text(encoding="utf-8")
    with LLM.load(made) as plain, LLM.load(made, bf16_dot=True) as rounded:
        found = divergence(plain, rounded, text, limit=1024)
        assert not rounded.notes
    assert 5e-6 < found.mean < 2.5e-5
    assert found.top1 > 0.99


@pytest.mark.skipif(not host().has_bfloat_dot, reason="the processor lacks AVX512_BF16")
def test_an_option_that_changes_nothing_is_noted(path: Path) -> None:
    with LLM.load(path, bf16_dot=True) as llm:
        assert llm.notes == ["dot products of BF16 change nothing, because no weight of this model is BF16"]


@pytest.mark.skipif(host().arm, reason="forces a lowering of x86")
def test_dot_products_of_bf16_are_refused_where_there_are_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIQUANT_LOWERING", "avx2" if host().lowering != "generic" else "generic")
    host.cache_clear()
    try:
        with pytest.raises(RequestError, match=r"\(bf16_dot\), but the processor.* lacks AVX512_BF16"):
            LLM.load(path, bf16_dot=True)
    finally:
        host.cache_clear()
    with LLM.load(path, backend="reference", bf16_dot=True) as llm:
        assert llm.notes, "the definition runs anywhere"


def test_a_failing_kernel_of_a_first_start_is_told_and_leaves_no_thread(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIQUANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", {})
    before = threading.active_count()
    for error in (KernelError("LLVM is out of order"), KeyboardInterrupt()):

        def fail(text: str, target: object, error: BaseException = error) -> bytes:
            raise error if threading.current_thread() is threading.main_thread() else KernelError("elsewhere")

        monkeypatch.setattr(library, "emit_object", fail)
        with pytest.raises(type(error)):
            LLM.load(path)
        assert threading.active_count() == before


@pytest.mark.parametrize("opening", ["<tool_call>", '{"tool_calls":[', "functools[", '{"name":"weather"'])
def test_a_model_that_is_brought_to_begin_a_call_gives_arguments_by_the_schema(llm: LLM, opening: str) -> None:
    """Biases make it write the beginning of a call, token by token; what comes then is its own, within the grammar."""
    cities = ["Rome", "Oslo"]
    schema = {
        "type": "object",
        "properties": {"city": {"enum": cities}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    box = Toolbox([Tool("weather", "", schema, strict=True)], llm.tokenizer.chat_template, parallel=False)
    tokens = llm.tokenizer.encode_continuation(opening)
    bias = {token: 1000.0 * (len(tokens) - at) for at, token in enumerate(dict.fromkeys(tokens))}
    options = {"logit_bias": bias, "presence_penalty": 1e6, "repeat_last_n": 32, "max_tokens": 64, "temperature": 0}

    def calls(**more: Any) -> list[dict[str, Any]]:
        completion = llm.generate("Hello", **options, **more)
        assert completion.text.startswith(opening[:3]), completion.text
        reader = box.reader()
        found = [*reader.push(completion.text), *reader.finish()]
        said = "".join(item.text for item in found if isinstance(item, CallArguments))
        return [json.loads(said)] if said.endswith("}") else []

    (arguments,) = calls(grammar=box.grammar())
    assert arguments.keys() == {"city", "days"}
    assert arguments["city"] in cities
    assert 1 <= arguments["days"] <= 9
    assert calls() == []  # without the grammar it does not get there
