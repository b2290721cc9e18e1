"""Figures of a measurement, each with its standard error, as llama-perplexity defines them.

error of a mean     sqrt((E[x²] - E[x]²) / (n - 1))
error of f(x)       |f'| times the error of x
error of x - y      sqrt(error(x)² + error(y)² - 2 covariance), the covariance likewise divided by n - 1
percentile          linear between the two nearest of the sorted values
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Comparison", "Divergence", "Estimate", "Perplexity", "TokenProbabilities"]

Floats = NDArray[np.float64]

_DIVERGENCE_PERCENTS: Final = (99.9, 99.0, 95.0, 90.0, 10.0, 5.0, 1.0, 0.1)
_PROBABILITY_PERCENTS: Final = (99.9, 99.0, 95.0, 90.0, 75.0, 25.0, 10.0, 5.0, 1.0, 0.1)


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; zero if one value says nothing of it."""

    value: float
    error: float

    @classmethod
    def mean(cls, values: Floats) -> Self:
        """Of the mean of some values."""
        value = math.fsum(values) / len(values)
        return cls(value, math.sqrt(_spread(values, value, values, value)))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood.

    Attributes:
        value: the perplexity.
        error: its standard error.
        tokens: how many predictions were scored.
    """

    value: float
    error: float
    tokens: int

    @classmethod
    def of(cls, losses: Floats) -> Self:
        """From negative log-likelihoods."""
        mean = Estimate.mean(losses)
        value = math.exp(mean.value)
        return cls(value, value * mean.error, len(losses))


@dataclass(frozen=True)
class Divergence:
    """How far one model's predictions are from another's, in nats per token.

    Attributes:
        mean: of KL(base ‖ other).
        maximum: the largest of a single position.
        top1: share of positions, 0 to 1, at which both find the same token likeliest.
        tokens: positions compared.
        error: standard error of the mean.
        top1_error: standard error of `top1`.
        median: of the positions.
        minimum: the least of a single position.
        percentiles: value below which so many percent of the positions are.
    """

    mean: float
    maximum: float
    top1: float
    tokens: int
    error: float
    top1_error: float
    median: float
    minimum: float
    percentiles: Mapping[float, float]

    @classmethod
    def of(cls, values: Floats, same: NDArray[np.bool_]) -> Self:
        """From the divergence of each position, and whether the likeliest token was the same there."""
        mean, top1, count = Estimate.mean(values), float(same.mean()), len(values)
        return cls(
            mean=mean.value,
            maximum=float(values.max()),
            top1=top1,
            tokens=count,
            error=mean.error,
            top1_error=math.sqrt(top1 * (1 - top1) / max(count - 1, 1)),
            median=float(np.median(values)),
            minimum=float(values.min()),
            percentiles=_percentiles(values, _DIVERGENCE_PERCENTS),
        )


@dataclass(frozen=True)
class TokenProbabilities:
    """How the probability of the token that came changed, 0 to 1: that of the model less that of the base.

    Attributes:
        mean: of the differences.
        rms: root of their mean square.
        maximum: the largest gain.
        median: of the differences.
        minimum: the largest loss, negative.
        percentiles: difference below which so many percent of the positions are.
    """

    mean: Estimate
    rms: Estimate
    maximum: float
    median: float
    minimum: float
    percentiles: Mapping[float, float]

    @classmethod
    def of(cls, differences: Floats) -> Self:
        """From the difference at each position."""
        square = Estimate.mean(differences**2)
        rms = math.sqrt(square.value)
        return cls(
            mean=Estimate.mean(differences),
            rms=Estimate(rms, 0.5 / rms * square.error if rms else 0.0),
            maximum=float(differences.max()),
            median=float(np.median(differences)),
            minimum=float(differences.min()),
            percentiles=_percentiles(differences, _PROBABILITY_PERCENTS),
        )


@dataclass(frozen=True)
class Comparison:
    """A model beside its base on the same text: what `llama-perplexity --kl-divergence` prints.

    Attributes:
        perplexity: of the model.
        base_perplexity: of the base.
        correlation: of the logarithms of both, -1 to 1; None if one of them does not vary.
        log_ratio: ln(perplexity / base's).
        ratio: perplexity / base's.
        difference: perplexity less base's.
        divergence: of the model's predictions from the base's.
        probabilities: of the tokens that came.
    """

    perplexity: Perplexity
    base_perplexity: Perplexity
    correlation: float | None
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    divergence: Divergence
    probabilities: TokenProbabilities

    @classmethod
    def of(cls, losses: Floats, base_losses: Floats, divergence: Floats, same: NDArray[np.bool_]) -> Self:
        """From each position's negative log-likelihoods, divergence, and whether the likeliest token is the same."""
        log, base_log = Estimate.mean(losses), Estimate.mean(base_losses)
        perplexity, base = Perplexity.of(losses), Perplexity.of(base_losses)
        covariance = _spread(losses, log.value, base_losses, base_log.value)
        varied = log.error * base_log.error
        log_ratio = log.value - base_log.value
        log_error = math.sqrt(max(log.error**2 + base_log.error**2 - 2 * covariance, 0.0))
        spread = perplexity.error**2 + base.error**2 - 2 * perplexity.value * base.value * covariance
        return cls(
            perplexity=perplexity,
            base_perplexity=base,
            correlation=covariance / varied if varied else None,
            log_ratio=Estimate(log_ratio, log_error),
            ratio=Estimate(math.exp(log_ratio), math.exp(log_ratio) * log_error),
            difference=Estimate(perplexity.value - base.value, math.sqrt(max(spread, 0.0))),
            divergence=Divergence.of(divergence, same),
            probabilities=TokenProbabilities.of(np.exp(-losses) - np.exp(-base_losses)),
        )


def _spread(x: Floats, x_mean: float, y: Floats, y_mean: float) -> float:
    """Covariance of the means of x and y."""
    return math.fsum((x - x_mean) * (y - y_mean)) / len(x) / max(len(x) - 1, 1)


def _percentiles(values: Floats, percents: tuple[float, ...]) -> dict[float, float]:
    return dict(zip(percents, np.percentile(values, percents).tolist(), strict=True))
