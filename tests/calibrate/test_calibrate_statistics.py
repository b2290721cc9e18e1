"""Figures of importance matrices whose values are known, experts included."""

import math

import numpy as np
import pytest

from phiquant.calibrate import layer_figures, tensor_figures
from phiquant.convert.imatrix import ImportanceMatrix, Statistic


def matrix(**entries: tuple[object, list[int]]) -> ImportanceMatrix:
    made = {
        name.replace("__", "."): Statistic(np.array(sums, np.float32), np.array(counts))
        for name, (sums, counts) in entries.items()
    }
    return ImportanceMatrix(made, 1, 512)


def test_a_flat_weight_and_one_with_a_single_peak() -> None:
    flat, peak = tensor_figures(
        matrix(blk__0__a__weight=([[6.0] * 8], [3]), blk__0__b__weight=([[0, 0, 0, 12.0] + [0] * 12], [4]))
    )
    assert (flat.name, flat.layer, flat.kind, flat.elements) == ("blk.0.a.weight", 0, "a", 8)
    assert (flat.total, flat.minimum, flat.maximum, flat.mean, flat.deviation) == (16, 2, 2, 2, 0)
    assert (flat.active, flat.entropy, flat.normalized_entropy, flat.density) == (1, 3, 1, 0)
    assert flat.similarity is None
    assert (peak.total, peak.minimum, peak.maximum, peak.mean) == (3, 0, 3, 3 / 16)
    assert peak.deviation == pytest.approx(3 / 16 * math.sqrt(15))
    assert (peak.active, peak.entropy, peak.normalized_entropy, peak.density) == (1 / 16, 0, 0, 1 / 16)


def test_entropy_and_density() -> None:
    (figures,) = tensor_figures(matrix(output__weight=([[1, 1, 2, 4]], [1])))
    assert figures.entropy == pytest.approx(1 / 8 * 3 + 1 / 8 * 3 + 1 / 4 * 2 + 1 / 2)
    assert figures.normalized_entropy == pytest.approx(1.75 / 2)
    assert figures.density == 1 / 4, "mean 2, deviation 1.22"
    assert (figures.layer, figures.kind, figures.similarity) == (None, "output", None)


def test_experts_that_no_token_reached_are_left_out() -> None:
    (figures,) = tensor_figures(
        matrix(blk__1__ffn_up_exps__weight=([[2, 4], [9, 9], [1, 3]], [2, 0, 1]), blk__1__c__weight=([[0, 0]], [0]))
    )
    assert (figures.elements, figures.total, figures.minimum, figures.maximum) == (4, 7, 1, 3)
    assert figures.kind == "ffn_up_exps"


def test_similarity_with_the_block_before() -> None:
    figures = tensor_figures(
        matrix(
            blk__0__a__weight=([[1, 0]], [1]),
            blk__1__a__weight=([[3, 4]], [1]),
            blk__2__a__weight=([[6, 8]], [2]),
            blk__3__a__weight=([[1, 1, 1]], [1]),
            blk__4__a__weight=([[0, 0, 0]], [1]),
        )
    )
    similarity = {f.layer: f.similarity for f in figures}
    assert similarity[0] is None
    assert similarity[1] == pytest.approx(0.6)
    assert similarity[2] == pytest.approx(1)
    assert similarity[3] is None, "another width"
    assert similarity[4] == 0


def test_the_order_and_the_layers() -> None:
    figures = tensor_figures(
        matrix(
            blk__0__b__weight=([[1, 3]], [1]),
            blk__1__b__weight=([[1, 7]], [1]),
            blk__1__a__weight=([[2, 2, 2, 4, 2, 2]], [1]),
            output__weight=([[5]], [1]),
        )
    )
    assert [f.name for f in figures] == ["blk.1.a.weight", "blk.1.b.weight", "blk.0.b.weight", "output.weight"]
    first, second = layer_figures(figures)
    assert (first.layer, first.total, first.density, first.similarity) == (0, 4, 0, 0)
    assert second.layer == 1
    assert second.total == pytest.approx((6 * 14 + 2 * 8) / 8)
    assert second.density == pytest.approx((6 * (1 / 6) + 2 * 0) / 8)
    assert second.similarity == pytest.approx(2 * (1 + 21) / math.sqrt(10 * 50) / 8)
    assert layer_figures([]) == []
