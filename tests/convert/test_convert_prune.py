"""Leaving layers out: names, metadata, mixtures and importance follow."""

from pathlib import Path

import numpy as np
import pytest

from phiquant.convert import Importance, quantize
from phiquant.convert.entries import Entry, uint32
from phiquant.convert.imatrix import ImportanceMatrix, Statistic
from phiquant.convert.prune import Pruning, parse_layers
from phiquant.errors import RequestError
from phiquant.gguf import GGUFFile, ValueType

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


def test_lists_of_layers() -> None:
    assert parse_layers("7,3, 3,20") == (3, 7, 20)
    for text in ("", "3,", "a", "-1", "1.5", "3-5", "٣", "9" * 12):
        with pytest.raises(RequestError, match="--prune-layers"):
            parse_layers(text)


def test_the_others_move_up() -> None:
    pruning = Pruning((0, 3), 5)
    assert pruning.kept == [1, 2, 4]
    names = ["output.weight", *(f"blk.{i}.ffn_up.weight" for i in range(5))]
    assert pruning.names(names) == {
        "output.weight": "output.weight",
        "blk.1.ffn_up.weight": "blk.0.ffn_up.weight",
        "blk.2.ffn_up.weight": "blk.1.ffn_up.weight",
        "blk.4.ffn_up.weight": "blk.2.ffn_up.weight",
    }


def test_metadata() -> None:
    heads = Entry("x.attention.head_count_kv", ValueType.ARRAY, np.array([1, 2, 3]), ValueType.INT32)
    other = Entry("x.rope.dimension_sections", ValueType.ARRAY, np.array([1, 2]), ValueType.INT32)
    entries = Pruning((1,), 3).entries([uint32("x.block_count", 3), heads, other], "x")
    assert entries[0] == uint32("x.block_count", 2)
    assert entries[1].value.tolist() == [1, 3]
    assert entries[2] is other


@pytest.mark.parametrize(("layers", "what"), [((8,), "has 8 layers, which are counted from 0"), (range(8), "all")])
def test_layers_that_are_not_there(layers: tuple[int, ...], what: str) -> None:
    with pytest.raises(RequestError, match=what):
        Pruning(tuple(layers), 8)


@pytest.mark.cpu
def test_weights_and_their_importance_keep_together(tmp_path: Path) -> None:
    """What stays has the bytes it would have had alone; a matrix of the whole model serves."""
    with GGUFFile.open(quantize(TINY, tmp_path / "bf16.gguf", "BF16").plan.path) as file:
        shapes = {n: t.shape for n, t in file.tensors.items() if len(t.shape) > 1 and n.startswith("blk.")}
        blocks = file.require("phi3.block_count", int)
    rng = np.random.default_rng(0)
    entries = {name: Statistic(rng.random((1, s[-1]), np.float32), np.array([1])) for name, s in shapes.items()}
    importance = Importance(ImportanceMatrix(entries, 1, 1), "i.gguf")
    for source in (tmp_path / "bf16.gguf", TINY):
        quantize(source, tmp_path / "whole.gguf", "Q4_K_S", importance=importance)
        quantize(source, tmp_path / "less.gguf", "Q4_K_S", importance=importance, prune=[1, 2])
        with GGUFFile.open(tmp_path / "whole.gguf") as whole, GGUFFile.open(tmp_path / "less.gguf") as less:
            assert less.require("phi3.block_count", int) == blocks - 2
            assert len(less.tensors) < len(whole.tensors)
            for old, new in ((0, 0), (3, 1), (blocks - 1, blocks - 3)):
                a, b = f"blk.{old}.ffn_up.weight", f"blk.{new}.ffn_up.weight"
                assert np.array_equal(whole.data(a), less.data(b))
            assert f"blk.{blocks - 2}.ffn_up.weight" not in less.tensors
