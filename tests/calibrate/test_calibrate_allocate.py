"""Allocation against all combinations, on small instances."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiquant.calibrate.allocate import Choice, allocate

choices = st.builds(Choice, st.integers(0, 60), st.floats(0, 10, allow_nan=False).map(lambda cost: round(cost, 3)))
instances = st.lists(st.lists(choices, min_size=1, max_size=5), min_size=1, max_size=5)


def total(items: list[list[Choice]], picked: list[int]) -> tuple[int, float]:
    taken = [item[i] for item, i in zip(items, picked, strict=True)]
    return sum(choice.bytes for choice in taken), sum(choice.cost for choice in taken)


def optimum(items: list[list[Choice]], budget: int) -> float:
    combinations = itertools.product(*(range(len(item)) for item in items))
    return min(cost for size, cost in (total(items, list(picked)) for picked in combinations) if size <= budget)


@given(instances, st.integers(0, 200), st.sampled_from([1, 32, 1000]))
def test_it_is_the_best_of_all_combinations(items: list[list[Choice]], spare: int, factor: int) -> None:
    items = [[Choice(choice.bytes * factor, choice.cost) for choice in item] for item in items]
    budget = sum(min(choice.bytes for choice in item) for item in items) + spare * factor
    size, cost = total(items, allocate(items, budget))
    assert size <= budget
    assert cost == pytest.approx(optimum(items, budget), abs=1e-9)


@given(instances, st.integers(0, 200), st.integers(1, 50))
def test_with_too_few_cells_it_keeps_the_budget_and_leaves_no_better_choice_that_fits(
    items: list[list[Choice]], spare: int, cells: int
) -> None:
    budget = sum(min(choice.bytes for choice in item) for item in items) + spare
    picked = allocate(items, budget, cells=cells)
    size, cost = total(items, picked)
    assert size <= budget
    assert cost >= optimum(items, budget) - 1e-9
    for item, now in zip(items, picked, strict=True):
        for choice in item:
            assert choice.cost >= item[now].cost or size - item[now].bytes + choice.bytes > budget


def test_coarse_units_come_near_the_best() -> None:
    items = [[Choice(2000 * 2**k + 7 * n + k, 4.0 ** (5 - k) * (1 + n % 7)) for k in range(6)] for n in range(40)]
    budget = 40 * 2000 * 6
    exact, coarse = (total(items, allocate(items, budget, cells=cells))[1] for cells in (1 << 25, 40 * 2000))
    assert exact <= coarse <= 1.01 * exact


def test_what_is_impossible_is_refused() -> None:
    with pytest.raises(ValueError, match="30 bytes at least, and the budget is 29"):
        allocate([[Choice(10, 1.0)], [Choice(20, 0.0), Choice(40, 0.0)]], 29)
    with pytest.raises(ValueError, match="without a choice"):
        allocate([[]], 5)
