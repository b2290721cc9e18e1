"""Figures and their errors, against NumPy's own and against what repetition shows."""

import numpy as np
import pytest

from phiquant.eval.statistics import Comparison, Divergence, Estimate, Perplexity, TokenProbabilities

RNG = np.random.default_rng(7)


def test_an_estimate_is_mean_and_standard_error() -> None:
    values = RNG.normal(3, 2, 1000)
    found = Estimate.mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / np.sqrt(1000))
    assert Estimate.mean(np.array([5.0])) == Estimate(5.0, 0.0)


def test_perplexity_of_losses() -> None:
    losses = RNG.exponential(2, 500)
    found = Perplexity.of(losses)
    assert found.value == pytest.approx(np.exp(losses.mean()))
    assert found.error == pytest.approx(np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(500))
    assert found.tokens == 500


def test_divergence_has_percentiles_and_the_error_of_a_share() -> None:
    values, same = RNG.exponential(0.01, 2001), RNG.random(2001) < 0.9
    found = Divergence.of(values, same)
    ordered = np.sort(values)
    assert found.median == ordered[1000]
    assert (found.minimum, found.maximum) == (ordered[0], ordered[-1])
    assert found.percentiles[99.9] == pytest.approx(ordered[1998])
    assert found.percentiles[10.0] == pytest.approx(ordered[200])
    assert found.top1_error == pytest.approx(np.sqrt(found.top1 * (1 - found.top1) / 2000))
    assert found.mean == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / np.sqrt(2001))


def test_errors_of_ratio_and_difference_are_what_repetition_shows() -> None:
    """Many texts drawn alike: the spread of their figures is the error that one of them tells."""
    found = []
    for _ in range(2000):
        base = RNG.exponential(2, 200)
        other = base + RNG.normal(0.02, 0.2, 200)
        found.append(Comparison.of(other, base, np.full(200, 0.1), np.ones(200, np.bool_)))
    for name in ("log_ratio", "ratio", "difference"):
        figures = [getattr(c, name) for c in found]
        spread = np.std([f.value for f in figures])
        assert np.mean([f.error for f in figures]) == pytest.approx(spread, rel=0.1), name
    one = found[0]
    assert one.ratio.value == pytest.approx(one.perplexity.value / one.base_perplexity.value)
    assert one.log_ratio.value == pytest.approx(np.log(one.ratio.value))
    assert one.difference.value == pytest.approx(one.perplexity.value - one.base_perplexity.value)


def test_correlation_is_pearson_s() -> None:
    base = RNG.exponential(2, 300)
    other = base + RNG.normal(0, 0.5, 300)
    found = Comparison.of(other, base, np.zeros(300), np.ones(300, np.bool_))
    assert found.correlation == pytest.approx(np.corrcoef(other, base)[0, 1])
    flat = np.full(300, 2.0)
    assert Comparison.of(flat, base, np.zeros(300), np.ones(300, np.bool_)).correlation is None


def test_probabilities_of_the_tokens_that_came() -> None:
    differences = RNG.normal(0.01, 0.03, 401)
    found = TokenProbabilities.of(differences)
    assert found.mean.value == pytest.approx(differences.mean())
    assert found.rms.value == pytest.approx(np.sqrt((differences**2).mean()))
    assert found.rms.error == pytest.approx(0.5 / found.rms.value * (differences**2).std(ddof=1) / np.sqrt(401))
    assert found.percentiles[25.0] == pytest.approx(np.sort(differences)[100])
    assert TokenProbabilities.of(np.zeros(5)).rms == Estimate(0.0, 0.0)
    ours = Comparison.of(np.log([2.0, 4.0]), np.log([4.0, 4.0]), np.zeros(2), np.ones(2, np.bool_)).probabilities
    assert ours.maximum == pytest.approx(0.25), "from 1/4 to 1/2"
