"""Sequences through the engine, on a processor that checks every key a token may see and predicts by arithmetic."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from engine_checker import GREEDY, NONE, VOCABULARY, Checker, TwoRegimes, engine, expected, following, run
from numpy.typing import NDArray

from phiquant.engine import Engine, ModelDraft, PromptLookup, Sampling, Sequence
from phiquant.engine.draft import LONGEST, Pace
from phiquant.errors import ContextError, KernelError, RequestError, TokenError
from phiquant.kernels.ops import Capacity


def test_a_long_prompt_goes_in_chunks() -> None:
    e, checker = engine()
    prompt = [i % VOCABULARY for i in range(100)]
    assert run(e, prompt, 5).generated == expected(prompt, 5)
    assert [len(s.tokens) for s in checker.steps] == [24, 24, 24, 24, 4, 1, 1, 1, 1]


def test_ends() -> None:
    e, _ = engine()
    first, second = expected([1, 2], 2)
    assert run(e, [1, 2], 9, end_ids=frozenset({second})).generated == [first, second]
    assert run(e, [1, 2], 9, end_ids=frozenset({second})).finish == "stop"
    assert run(e, [1, 2], 3).finish == "length"
    full = run(e, [3] * 150, None)
    assert (len(full.ids), full.finish) == (160, "length")


def test_refusals_come_before_any_work() -> None:
    e, checker = engine()
    for prompt, sampling, error in (
        ([1] * 160, GREEDY, ContextError),
        ([1] * 161, None, ContextError),
        ([1, VOCABULARY], GREEDY, TokenError),
        ([-1], GREEDY, TokenError),
    ):
        with pytest.raises(error):
            e.submit(Sequence(prompt, sampling))
    with pytest.raises(RequestError, match="empty"):
        Sequence([], GREEDY)
    assert checker.steps == []


def test_all_logits() -> None:
    e, checker = engine(outputs=10)
    prompt = [7 * i % VOCABULARY for i in range(60)]
    run(e, prompt, 1)
    for _ in range(2):  # what is cached is not used, because every row is wanted
        sequence = Sequence(prompt, None)
        e.submit(sequence)
        e.advance(sequence, 60)
        assert sequence.logits is not None
        assert sequence.logits.argmax(axis=1).tolist() == [following(prompt[: i + 1], False) for i in range(60)]
    assert max(len(s.outputs) for s in checker.steps) == 10


def test_logits_go_to_a_sink_from_the_first_that_is_wanted() -> None:
    e, checker = engine(outputs=10, sequences=2, pages=20)
    prompt = [7 * i % VOCABULARY for i in range(60)]
    seen: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}

    def sink(name: str, position: int, rows: NDArray[np.float32]) -> None:
        seen[name] += [(position + i, int(row.argmax())) for i, row in enumerate(rows)]

    jobs = [Sequence(prompt, None, sink=partial(sink, name), first=37) for name in seen]
    for job in jobs:
        e.submit(job)
    while jobs[0].finish is None or jobs[1].finish is None:
        e.step(jobs[0] if jobs[0].finish is None else jobs[1])
    wanted = [(i, following(prompt[: i + 1], False)) for i in range(37, 60)]
    assert seen == {"a": wanted, "b": wanted}
    assert all(job.logits is None for job in jobs)
    assert max(len(s.outputs) for s in checker.steps) == 10
    assert max(len(set(s.slots.tolist())) for s in checker.steps) == 2, "both are in one step"
    assert sum(len(s.tokens) for s in checker.steps) == 120
    steps = len(checker.steps)
    e.step(jobs[0])
    assert len(checker.steps) == steps, "it has ended"


def test_a_prefix_is_computed_once() -> None:
    e, checker = engine()
    prompt = [3 * i % VOCABULARY for i in range(40)]
    run(e, prompt, 2)
    before = sum(len(s.tokens) for s in checker.steps)
    again = run(e, [*prompt, 9, 9], 2)
    assert again.shared == 40
    assert again.generated == expected([*prompt, 9, 9], 2)
    assert sum(len(s.tokens) for s in checker.steps) - before == 3


def test_the_border_is_crossed_by_beginning_again() -> None:
    e, checker = engine(border=50)
    prompt = [5] * 45
    assert run(e, prompt, 20).generated == expected(prompt, 20, border=50)
    lengths = [len(s.tokens) for s in checker.steps]
    assert lengths == [24, 21, 1, 1, 1, 1, 1, 24, 24, 3] + [1] * 13
    assert run(e, [5] * 51, 3).shared == 45  # of the long pages; short ones would fail the check


def test_many_at_once_on_few_pages() -> None:
    """Preempted, batched, shared and resumed: everybody gets what they would get alone."""
    e, checker = engine(sequences=4, pages=12)
    prompts = [[i % 3] * (10 + 7 * i) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(run, e, prompt, 30) for prompt in prompts]
        assert [job.result().generated for job in jobs] == [expected(prompt, 30) for prompt in prompts]
    assert max(len(s.pages) for s in checker.steps) > 1


def test_generating_goes_before_prompts() -> None:
    e, checker = engine(sequences=2, pages=20)
    short, long = Sequence([1], GREEDY, max_tokens=10), Sequence([2] * 90, GREEDY, max_tokens=1)
    e.submit(long)
    e.submit(short)
    e.advance(long, 90)
    assert len(short.ids) > 2
    assert all(len(s.tokens) == 24 for s in checker.steps[:3])


def test_a_cancelled_sequence_leaves_its_pages_to_others() -> None:
    e, _ = engine(pages=10)
    for _ in range(5):
        sequence = Sequence([1] * 100, GREEDY)
        e.submit(sequence)
        e.advance(sequence, 100)
        e.cancel(sequence)
        assert sequence.finish == "cancelled"
    assert run(e, [2] * 150, None).finish == "length"


def test_an_interrupted_step_can_be_repeated() -> None:
    e, checker = engine()
    sequence = Sequence([4] * 60, GREEDY, max_tokens=5)
    e.submit(sequence)
    checker.fail_at = 2
    with pytest.raises(KeyboardInterrupt):
        e.advance(sequence, 60)
    while sequence.finish is None:
        e.advance(sequence, len(sequence.ids))
    assert sequence.generated == expected([4] * 60, 5)


def test_broken_logits_end_one_sequence() -> None:
    e, checker = engine()
    checker.broken = True
    with pytest.raises(KernelError, match="finite"):
        run(e, [1, 2, 3], 2)
    checker.broken = False
    assert run(e, [1, 2, 3], 2).generated == expected([1, 2, 3], 2)


class Even:
    """Allows even ids only."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> NDArray[np.bool_]:
        return np.arange(VOCABULARY) % 2 == 0

    def accept(self, token: int) -> None:
        self.taken.append(token)


