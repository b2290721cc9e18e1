"""Models in several files: dividing, naming, opening all parts as one, and every way in which parts may not fit."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf
from phiquant.errors import GGUFError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType, open_model
from phiquant.gguf.split import divide, part_path, split_name

NAMES = [f"t{i}" for i in range(7)]


def content(name: str) -> np.ndarray:
    return np.full((4, 32), NAMES.index(name), np.float32)


def write_part(
    path: Path, names: Sequence[str], place: int, parts: int, *, alignment: int = 32, **keys: int | None
) -> None:
    """A part as llama-gguf-split has it; `keys` replace the values of the split's, None leaves one out."""
    values = {"no": place, "count": parts, "total": len(NAMES), **keys}
    with GGUFWriter(path, alignment=alignment) as writer:
        if place == 0:
            writer.add("general.architecture", "phi3", ValueType.STRING)
        for key, value, kind in (
            ("split.no", values["no"], ValueType.UINT16),
            ("split.tensors.count", values["total"], ValueType.INT32),
            ("split.count", values["count"], ValueType.UINT16),
        ):
            if value is not None:
                writer.add(key, value, kind)
        for name in names:
            writer.add_tensor(name, (4, 32), GGMLType.F32)
        writer.begin()
        for name in names:
            writer.write(name, content(name))
        writer.commit()


Change = Callable[[int], dict[str, Any]]


def write_model(
    folder: Path, divided: Sequence[Sequence[str]], change: Change = lambda i: {}, *, alignments: Sequence[int] = (32,)
) -> Path:
    for i, names in enumerate(divided):
        path = part_path(folder / "m", i, len(divided))
        write_part(path, names, i, len(divided), alignment=alignments[i % len(alignments)], **change(i))
    return part_path(folder / "m", 0, len(divided))


PARTS = [NAMES[:3], NAMES[3:6], NAMES[6:]]


@pytest.mark.parametrize("divided", [PARTS, [[], *PARTS], [[n] for n in NAMES]], ids=["three", "empty first", "seven"])
def test_all_parts_are_one_file(tmp_path: Path, divided: list[list[str]]) -> None:
    first = write_model(tmp_path, divided, alignments=(32, 64, 4096))
    with open_model(first) as model:
        assert list(model.tensors) == NAMES
        assert model.require("general.architecture", str) == "phi3"
        assert [len(part.tensors) for part in model.parts] == [len(names) for names in divided]
        assert model.size == sum(path.stat().st_size for path in tmp_path.iterdir())
        for name in NAMES:
            assert np.array_equal(model.data(name).view("<f4"), content(name).reshape(-1))
            part, offset = model.locate(name)
            assert part.path.read_bytes()[offset : offset + 512] == content(name).tobytes()
        for ask in (model.data, model.locate):
            with pytest.raises(GGUFError, match="no tensor 'none'"):
                ask("none")
    for part in model.parts:
        if part.tensors:
            with pytest.raises(ValueError, match="closed"):
                part.data(next(iter(part.tensors)))


@pytest.mark.parametrize("count", [None, 0, 1])
def test_a_file_that_is_no_part_is_opened_as_it_is(tmp_path: Path, count: int | None) -> None:
    """llama-gguf-split leaves its keys in what it merged, with a count of 0."""
    write_part(tmp_path / "merged.gguf", NAMES, 0, 0, count=count)
    with open_model(tmp_path / "merged.gguf") as model:
        assert type(model) is GGUFFile
        assert model.parts == (model,)
        assert len(model.tensors) == 7


@pytest.mark.parametrize("small_first", [False, True])
def test_parts_of_the_gguf_package_are_read(tmp_path: Path, small_first: bool) -> None:
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "phi3", split_max_tensors=3, small_first_shard=small_first)
    for name in NAMES:
        writer.add_tensor(name, content(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.iterdir())
    assert len(parts) == 3 + small_first
    with open_model(parts[0]) as model:
        assert list(model.tensors) == NAMES
        assert all(np.array_equal(model.data(name).view("<f4"), content(name).reshape(-1)) for name in NAMES)


def remove(index: int) -> Callable[[Path], None]:
    return lambda folder: part_path(folder / "m", index, 3).unlink()


def rename_first(folder: Path) -> None:
    part_path(folder / "m", 0, 3).rename(folder / "other.gguf")


def cut(folder: Path) -> None:
    path = part_path(folder / "m", 1, 3)
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder: Path) -> None:
    part_path(folder / "m", 2, 3).write_bytes(b"")


def make_folder(folder: Path) -> None:
    part_path(folder / "m", 2, 3).unlink()
    part_path(folder / "m", 2, 3).mkdir()


def nothing(folder: Path) -> None:
    pass


def on(index: int, **keys: Any) -> Change:
    return lambda i: keys if i == index else {}


