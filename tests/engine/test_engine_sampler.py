"""Sampling against the plainest possible definition, and its rules."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.engine import Sampling, sample
from phiquant.engine.truncation import largest
from phiquant.errors import KernelError, RequestError


def plain_candidates(logits: np.ndarray, s: Sampling) -> list[int]:
    """Ids that remain, by the definition of each step, likeliest first."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if s.top_k:
        order = order[: s.top_k]
    weights = [math.exp(float(logits[i]) - float(logits[order[0]])) for i in order]
    if s.top_p < 1:
        total, reached, count = sum(weights), 0.0, 0
        while reached < s.top_p * total and count < len(order):
            reached += weights[count]
            count += 1
        order, weights = order[: max(count, 1)], weights[: max(count, 1)]
    return [i for i, w in zip(order, weights, strict=True) if w >= s.min_p * weights[0]]


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(2, 300),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_only_what_the_rules_leave_is_chosen(seed: int, size: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)
    s = Sampling(1.0, top_k, top_p, min_p, seed=seed)
    expected = set(plain_candidates(logits, s))
    chosen = {sample(logits, [0] * n, s) for n in range(1, 30)}
    assert chosen <= expected


@pytest.mark.parametrize("k", [0, 1, 40, 499, 500, 501, 5000])
def test_top_k_of_a_large_vocabulary(k: int) -> None:
    scores = np.random.default_rng(k).normal(size=32064).astype(np.float32).round(2)  # with many equals
    scores[::7] = -np.inf
    order = np.lexsort((np.arange(len(scores)), -scores))
    expected = order[: k or len(scores)]
    assert sorted(largest(scores, k)) == sorted(expected[scores[expected] > -np.inf])


def test_frequencies_follow_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for temperature in (0.5, 1.0, 2.0):
        s = Sampling(temperature, top_k=0, top_p=1.0, min_p=0.0, seed=7)
        drawn = np.bincount([sample(logits, [0] * n, s) for n in range(4000)], minlength=4) / 4000
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        assert np.abs(drawn - expected).max() < 0.03


def test_chance_depends_on_seed_and_position_alone() -> None:
    logits = np.zeros(1000, np.float32)
    s = Sampling(1.0, 0, 1.0, 0.0, seed=5)
    assert sample(logits, [1, 2, 3], s) == sample(logits, [7, 8, 9], s)
    assert len({sample(logits, [0] * n, s) for n in range(1, 60)}) > 40
    other = Sampling(1.0, 0, 1.0, 0.0, seed=6)
    assert [sample(logits, [0] * n, s) for n in range(9)] != [sample(logits, [0] * n, other) for n in range(9)]


def test_greedy_takes_the_likeliest_and_leaves_the_logits_alone() -> None:
    logits = np.array([1, 5, 3], np.float32)
    assert sample(logits, [1], Sampling(0, repeat_penalty=4.0)) == 2
    assert logits.tolist() == [1, 5, 3]


def test_repetition_penalty_looks_at_the_last_64_tokens() -> None:
    logits = np.array([2.0, 1.9, -0.5], np.float32)
    s = Sampling(0, repeat_penalty=1.2)
    assert sample(logits, [0], s) == 1
    assert sample(logits, [0] + [2] * 64, s) == 0
    negative = np.array([-1.0, -1.1], np.float32)
    assert sample(negative, [0], s) == 1  # multiplied, since dividing would help it


def test_unused_and_forbidden_ids_never_come() -> None:
    logits = np.array([9, 8, 7, 6], np.float32)
    unused = np.array([0])
    assert sample(logits, [0], Sampling(0), unused=unused) == 1
    allowed = np.array([True, False, False, True])
    for n in range(20):
        assert sample(logits, [0] * n, Sampling(5.0, 0, 1.0, 0.0), unused=unused, allowed=allowed) == 3
    with pytest.raises(RequestError, match="no token"):
        sample(logits, [0], Sampling(), unused=unused, allowed=np.array([True, False, False, False]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = np.array([1, bad, 2], np.float32)
    with pytest.raises(KernelError):
        sample(logits, [0], Sampling(0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repeat_penalty": 0.0},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_parameters_that_make_no_sense_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
