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


A, B = stored("a", (6, 5)), stored("b", (2, 3, 5))
BYTES = {t.name: np.random.default_rng(len(t.shape)).integers(0, 256, t.nbytes, np.uint8) for t in (A, B)}


def read(made: Assembly, begin: int, size: int) -> np.ndarray:
    out = np.zeros(size, np.uint8)
    for tensor, first, place, length in made.spans(begin, size):
        assert length > 0
        out[place : place + length] = BYTES[tensor.name][first : first + length]
    return out


@pytest.mark.parametrize("begin", [0, 1, 19, 20, 60, 99])
@pytest.mark.parametrize("size", [1, 20, 21, 61, 160])
def test_any_bytes_of_any_order_of_rows(begin: int, size: int) -> None:
    parts = (Rows(B, 4, 2), Rows(A, 1, 1), Rows(B, 0, 1), Rows(A, 0, 6))
    made = Assembly((10, 5), parts)
    whole = np.concatenate([BYTES[r.tensor.name][20 * r.first : 20 * (r.first + r.count)] for r in parts])
    size = min(size, 200 - begin)
    assert (read(made, begin, size) == whole[begin : begin + size]).all()


@pytest.mark.parametrize("tensor", [A, B, stored("v", (7,))])
def test_a_whole_tensor_is_itself(tensor: StoredTensor) -> None:
    made = Assembly.whole(tensor)
    assert made.shape == tensor.shape
    assert list(made.spans(0, tensor.nbytes)) == [(tensor, 0, 0, tensor.nbytes)]
    assert list(made.spans(3, 8)) == [(tensor, 3, 0, 8)]


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
