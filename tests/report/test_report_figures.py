"""Short names, the Pareto front, axes."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiquant.report.figures import labels, pareto, placed
from phiquant.report.scales import linear, logarithmic, short
from phiquant.report.types import bits_of, hue


def file(size: int, divergence: float) -> Any:
    return SimpleNamespace(size=size, divergence=divergence)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["phi-Q4_K_M", "phi-Q2_K"], ["Q4_K_M", "Q2_K"]),
        (["phi-mini-F16", "phi-mini-Q8_0"], ["F16", "Q8_0"]),
        (["a", "b"], ["a", "b"]),
        (["phi-Q4_K_M"], ["phi-Q4_K_M"]),
        (["phi-Q4", "phi"], ["phi-Q4", "phi"]),
        (["x/phi", "y/phi"], ["x/phi.gguf", "y/phi.gguf"]),
    ],
)
def test_labels_are_short_and_differ(names: list[str], found: list[str]) -> None:
    assert labels([Path(f"{name}.gguf") for name in names]) == found


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=20))
def test_the_front_is_what_nothing_is_superior_to(pairs: list[tuple[int, int]]) -> None:
    files = [file(size, divergence) for size, divergence in pairs]
    front = pareto(files)
    for one in files:
        beaten = any(
            o.size <= one.size
            and o.divergence <= one.divergence
            and (o.size, o.divergence) != (one.size, one.divergence)
            for o in files
        )
        assert any(one is kept for kept in front) is not beaten
    assert [one.size for one in front] == sorted(one.size for one in front)


def test_where_tensors_belong() -> None:
    assert placed("blk.12.ffn_up.weight") == ("12", "ffn_up.weight")
    assert placed("token_embd.weight") == ("embedding", "token_embd.weight")
    assert placed("output_norm.weight") == ("output", "output_norm.weight")
    assert placed("blk.99999999999999999999.x") == ("output", "blk.99999999999999999999.x")


@given(st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=8))
def test_axes_hold_their_values(values: list[float]) -> None:
    for scale in (linear(values), logarithmic(values)):
        assert scale.low < min(values) or math.isclose(scale.low, min(values))
        assert scale.high > max(values)
        assert scale.at(scale.low) == 0
        assert math.isclose(scale.at(scale.high), 1)
        assert scale.at(min(values)) <= scale.at(max(values))
        places = [scale.at(tick) for tick, _ in scale.ticks]
        assert places == sorted(places)


def test_a_logarithmic_axis_has_no_place_for_zero() -> None:
    scale = logarithmic([0.0, -1.0, math.nan, 0.01, 0.1])
    assert scale.low > 0
    assert scale.at(0.0) == 0
    assert [label for _, label in scale.ticks] == ["0.01", "0.02", "0.05", "0.1"]
    assert logarithmic([]).high > logarithmic([]).low


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123456, "0.01235"), (1e-4, "1e-4"), (0.00012, "1.2e-4"), (12.5, "12.5"), (2e9, "2e9")],
)
def test_figures_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_types_have_colours_by_their_bits() -> None:
    assert bits_of("Q4_K") == 4.5
    assert bits_of("F16") == 16
    assert hue("Q2_K") < hue("Q4_K") < hue("Q6_K") < hue("Q8_0") < hue("F16")
