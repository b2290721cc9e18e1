"""The public API on the bundled model."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import phiquant
from phiquant import LLM, Completion, errors
from phiquant.convert import convert, quantize
from phiquant.errors import ContextError, GGUFError, KernelError, RequestError, TokenError, UnsupportedError
from phiquant.eval.kl import divergence
from phiquant.kernels.cpu import library
from phiquant.kernels.cpu.target import host

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
    with pytest.raises(TypeError, match="temprature"):
        llm.generate(PROMPT, temprature=1)  # type: ignore[call-overload]


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
