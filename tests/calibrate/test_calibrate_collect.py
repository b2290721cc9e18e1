"""Collecting on the bundled model: against NumPy, against the reference backend, and cut in every way."""

import sys
from pathlib import Path

import numpy as np
import pytest

from phiquant import LLM
from phiquant.calibrate import Calibration, collect
from phiquant.convert.imatrix import ImportanceMatrix, read
from phiquant.errors import GGUFError, RequestError, WeightsError
from phiquant.eval import perplexity
from phiquant.gguf import GGUFFile

pytestmark = pytest.mark.cpu

module = sys.modules[Calibration.__module__]
KINDS = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")


def gathered(path: Path, text: str, **options: object) -> ImportanceMatrix:
    with Calibration(path, text, **{"context": 64, "chunks": 2, **options}) as calibration:  # type: ignore[arg-type]
        for _ in calibration.run():
            pass
        return calibration.matrix()


def same_bits(a: ImportanceMatrix, b: ImportanceMatrix) -> bool:
    return a.entries.keys() == b.entries.keys() and all(
        np.array_equal(a.entries[n].sums, b.entries[n].sums)
        and np.array_equal(a.entries[n].counts, b.entries[n].counts)
        for n in a.entries
    )


@pytest.fixture(scope="module")
def matrix(tiny: Path, page: str) -> ImportanceMatrix:
    return gathered(tiny, page)


def test_it_has_the_weights_of_the_blocks_and_counts_tokens(matrix: ImportanceMatrix) -> None:
    assert set(matrix.entries) == {f"blk.{block}.{kind}.weight" for block in range(8) for kind in KINDS}
    for name, entry in matrix.entries.items():
        assert entry.sums.shape == (1, 768 if "ffn_down" in name else 256)
        assert entry.sums.dtype == np.float32
        assert entry.counts.tolist() == [128]
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (2, 64, ())


def test_the_first_weight_sees_normalized_embeddings(tiny: Path, page: str, matrix: ImportanceMatrix) -> None:
    with LLM.load(tiny, context=64) as llm:
        ids = np.array(llm.tokenize(page, special=False)[:128]).reshape(2, 64)
        if llm.tokenizer.add_bos:
            ids[:, 0] = llm.tokenizer.bos_id
        epsilon = llm.config.rms_epsilon
    with GGUFFile.open(tiny) as file:
        table = file.data("token_embd.weight").view(np.float32).reshape(-1, 256).astype(np.float64)
        norm = file.data("blk.0.attn_norm.weight").view(np.float32).astype(np.float64)
    x = table[ids.reshape(-1)]
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + epsilon) * norm
    np.testing.assert_allclose(matrix.entries["blk.0.attn_qkv.weight"].sums[0], (x * x).sum(axis=0), rtol=2e-6)


def test_the_reference_backend_sees_the_same(tiny: Path, page: str, matrix: ImportanceMatrix) -> None:
    expected = gathered(tiny, page, backend="reference")
    for name, entry in expected.entries.items():
        np.testing.assert_allclose(
            matrix.entries[name].sums, entry.sums, rtol=1e-3, err_msg=name
        )  # keys are rounded to F16
        assert matrix.entries[name].counts.tolist() == entry.counts.tolist()


def test_threads_steps_and_outputs_change_no_bit(
    tiny: Path, page: str, matrix: ImportanceMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same_bits(gathered(tiny, page, threads=1), matrix)
    assert same_bits(gathered(tiny, page, threads=3, perplexity=False), matrix)
    assert same_bits(gathered(tiny, page, process_output=True), matrix), "tied: there is no output.weight"
    monkeypatch.setattr(module, "_STEP_TOKENS", 27)
    assert same_bits(gathered(tiny, page), matrix)


def test_chunks_add_up(tiny: Path, page: str, matrix: ImportanceMatrix) -> None:
    first, second = (gathered(tiny, page, chunks=1, skip=skip) for skip in (0, 1))
    for name, entry in matrix.entries.items():
        total = first.entries[name].sums.astype(np.float64) + second.entries[name].sums
        np.testing.assert_allclose(entry.sums, total, rtol=2e-7)


@pytest.mark.parametrize("rows", [512, 7])
def test_perplexity_is_that_of_the_evaluation(
    tiny: Path, page: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS_BYTES", rows * 4 * 32064)
    with Calibration(tiny, page, context=64, chunks=3) as calibration:
        seen = list(calibration.run())
        assert list(calibration.run()) == []
    assert [done.chunks for done in seen] == [1, 2, 3]
    assert {done.total for done in seen} == {3}
    with LLM.load(tiny, context=64, cache_type="f16") as llm:
        bos = llm.tokenizer.bos_id if llm.tokenizer.add_bos else None
        expected = perplexity(llm, page, window=64, windows=3, bos=bos)
    assert seen[-1].perplexity == pytest.approx(expected.value, rel=1e-9)
    assert seen[-1].error == pytest.approx(expected.error, rel=1e-9)


def test_collect_and_what_it_writes(tiny: Path, page: str, matrix: ImportanceMatrix, tmp_path: Path) -> None:
    told = []
    made = collect(tiny, page, context=64, chunks=2, dataset="page", progress=told.append)
    assert same_bits(made, matrix)
    assert [(done.chunks, done.total, done.perplexity) for done in told] == [(1, 2, None), (2, 2, None)]
    made.write_gguf(tmp_path / "imatrix.gguf")
    back = read(tmp_path / "imatrix.gguf")
    assert same_bits(back, made)
    assert (back.chunk_count, back.chunk_size, tuple(back.datasets)) == (2, 64, ("page",))


def test_a_matrix_is_a_copy(tiny: Path, page: str) -> None:
    with Calibration(tiny, page, context=64, chunks=2) as calibration:
        run = calibration.run()
        next(run)
        early = calibration.matrix()
        before = {name: entry.sums.copy() for name, entry in early.entries.items()}
        next(run)
        assert all(np.array_equal(early.entries[name].sums, sums) for name, sums in before.items())
        assert calibration.matrix().chunk_count == 2
        assert early.chunk_count == 1
        assert calibration.shapes["blk.7.ffn_down.weight"] == (1, 768)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"context": 512}, "790 tokens and must have at least 1024, two chunks of 512"),
        ({"context": 256, "skip": 2}, "278 tokens after the 2 chunks that are skipped"),
        ({"context": 256, "skip": 9}, "0 tokens after"),
        ({"context": 4096}, "longer than the 2048"),
        ({"context": 1}, "1 tokens"),
        ({"chunks": 0}, "0 chunks"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny: Path, page: str, options: dict[str, int], what: str) -> None:
    with pytest.raises(RequestError, match=what):
        Calibration(tiny, page, **options)  # type: ignore[arg-type]


def test_files_that_are_no_models_are_refused(tmp_path: Path, page: str) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(GGUFError):
        Calibration(tmp_path / "model.gguf", page)


def test_activations_that_are_no_numbers_end_it(tiny: Path, page: str) -> None:
    with Calibration(tiny, page, context=64) as calibration:
        calibration._observations[5].sums[0, 3] = np.nan
        with pytest.raises(WeightsError, match=r"inputs of blk\.1\.attn_output\.weight are not finite"):
            next(calibration.run())
