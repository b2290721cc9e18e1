"""Importance matrices: both formats read and written, merged, filtered, and refused when broken."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phiquant.convert.imatrix import ImportanceMatrix, Statistic, merge, read
from phiquant.errors import FormatError, ImportanceError, OutputError, RequestError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType


def matrix(*, experts: int = 4, chunk_size: int = 32, seed: int = 0, dataset: str = "text.txt") -> ImportanceMatrix:
    rng = np.random.default_rng(seed)

    def some(matrices: int, columns: int, counts: list[int]) -> Statistic:
        return Statistic(rng.random((matrices, columns), np.float32) * 100, np.array(counts, np.int64))

    entries = {
        "blk.10.attn_qkv.weight": some(1, 8, [96]),
        "blk.2.attn_qkv.weight": some(1, 8, [96]),
        "blk.2.ffn_down_exps.weight": some(experts, 6, [0, 96, 33, 1][:experts]),
        "blk.3.ffn_down_exps.weight": some(experts, 6, [0] * experts),
    }
    return ImportanceMatrix(entries, 3, chunk_size, (dataset,))


def test_importance_is_the_mean_square_and_one_where_nothing_came() -> None:
    given = matrix()
    entry = given.entries["blk.2.ffn_down_exps.weight"]
    importance = given.importance("blk.2.ffn_down_exps.weight")
    assert importance is not None
    assert importance.dtype == np.float32
    assert np.array_equal(importance[0], np.ones(6))
    for expert, count in ((1, 96), (2, 33), (3, 1)):
        assert np.array_equal(importance[expert], entry.sums[expert] / np.float32(count))
    assert given.importance("blk.9.ffn_down_exps.weight") is None


def test_gguf_round_trip(tmp_path: Path) -> None:
    given = matrix()
    given.write_gguf(tmp_path / "imatrix.gguf")
    found = read(tmp_path / "imatrix.gguf")
    assert (found.chunk_count, found.chunk_size, found.datasets) == (3, 32, ("text.txt",))
    assert list(found.entries) == sorted(given.entries)
    for name, entry in given.entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums)
        assert np.array_equal(found.entries[name].counts, entry.counts)


def test_the_gguf_file_is_llama_cpps(tmp_path: Path) -> None:
    """Keys, names, types, dimensions and order as llama-imatrix writes them; single matrices have one dimension."""
    matrix().write_gguf(tmp_path / "imatrix.gguf")
    with GGUFFile.open(tmp_path / "imatrix.gguf") as file:
        assert [(key, field.type, field.item_type) for key, field in file.fields.items()] == [
            ("general.type", ValueType.STRING, None),
            ("imatrix.datasets", ValueType.ARRAY, ValueType.STRING),
            ("imatrix.chunk_count", ValueType.UINT32, None),
            ("imatrix.chunk_size", ValueType.UINT32, None),
        ]
        assert [(info.name, info.shape, info.type) for info in file.tensors.values()][:6] == [
            ("blk.10.attn_qkv.weight.in_sum2", (8,), GGMLType.F32),
            ("blk.10.attn_qkv.weight.counts", (1,), GGMLType.F32),
            ("blk.2.attn_qkv.weight.in_sum2", (8,), GGMLType.F32),
            ("blk.2.attn_qkv.weight.counts", (1,), GGMLType.F32),
            ("blk.2.ffn_down_exps.weight.in_sum2", (4, 6), GGMLType.F32),
            ("blk.2.ffn_down_exps.weight.counts", (4, 1), GGMLType.F32),
        ]


def test_dat_round_trip(tmp_path: Path) -> None:
    """What nothing came to is left out; the importance survives, tokens and matrices do not."""
    given = matrix()
    given.write_dat(tmp_path / "imatrix.dat")
    found = read(tmp_path / "imatrix.dat")
    assert (found.chunk_count, found.chunk_size, found.datasets) == (3, 0, ("text.txt",))
    assert list(found.entries) == sorted(given.entries)[:3]
    for name, entry in found.entries.items():
        assert entry.counts.tolist() == [3]
        expected = given.importance(name)
        assert expected is not None
        np.testing.assert_allclose(entry.importance.reshape(expected.shape), expected, rtol=2e-7)
    (tmp_path / "again").mkdir()
    found.write_dat(tmp_path / "again/imatrix.dat")
    first, second = ((tmp_path / part).read_bytes() for part in ("imatrix.dat", "again/imatrix.dat"))
    assert len(first) == len(second)
    found.write_gguf(tmp_path / "imatrix.gguf")  # chunks of 512 tokens, as nothing says otherwise
    turned = read(tmp_path / "imatrix.gguf")
    assert turned.chunk_size == 512
    for name, entry in found.entries.items():
        assert np.array_equal(turned.entries[name].sums, entry.sums * 512)
        assert turned.entries[name].counts.tolist() == [3 * 512]


def test_the_bytes_of_a_dat_file(tmp_path: Path) -> None:
    entries = {
        "b": Statistic(np.array([[4, 8]], np.float32), np.array([4])),
        "a": Statistic(np.array([[2], [9]], np.float32), np.array([5, 0])),  # 5 tokens in chunks of 4: 2 calls
    }
    ImportanceMatrix(entries, 1, 4, ("x", "last")).write_dat(tmp_path / "imatrix.dat")
    expected = struct.pack("<iiciiff", 2, 1, b"a", 2, 2, np.float32(2) / np.float32(5) * np.float32(2), 2.0)
    expected += struct.pack("<iciiff", 1, b"b", 1, 2, 1.0, 2.0) + struct.pack("<ii4s", 1, 4, b"last")
    assert (tmp_path / "imatrix.dat").read_bytes() == expected


def test_a_dat_file_without_its_trailer(tmp_path: Path) -> None:
    whole = tmp_path / "imatrix.dat"
    matrix().write_dat(whole)
    whole.write_bytes(whole.read_bytes()[: -8 - len("text.txt")])
    found = read(whole)
    assert (found.chunk_count, found.datasets, len(found.entries)) == (0, (), 3)


def test_merging_adds(tmp_path: Path) -> None:
    a, b = matrix(seed=1, dataset="a"), matrix(seed=2, dataset="b")
    both = merge([a, b])
    assert (both.chunk_count, both.chunk_size, both.datasets) == (6, 32, ("a", "b"))
    for name in a.entries:
        assert np.array_equal(both.entries[name].sums, a.entries[name].sums + b.entries[name].sums)
        assert np.array_equal(both.entries[name].counts, a.entries[name].counts + b.entries[name].counts)
    b.write_dat(tmp_path / "b.dat")
    mixed = merge([a, read(tmp_path / "b.dat")])
    entry = mixed.entries["blk.2.ffn_down_exps.weight"]
    assert entry.counts.tolist() == [96, 192, 129, 97]  # one count of the older format stands for every expert
    assert entry.sums.shape == (4, 6)
    assert mixed.entries["blk.3.ffn_down_exps.weight"].counts.tolist() == [0, 0, 0, 0]


def test_merging_refuses_other_models() -> None:
    name = "blk.0.ffn_up.weight"
    one = ImportanceMatrix({name: Statistic(np.ones((1, 8), np.float32), np.array([1]))}, 1, 1)
    other = ImportanceMatrix({name: Statistic(np.ones((1, 6), np.float32), np.array([1]))}, 1, 1)
    with pytest.raises(ImportanceError, match=r"blk\.0\.ffn_up\.weight has 8 values in one and 6 in another"):
        merge([one, other])
    two = ImportanceMatrix({name: Statistic(np.ones((2, 4), np.float32), np.array([1, 1]))}, 1, 1)
    four = ImportanceMatrix({name: Statistic(np.ones((4, 2), np.float32), np.array([1] * 4))}, 1, 1)
    with pytest.raises(ImportanceError, match="2 matrices in one and 4 in another"):
        merge([two, four])


def test_choosing_entries_by_part_of_the_name() -> None:
    given = matrix()
    assert set(given.chosen(include=["attn_qkv"]).entries) == {"blk.10.attn_qkv.weight", "blk.2.attn_qkv.weight"}
    assert set(given.chosen(exclude=["attn_qkv", "blk.3"]).entries) == {"blk.2.ffn_down_exps.weight"}
    assert given.chosen().entries == given.entries


def test_nothing_is_not_written(tmp_path: Path) -> None:
    nothing = ImportanceMatrix({}, 0, 512)
    for write in (nothing.write_gguf, nothing.write_dat):
        with pytest.raises(RequestError, match="there is nothing in"):
            write(tmp_path / "x")
    with pytest.raises(OutputError, match="cannot be written"):
        matrix().write_dat(tmp_path / "no" / "x.dat")
    assert list(tmp_path.iterdir()) == []


def gguf(path: Path, tensors: dict[str, np.ndarray], **changes: object) -> Path:
    fields: dict[str, object] = {"general.type": "imatrix", "imatrix.datasets": ["x"]}
    fields |= {"imatrix.chunk_count": 1, "imatrix.chunk_size": 4}
    fields |= {key.replace("__", "."): value for key, value in changes.items()}
    with GGUFWriter(path) as writer:
        for key, value in fields.items():
            if isinstance(value, list):
                writer.add(key, value, ValueType.ARRAY, ValueType.STRING)
            elif value is not None:
                writer.add(key, value, ValueType.STRING if isinstance(value, str) else ValueType.INT64)
        for name, values in tensors.items():
            writer.add_tensor(name, values.shape, GGMLType.F16 if values.dtype == np.float16 else GGMLType.F32)
        writer.begin()
        for name, values in tensors.items():
            writer.write(name, values if values.dtype == np.float16 else values.astype("<f4"))
        writer.commit()
    return path


SUMS, COUNTS = "blk.0.attn_qkv.weight.in_sum2", "blk.0.attn_qkv.weight.counts"
GOOD = {SUMS: np.ones(8), COUNTS: np.ones(1)}


@pytest.mark.parametrize(
    ("tensors", "keys", "what"),
    [
        ({}, {}, "it has no entries"),
        ({SUMS: np.ones(8)}, {}, "lacks the tensor blk.0.attn_qkv.weight.counts"),
        ({COUNTS: np.ones(1)}, {}, "lacks the tensor blk.0.attn_qkv.weight.in_sum2"),
        ({**GOOD, SUMS: np.full(8, np.nan)}, {}, "NaN or infinity"),
        ({**GOOD, SUMS: np.full(8, np.inf)}, {}, "NaN or infinity"),
        ({**GOOD, SUMS: np.full(8, -1.0)}, {}, "below 0"),
        ({**GOOD, COUNTS: np.full(1, -1.0)}, {}, "no numbers of tokens"),
        ({**GOOD, COUNTS: np.full(1, np.nan)}, {}, "no numbers of tokens"),
        ({**GOOD, COUNTS: np.full(1, 1e30)}, {}, "no numbers of tokens"),
        ({**GOOD, COUNTS: np.ones((3, 1))}, {}, "8 sums and 3 counts"),
        ({**GOOD, COUNTS: np.ones((0, 1))}, {}, "8 sums and 0 counts"),
        ({**GOOD, SUMS: np.ones(8, np.float16)}, {}, "is F16 and must be F32"),
        (GOOD, {"imatrix__chunk_size": 0}, "1 chunks of 0 tokens"),
        (GOOD, {"imatrix__chunk_count": -1}, "-1 chunks"),
        (GOOD, {"imatrix__chunk_count": None}, "lacks the key imatrix.chunk_count"),
        (GOOD, {"imatrix__datasets": None}, "lacks the key imatrix.datasets"),
        (GOOD, {"general__type": "model"}, "GGUF file of another kind"),
        (GOOD, {"general__architecture": "phi3"}, "GGUF file of another kind"),
    ],
)
def test_bad_gguf_files(tmp_path: Path, tensors: dict[str, np.ndarray], keys: dict[str, object], what: str) -> None:
    with pytest.raises(ImportanceError, match=what.replace(".", r"\.")) as caught:
        read(gguf(tmp_path / "imatrix.gguf", tensors, **keys))
    assert "phiquant imatrix" in str(caught.value)


def broken(change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        matrix().write_dat(path)
        path.write_bytes(change(bytearray(path.read_bytes())))
        return path

    return make


def with_number(at: int, number: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        struct.pack_into("<i", data, at, number)
        return data

    return change


NAME = len("blk.10.attn_qkv.weight")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: b"", "ends within its first number"),
        (lambda data: b"Once upon a time", "neither GGUF nor"),
        (with_number(0, 0), "has no entries"),
        (with_number(0, -5), "neither GGUF nor"),
        (with_number(0, 4), "entry 4 of 4"),
        (with_number(0, 2), "the name of its text has a length of"),
        (with_number(4, 1 << 30), "a length of 1073741824"),
        (with_number(4, -1), "a length of -1"),
        (with_number(8 + NAME, -3), "-3 calls"),
        (with_number(12 + NAME, 1 << 30), "ends within entry 1 of 3"),
        (with_number(12 + NAME, 0), "0 values"),
        (with_number(16 + NAME, 0x7FC00000), "NaN or infinity"),
        (with_number(16 + NAME, -1 << 30), "below 0"),
        (lambda data: data[:8] + b"\xff" * NAME + data[8 + NAME :], "not valid UTF-8"),
        (lambda data: data + b"x", "1 bytes follow its end"),
    ],
)
def test_bad_dat_files(tmp_path: Path, change: Callable[[bytearray], bytes], what: str) -> None:
    path = broken(change)(tmp_path / "imatrix.dat")
    with pytest.raises(ImportanceError, match=what):
        read(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """All but those that lose nothing: the optional trailer, the padding after the last tensor."""
    path = tmp_path / "imatrix"
    given = matrix()
    trailer = 8 + len("text.txt")
    for write, harmless in ((given.write_dat, {trailer, trailer - 4}), (given.write_gguf, set(range(1, 17)))):
        write(path)
        whole = path.read_bytes()
        accepted = set()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            try:
                read(path)
            except FormatError:
                continue
            accepted.add(len(whole) - length)
        assert accepted == harmless


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", Path("a\0b")):
        with pytest.raises(ImportanceError):
            read(path)
