"""`phiquant measure`, and what `quantize` measures and records of its own accord."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phiquant import LLM
from phiquant.calibrate import held_out
from phiquant.cli.app import run
from phiquant.cli.inspect import inspect
from phiquant.convert import convert, quantize
from phiquant.convert.verify import verify
from phiquant.eval.measure import Measurement, RowsBase, stream
from phiquant.eval.statistics import Comparison
from phiquant.eval.windows import Windows
from phiquant.gguf import GGUFFile, GGUFWriter, ValueType, keys, open_model
from phiquant.gguf.describe import made_here
from phiquant.gguf.quality import Quality, standing

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
PAGE = TINY / "page.txt"
CALIBRATION = TINY / "calibration.txt"

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("measure") / "tiny-F16.gguf"
    convert(TINY, made, "f16", quiet=True)
    return made


@pytest.fixture(scope="module")
def small(original: Path) -> Path:
    made = original.with_name("tiny-Q4_0.gguf")
    quantize(original, made, "Q4_0", quiet=True)
    return made


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Five chunks, of which two are held out, and some more."""
    path = tmp_path / "text.txt"
    path.write_text(CALIBRATION.read_text("utf-8")[:10500], "utf-8")
    return path


def compared(file: Path, original: Path, text: Path, size: int = 512, first: int = 0) -> Comparison:
    """The figures by the rooms below, without the command line."""
    with LLM.load(original, context=size) as base, LLM.load(file, context=size) as model:
        ids = np.array(base.tokenize(text.read_text("utf-8").removesuffix("\n"), special=False), np.int32)
        bos = base.tokenizer.bos_id if base.tokenizer.add_bos else None
        windows = Windows.halves(ids[first * size :], size, bos=bos)
        measured = Measurement(
            model, windows, base=RowsBase(stream(base, (windows.read(w) for w in range(len(windows))), windows))
        )
        for _ in measured.run():
            pass
        return measured.comparison


def recorded(path: Path) -> Quality:
    with open_model(path) as gguf:
        found = Quality.recorded(gguf)
        assert found is not None
        assert standing(gguf) == "of this file"
        return found


def agrees(found: Quality, expected: Comparison, *, exact: bool = False) -> None:
    pairs = (
        (found.kl_mean, expected.divergence.mean),
        (found.kl_p999, expected.divergence.percentiles[99.9]),
        (found.top1, expected.divergence.top1),
        (found.perplexity, expected.perplexity.value),
        (found.reference_perplexity, expected.base_perplexity.value),
    )
    for value, right in pairs:
        assert value == (right if exact else float(np.float32(right)))
    assert found.tokens == expected.divergence.tokens


