"""Reading and scoring: whatever order and size the rows come in, and whatever the base is."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from phiquant.errors import RequestError
from phiquant.eval import compare_logits, perplexity
from phiquant.eval.measure import Block, Measurement, RowsBase
from phiquant.eval.saved import SavedLogits, SavedWriter
from phiquant.eval.windows import Windows

VOCABULARY = 23
IDS = np.random.default_rng(1).integers(0, VOCABULARY, 60).astype(np.int32)
WINDOWS = Windows.halves(IDS, 10, bos=1)


class Table:
    """A model whose scores are a function of the token before."""

    def __init__(self, seed: int, vocabulary: int = VOCABULARY) -> None:
        self.table = np.random.default_rng(seed).normal(0, 2, (VOCABULARY, vocabulary)).astype(np.float32)

    def tokenize(self, text: str) -> list[int]:
        return [int(i) for i in text.split()]

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.table[np.asarray(ids)]


class Streaming(Table):
    """The same, in blocks of some rows, several windows in turn."""

    def __init__(self, seed: int, rows: int, parallel: int) -> None:
        super().__init__(seed)
        self.rows, self.parallel = rows, parallel
        self.most = 0

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        raise AssertionError("a whole window is held where it could be streamed")

    def stream_logits(self, sequences: Iterable[Sequence[int]], *, first: int = 0) -> Iterator[Block]:
        waiting = list(enumerate(sequences))
        while waiting:
            group, waiting = waiting[: self.parallel], waiting[self.parallel :]
            for start in range(first, len(group[0][1]), self.rows):
                for index, ids in group:
                    rows = self.table[np.asarray(ids[start : start + self.rows])]
                    self.most = max(self.most, len(rows))
                    yield index, start, rows


def run(measurement: Measurement) -> Measurement:
    last = [*measurement.run()][-1]
    assert last.windows == len(WINDOWS)
    assert last.perplexity == pytest.approx(measurement.perplexity.value)
    return measurement


def test_streamed_and_whole_windows_give_the_same() -> None:
    whole = run(Measurement(Table(1), WINDOWS)).perplexity
    for rows, parallel in ((1, 1), (2, 3), (3, 4), (100, 2)):
        assert run(Measurement(Streaming(1, rows, parallel), WINDOWS)).perplexity == whole
    assert whole.tokens == 6 * 4
    assert perplexity(Table(1), " ".join(map(str, IDS)), window=10, bos=1) == whole


def test_windows_are_told_when_they_are_whole() -> None:
    measurement = Measurement(Streaming(1, 2, 3), WINDOWS)
    seen = [(done.windows, done.positions) for done in measurement.run()]
    assert [w for w, _ in seen] == [0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 5, 6]
    assert seen[-1][1] == 24
    assert measurement.running(6) == measurement.perplexity


@pytest.mark.parametrize("rows", [(1, 3), (3, 1), (2, 100), (2, 2)])
@pytest.mark.parametrize("parallel", [(1, 1), (2, 2), (1, 3), (3, 1)])
def test_a_base_is_aligned_with_the_model(rows: tuple[int, int], parallel: tuple[int, int]) -> None:
    base, other = Streaming(1, rows[0], parallel[0]), Streaming(2, rows[1], parallel[1])
    stream = base.stream_logits([WINDOWS.read(w).tolist() for w in range(6)], first=WINDOWS.first)
    found = run(Measurement(other, WINDOWS, base=RowsBase(stream))).comparison
    tokens = np.concatenate([WINDOWS.read(w)[5:9] for w in range(6)])
    values, same = compare_logits(base.table[tokens], other.table[tokens])
    assert found.divergence.mean == pytest.approx(values.mean())
    assert found.divergence.top1 == same / 24
    assert found.base_perplexity == run(Measurement(Table(1), WINDOWS)).perplexity
    assert found.perplexity == run(Measurement(Table(2), WINDOWS)).perplexity


def test_saved_logits_are_a_base(tmp_path: Path) -> None:
    path = tmp_path / "base.kld"
    with SavedWriter(path, WINDOWS, VOCABULARY) as writer:
        run(Measurement(Streaming(1, 3, 2), WINDOWS, save=writer))
        writer.commit()
    with SavedLogits(path) as saved:
        found = run(Measurement(Streaming(2, 2, 3), WINDOWS, base=saved)).comparison
        stream = Table(1)
        blocks = ((w, 5, stream.logits(WINDOWS.read(w)[5:].tolist())) for w in range(6))
        exact = run(Measurement(Table(2), WINDOWS, base=RowsBase(blocks))).comparison
    assert found.divergence.mean == pytest.approx(exact.divergence.mean, abs=1e-4)
    assert found.base_perplexity.value == pytest.approx(exact.base_perplexity.value, rel=1e-4)
    assert found.perplexity == exact.perplexity


def test_bases_that_do_not_fit_are_refused() -> None:
    blocks = ((w, 5, Table(1, 24).logits(WINDOWS.read(w)[5:].tolist())) for w in range(6))
    with pytest.raises(RequestError, match="vocabulary of 24 tokens and the model one of 23"):
        run(Measurement(Table(2), WINDOWS, base=RowsBase(blocks)))
    with pytest.raises(RequestError, match="no logits of position 5 of window 1"):
        run(Measurement(Table(2), WINDOWS, base=RowsBase(iter(()))))
    late = ((w, 6, Table(1).logits(WINDOWS.read(w)[6:].tolist())) for w in range(6))
    with pytest.raises(RequestError, match="gives position 6 of window 1 where 5 is due"):
        run(Measurement(Table(2), WINDOWS, base=RowsBase(late)))
