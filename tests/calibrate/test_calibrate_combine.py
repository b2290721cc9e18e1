"""Matrices of one model added up, those of another refused by the first tensor that does not fit."""

import numpy as np
import pytest

from phiquant.calibrate import check_same_model, combine
from phiquant.convert.imatrix import ImportanceMatrix, Statistic
from phiquant.errors import ImportanceError


def matrix(tokens: int = 128, chunk_size: int = 64, **shapes: tuple[int, int]) -> ImportanceMatrix:
    """Entries by name, with _ for the dots, of the shape (matrices, columns); sums are all the number of tokens."""
    entries = {
        name.replace("_", ".") + ".weight": Statistic(np.full(shape, tokens, np.float32), np.full(shape[0], tokens))
        for name, shape in shapes.items()
    }
    return ImportanceMatrix(entries, tokens // chunk_size, chunk_size, ("text",))


def test_matrices_of_one_model_add_up() -> None:
    a, b = matrix(128, blk_0_up=(1, 4), blk_1_up=(4, 3)), matrix(64, blk_0_up=(1, 4), blk_1_up=(4, 3), output=(1, 9))
    whole = combine([("a", a), ("b", b)])
    assert {name: entry.counts.tolist() for name, entry in whole.entries.items()} == {
        "blk.0.up.weight": [192],
        "blk.1.up.weight": [192] * 4,
        "output.weight": [64],
    }
    assert (whole.entries["blk.1.up.weight"].sums == 192).all()
    assert (whole.chunk_count, whole.chunk_size, whole.datasets) == (3, 64, ("text", "text"))
    assert combine([("a", a)]).entries.keys() == a.entries.keys()


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            {"blk_0_up": (1, 4), "blk_1_up": (1, 5)},
            r"b .* than a: .* is blk\.1\.up\.weight; it has 5 values where a",
        ),
        ({"blk_0_up": (1, 4)}, r"fit is blk\.1\.up\.weight; a alone has its block"),
        ({"blk_0_up": (1, 4), "blk_1_up": (1, 3), "blk_2_up": (1, 3)}, r"blk\.2\.up\.weight; b alone has its block"),
        ({"blk_0_up": (2, 4), "blk_1_up": (1, 3), "output": (1, 8)}, r"fit is output\.weight; it has 8 values where a"),
    ],
)
def test_another_model_is_refused_by_its_first_tensor(other: dict[str, tuple[int, int]], what: str) -> None:
    a = matrix(blk_0_up=(1, 4), blk_1_up=(1, 3), output=(1, 9))
    with pytest.raises(ImportanceError, match=what):
        combine([("a", a), ("b", matrix(**other))])


def test_weights_that_one_lacks_are_no_reason_to_refuse() -> None:
    sizes = {"blk.0.up.weight": 4, "blk.0.down.weight": 8}
    check_same_model("a", matrix(blk_0_up=(1, 4)), sizes, "model")
    check_same_model("a", matrix(blk_0_up=(2, 2), output=(1, 3)), sizes, "model")
    with pytest.raises(ImportanceError, match="than model"):
        check_same_model("a", matrix(blk_0_up=(2, 3)), sizes, "model")
