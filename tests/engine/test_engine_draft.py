"""What is guessed, how likely guesses are, and when they pay."""

import pytest

from phiquant.engine.draft import Odds, Pace, PromptLookup


def test_prompt_lookup():
    lookup = PromptLookup()
    assert lookup.draft([1, 2], 4) == []
    ids = [1, 2, 3, 4, 5, 1, 2, 3]
    assert lookup.draft(ids, 2) == [4, 5]
    assert lookup.draft(ids, 7) == [4, 5, 1, 2, 3, 4, 5]
    assert lookup.draft([*ids, 9, 1, 2, 3], 2) == [9, 1]  # the last place counts
    assert lookup.draft([*ids, 9, 1, 2, 3, 8], 2) == []
    assert PromptLookup().draft([7] * 5, 3) == [7] * 3


def test_odds():
    odds = Odds()
    assert odds.chance == 0.5
    for _ in range(50):
        odds.drafted(4, 4)
    assert odds.chance > 0.95
    for _ in range(30):
        odds.drafted(4, 0)
    assert odds.chance < 0.25
    for _ in range(300):
        odds.idled()
    assert odds.chance == pytest.approx(0.5, abs=0.01)


def test_pace():
    pace = Pace()
    assert pace.guesses(0.9, 0, 15) == 0  # nothing is known of the steps
    for _ in range(20):
        pace.timed(1, 0.08)
    assert pace.guesses(0.1, 0, 15) == 3  # and nothing of what guesses cost
    for _ in range(20):
        pace.timed(5, 0.08 + 4 * 0.008)
    assert pace.guesses(0.95, 0, 15) == 15
    assert 2 <= pace.guesses(0.7, 0, 15) <= 7
    assert pace.guesses(0.05, 0, 15) == 0
    assert pace.guesses(0.7, 0.06, 15) == 0  # a drafter that is too slow
    assert pace.guesses(0.95, 0, 0) == 0
