"""Tensors put together from rows of stored ones, and read piece by piece."""

from pathlib import Path

import numpy as np
import pytest

from phiquant.convert.assembly import Assembly, Rows, match
from phiquant.convert.safetensors import StoredTensor
from phiquant.errors import CheckpointError


def stored(name: str, shape: tuple[int, ...], dtype: str = "F32") -> StoredTensor:
    size = {"F32": 4, "BF16": 2}[dtype]
    return StoredTensor(name, dtype, shape, Path("model.safetensors"), 0, int(np.prod(shape)) * size)


A, B, T = stored("a", (6, 5)), stored("b", (2, 3, 5)), stored("t", (12, 5))
BYTES = {t.name: np.random.default_rng(len(t.shape)).integers(0, 256, t.nbytes, np.uint8) for t in (A, B, T)}


def read(made: Assembly, begin: int, size: int) -> np.ndarray:
    def fill(tensor: StoredTensor, first: int, target: np.ndarray) -> None:
        assert target.size > 0
        target[:] = BYTES[tensor.name][first : first + target.size]
        assert first + target.size <= tensor.nbytes

    out = np.zeros(size, np.uint8)
    made.read_into(fill, begin, out)
    return out


def rows_of(part: Rows) -> np.ndarray:
    whole = BYTES[part.tensor.name].reshape(-1, part.row_bytes)
    some = whole[part.first :: part.step][: part.count]
    order = [turn + i for i in range(part.count // part.turns) for turn in _starts(part)]
    return some[order].reshape(-1)


@pytest.mark.parametrize("begin", [0, 1, 19, 20, 60, 99])
@pytest.mark.parametrize("size", [1, 20, 21, 61, 160])
def test_any_bytes_of_any_order_of_rows(begin: int, size: int) -> None:
    parts = (Rows(B, 4, 2), Rows(A, 1, 1), Rows(B, 0, 1), Rows(A, 0, 6))
    made = Assembly((10, 5), parts)
    whole = np.concatenate([rows_of(part) for part in parts])
    size = min(size, 200 - begin)
    assert (read(made, begin, size) == whole[begin : begin + size]).all()


@pytest.mark.parametrize("begin", [0, 1, 19, 20, 60, 99])
@pytest.mark.parametrize("size", [1, 20, 21, 61, 160])
@pytest.mark.parametrize("chunk", [1, 80, 1 << 21])
def test_any_bytes_of_rows_that_are_picked(begin: int, size: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phiquant.convert.assembly._CHUNK", chunk)
    parts = (Rows(A, 1, 3, step=2), Rows(B, 0, 2, step=5), Rows(A, 0, 1, step=4), Rows(B, 2, 4), Rows(A, 3, 1, step=9))
    made = Assembly((11, 5), parts)
    whole = np.concatenate([rows_of(part) for part in parts])
    size = min(size, whole.size - begin)
    assert (read(made, begin, size) == whole[begin : begin + size]).all()


def _starts(part: Rows) -> range:
    """First rows of the parts that are taken in turn."""
    return range(0, part.count, part.count // part.turns)


@pytest.mark.parametrize("begin", [0, 1, 19, 20, 60, 99, 139])
@pytest.mark.parametrize("size", [1, 20, 21, 61, 160, 400])
def test_any_bytes_of_rows_that_are_taken_in_turn(begin: int, size: int) -> None:
    parts = (Rows(A, 0, 6, turns=2), Rows(B, 0, 4), Rows(A, 0, 6, turns=3), Rows(B, 1, 4, turns=2))
    made = Assembly((20, 5), parts)
    whole = np.concatenate([rows_of(part) for part in parts])
    assert rows_of(parts[0]).tolist() == BYTES["a"].reshape(6, -1)[[0, 3, 1, 4, 2, 5]].reshape(-1).tolist()
    size = min(size, whole.size - begin)
    assert (read(made, begin, size) == whole[begin : begin + size]).all()


@pytest.mark.parametrize("begin", [0, 7, 20, 40])
@pytest.mark.parametrize("size", [1, 20, 41, 80])
@pytest.mark.parametrize("chunk", [1, 1 << 21])
def test_any_bytes_of_picked_rows_that_are_taken_in_turn(
    begin: int, size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phiquant.convert.assembly._CHUNK", chunk)
    part = Rows(T, 1, 4, step=3, turns=2)
    assert rows_of(part).tolist() == BYTES["t"].reshape(12, -1)[[1, 7, 4, 10]].reshape(-1).tolist()
    size = min(size, 80 - begin)
    assert (read(Assembly((4, 5), (part,)), begin, size) == rows_of(part)[begin : begin + size]).all()


def test_every_other_number_of_a_vector() -> None:
    vector = stored("v", (9,), "BF16")
    BYTES["v"] = np.arange(18, dtype=np.uint8)
    made = Assembly((9,), (Rows(vector, 0, 5, step=2), Rows(vector, 1, 4, step=2)))
    assert read(made, 0, 18).view("<u2").tolist() == BYTES["v"].view("<u2")[[0, 2, 4, 6, 8, 1, 3, 5, 7]].tolist()


@pytest.mark.parametrize("tensor", [A, B, stored("w", (7,))])
def test_a_whole_tensor_is_itself_and_read_at_once(tensor: StoredTensor) -> None:
    made = Assembly.whole(tensor)
    assert made.shape == tensor.shape
    reads: list[tuple[StoredTensor, int, np.ndarray]] = []
    for begin, size in ((0, tensor.nbytes), (3, 8)):
        made.read_into(lambda *read: reads.append(read), begin, target := np.zeros(size, np.uint8))
        found, first, into = reads.pop()
        assert not reads
        assert (found, first, into.size) == (tensor, begin, size)
        assert np.shares_memory(into, target)


def test_rows_of_different_types_do_not_belong_together() -> None:
    with pytest.raises(CheckpointError, match=r"a \(F32\), c \(BF16\) belong together"):
        Assembly((7, 5), (Rows(A, 0, 6), Rows(stored("c", (1, 5), "BF16"), 0, 1)))


def test_matching_keeps_the_order_of_the_checkpoint_and_leaves_out_what_is_unused() -> None:
    tensors = {"b": B, "x.rotary_emb.inv_freq": A, "a": A, "tied": A}
    assert match({"a": A.shape, "b": B.shape}, tensors, "a model", unused=["tied"]) == ["b", "a"]
    with pytest.raises(CheckpointError, match=r"'tied' of model\.safetensors has no place in a model"):
        match({"a": A.shape, "b": B.shape}, tensors, "a model")
    with pytest.raises(CheckpointError, match="lacks tensor c"):
        match({"a": A.shape, "b": B.shape, "c": (1,)}, tensors, "a model", unused=["tied"])
    with pytest.raises(CheckpointError, match=r"Tensor a of model\.safetensors has shape \[6, 5\], .* \[5, 6\]"):
        match({"a": (5, 6), "b": B.shape}, tensors, "a model", unused=["tied"])