def test_a_mask_is_asked_and_told() -> None:
    e, _ = engine()
    mask = Even()
    made = run(e, [1, 2, 3], 8, mask=mask).generated
    assert made == mask.taken
    assert all(token % 2 == 0 for token in made)


def test_closing_ends_those_that_wait() -> None:
    e, _ = engine()
    sequence = Sequence([1], GREEDY)
    e.submit(sequence)
    e.close()
    with pytest.raises(RequestError, match="closed"):
        e.advance(sequence, 1)


class Guesser:
    """Knows the truth, and says it with a chance."""

    seconds = 0.0

    def __init__(self, chance: float, border: int = 1 << 30) -> None:
        self.chance, self.border, self.rng = chance, border, np.random.default_rng(1)
        self.asked: list[int] = []

    def draft(self, ids, most):
        self.asked.append(most)
        known = list(ids)
        for _ in range(most):
            known.append(following(known, len(known) > self.border))
        wrong = self.rng.random(most) >= self.chance
        return [(t + 1) % VOCABULARY if w else t for t, w in zip(known[len(ids) :], wrong, strict=True)]


@pytest.fixture
def eager(monkeypatch):
    """As many guesses as there may be, whatever steps take."""
    monkeypatch.setattr(Pace, "guesses", lambda self, chance, seconds, most: max(most, 0))


