"""`verify`: sound files of every kind pass, and every kind of damage is named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phiquant.convert import quantize
from phiquant.convert.parts import Division
from phiquant.convert.verify import Verdict, verify
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType, keys
from phiquant.gguf.checksum import PIECE

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "q.gguf"
    quantize(Path(__file__).parents[2] / "models" / "phi3-tiny", path, "Q4_K_M")
    return path


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(original.read_bytes())
    return path


def poke(path: Path, tensor: str, offset: int, content: bytes) -> None:
    with GGUFFile.open(path) as file:
        _, start = file.locate(tensor)
    with path.open("r+b") as raw:
        raw.seek(start + offset)
        raw.write(content)


def test_a_sound_file(model: Path) -> None:
    planned: list[int] = []
    done: list[int] = []
    verdict = verify(model, planned=planned.append, advanced=lambda count, tensor: done.append(count))
    assert verdict == Verdict(model, 1, 50, sum(done), "matches")
    assert sum(planned) == sum(done) == verdict.nbytes > 10_000_000


@pytest.mark.parametrize("threads", [1, 5])
def test_a_bad_scale_is_named_with_its_row(model: Path, threads: int) -> None:
    rows = GGMLType.Q4_K.row_bytes(256)
    for row in (9, 200):
        poke(model, "blk.2.ffn_up.weight", row * rows + 2, b"\x00\xfc")
    poke(model, "output_norm.weight", 4 * 17, b"\x00\x00\xc0\x7f")
    verdict = verify(model, threads=threads)
    second, first, *sums = verdict.findings  # in the order of the file
    assert (first.tensor, first.row) == ("blk.2.ffn_up.weight", 9)
    assert "NaN or infinity in the scale of a block in row 9 and 1 more rows; fetch" in first.sentence
    assert (second.tensor, second.row) == ("output_norm.weight", 0)
    assert verdict.checksum == "differs"
    assert [finding.tensor for finding in sums] == ["output_norm.weight", "blk.2.ffn_up.weight"]


def test_a_flipped_bit_is_found_by_the_checksum(model: Path) -> None:
    poke(model, "blk.5.attn_qkv.weight", 1000, b"\x12")
    (finding,) = verify(model).findings
    assert finding.tensor == "blk.5.attn_qkv.weight"
    assert "is not what its checksum was made of" in finding.sentence


def rewritten(model: Path, path: Path, change: Callable[[str, object], object]) -> Path:
    """The same tensors under metadata that `change` changes; None leaves a key out."""
    with GGUFFile.open(model) as file, GGUFWriter(path) as writer:
        for key, field in file.fields.items():
            value = change(key, field.value)
            if value is not None:
                writer.add(key, value, field.type, field.item_type)
        for info in file.tensors.values():
            writer.add_tensor(info.name, info.shape, info.type)
        writer.begin()
        for name in file.tensors:
            writer.write(name, file.data(name))
        writer.commit()
    return path


def test_other_metadata_does_not_matter_to_the_checksum(model: Path, tmp_path: Path) -> None:
    path = rewritten(model, tmp_path / "x.gguf", lambda key, value: "other" if key == "general.name" else value)
    assert verify(path) == Verdict(path, 1, 50, verify(model).nbytes, "matches")


def test_a_file_of_another_program_has_no_checksum(model: Path, tmp_path: Path) -> None:
    path = rewritten(model, tmp_path / "x.gguf", lambda key, value: None if key.startswith("phiquant.") else value)
    verdict = verify(path)
    assert (verdict.checksum, verdict.findings) == ("none", [])


def test_a_checksum_that_another_program_copied_says_nothing(model: Path, tmp_path: Path) -> None:
    """As llama-quantize does, which keeps keys that it does not know."""
    with GGUFFile.open(model) as file, GGUFWriter(tmp_path / "x.gguf") as writer:
        writer.add(keys.CHECKSUM, file.metadata[keys.CHECKSUM], ValueType.STRING)
        writer.add_tensor("token_embd.weight", (4, 32), GGMLType.F32)
        writer.begin()
        writer.write("token_embd.weight", bytes(512))
        writer.commit()
    verdict = verify(tmp_path / "x.gguf")
    assert (verdict.checksum, verdict.findings) == ("of another file", [])


@pytest.mark.parametrize("kept", [True, False])
def test_a_damaged_checksum(model: Path, tmp_path: Path, kept: bool) -> None:
    def change(key: str, value: object) -> object:
        if key == keys.TENSOR_CHECKSUMS:
            return value if kept else None
        return f"{value[:-1]}{'1' if value[-1] == '0' else '0'}" if key == keys.CHECKSUM else value  # type: ignore[index]

    (finding,) = verify(rewritten(model, tmp_path / "x.gguf", change)).findings
    assert ("checksum of" if kept else "weights of") in finding.sentence
    assert finding.tensor is None


@pytest.mark.parametrize("damage", ["truncated", "longer", "no file", "text"])
def test_a_broken_structure_is_a_finding(model: Path, damage: str) -> None:
    content = model.read_bytes()
    expected = {
        "truncated": (content[:-500], "ends beyond the end of the file"),
        "longer": (content + bytes(40), "goes on for 40 bytes after its last tensor"),
        "text": (b"hello" * 20, "is not a GGUF file"),
        "no file": (b"", "cannot be opened"),
    }
    changed, sentence = expected[damage]
    model.write_bytes(changed)
    if damage == "no file":
        model.unlink()
    (finding,) = verify(model).findings
    assert sentence in finding.sentence


def test_parts_are_verified_as_one(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "models" / "phi3-tiny"
    plan = quantize(source, tmp_path / "p", "Q8_0", division=Division(max_tensors=20)).plan
    verdict = verify(plan.path)
    assert (verdict.parts, verdict.tensors, verdict.checksum, verdict.findings) == (3, 50, "matches", [])
    last = plan.parts[2]
    poke(last.path, last.tensors[-1].name, 0, b"\x01")
    assert [finding.tensor for finding in verify(plan.path).findings] == [last.tensors[-1].name]
    last.path.unlink()
    (finding,) = verify(plan.path).findings
    assert "p-00003-of-00003.gguf is missing" in finding.sentence


def test_tensors_of_every_shape(tmp_path: Path) -> None:
    shapes = {"wide": (2, PIECE + 512), "cube": (3, 5, 256), "empty": (0, 256), "flat": (7,)}
    with GGUFWriter(tmp_path / "x.gguf") as writer:
        for name, shape in shapes.items():
            writer.add_tensor(name, shape, GGMLType.F16)
        writer.begin()
        data = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
        data["wide"][1, PIECE + 100] = np.nan
        data["cube"][2, 4, 7] = -np.inf
        for name, values in data.items():
            writer.write(name, values)
        writer.commit()
    findings = verify(tmp_path / "x.gguf").findings
    assert [(finding.tensor, finding.row) for finding in findings] == [("wide", 1), ("cube", 14)]
