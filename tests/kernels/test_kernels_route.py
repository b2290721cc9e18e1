"""Route against its definition: choices equal for every token, and the order in which what is routed is put."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phiquant.errors import KernelError
from phiquant.kernels import ops
from phiquant.kernels.cpu import route
from phiquant.kernels.reference import ReferenceBackend

pytestmark = pytest.mark.cpu


def defined(logits: NDArray[np.float32], used: int, jitter: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What the reference backend chooses: experts and weights [tokens, used]."""
    r = ops.Recorder(ops.AttentionShape(1, 1, 2, 2, 1.0), 1)
    rows, last = r.buffer("logits", logits.shape[1]), r.buffer("last", logits.shape[1], "outputs")
    made = r.route(rows, used, jitter)
    r.select(rows, last)
    executable = ReferenceBackend().prepare(r.finish(last), ops.Capacity())
    executable._rows[id(rows)] = logits
    executable._route(made, None)  # type: ignore[arg-type]
    return executable._routes[id(made)]


def routed(machine, logits, tokens, used, jitter, target=None, threads=2) -> route.Routes:
    """Run, in memory filled with nonsense."""
    region = machine.region(logits, tokens)
    made = route.Routes.of(logits.shape[1], used, len(logits), region.count)
    for array in (made.chosen, made.starts, made.order):
        array[:] = -(1 << 30)
    made.weights[:] = np.nan
    machine.run(route.bind(region, made, jitter, target), threads=threads)
    return made


def check_order(made: route.Routes, count: int) -> None:
    """Every route once, expert by expert, ascending within each."""
    assert made.starts[0] == 0
    assert made.starts[-1] == count
    assert sorted(made.order[:count].tolist()) == list(range(count))
    for expert in range(made.experts):
        mine = made.order[made.starts[expert] : made.starts[expert + 1]]
        assert np.array_equal(mine, np.flatnonzero(made.chosen[:count] == expert))
    assert (made.order[count:] < 0).all()
    assert (made.chosen[count:] < 0).all()
    assert np.isnan(made.weights[count:]).all()


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 40),
    share=st.floats(0, 1),
    tokens=st.integers(0, 30),
    spare=st.integers(0, 2),
    jitter=st.sampled_from([0.0, 0.01, 0.3, 2.0]),
    spread=st.sampled_from([1e-6, 0.02, 1.0, 30.0]),
    shift=st.sampled_from([0.0, -8.0, 8.0]),
    coarse=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_choices_are_those_of_the_reference(
    each_target, machine, experts, share, tokens, spare, jitter, spread, shift, coarse, threads, seed
) -> None:
    used = 1 + int(share * (min(experts, 6) - 1))
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((tokens + spare, experts)) * spread + shift).astype(np.float32)
    if coarse:  # many that are equal, and zeros
        logits = np.rint(logits).astype(np.float32)
    made = routed(machine, logits, tokens, used, jitter, each_target, threads)
    chosen, weights = defined(logits[:tokens], used, jitter)
    count = tokens * used
    assert np.array_equal(made.chosen[:count], chosen.reshape(-1))
    np.testing.assert_allclose(made.weights[:count], weights.reshape(-1), rtol=1e-6)
    check_order(made, count)


def test_the_first_of_equals_is_chosen_and_is_out_of_the_second_choice(machine) -> None:
    logits = np.array([[1, 5, 5, 5], [-3, -3, -3, -3], [0, 0, 0, -1]], np.float32)
    made = routed(machine, logits, 3, 2, 0.01)
    assert made.chosen.reshape(3, 2).tolist() == [[1, 2], [0, 1], [0, 1]]
    # All within the jitter share; the second is weighed among those left.
    np.testing.assert_allclose(made.weights.reshape(3, 2)[:2], [[1 / 3, 1 / 2], [1 / 4, 1 / 3]], rtol=1e-6)


def test_what_is_within_the_jitter_is_told_to_the_last_bit(machine) -> None:
    """Distances around 2 * jitter, computed as the reference does, where float32 could not tell them apart."""
    rng = np.random.default_rng(3)
    top = rng.uniform(1, 50, 4000).astype(np.float32)
    near = (top * np.float32(1 - 0.02)).view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)
    logits = np.concatenate([top[:, None], near.view(np.float32)], axis=1)
    made = routed(machine, logits, len(logits), 1, 0.01)
    _, weights = defined(logits, 1, 0.01)
    assert len(np.unique((1 / weights).round(1))) > 3, "the border lies among them"
    np.testing.assert_allclose(made.weights, weights[:, 0], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_chosen_first_or_last_and_weighs_none(machine, bad: float) -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((64, 6)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.3] = bad
    logits[7] = bad
    made = routed(machine, logits, 64, 3, 0.01)
    with np.errstate(invalid="ignore"):
        chosen, weights = defined(logits, 3, 0.01)
    assert np.array_equal(made.chosen, chosen.reshape(-1))
    np.testing.assert_allclose(made.weights, weights.reshape(-1), rtol=1e-6)
    assert np.isnan(made.weights).any()
    check_order(made, 192)


def test_experts_are_different_ones_whatever_the_logits(machine) -> None:
    rng = np.random.default_rng(5)
    logits = rng.choice(np.array([-np.inf, np.inf, np.nan, 0, -0.0, 1e-45, -3e38, 3e38], np.float32), (300, 5))
    made = routed(machine, logits, 300, 5, 0.01)
    assert np.array_equal(np.sort(made.chosen.reshape(300, 5), axis=1), np.tile(np.arange(5), (300, 1)))
    with np.errstate(all="ignore"):
        chosen, _ = defined(logits, 5, 0.01)
    assert np.array_equal(made.chosen, chosen.reshape(-1))
    check_order(made, 1500)


def test_all_to_one_expert_and_none_to_the_others(machine) -> None:
    logits = np.zeros((50, 4), np.float32)
    logits[:, 2] = 9
    made = routed(machine, logits, 50, 1, 0.01)
    assert made.starts.tolist() == [0, 0, 0, 50, 50]
    assert made.order.tolist() == list(range(50))
    assert (made.weights == 1).all()


def test_what_does_not_fit_is_refused(machine) -> None:
    region = machine.region(np.zeros((3, 8), np.float32), 3)
    for experts, tokens, jitter in ((7, 3, 0.01), (8, 2, 0.01), (8, 3, -1.0), (8, 3, float("nan"))):
        with pytest.raises(KernelError, match="cannot route"):
            route.bind(region, route.Routes.of(experts, 2, tokens, region.count), jitter)
    for used in (0, 9):
        with pytest.raises(KernelError, match="cannot be chosen"):
            route.Routes.of(8, used, 3, 0)
