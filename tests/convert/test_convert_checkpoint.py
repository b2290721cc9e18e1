"""Opening checkpoints: shards, what is missing, what may not be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.convert.checkpoint import Checkpoint, read_json
from phiquant.errors import CheckpointError


def test_rows_are_read_as_stored(tiny: Path) -> None:
    from safetensors.numpy import load_file

    theirs = load_file(tiny / "model.safetensors")
    with Checkpoint.open(tiny) as ours:
        assert set(ours.tensors) == set(theirs)
        name = "model.layers.3.mlp.down_proj.weight"
        assert ours.read(name, 5, 9).tobytes() == theirs[name][5:9].tobytes()
        assert ours.read(name, 7, 7).size == 0
        with pytest.raises(ValueError, match="rows"):
            ours.read(name, 0, 10_000)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_hold_the_same_tensors(checkpoint: Callable[..., Path], make: Any, shards: int) -> None:
    expected = make.tensors(make.config, "F32")
    with Checkpoint.open(checkpoint(shards=shards, dtype="F32")) as opened:
        assert set(opened.tensors) == set(expected)
        for name, (_, values) in expected.items():
            assert np.array_equal(opened.read(name, 0, len(values)).view("<f4"), values.reshape(-1))


def test_a_missing_shard_is_named(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint(shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00003\.safetensors.*download"):
        Checkpoint.open(directory)


def test_a_tensor_that_is_not_in_its_shard_is_named(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint(shards=2)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.absent"] = "model-00001-of-00002.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.absent should be in model-00001"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..", "a\\b.safetensors"]
)
def test_an_index_cannot_lead_elsewhere(checkpoint: Callable[..., Path], name: str) -> None:
    directory = checkpoint()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="not a safetensors file beside it"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(checkpoint: Callable[..., Path], index: Any) -> None:
    directory = checkpoint()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint.open(directory)


def test_what_is_missing_is_named(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    directory = checkpoint()
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        Checkpoint.open(directory)
    (directory / "model-00001-of-00002.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert them to safetensors first"):
        Checkpoint.open(directory)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="download the weights"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}"])
def test_bad_json_is_one_sentence(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not"):
        read_json(tmp_path / "config.json")


def test_a_file_that_shrinks_is_an_error(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint()
    with Checkpoint.open(directory) as opened:
        with (directory / "model.safetensors").open("r+b") as file:
            file.truncate(3000)
        with pytest.raises(CheckpointError, match="ended at byte"):
            opened.read("model.norm.weight", 0, 64)
