"""The safetensors header reader: what it accepts, and that nothing hostile passes or costs memory."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phiquant.convert.safetensors import read_header
from phiquant.errors import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def build(path: Path, header: Any, body: int = 32, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(body))
    return path


def test_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    tensors = {
        "z": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.zeros((0, 4), np.float16),
        "m": np.ones((), np.int64),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt"})
    found = read_header(path)
    assert list(found) == sorted(tensors)
    with safe_open(path, "numpy") as theirs:
        for name, stored in found.items():
            assert stored.shape == tuple(theirs.get_slice(name).get_shape())
            raw = path.read_bytes()[stored.offset : stored.offset + stored.nbytes]
            assert raw == tensors[name].tobytes()


@pytest.mark.parametrize(
    ("header", "body", "what"),
    [
        (b"{", 0, "not valid JSON"),
        (b"[]", 0, "not a JSON object"),
        (b'{"a": 1, "a": 2}', 0, "twice"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "not valid JSON"),
        ({"a": 3}, 0, "not a JSON object"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, 4, "data type 'F99'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4, "shape"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, 4, "shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4, "shape"),
        ({"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}}, 4, "shape"),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, 4, "more elements"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, 4, "outside"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}, 4, "outside"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4, "two counts"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**64]}}, 4, "two counts"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4, "needs 8 bytes"),
        ({**GOOD, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [20, 28]}}, 28, "overlaps"),
        ({**GOOD, "b": {"dtype": "BF16", "shape": [4], "data_offsets": [26, 34]}}, 34, "gap"),
        (GOOD, 33, "after its last tensor"),
        (GOOD, 31, "outside"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, header: Any, body: int, what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        read_header(build(tmp_path / "x.safetensors", header, body))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_an_absurd_header_length_costs_no_memory(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError):
        read_header(build(tmp_path / "x.safetensors", b"{}", 0, length=length))


def test_short_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)
    for size in range(8):
        path.write_bytes(bytes(size))
        with pytest.raises(CheckpointError, match="no safetensors file"):
            read_header(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(tensor=st.sampled_from(["a", "b"]), field=st.sampled_from(["dtype", "shape", "data_offsets"]), value=json_values)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_value_of_a_field_is_refused(tmp_path: Path, tensor: str, field: str, value: Any) -> None:
    header = {name: dict(entry) for name, entry in GOOD.items()}
    if value == header[tensor][field] and type(value) is type(header[tensor][field]):
        return
    header[tensor][field] = value
    with pytest.raises(CheckpointError):
        read_header(build(tmp_path / "x.safetensors", header))


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_never_do_worse_than_an_error(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(build(tmp_path / "x.safetensors", GOOD).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 33))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.safetensors").write_bytes(raw)
    try:
        found = read_header(tmp_path / "x.safetensors")
    except CheckpointError:
        return
    for stored in found.values():
        assert 8 <= stored.offset <= stored.offset + stored.nbytes <= len(raw)


def test_every_truncation_is_refused(tmp_path: Path, make: Any) -> None:
    raw = build(tmp_path / "x.safetensors", GOOD).read_bytes()
    for size in range(len(raw)):
        (tmp_path / "x.safetensors").write_bytes(raw[:size])
        with pytest.raises(CheckpointError):
            read_header(tmp_path / "x.safetensors")