@pytest.mark.parametrize("chance", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize("border", [1 << 30, 40, 41, 47])
@pytest.mark.usefixtures("eager")
def test_the_same_tokens_come(chance, border):
    e, checker = engine(border)
    sequence = run(e, [1, 2, 3], 100, drafters=[Guesser(chance, border)])
    assert sequence.generated == expected([1, 2, 3], 100, border)
    assert (sequence.accepted == 0) == (chance == 0)
    assert sequence.accepted <= sequence.drafted
    if chance == 1 and border > 100:
        assert sequence.accepted == sequence.drafted
        assert len(checker.steps) == 1 + -(-99 // (LONGEST + 1))
    # a later sequence goes on from what was computed, and no wrong guess is part of it
    again = run(e, sequence.ids[:60], 20)
    assert again.generated == expected(sequence.ids[:60], 20, border)


@pytest.mark.usefixtures("eager")
def test_the_context_ends_where_it_ends():
    e, _ = engine()
    full = run(e, [3] * 100, None, drafters=[Guesser(1)])
    assert (len(full.ids), full.finish) == (160, "length")
    assert full.generated == expected([3] * 100, 60)


@pytest.mark.usefixtures("eager")
def test_an_end_token_among_the_guesses_ends_it():
    e, _ = engine()
    truth = expected([5, 6], 12)
    end = truth[-1]
    length = truth.index(end) + 1
    sequence = run(e, [5, 6], 40, end_ids=frozenset({end}), drafters=[Guesser(1)])
    assert (sequence.generated, sequence.finish) == (truth[:length], "stop")


@pytest.mark.usefixtures("eager")
def test_no_more_guesses_than_there_is_room_for():
    e, checker = engine(tokens=4, outputs=3)
    guesser = Guesser(1)
    assert run(e, [1], 30, drafters=[guesser]).generated == expected([1], 30)
    assert max(guesser.asked) == 2
    assert max(len(s.tokens) for s in checker.steps) == 3


@pytest.mark.usefixtures("eager")
def test_whoever_shares_a_step_does_not_guess():
    e, checker = engine(sequences=2, pages=20)
    one, two = (Sequence([i], GREEDY, max_tokens=20, drafters=[Guesser(1)]) for i in (1, 2))
    for sequence in (one, two):
        e.submit(sequence)
    for sequence in (one, two):
        while sequence.finish is None:
            e.advance(sequence, len(sequence.ids))
    assert one.generated == expected([1], 20)
    assert two.generated == expected([2], 20)
    assert one.drafted == two.drafted == 0
    assert max(len(s.tokens) for s in checker.steps) == 2


@pytest.mark.usefixtures("eager")
def test_masks_see_every_token_once():
    class Even:
        def __init__(self):
            self.seen = []

        def allowed(self):
            return np.arange(VOCABULARY) % 2 == 0

        def accept(self, token):
            self.seen.append(token)

    def generated(*drafters):
        mask = Even()
        sequence = run(engine()[0], [9], 25, mask=mask, drafters=drafters)
        assert mask.seen == sequence.generated
        return sequence.generated

    assert generated() == generated(Guesser(0.7))


@pytest.mark.usefixtures("eager")
def test_a_smaller_model_guesses():
    e, checker = engine()
    small = Checker(Capacity(tokens=24, outputs=1, sequences=1, page_tokens=16, pages=8, pages_per_sequence=8))
    drafter = ModelDraft(Engine(small, TwoRegimes(), 120, NONE))
    sequence = run(e, [4] * 30, 110, drafters=[drafter])
    assert sequence.generated == expected([4] * 30, 110)
    assert sequence.accepted == sequence.drafted > 60  # until its context ends
    assert drafter.seconds > 0
    assert len(checker.steps) < 50
    assert drafter.draft([1] * 120, 3) == []


@pytest.mark.usefixtures("eager")
def test_chance_depends_on_the_position_alone():
    sampled = Sampling(1.0, top_k=0, top_p=1, min_p=0, seed=3)
    found = []
    for drafters in ([], [PromptLookup()], [Guesser(0.3)]):
        e, _ = engine()
        sequence = Sequence([1, 2, 1, 2, 1, 2], sampled, max_tokens=60, drafters=drafters)
        e.submit(sequence)
        e.advance(sequence, 65)
        found.append(sequence.generated)
    assert found[0] == found[1] == found[2]