def test_it_prints_what_the_rooms_below_measure(
    small: Path, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["measure", str(small), "--against", str(original), "-f", str(PAGE), "-c", "64"]
    assert run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("file") == str(small)
    quality = Quality(**found)
    agrees(quality, compared(small, original, PAGE, 64), exact=True)
    assert quality.text_sha256 == hashlib.sha256(PAGE.read_bytes()).hexdigest()
    assert (quality.context, quality.first_window, quality.reference) == (64, 0, "tiny-F16")
    assert run([*command, "--chunk", "3", "--json"]) == 0
    later = json.loads(capsys.readouterr().out)
    assert later["first_window"] == 3
    assert later["kl_mean"] == compared(small, original, PAGE, 64, first=3).divergence.mean
    assert run(command) == 0
    assert f"{quality.kl_mean:.6f} nats per token" in capsys.readouterr().out


@pytest.mark.parametrize("in_place", [True, False])
def test_figures_are_recorded_and_nothing_else_changes(
    in_place: bool, small: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.gguf"
    shutil.copy(small, file)
    before = file.read_bytes()
    out = file if in_place else tmp_path / "with.gguf"
    where = ["--write"] if in_place else ["-o", str(out)]
    assert run(["measure", str(file), "--against", str(original), "-f", str(PAGE), "-c", "64", *where, "-q"]) == 0
    assert in_place or file.read_bytes() == before
    found = recorded(out)
    agrees(found, compared(small, original, PAGE, 64))
    with GGUFFile.open(small) as old, GGUFFile.open(out) as new:
        assert {k for k in new.fields if k not in old.fields} == {k for k in new.fields if "quality" in k}
        assert list(old.tensors) == list(new.tensors)
        assert all((old.data(name) == new.data(name)).all() for name in old.tensors)
    verdict = verify(out)
    assert (verdict.findings, verdict.checksum, verdict.quality) == ([], "matches", "matches")
    assert sorted(p.name for p in tmp_path.iterdir()) == (["file.gguf"] if in_place else ["file.gguf", "with.gguf"])
    size = out.stat().st_size
    assert run(["measure", str(out), "--against", str(original), "-f", str(PAGE), "-c", "32", "--write", "-q"]) == 0
    assert out.stat().st_size == size, "figures are replaced, not added"
    assert recorded(out).context == 32
    capsys.readouterr()


def test_a_file_that_others_made_stays_theirs(small: Path, original: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.gguf"
    with GGUFFile.open(small) as ours, GGUFWriter(theirs) as writer:
        assert made_here(ours)
        for key, field in ours.fields.items():
            if not key.startswith("phiquant."):
                writer.add(key, field.value, field.type, field.item_type)
        for info in ours.tensors.values():
            writer.add_tensor(info.name, info.shape, info.type)
        writer.begin()
        for name in ours.tensors:
            writer.write(name, ours.data(name))
        writer.commit()
    assert run(["measure", str(theirs), "--against", str(original), "-f", str(PAGE), "-c", "64", "--write", "-q"]) == 0
    agrees(recorded(theirs), compared(small, original, PAGE, 64))
    verdict = verify(theirs)
    assert (verdict.findings, verdict.checksum, verdict.quality) == ([], "none", "matches")
    with GGUFFile.open(theirs) as gguf:
        assert not made_here(gguf)
    with_copied = tmp_path / "copied.gguf"
    with GGUFFile.open(theirs) as fields, GGUFFile.open(original) as other, GGUFWriter(with_copied) as writer:
        for key, field in fields.fields.items():
            writer.add(key, field.value, field.type, field.item_type)
        writer.add(keys.CHECKSUM, other.require(keys.CHECKSUM, str), ValueType.STRING)
        for info in fields.tensors.values():
            writer.add_tensor(info.name, info.shape, info.type)
        writer.begin()
        for name in fields.tensors:
            writer.write(name, fields.data(name))
        writer.commit()
    assert recorded(with_copied) == recorded(theirs), "a checksum of the F16 file, copied along, does not disturb"
    assert verify(with_copied).checksum == "of another file"
    damaged = bytearray(theirs.read_bytes())
    damaged[-40] ^= 1
    theirs.write_bytes(damaged)
    assert verify(theirs).quality == "of another file"


@pytest.mark.parametrize("method", ["feedback", "imatrix"])
def test_quantize_holds_the_end_of_the_text_out_and_measures_on_it(
    method: str, text: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    command = ["quantize", "--method", method, "-q", "--calibrate"]
    assert run([*command, str(text), str(original), str(out), "Q3_K_S"]) == 0
    found = recorded(out)
    with LLM.load(original, context=512) as llm:
        chunks = len(llm.tokenize(text.read_text("utf-8"), special=False)) // 512
    first, kept = held_out(chunks * 512, 512)
    assert (found.first_window, kept, found.tokens) == (first, 2, 2 * 255)
    assert "held out" in found.method
    agrees(found, compared(out, original, text, first=first))
    assert verify(out).quality == "matches"
    # Nothing of what is held out reaches the statistics: with other words there, the weights are the same.
    other = tmp_path / "other.txt"
    words = text.read_text("utf-8")
    other.write_text(words[:-2000] + words[:2000], "utf-8")
    second = tmp_path / "second.gguf"
    assert run([*command, str(other), str(original), str(second), "Q3_K_S"]) == 0
    with GGUFFile.open(out) as a, GGUFFile.open(second) as b:
        assert all((a.data(name) == b.data(name)).all() for name in a.tensors)
        if method == "imatrix":
            assert a.require("quantize.imatrix.chunks_count", int) == first
        else:
            assert a.require("phiquant.quantize.tokens", int) == first * 512
    assert recorded(second).kl_mean != found.kl_mean
    inspect(out, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["quality"]["kl_mean"] == found.kl_mean
    assert shown["quality"]["standing"] == "of this file"
    inspect(out, as_json=False)
    assert f"{found.kl_mean:.6f} nats per token" in capsys.readouterr().out


def test_quantize_measures_on_another_text_and_in_parts(original: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text(PAGE.read_text("utf-8") * 2, "utf-8")
    out = tmp_path / "out.gguf"
    command = ["quantize", "--measure-text", str(page), "--split-max-tensors", "20", "-q"]
    assert run([*command, str(original), str(out), "Q4_0"]) == 0
    first = tmp_path / "out-00001-of-00003.gguf"
    found = recorded(first)
    agrees(found, compared(first, original, page))
    assert "held out" not in found.method
    assert (verify(first).quality, verify(first).findings) == ("matches", [])
    again = tmp_path / "again.gguf"
    assert run(["merge", "-q", str(first), str(again)]) == 0
    assert recorded(again) == found, "the division does not matter"
    assert run(["measure", str(first), "--against", str(original), "-f", str(PAGE), "-c", "64", "--write", "-q"]) == 0
    assert recorded(first).context == 64
    assert verify(first).quality == "matches"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["again.gguf", *(f"out-0000{i}-of-00003.gguf" for i in (1, 2, 3)), "page.txt"]
    )


def test_quantizing_again_drops_the_figures_of_the_source(small: Path, original: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    command = ["measure", str(original), "--against", str(original), "-f", str(PAGE), "-c", "64", "-o", str(first)]
    assert run([*command, "-q"]) == 0
    assert recorded(first).kl_mean == 0
    quantize(first, second, "Q4_0", quiet=True)
    with GGUFFile.open(second) as gguf, GGUFFile.open(small) as expected:
        assert Quality.recorded(gguf) is None
        assert list(gguf.fields) == list(expected.fields)


def test_figures_that_a_program_copied_are_not_believed(
    original: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_figures, copied = tmp_path / "with.gguf", tmp_path / "copied.gguf"
    command = ["measure", str(small), "--against", str(original), "-f", str(PAGE), "-c", "64", "-q"]
    assert run([*command, "-o", str(with_figures)]) == 0
    with GGUFFile.open(with_figures) as fields, GGUFFile.open(original) as weights, GGUFWriter(copied) as writer:
        for key, field in fields.fields.items():
            writer.add(key, field.value, field.type, field.item_type)
        for info in weights.tensors.values():
            writer.add_tensor(info.name, info.shape, info.type)
        writer.begin()
        for name in weights.tensors:
            writer.write(name, weights.data(name))
        writer.commit()
    capsys.readouterr()
    inspect(copied, as_json=False)
    assert "Quality of another file" in capsys.readouterr().out
    inspect(copied, as_json=True)
    assert json.loads(capsys.readouterr().out)["quality"]["standing"] == "of another file"
    assert verify(copied).quality == "of another file"


def test_figures_that_are_none_are_said_to_be(
    original: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    command = ["measure", str(small), "--against", str(original), "-f", str(PAGE), "-c", "64", "-q"]
    assert run([*command, "-o", str(broken)]) == 0
    data = bytearray(broken.read_bytes())
    place = data.index(b"phiquant.quality.kl_mean") + len("phiquant.quality.kl_mean") + 4
    data[place : place + 4] = struct.pack("<f", float("nan"))
    broken.write_bytes(data)
    capsys.readouterr()
    inspect(broken, as_json=False)
    assert "cannot be read" in capsys.readouterr().out
    inspect(broken, as_json=True)
    assert json.loads(capsys.readouterr().out)["quality"] is None


def test_statistics_from_elsewhere_are_not_believed_to_leave_an_end_out(
    text: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics, out = tmp_path / "s.gguf", tmp_path / "out.gguf"
    command = ["quantize", "--calibrate", str(text), "--statistics", str(statistics), str(original), str(out), "Q3_K_S"]
    assert run(command) == 0
    assert recorded(out).first_window > 0, "they were collected in this run, without the end"
    assert run(command) == 0
    assert "so the result is not measured" in capsys.readouterr().err
    with GGUFFile.open(out) as gguf:
        assert Quality.recorded(gguf) is None


def test_what_is_refused(small: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measure", str(small), "-f", str(PAGE)]) == 2
    assert "--against" in capsys.readouterr().err
    assert run(["measure", str(small), "--against", str(original), "-f", str(PAGE)]) == 1
    assert "must have at least 1024" in capsys.readouterr().err
    assert run(["measure", str(small), "--against", str(original), "-f", str(PAGE), "-c", "64", "--chunk", "11"]) == 1
    assert "leave out fewer" in capsys.readouterr().err
    command = ["quantize", "--allow-requantize", "--measure-text", str(CALIBRATION), str(small)]
    assert run([*command, str(tmp_path / "x.gguf"), "Q2_K"]) == 1
    assert "is quantized already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_stopping_leaves_nothing(original: Path, tmp_path: Path) -> None:
    """Ctrl-C while the result is measured: no output, no temporary file."""
    long = tmp_path / "long.txt"
    long.write_text(CALIBRATION.read_text("utf-8") * 20, "utf-8")
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-m", "phiquant", "quantize", "--measure-text", str(long)]
    process = subprocess.Popen(
        [*command, str(original), str(folder / "x.gguf"), "Q8_0", "-q"], env={**os.environ}, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(folder.iterdir()):
        time.sleep(0.05)
    time.sleep(3)
    assert process.poll() is None
    assert any(folder.iterdir())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert list(folder.iterdir()) == []
