"""What is taken from rows of logits, against the definitions written out."""

import math

import numpy as np
import pytest

from phiquant.errors import RequestError
from phiquant.eval import rows
from phiquant.eval.rows import LogitRows, compare, log_softmax, log_sum_exp, losses, slices

VOCABULARY = 37


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(5).normal(0, 4, (11, VOCABULARY)).astype(np.float32)


def test_sums_and_losses_are_those_of_the_definition(logits: np.ndarray) -> None:
    targets = np.arange(11, dtype=np.int32) * 3
    for row, total, loss, target in zip(
        logits.tolist(), log_sum_exp(logits), losses(logits, targets), targets, strict=True
    ):
        expected = math.log(math.fsum(math.exp(x) for x in row))
        assert total == pytest.approx(expected, rel=1e-14)
        assert loss == pytest.approx(expected - row[target], rel=1e-13)


def test_large_scores_do_not_overflow() -> None:
    assert log_sum_exp(np.array([[3e38, 3e38]], np.float32))[0] == pytest.approx(float(np.float32(3e38)))
    assert log_softmax(np.array([[-3e38, 3e38]], np.float32))[0, 1] == 0


def test_a_comparison_gives_divergence_losses_and_likeliest_tokens(logits: np.ndarray) -> None:
    other = logits + np.random.default_rng(6).normal(0, 0.5, logits.shape).astype(np.float32)
    targets = np.arange(11, dtype=np.int32)
    found = compare(LogitRows(logits), other, targets)
    for i in range(11):
        p, q = (np.exp(x[i].astype(float)) for x in (logits, other))
        p, q = p / p.sum(), q / q.sum()
        assert found.divergence[i] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)
        assert found.losses[i] == pytest.approx(-math.log(q[i]), rel=1e-12)
        assert found.base_losses[i] == pytest.approx(-math.log(p[i]), rel=1e-12)
        assert found.same[i] == (p.argmax() == q.argmax())
    assert 0 < found.same.sum() < 11, "the two agree somewhere and differ somewhere"


def test_how_rows_are_cut_changes_nothing(logits: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    other, targets = logits[::-1].copy(), np.zeros(11, np.int32)
    whole = compare(LogitRows(logits), other, targets)
    monkeypatch.setattr(rows, "ELEMENTS", 3 * VOCABULARY)
    assert len(list(slices(11, VOCABULARY))) == 4
    parts = compare(LogitRows(logits), other, targets)
    for name in ("divergence", "same", "losses", "base_losses"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_the_same_rows_do_not_diverge(logits: np.ndarray) -> None:
    found = compare(LogitRows(logits), logits.copy())
    assert (found.divergence == 0).all()
    assert found.same.all()
    assert found.losses.size == found.base_losses.size == 0


def test_what_is_no_number_is_refused(logits: np.ndarray) -> None:
    logits[3, 4] = np.nan
    with pytest.raises(RequestError, match="NaN"):
        losses(logits, np.zeros(11, np.int32))
