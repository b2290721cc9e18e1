"""`inspect`: tables for people, JSON for programs, and nothing of a file's text steers the terminal."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from phiquant.cli.inspect import inspect
from phiquant.convert import convert
from phiquant.errors import GGUFError
from phiquant.gguf import GGMLType, GGUFFile, GGUFWriter, ValueType

MODEL = Path(__file__).parents[2] / "models" / "phi3-tiny"

WORDS = [f"word{index}" for index in range(1234)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "phi3", ValueType.STRING)
        writer.add("general.file_type", 15, ValueType.UINT32)
        writer.add("k.nan", math.nan, ValueType.FLOAT32)
        writer.add("k.flag", True, ValueType.BOOL)
        writer.add("k.words", WORDS, ValueType.ARRAY, ValueType.STRING)
        writer.add("k.few", [1.5, math.inf], ValueType.ARRAY, ValueType.FLOAT32)
        writer.add("k.long", "x" * 5000, ValueType.STRING)
        writer.add("k.hostile", "a\x1b[31m[bold]red[/bold]\x9b\n:smile:", ValueType.STRING)
        writer.add_tensor("token_embd.weight", (3, 256), GGMLType.Q4_K)
        writer.add_tensor("output_norm.weight", (256,), GGMLType.F32)
        writer.begin()
        writer.write("token_embd.weight", bytes(3 * 144))
        writer.write("output_norm.weight", np.ones(256, np.float32))
        writer.commit()
    return path


def test_json_is_complete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(path, True)
    out = capsys.readouterr().out

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(out, parse_constant=refuse)
    with GGUFFile.open(path) as file:
        assert document["size"] == file.size
        assert document["data_offset"] == file.data_offset
        assert list(document["metadata"]) == list(file.fields)
        assert [tensor["name"] for tensor in document["tensors"]] == list(file.tensors)
    assert (document["version"], document["alignment"], document["file_type"]) == (3, 32, "Q4_K_M")
    metadata = document["metadata"]
    assert metadata["general.file_type"] == {"type": "UINT32", "value": 15}
    assert metadata["k.nan"]["value"] == "nan"
    assert metadata["k.flag"]["value"] is True
    assert metadata["k.long"]["value"] == "x" * 5000
    assert metadata["k.few"] == {"type": "ARRAY", "item_type": "FLOAT32", "count": 2, "items": [1.5, "inf"]}
    words = {"type": "ARRAY", "item_type": "STRING", "count": 1234, "first_items": WORDS[:8]}
    assert metadata["k.words"] == words
    embedding, norm = document["tensors"]
    assert embedding == {
        "name": "token_embd.weight",
        "shape": [256, 3],
        "type": "Q4_K",
        "size": 432,
        "offset": document["data_offset"],
        "part": 0,
    }
    assert norm["offset"] == document["data_offset"] + 448
    totals = document["totals"]
    assert (totals["tensors"], totals["elements"], totals["size"]) == (2, 1024, 1456)
    assert totals["bits_per_weight"] == 11.375
    assert totals["types"]["Q4_K"] == {"tensors": 1, "elements": 768, "size": 432, "bits_per_weight": 4.5}


def test_tables_show_the_same(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(path, False)
    out = capsys.readouterr().out
    for shown in (
        "Q4_K_M",
        "GGUF 3, little-endian",
        "STRING [1,234]",
        '"word7", …',
        "(5,000 characters)",
        "11.375",
        "4.500",
    ):
        assert shown in out
    assert "word8" not in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    with GGUFFile.open(path) as file:
        start = file.data_offset
    assert lines["token_embd.weight"] == ["256", "x", "3", "Q4_K", "432", f"{start:,}"]
    assert lines["output_norm.weight"] == ["256", "F32", "1,024", f"{start + 448:,}"]
    assert lines["all"] == ["2", "1,024", "1,456", "11.375"]


def test_text_of_a_file_is_escaped(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(path, False)
    out = capsys.readouterr().out
    assert r"a\x1b[31m[bold]red[/bold]\x9b\n:smile:" in out
    inspect(path, True)
    out += capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in out)


def test_a_file_without_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.gguf"
    with GGUFWriter(path) as writer:
        writer.add("general.file_type", 999, ValueType.UINT32)
        writer.begin()
        writer.commit()
    inspect(path, False)
    assert "unknown (999)" in capsys.readouterr().out
    inspect(path, True)
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert totals == {"tensors": 0, "elements": 0, "size": 0, "bits_per_weight": None, "types": {}}


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("not a GGUF file, but long enough")
    for as_json in (False, True):
        with pytest.raises(GGUFError, match="is not a GGUF file"):
            inspect(tmp_path / "a.txt", as_json)


def test_what_a_file_does_not_say_is_told_with_what_is_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "moe.gguf"
    numbers = {"context_length": 64, "embedding_length": 8, "feed_forward_length": 4, "block_count": 1}
    numbers |= {"attention.head_count": 2, "expert_count": 3, "expert_used_count": 2}
    experts = {"ffn_gate_inp": (3, 8), "ffn_gate_exps": (3, 4, 8), "ffn_up_exps": (3, 4, 8), "ffn_down_exps": (3, 8, 4)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (5, 8), "output.weight": (5, 8)}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in experts.items()}
    shapes |= {f"blk.0.attn_{name}.weight": (8, 8) for name in ("q", "k", "v", "output")}
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        shapes |= {f"{norm}.weight": (8,), f"{norm}.bias": (8,)}
    with GGUFWriter(path) as writer:
        writer.add("general.architecture", "phimoe", ValueType.STRING)
        for key, value in numbers.items():
            writer.add(f"phimoe.{key}", value, ValueType.UINT32)
        writer.add("phimoe.attention.layer_norm_rms_epsilon", 1e-5, ValueType.FLOAT32)
        for name, shape in shapes.items():
            writer.add_tensor(name, shape, GGMLType.F32)
        writer.begin()
        for name, shape in shapes.items():
            writer.write(name, np.zeros(shape, np.float32))
        writer.commit()
    inspect(path, True)
    (assumed,) = json.loads(capsys.readouterr().out)["assumptions"]
    assert "sparsemixer with a jitter of 0.01" in assumed
    inspect(path, False)
    assert assumed in capsys.readouterr().out


def test_a_file_that_says_all_leaves_nothing_to_be_assumed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(path, True)
    assert json.loads(capsys.readouterr().out)["assumptions"] == []
    inspect(path, False)
    assert "assumed" not in capsys.readouterr().out


def test_what_a_vocabulary_leaves_out_is_told_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in files of llama.cpp, which have no place for the whitespace that added tokens swallow."""
    whole, bare = tmp_path / "whole.gguf", tmp_path / "bare.gguf"
    convert(MODEL, whole, "q8_0", quiet=True)
    with GGUFFile.open(whole) as source, GGUFWriter(bare) as writer:
        for key, field in source.fields.items():
            if not key.startswith("phiquant."):
                writer.add(key, field.value, field.type, field.item_type)
        for name, info in source.tensors.items():
            writer.add_tensor(name, info.shape, info.type)
        writer.begin()
        for name in source.tensors:
            writer.write(name, source.data(name))
        writer.commit()
    for path, count in ((whole, 0), (bare, 1)):
        inspect(path, True)
        assumptions = json.loads(capsys.readouterr().out)["assumptions"]
        assert len(assumptions) == count
    assert "lacks the attributes of added tokens" in assumptions[0]
