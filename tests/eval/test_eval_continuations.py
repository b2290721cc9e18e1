"""Continuations of two models, and where they part."""

import math
from pathlib import Path

import numpy as np
import pytest

from phiquant import LLM
from phiquant.completion import TokenLogprob
from phiquant.convert import convert, quantize
from phiquant.eval.continuations import Continuation, continued, parting, text_parting

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


def made(ids: tuple[int, ...], places: dict[int, list[tuple[int, float]]] | None = None) -> Continuation:
    tops = tuple(
        TokenLogprob(token, math.log(0.5), tuple((t, math.log(p)) for t, p in (places or {}).get(i, [])))
        for i, token in enumerate(ids)
    )
    return Continuation((1,), ids, tuple(f"{i}," for i in ids), tops, {i: str(i) for i in range(10)}, "length")


def test_where_they_part_and_how_sure_both_were() -> None:
    left = made((1, 2, 3, 4), {2: [(3, 0.5), (5, 0.25)]})
    right = made((1, 2, 5, 4), {2: [(5, 0.5), (3, 0.125)]})
    found = parting(left, right)
    assert found is not None
    assert (found.tokens, found.left, found.right) == (2, 3, 5)
    assert [(c.token, c.text) for c in found.candidates] == [(3, "3"), (5, "5")]
    assert [(c.left, c.right) for c in found.candidates] == [
        (pytest.approx(0.5), pytest.approx(0.125)),
        (pytest.approx(0.25), pytest.approx(0.5)),
    ]
    assert parting(left, left) is None


def test_one_that_ends_earlier_and_one_that_never_heard_of_a_token() -> None:
    found = parting(made((1, 2)), made((1, 2, 7)))
    assert found is not None
    assert (found.tokens, found.left, found.right) == (2, None, 7)
    assert [(c.token, c.left) for c in found.candidates] == [(7, None)]
    found = parting(made((1,), {0: [(1, 0.5)]}), made((2,), {0: [(2, 0.5)]}))
    assert found is not None
    assert {(c.token, c.left is None, c.right is None) for c in found.candidates} == {
        (1, False, True),
        (2, True, False),
    }


@pytest.mark.parametrize(
    ("left", "right", "same"), [("abc", "abd", 2), ("ab", "ab", None), ("ab", "abc", 2), ("x", "", 0)]
)
def test_texts_alone(left: str, right: str, same: int | None) -> None:
    assert text_parting(left, right) == same


@pytest.mark.cpu
def test_what_a_model_says_and_how_sure_it_was(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "f16.gguf", "f16", quiet=True)
    quantize(tmp_path / "f16.gguf", tmp_path / "q2.gguf", "Q2_K", quiet=True)
    prompt = "Once upon a time"
    counts: list[int] = []
    with LLM.load(tmp_path / "f16.gguf", context=128) as one, LLM.load(tmp_path / "q2.gguf", context=128) as two:
        ids = one.tokenize(prompt)
        left = continued(one, ids, counts.append, {"max_tokens": 24, "temperature": 0.0})
        right = continued(two, ids, options={"max_tokens": 24, "temperature": 0.0})
        plain = one.generate(ids, max_tokens=24, temperature=0.0)
        assert (left.text, left.ids, left.finish_reason) == (plain.text, plain.ids, plain.finish_reason)
        assert len(left.pieces) == len(left.ids) == counts[-1]
        found = parting(left, right)
        assert found is not None
        before = [*ids, *left.ids[: found.tokens]]
        assert left.ids[: found.tokens] == right.ids[: found.tokens]
        assert (left.ids[found.tokens], right.ids[found.tokens]) == (found.left, found.right)
        rows = [llm.logits(before)[-1].astype(np.float64) for llm in (one, two)]
    exact = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in rows]
    assert found.left == int(rows[0].argmax())
    assert found.right == int(rows[1].argmax())
    for candidate in found.candidates:
        for value, p in zip((candidate.left, candidate.right), exact, strict=True):
            assert value is None or value == pytest.approx(p[candidate.token], rel=1e-5)
