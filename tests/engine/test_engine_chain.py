"""Every step of the chain against a definition written out by hand, and what their order does."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.engine import CHAIN, Sampler, Sampling, parse_chain, sample
from phiquant.engine import truncation as steps
from phiquant.engine.logprobs import token_logprob
from phiquant.engine.repetition import dry, penalize
from phiquant.engine.truncation import Candidates
from phiquant.errors import RequestError

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def candidates(logits: Sequence[float]) -> Candidates:
    return Candidates(np.arange(len(logits)), np.asarray(logits, np.float64))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def random_logits(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("p", [0.05, 0.4, 0.9, 0.999])
def test_typical(seed: int, p: float) -> None:
    logits = random_logits(seed)
    probability = softmax(logits)
    entropy = -(probability * np.log(probability)).sum()
    order = sorted(range(50), key=lambda i: abs(-math.log(probability[i]) - entropy))
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += probability[i]
        if total > p:
            break
    found = steps.typical(candidates(logits), Sampling(typical_p=p), 0)
    assert sorted(found.ids) == sorted(kept)


@pytest.mark.parametrize("n", [0.3, 1.0, 2.5])
def test_top_n_sigma(n: float) -> None:
    logits = random_logits(1)
    found = steps.top_n_sigma(candidates(logits), Sampling(top_n_sigma=n), 0)
    assert sorted(found.ids) == [i for i in range(50) if logits[i] >= logits.max() - n * logits.std()]
    assert len(steps.top_n_sigma(candidates(logits), Sampling(top_n_sigma=0), 0).ids) == 50


def test_xtc_leaves_the_last_of_the_likely_and_all_others() -> None:
    logits = np.log([0.4, 0.05, 0.3, 0.2, 0.05])
    s = Sampling(xtc_probability=0.5, xtc_threshold=0.1)
    assert sorted(steps.xtc(candidates(logits), s, 0.4).ids) == [1, 3, 4]
    assert len(steps.xtc(candidates(logits), s, 0.6).ids) == 5  # not this time
    only = Sampling(xtc_probability=1.0, xtc_threshold=0.35)
    assert len(steps.xtc(candidates(logits), only, 0.0).ids) == 5  # one likely token stays
    assert len(steps.xtc(candidates(logits), Sampling(xtc_probability=1.0, xtc_threshold=0.6), 0.0).ids) == 5


def test_xtc_happens_as_often_as_it_should() -> None:
    logits = np.log(np.array([0.8, 0.2], np.float32))
    s = Sampling(1.0, xtc_probability=0.3, xtc_threshold=0.1, seed=3, **OFF)
    drawn = np.array([sample(logits, [0] * n, s) for n in range(4000)])
    assert abs((drawn == 1).mean() - (0.3 + 0.7 * 0.2)) < 0.025


def test_dynamic_temperature_goes_with_entropy() -> None:
    s = Sampling(1.0, dynatemp_range=0.5, dynatemp_exponent=2.0)
    logits = random_logits(4)
    p = softmax(logits)
    entropy = -(p * np.log(p)).sum() / math.log(50)
    expected = (logits - logits.max()) / (0.5 + 1.0 * entropy**2)
    assert np.allclose(steps.temperature(candidates(logits), s, 0).scores, expected)
    flat = steps.temperature(candidates(np.zeros(8)), s, 0)
    assert np.allclose(flat.scores, 0)
    assert steps.temperature(candidates(logits), Sampling(0.2, dynatemp_range=0.2), 0).ids.size >= 1


def test_a_tiny_temperature_is_no_division_by_zero() -> None:
    logits = np.array([0.0, 1.0, -700.0], np.float32)
    assert {sample(logits, [0] * n, Sampling(1e-308, **OFF)) for n in range(20)} == {1}  # type: ignore[arg-type]


def test_penalties() -> None:
    scores = np.array([2.0, -1.0, 3.0, 0.0], np.float32)
    penalize(scores, [0, 0, 1, 3], Sampling(repeat_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25))
    assert scores.tolist() == [1.0 - 0.5 - 0.5, -2.0 - 0.75, 3.0, -0.75]
    for last, expected in ((0, [2.0, 1.0]), (1, [2.0, 0.5]), (-1, [1.0, 0.5])):
        scores = np.array([2.0, 1.0], np.float32)
        penalize(scores, [0] * 99 + [1], Sampling(repeat_penalty=2.0, repeat_last_n=last))
        assert scores.tolist() == expected


def plain_dry(ids: list[int], s: Sampling, size: int) -> np.ndarray:
    """By the definition: for every token, the longest end of the text that it would repeat."""
    text = ids if s.dry_penalty_last_n < 0 else ids[len(ids) - min(s.dry_penalty_last_n, len(ids)) :]
    reach = len(text)
    for at in range(len(text) - 1, -1, -1):
        ends = [at + 1 + len(t) for h, t in s.dry_breakers if h == text[at] and tuple(text[at + 1 :][: len(t)]) == t]
        if ends:
            reach = len(text) - max(ends)
            break
    taken = np.zeros(size)
    for end in range(1, len(text)):
        n = 0
        while n < end and n < reach and text[end - 1 - n] == text[len(text) - 1 - n]:
            n += 1
        single = any(h == text[end] and not t for h, t in s.dry_breakers)
        if n >= s.dry_allowed_length and n and not single:
            penalty = s.dry_multiplier * s.dry_base ** (n - s.dry_allowed_length)
            taken[text[end]] = max(taken[text[end]], penalty)
    return taken


@settings(deadline=None, max_examples=300)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    allowed=st.integers(1, 4),
    last=st.sampled_from([-1, 5, 20]),
    breakers=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=2).map(tuple)), max_size=2),
)
def test_dry(ids: list[int], allowed: int, last: int, breakers: list[tuple[int, tuple[int, ...]]]) -> None:
    s = Sampling(dry_multiplier=0.8, dry_allowed_length=allowed, dry_penalty_last_n=last, dry_breakers=tuple(breakers))
    scores = np.zeros(4, np.float32)
    dry(scores, ids, s)
    assert np.allclose(-scores, plain_dry(ids, s, 4), rtol=1e-6)


def test_dry_of_a_long_loop_stays_finite() -> None:
    scores = np.zeros(2, np.float32)
    dry(scores, [0, 1] * 3000, Sampling(dry_multiplier=1.0))
    assert np.isfinite(scores).all()
    assert scores[0] < -1e30


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("absurd", "forced"),
    [
        ({"logit_bias": ((5, 1e39),)}, {5}),
        ({"logit_bias": ((5, -1e39), (6, 1e300))}, {6}),
        ({"presence_penalty": -1e39}, {3, 15}),
        ({"frequency_penalty": -1e300}, {3, 15}),
        ({"repeat_penalty": 1e-39}, {15}),
        ({"repeat_penalty": 1e-300}, {15}),
        ({"presence_penalty": 1e308, "frequency_penalty": 1e308, "logit_bias": ((19, 1e39),)}, {19}),
        ({"dry_multiplier": 1e300, "dry_base": 1e300, "logit_bias": ((15, 1e39), (18, 1e39))}, {18}),
        (
            {
                "samplers": ("top_k", "penalties", "top_p"),
                "top_k": 2,
                "presence_penalty": 1e39,
                "logit_bias": ((3, 9.0), (15, 9.0)),
            },
            {3, 15},
        ),
    ],
)
def test_absurd_figures_choose_what_they_say(absurd: dict[str, Any], forced: set[int], temperature: float) -> None:
    logits = np.linspace(-1, 1, 20).astype(np.float32)
    found = {sample(logits, [3, *[15] * n], Sampling(temperature, **absurd)) for n in range(5, 25)}
    assert found <= forced


def test_what_is_forbidden_stays_so_whatever_penalties_give() -> None:
    scores = np.array([-np.inf, 0.0], np.float32)
    penalize(scores, [0, 1], Sampling(presence_penalty=-1e39))
    assert scores[0] == -np.inf
    assert np.isfinite(scores[1])


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_keeps_the_surprise_near_its_aim(version: int) -> None:
    """By what its memory says: it moves by eta times what the surprise among the tokens it kept missed the aim by."""
    logits = -1.1 * np.log(np.arange(1, 5001)).astype(np.float32)  # Zipf's law
    for aim in (2.0, 5.0):
        sampler = Sampler(Sampling(1.0, mirostat=version, mirostat_tau=aim, mirostat_eta=0.2, seed=1))
        ids = [0]
        for _ in range(600):
            ids.append(sampler.choose(logits, ids))
        assert abs(sampler._mu - 2 * aim) / (0.2 * 600) < 0.05
        assert len(set(ids)) > 5


def test_mirostat_2_step_by_step() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = Sampler(Sampling(1.0, mirostat=2, mirostat_tau=1.2, mirostat_eta=0.5, seed=4))
    assert sampler._mu == 2.4
    token = sampler.choose(logits, [0])
    assert token in (0, 1)  # the others surprise by 3 bits
    surprise = -math.log2((0.5, 0.25)[token] / 0.75)
    assert sampler._mu == pytest.approx(2.4 - 0.5 * (surprise - 1.2))


def test_a_bias_moves_a_token_and_forbids_one() -> None:
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    assert sample(logits, [0], Sampling(0, logit_bias=((0, 5.0),))) == 0
    assert sample(logits, [0], Sampling(0, logit_bias=((2, -math.inf),))) == 1
    with pytest.raises(RequestError, match="logit_bias names the token 3"):
        sample(logits, [0], Sampling(logit_bias=((3, 1.0),)))


def test_the_order_of_the_chain_matters() -> None:
    """Flattened first, more tokens are needed for the same share."""
    logits = np.log(np.array([0.9, 0.05, 0.03, 0.02], np.float32))
    first = Sampling(5.0, samplers=("temperature", "top_p"), **{**OFF, "top_p": 0.8}, seed=2)  # type: ignore[arg-type]
    last = Sampling(5.0, samplers=("top_p", "temperature"), **{**OFF, "top_p": 0.8}, seed=2)  # type: ignore[arg-type]
    assert {sample(logits, [0] * n, last) for n in range(50)} == {0}
    assert len({sample(logits, [0] * n, first) for n in range(50)}) > 1


def test_penalties_after_other_steps_act_on_what_is_left() -> None:
    logits = np.array([3.0, 2.9, 0.01], np.float32)
    s = Sampling(0, 2, samplers=("top_k", "penalties", "temperature"), repeat_penalty=1000.0)
    assert sample(logits, [0], s) == 1
    assert sample(logits, [0, 1], s) == 0  # the third has gone before


def test_names_of_steps() -> None:
    assert parse_chain("penalties;top-k;typ_p;temp") == ("penalties", "top_k", "typ_p", "temperature")
    assert parse_chain(["typical", "min_p"]) == ("typ_p", "min_p")
    assert parse_chain(";".join(CHAIN)) == CHAIN
    with pytest.raises(RequestError, match="no sampler 'topk'"):
        parse_chain("topk")


@pytest.mark.parametrize(
    "wrong",
    [
        {"typical_p": 1.5},
        {"xtc_probability": -0.1},
        {"presence_penalty": math.inf},
        {"dry_base": -1.0},
        {"dry_allowed_length": 1.5},
        {"mirostat": 3},
        {"mirostat_tau": 0.0},
        {"repeat_last_n": -2},
        {"min_tokens": True},
        {"samplers": ("top_q",)},
        {"logit_bias": ((1, math.inf),)},
        {"temperature": "hot"},
    ],
)
def test_parameters_that_make_no_sense_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


def test_logprobs_are_those_of_the_model() -> None:
    logits = random_logits(9, 300).astype(np.float32)
    logits[5] = -np.inf
    expected = np.log(softmax(logits.astype(np.float64)), where=logits > -np.inf, out=np.full(300, -np.inf))
    found = token_logprob(logits, 7, 3)
    assert found.logprob == pytest.approx(expected[7], abs=1e-6)
    best = np.argsort(-expected)[:3]
    assert [i for i, _ in found.top] == best.tolist()
    assert np.allclose([p for _, p in found.top], expected[best], atol=1e-6)
    assert token_logprob(logits, 7, 0).top == ()
