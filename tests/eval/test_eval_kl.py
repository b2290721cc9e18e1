"""Divergence and perplexity against values worked out by other means."""

import math

import numpy as np
import pytest

from phiquant.errors import RequestError
from phiquant.eval import compare_logits, divergence, perplexity


class Fixed:
    """A model whose scores are a function of the token before."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)
        self.lengths: list[int] = []

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def logits(self, ids: list[int]) -> np.ndarray:
        self.lengths.append(len(ids))
        return self.table[np.asarray(ids)]


def test_divergence_of_two_coins() -> None:
    base = np.log(np.array([[0.5, 0.5], [0.9, 0.1]])).astype(np.float32)
    other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]])).astype(np.float32)
    values, same = compare_logits(base, other)
    np.testing.assert_allclose(values, [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0], atol=1e-7)
    assert same == 1, "the first row's likeliest tokens are 0 (of a tie) and 1"


def test_divergence_ignores_a_constant_and_survives_minus_infinity() -> None:
    base = np.array([[1.0, 2.0, -np.inf]], np.float32)
    values, same = compare_logits(base, base + 7)
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert same == 1


def test_nan_is_not_a_small_divergence() -> None:
    base = np.zeros((1, 3), np.float32)
    with pytest.raises(RequestError, match="NaN"):
        compare_logits(base, np.full((1, 3), np.nan, np.float32))
    with pytest.raises(RequestError, match="shapes"):
        compare_logits(base, np.zeros((1, 4), np.float32))


def test_windows_and_limit() -> None:
    rng = np.random.default_rng(1)
    a, b = Fixed(rng.normal(size=(4, 4))), Fixed(rng.normal(size=(4, 4)))
    result = divergence(a, b, "abcdabcdab", window=4, limit=9)
    assert a.lengths == b.lengths == [4, 4, 1]
    assert result.tokens == 9
    each, _ = compare_logits(a.table, b.table)
    assert result.mean == pytest.approx((2 * each.sum() + each[0]) / 9)
    assert result.maximum == pytest.approx(each.max())
    assert divergence(a, a, "abcd").top1 == 1
    with pytest.raises(RequestError, match="no text"):
        divergence(a, b, "")


def test_models_of_different_vocabularies_are_refused() -> None:
    a, b = Fixed(np.eye(4)), Fixed(np.eye(4))
    b.tokenize = lambda text: [0] * len(text)  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="vocabular"):
        divergence(a, b, "abc")


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary() -> None:
    model = Fixed(np.zeros((4, 4)))
    result = perplexity(model, "abcd" * 5, window=8)
    assert result.value == pytest.approx(4)
    assert result.error == pytest.approx(0, abs=1e-6)
    assert result.tokens == 2 * 3, "positions 4 to 6 of each of two windows; the last four tokens are left over"


def test_perplexity_scores_the_second_half_and_places_bos() -> None:
    probability = np.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.4, 0.2, 0.2], [0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
    model = Fixed(np.log(probability))
    seen = []
    model.logits = lambda ids: (seen.append(list(ids)), model.table[np.asarray(ids)])[1]  # type: ignore[method-assign]
    result = perplexity(model, "aabbccdd", window=4, bos=3)
    assert seen == [[3, 0, 1, 1], [3, 2, 3, 3]]
    expected = -(math.log(0.4) + math.log(0.4)) / 2
    assert result.value == pytest.approx(math.exp(expected), rel=1e-6)
    with pytest.raises(RequestError, match="two windows"):
        perplexity(model, "abc", window=4)
