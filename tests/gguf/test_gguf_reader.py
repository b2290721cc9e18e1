"""The reader against files that the `gguf` package wrote."""

from pathlib import Path

import numpy as np
import pytest

import gguf
from phiquant.errors import GGUFError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType

SCALARS = {
    "t.u8": (gguf.GGUFValueType.UINT8, 255),
    "t.i8": (gguf.GGUFValueType.INT8, -128),
    "t.u16": (gguf.GGUFValueType.UINT16, 65535),
    "t.i16": (gguf.GGUFValueType.INT16, -32768),
    "t.u32": (gguf.GGUFValueType.UINT32, 4294967295),
    "t.i32": (gguf.GGUFValueType.INT32, -2147483648),
    "t.u64": (gguf.GGUFValueType.UINT64, 2**64 - 1),
    "t.i64": (gguf.GGUFValueType.INT64, -(2**63)),
    "t.f32": (gguf.GGUFValueType.FLOAT32, 0.5),
    "t.f64": (gguf.GGUFValueType.FLOAT64, 1e-300),
    "t.true": (gguf.GGUFValueType.BOOL, True),
    "t.false": (gguf.GGUFValueType.BOOL, False),
    "t.text": (gguf.GGUFValueType.STRING, "Ünïcode \N{OWL} \0 text"),
}
WORDS = ["", "a", "▁the", "\N{OWL}" * 40, "x" * 300]


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A file of the `gguf` package with every value type and several tensors of odd sizes."""
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "phi3")
    for key, (kind, value) in SCALARS.items():
        writer.add_key_value(key, value, kind)
    writer.add_array("t.words", WORDS)
    writer.add_array("t.ints", [1, -2, 3])
    writer.add_array("t.floats", [0.25, -1.5])
    writer.add_array("t.bools", [True, False, True])
    writer.add_tensor("one", np.arange(5, dtype=np.float32))
    writer.add_tensor("two", np.arange(21, dtype=np.float16).reshape(3, 7))
    writer.add_tensor("three", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    blocks = gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_every_value_type(theirs: Path) -> None:
    with GGUFFile.open(theirs) as file:
        assert (file.version, file.alignment, file.byte_order) == (3, 32, "little")
        assert file.size == theirs.stat().st_size
        for key, (kind, value) in SCALARS.items():
            assert file.metadata[key] == value, key
            assert type(file.metadata[key]) is type(value), key
            assert file.fields[key].type == kind, key
        assert list(file.metadata) == ["general.architecture", *SCALARS, "t.words", "t.ints", "t.floats", "t.bools"]


def test_reads_arrays(theirs: Path) -> None:
    with GGUFFile.open(theirs) as file:
        words = file.fields["t.words"]
        assert (words.type, words.item_type, words.count) == (ValueType.ARRAY, ValueType.STRING, len(WORDS))
        assert words.head(2) == WORDS[:2]
        assert words.value == WORDS
        assert words.head(3) == WORDS[:3]
        assert words.value is file.metadata["t.words"]
        for key, values, dtype in (
            ("t.ints", [1, -2, 3], np.int32),
            ("t.floats", [0.25, -1.5], np.float32),
            ("t.bools", [True, False, True], np.bool_),
        ):
            array = file.metadata[key]
            assert array.dtype == dtype
            assert array.tolist() == values
            assert file.fields[key].head(1).tolist() == values[:1]
            assert array.flags.aligned


def test_reads_the_same_tensors_as_the_gguf_package(theirs: Path) -> None:
    reference = gguf.GGUFReader(theirs)
    with GGUFFile.open(theirs) as file:
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = file.tensors[tensor.name]
            assert info.shape == tuple(tensor.shape.tolist()[::-1])
            assert info.type == tensor.tensor_type
            assert info.nbytes == tensor.n_bytes
            assert file.data_offset + info.offset == tensor.data_offset
            assert file.data(tensor.name).tobytes() == tensor.data.tobytes()


def test_tensor_bytes_are_a_read_only_view(theirs: Path) -> None:
    with GGUFFile.open(theirs) as file:
        data = file.data("three")
        assert (data.dtype, data.ndim) == (np.uint8, 1)
        assert not data.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            data[0] = 1
    assert data.view(np.float32).tolist() == list(range(24))  # outlives the file


def test_a_closed_file_gives_nothing_more(theirs: Path) -> None:
    file = GGUFFile.open(theirs)
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.data("one")
    with pytest.raises(ValueError, match="closed"):
        _ = file.metadata["t.words"]
    assert file.metadata["t.u32"] == 4294967295


def test_version_2_is_read(theirs: Path) -> None:
    content = bytearray(theirs.read_bytes())
    content[4] = 2
    theirs.write_bytes(content)
    with GGUFFile.open(theirs) as file:
        assert file.version == 2
        assert file.data("one").view(np.float32).tolist() == [0, 1, 2, 3, 4]


def test_typed_access(theirs: Path) -> None:
    with GGUFFile.open(theirs) as file:
        assert file.get("t.i8", int) == -128
        assert file.require("t.f64", float) == 1e-300
        assert file.get("t.true", bool) is True
        assert file.get("t.words", list) == WORDS
        assert file.get("t.ints", np.ndarray).tolist() == [1, -2, 3]
        assert file.get("absent", int, 7) == 7
        assert file.get("absent", str, None) is None
        with pytest.raises(GGUFError, match=r"lacks the key 'absent'"):
            file.require("absent", int)
        with pytest.raises(TypeError):
            file.get("t.u8", dict)  # type: ignore[type-var]
        with pytest.raises(GGUFError, match="no tensor 'absent'"):
            file.data("absent")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("t.f32", int),
        ("t.true", int),
        ("t.text", int),
        ("t.ints", int),
        ("t.u8", float),
        ("t.u8", bool),
        ("t.u8", str),
        ("t.ints", list),
        ("t.text", list),
        ("t.words", np.ndarray),
        ("t.u8", np.ndarray),
        ("t.words", str),
    ],
)
def test_a_value_of_another_kind_is_refused(theirs: Path, key: str, kind: type) -> None:
    with GGUFFile.open(theirs) as file, pytest.raises(GGUFError, match=f"{key}.*expected"):
        file.get(key, kind, None)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_array("t.words", WORDS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert file.tensors == {}
        assert file.data_offset == file.size
        assert file.metadata["t.words"] == WORDS


def test_own_alignment(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_custom_alignment(4096)
    writer.add_tensor("one", np.arange(5, dtype=np.float32))
    writer.add_tensor("two", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert file.alignment == 4096
        assert file.tensors["two"].offset == 4096
        assert file.data("two").view(np.float32).tolist() == [0, 1, 2, 3, 4]


def test_the_last_padding_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    with GGUFWriter(path) as writer:
        writer.add_tensor("one", (3,), GGMLType.F32)
        writer.begin()
        writer.write("one", np.ones(3, np.float32))
        writer.commit()
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with GGUFFile.open(path) as file:
        assert file.data("one").view(np.float32).tolist() == [1, 1, 1]
    path.write_bytes(content[:-21])
    with pytest.raises(GGUFError, match="truncated"):
        GGUFFile.open(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="No such file"):
        GGUFFile.open(tmp_path / "absent.gguf")
    with pytest.raises(GGUFError, match="is not a file"):
        GGUFFile.open(tmp_path)
    with pytest.raises(GGUFError, match="cannot be opened"):
        GGUFFile.open("a\0b")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    with pytest.raises(GGUFError, match="shorter than"):
        GGUFFile.open(empty)
