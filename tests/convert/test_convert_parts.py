"""Outputs in several files: split, merge, keep-split, direct parts; bytes, metadata, checksums."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from phiquant.convert import convert, quantize
from phiquant.convert.parts import Division, plan_merge, plan_split
from phiquant.convert.run import execute
from phiquant.convert.source import GGUFSource
from phiquant.errors import GGUFError, OutputError, RequestError
from phiquant.gguf import GGUFFile, open_model
from phiquant.llm import LLM

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "tiny-Q8_0.gguf"
    convert(Path(__file__).parents[2] / "models" / "phi3-tiny", path, "q8_0")
    return path


def split(source: Path, prefix: Path, division: Division) -> Path:
    with GGUFSource(source) as opened:
        return execute(plan_split(opened, prefix, division)).plan.path


def merge(first: Path, path: Path) -> Path:
    with GGUFSource(first) as opened:
        return execute(plan_merge(opened, path), overwrite=False).plan.path


DIVISIONS = {
    "tensors": Division(max_tensors=7),
    "one each": Division(max_tensors=1),
    "size": Division(max_bytes=2_000_000),
    "empty first": Division(max_tensors=30, first_empty=True),
    "all in one": Division(max_bytes=10**12),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_what_is_split_and_merged_is_the_same_to_the_byte(whole: Path, tmp_path: Path, name: str) -> None:
    with GGUFSource(whole) as opened:
        plan = plan_split(opened, tmp_path / "p", DIVISIONS[name])
    first = split(whole, tmp_path / "p", DIVISIONS[name])
    assert {part.path: part.size for part in plan.parts} == {path: path.stat().st_size for path in tmp_path.iterdir()}
    with open_model(first) as parts, open_model(whole) as one:
        assert list(parts.tensors) == list(one.tensors)
        assert [part.tensors.keys() - one.tensors.keys() for part in parts.parts] == [set()] * len(parts.parts)
        for part in parts.parts[1:]:
            assert list(part.fields) == ["split.no", "split.tensors.count", "split.count"]
    if name == "all in one":
        with pytest.raises(RequestError, match="nothing to merge"):
            merge(first, tmp_path / "merged.gguf")
        return
    assert merge(first, tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()
    again = split(first, tmp_path / "again", Division(max_tensors=25))
    assert merge(again, tmp_path / "other.gguf").read_bytes() == whole.read_bytes()


def test_a_file_without_a_checksum_gets_none(whole: Path, tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_array("words", ["a", "b"])
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((3, 32), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = split(path, tmp_path / "p", Division(max_tensors=2))
    assert merge(first, tmp_path / "merged.gguf").read_bytes() == path.read_bytes()


def test_directly_written_parts_are_the_whole_file_split(tiny: Path, tmp_path: Path) -> None:
    division = Division(max_bytes=3_000_000)
    one = quantize(tiny, tmp_path / "one.gguf", "Q4_K_M").plan.path
    for made in (
        quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", division=division).plan,
        convert(tiny, tmp_path / "c", "Q4_K_M", division=division).plan,
    ):
        assert made.path.name.endswith(f"-00001-of-{len(made.parts):05}.gguf")
        assert len(made.parts) > 2
        assert made.size == sum(part.path.stat().st_size for part in made.parts)
        split(one, tmp_path / "split", division)
        for i, part in enumerate(made.parts):
            other = tmp_path / f"split-{i + 1:05}-of-{len(made.parts):05}.gguf"
            assert part.path.read_bytes() == other.read_bytes()


def test_keep_split(tiny: Path, tmp_path: Path) -> None:
    source = convert(tiny, tmp_path / "f16", "f16", division=Division(max_tensors=20)).plan.path
    one = quantize(tiny, tmp_path / "one.gguf", "Q5_K_M").plan.path
    plan = quantize(source, tmp_path / "kept.gguf", "Q5_K_M", keep_split=True).plan
    assert [part.path.name for part in plan.parts] == [f"kept-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert [len(part.tensors) for part in plan.parts] == [20, 20, 10]
    assert merge(plan.path, tmp_path / "merged.gguf").read_bytes() == one.read_bytes()
    joined = quantize(source, tmp_path / "joined.gguf", "Q5_K_M").plan.path
    assert joined.read_bytes() == one.read_bytes()
    assert quantize(source, None, "Q8_0", keep_split=True).plan.path == tmp_path / "f16-Q8_0-00001-of-00003.gguf"
    with pytest.raises(RequestError, match=r"--keep-split.*not the first part"):
        quantize(one, tmp_path / "x.gguf", "Q5_K_M", keep_split=True)
    with pytest.raises(RequestError, match="cannot be used together"):
        quantize(source, tmp_path / "x.gguf", "Q5_K_M", keep_split=True, division=Division(max_tensors=3))


def test_a_split_model_runs(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path / "p", Division(max_tensors=9, first_empty=True))
    with LLM.load(whole, context=64) as one, LLM.load(first, context=64) as parts:
        ids = one.tokenize("Once upon a time")
        assert np.array_equal(one.logits(ids), parts.logits(ids))


def test_refusals(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path / "p", Division(max_tensors=20))
    (tmp_path / "there.gguf").touch()
    with pytest.raises(OutputError, match="exists already"):
        merge(first, tmp_path / "there.gguf")
    with pytest.raises(OutputError, match="also an input"):
        split(first, tmp_path / "p", Division(max_tensors=20))
    with pytest.raises(RequestError, match="cannot be used together"):
        Division(max_tensors=1, max_bytes=1)
    for division in ({"max_tensors": 0}, {"max_bytes": -5}):
        with pytest.raises(RequestError, match="above 0"):
            Division(**division)
    with pytest.raises(RequestError, match="--no-tensor-first-split needs"):
        split(whole, tmp_path / "x", Division(first_empty=True))
    with pytest.raises(GGUFError, match=r"give the first one, p-00001-of-00003\.gguf"):
        GGUFSource(tmp_path / "p-00003-of-00003.gguf")


def test_a_damaged_source_is_not_split_and_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    shutil.copyfile(whole, bad)
    with GGUFFile.open(bad) as file:
        _, at = file.locate("blk.3.ffn_up.weight")
    with bad.open("r+b") as raw:
        raw.seek(at + 7)
        raw.write(b"\x55\x55")
    with pytest.raises(GGUFError, match="is damaged: its tensors are not those its checksum was made of"):
        split(bad, tmp_path / "p", Division(max_tensors=20))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


def test_space_is_checked_for_all_parts_together(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 12_000_000))
    with pytest.raises(OutputError, match=r"needs 16.* MB and .* has 12\.0 MB free"):
        split(whole, tmp_path / "p", Division(max_tensors=1))
    assert list(tmp_path.iterdir()) == []