BROKEN: dict[str, tuple[list[list[str]], Change, Callable[[Path], None], str, str]] = {
    "second missing": (PARTS, on(9), remove(1), "m-00001-of-00003.gguf", "m-00002-of-00003.gguf is missing, part 2"),
    "third missing": (PARTS, on(9), remove(2), "m-00001-of-00003.gguf", "m-00003-of-00003.gguf is missing"),
    "second given": (PARTS, on(9), nothing, "m-00002-of-00003.gguf", "give the first one, m-00001-of-00003.gguf"),
    "first renamed": (PARTS, on(9), rename_first, "other.gguf", "give it back its name, ...-00001-of-00003.gguf"),
    "truncated": (PARTS, on(9), cut, "m-00001-of-00003.gguf", "m-00002-of-00003.gguf is not valid GGUF.*truncated"),
    "empty file": (PARTS, on(9), empty, "m-00001-of-00003.gguf", "m-00003-of-00003.gguf is not a GGUF file"),
    "folder": (PARTS, on(9), make_folder, "m-00001-of-00003.gguf", "m-00003-of-00003.gguf is not a file"),
    "count differs": (PARTS, on(0, count=2), nothing, "m-00001-of-00003.gguf", "first of 2 parts, which are found by"),
    "count too large": (PARTS, on(0, count=65535), nothing, "m-00001-of-00003.gguf", "first of 65535 parts"),
    "no beyond count": (PARTS, on(0, no=3), nothing, "m-00001-of-00003.gguf", "part 4 of 3, which cannot be"),
    "no missing": (PARTS, on(0, no=None), nothing, "m-00001-of-00003.gguf", "lacks the key 'split.no'"),
    "first says second": (PARTS, on(0, no=1), nothing, "m-00001-of-00003.gguf", "is part 2 of a model in 3 files"),
    "parts swapped": (PARTS, on(1, no=2), nothing, "m-00001-of-00003.gguf", "part 2 of 3 by its name and is part 3"),
    "part of another count": (PARTS, on(2, count=4), nothing, "m-00001-of-00003.gguf", "part 3 of 4 by its keys"),
    "part without keys": (PARTS, on(2, no=None), nothing, "m-00001-of-00003.gguf", "is no part of a model by its keys"),
    "part of another model": (PARTS, on(2, total=9), nothing, "m-00001-of-00003.gguf", "with 9 tensors .* has 7"),
    "loop": (PARTS, on(1, no=0), nothing, "m-00001-of-00003.gguf", "part 2 of 3 by its name and is part 1 of 3"),
    "total lies": (PARTS, lambda i: {"total": 8}, nothing, "m-00001-of-00003.gguf", "hold 7 tensors and should hold 8"),
    "total negative": (PARTS, lambda i: {"total": -1}, nothing, "m-00001-of-00003.gguf", "should hold -1"),
    "tensor twice": (
        [*PARTS[:2], ["t6", "t1"]],
        lambda i: {"total": 8},
        nothing,
        "m-00001-of-00003.gguf",
        "'t1' is in",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_fit_are_one_sentence(tmp_path: Path, name: str) -> None:
    divided, change, spoil, given, expected = BROKEN[name]
    write_model(tmp_path, divided, change)
    spoil(tmp_path)
    with pytest.raises(GGUFError, match=expected) as caught:
        open_model(tmp_path / given)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_a_count_of_another_type_is_no_number(tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "m-00001-of-00002.gguf") as writer:
        writer.add("split.count", "two", ValueType.STRING)
        writer.begin()
        writer.commit()
    with pytest.raises(GGUFError, match=r"stores the key 'split\.count' as STRING"):
        open_model(tmp_path / "m-00001-of-00002.gguf")


def test_tensors_of_all_parts_together_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phiquant.gguf.split.MAX_TENSORS", 5)
    first = write_model(tmp_path, PARTS)
    with pytest.raises(GGUFError, match="more than 5 tensors"):
        open_model(first)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_tensors": 1}, [1] * 7),
        ({"max_tensors": 3}, [3, 3, 1]),
        ({"max_tensors": 7}, [7]),
        ({"max_tensors": 128}, [7]),
        ({"max_tensors": 3, "first_empty": True}, [0, 3, 3, 1]),
        ({"max_bytes": 1}, [1] * 7),
        ({"max_bytes": 64}, [2, 1, 2, 2]),
        ({"max_bytes": 10_000}, [7]),
        ({"max_bytes": 64, "first_empty": True}, [0, 2, 1, 2, 2]),
    ],
)
def test_tensors_are_divided(options: dict[str, Any], expected: list[int]) -> None:
    assert divide([32, 32, 96, 32, 32, 32, 32], **options) == expected


@pytest.mark.parametrize("options", [{}, {"max_tensors": 0}, {"max_bytes": -1}, {"max_tensors": 1, "max_bytes": 1}])
def test_a_division_needs_one_limit(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        divide([1], **options)


def test_no_tensors_are_one_part() -> None:
    assert divide([], max_tensors=3) == [0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/phi-00001-of-00003.gguf", ("a/phi", 0, 3)),
        ("phi-q4-00003-of-00003.gguf", ("phi-q4", 2, 3)),
        ("phi\n-00001-of-00001.gguf", ("phi\n", 0, 1)),
        ("phi.gguf", None),
        ("-00001-of-00003.gguf", None),
        ("phi-00000-of-00003.gguf", None),
        ("phi-00004-of-00003.gguf", None),
        ("phi-1-of-3.gguf", None),
        ("phi-00001-of-00003.gguf.part", None),
        ("phi-\u0661\u0661\u0661\u0661\u0661-of-00003.gguf", None),
    ],
)
def test_names_of_parts(name: str, expected: tuple[str, int, int] | None) -> None:
    assert split_name(name) == (None if expected is None else (Path(expected[0]), *expected[1:]))
    if expected is not None:
        assert part_path(*expected) == Path(name)
