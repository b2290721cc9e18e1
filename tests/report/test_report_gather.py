"""The figures of a report are those of the rooms below."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small_report import Made, Silent, changed, load

from phiquant import LLM
from phiquant.errors import ImportanceError, RequestError
from phiquant.eval.measure import Measurement
from phiquant.eval.quality import token_windows
from phiquant.eval.saved import SavedLogits, SavedWriter
from phiquant.gguf import GGUFFile, open_model
from phiquant.quants import dequantize
from phiquant.report import gather
from phiquant.report.figures import TensorError
from phiquant.report.weights import weight_errors

pytestmark = pytest.mark.cpu


def test_divergences_are_those_of_eval(made: Made, tmp_path: Path) -> None:
    report = made.report
    with load(made.reference) as base:
        windows = token_windows(base, made.wanted.text, 64)
        with SavedWriter(tmp_path / "base", windows, base.config.vocab_size) as writer:
            own = Measurement(base, windows, save=writer)
            for _ in own.run():
                pass
            writer.commit()
    assert report.reference.perplexity == own.perplexity
    assert (report.size, report.windows, report.first) == (64, len(windows), windows.first)
    for path, file in zip(made.files, report.files, strict=True):
        with load(path) as llm, SavedLogits(tmp_path / "base") as base:
            measured = Measurement(llm, windows, base=base)
            for _ in measured.run():
                pass
        assert file.comparison == measured.comparison
        assert len(file.by_position) == windows.scored
        assert np.mean(file.by_position) == pytest.approx(file.divergence, rel=1e-12)
        assert file.path == path
    ours, theirs, same = report.files
    assert 0 < ours.divergence < theirs.divergence
    assert abs(same.divergence) < 2e-6, "what 16 bits cannot tell from none"
    assert same.comparison.divergence.top1 == 1


def test_what_files_are_is_told_by_their_metadata(made: Made) -> None:
    ours, theirs, same = made.report.files
    assert [file.made_here for file in made.report.files] == [True, False, True]
    assert [file.file_type for file in made.report.files] == ["Q4_K_M", "Q2_K", "F16"]
    assert [file.label for file in made.report.files] == ["Q4_K_M", "Q2_K", "same-<b>"]
    assert ours.size == made.ours.stat().st_size
    with open_model(made.ours) as gguf:
        total = sum(info.nbytes for info in gguf.tensors.values())
        assert ours.bits == pytest.approx(8 * total / sum(int(np.prod(i.shape)) for i in gguf.tensors.values()))
        assert [(w.name, w.type) for w in ours.weights] == [(i.name, i.type.name) for i in gguf.tensors.values()]
    assert theirs.size < ours.size < same.size


def test_every_file_says_what_it_says_alone(made: Made) -> None:
    for path, samples in [
        (made.reference, made.report.reference.samples),
        *((file.path, file.samples) for file in made.report.files),
    ]:
        with LLM.load(path, context=128) as llm:
            for prompt, sample in zip(made.wanted.prompts, samples, strict=True):
                assert sample.text == llm.generate(prompt, max_tokens=16, temperature=0.0).text


def test_progress_is_told_of_everything(made: Made) -> None:
    assert made.progress.read == [path.name for path in (made.reference, *made.files)]
    assert made.progress.weighed == {path.name: 0 for path in made.files}


def values(gguf: GGUFFile, name: str) -> np.ndarray:  # type: ignore[type-arg]
    info = gguf.tensors[name]
    return dequantize(np.array(gguf.data(name)), info.type, info.shape).astype(np.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_weights_are_those_of_numpy(made: Made, weighted: bool) -> None:
    rng = np.random.default_rng(5)
    with open_model(made.theirs) as file, open_model(made.reference) as reference:
        importance = {
            name: rng.uniform(0, 4, (1, info.shape[-1])).astype(np.float32)
            for name, info in file.tensors.items()
            if weighted and name.endswith("ffn_down.weight")
        }
        done: list[int] = []
        found = {e.name: e for e in weight_errors(file, reference, importance, done.append, threads=2)}
        assert list(found) == list(file.tensors)
        assert sum(done) == sum(info.nbytes for info in file.tensors.values())
        for name in ("blk.0.attn_qkv.weight", "blk.3.ffn_down.weight", "token_embd.weight", "output_norm.weight"):
            mine, theirs = values(file, name), values(reference, name)
            weights = importance.get(name, np.ones((1, 1), np.float32)).astype(np.float64)
            assert found[name].error == pytest.approx(float((weights * (mine - theirs) ** 2).sum()), rel=1e-5, abs=0)
            assert found[name].norm == pytest.approx(float((weights * theirs**2).sum()), rel=1e-5)
            assert found[name].weighted is (name in importance)
            assert found[name].matrix is (mine.ndim > 1)
        assert found["output_norm.weight"].relative == 0
    if not weighted:
        assert made.report.files[1].weights == tuple(found.values())


def test_importance_of_another_model_is_refused(made: Made) -> None:
    wrong = {"blk.0.ffn_down.weight": np.ones((1, 8), np.float32)}
    refused = pytest.raises(ImportanceError, match=r"another model: it has 8 values for blk\.0\.ffn_down\.weight")
    with open_model(made.theirs) as file, open_model(made.reference) as reference, refused:
        weight_errors(file, reference, wrong)


def test_layers_are_sums_over_their_matrices(made: Made) -> None:
    file = made.report.files[1]
    assert [layer.layer for layer in file.layers] == ["embedding", *map(str, range(8))]
    of = [w for w in file.weights if w.name.startswith("blk.3.") and w.matrix]
    assert file.layers[4].relative == pytest.approx(sum(w.error for w in of) / sum(w.norm for w in of))  # type: ignore[misc]
    weighed = tuple(
        dataclasses.replace(w, weighted=w.name.endswith("ffn_up.weight"), error=2.0, norm=5.0) for w in file.weights
    )
    assert dataclasses.replace(file, weights=weighed).layers[4].relative == 0.4
    assert [layer.relative for layer in made.report.files[2].layers] == [0.0] * 9
    assert TensorError("x", "F16", True, 1, None).relative is None


def test_a_tensor_without_a_counterpart_is_told(made: Made, tmp_path: Path) -> None:
    with open_model(made.ours) as file, open_model(made.reference) as reference:
        del reference.tensors["blk.2.ffn_up.weight"]
        found = {e.name: e for e in weight_errors(file, reference, {})}
    assert found["blk.2.ffn_up.weight"].error is None
    assert found["blk.2.ffn_down.weight"].error is not None


def test_another_vocabulary_is_refused_before_anything_runs(made: Made, tmp_path: Path) -> None:
    with open_model(made.ours) as gguf:
        tokens = [*gguf.require("tokenizer.ggml.tokens", list)[:-1], "<|another|>"]
    other = changed(made.ours, tmp_path / "other.gguf", tokenizer_ggml_tokens=tokens)
    wanted = dataclasses.replace(made.wanted, files=[made.ours, other])
    with pytest.raises(RequestError, match="has another vocabulary than"):
        gather(wanted, lambda path: pytest.fail("a model was loaded"), Silent())


def test_nothing_is_left_when_it_fails(made: Made, tmp_path: Path) -> None:
    def failing(path: Path) -> LLM:
        if path != made.reference:
            assert any(tmp_path.rglob("reference.kld"))
            raise KeyboardInterrupt
        return load(path)

    with pytest.raises(KeyboardInterrupt):
        gather(dataclasses.replace(made.wanted, folder=tmp_path), failing, Silent())
    assert list(tmp_path.iterdir()) == []


def test_without_a_prompt_the_beginning_of_the_text_is_continued(made: Made, tmp_path: Path) -> None:
    wanted = dataclasses.replace(made.wanted, prompts=(), files=[made.ours], chunks=2, folder=tmp_path)
    report = gather(wanted, load, Silent())
    assert len(report.prompts) == 1
    assert report.prompts[0]
    assert made.wanted.text.startswith(report.prompts[0])
    assert report.windows == 2
