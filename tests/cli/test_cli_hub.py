"""`pull`, `list`, `rm`, and `-hf` on the verbs that take a model, against a server of our own."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from hub_server import Hub, run, serving

from phiquant.cli import app, commands, models
from phiquant.convert import convert, quantize
from phiquant.convert.parts import Division, plan_split
from phiquant.convert.run import execute
from phiquant.convert.source import GGUFSource
from phiquant.errors import RequestError
from phiquant.hub import Reference

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
NAME = "org/tiny-GGUF"
SPLIT = "org/two-GGUF"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bundled model, as repositories hold it."""
    folder = tmp_path_factory.mktemp("tiny")
    convert(TINY, folder / "tiny-f16.gguf", "f16", quiet=True)
    quantize(folder / "tiny-f16.gguf", folder / "tiny-q8_0.gguf", "Q8_0", quiet=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"mmproj-tiny-Q8_0.gguf": b"GGUF"}


@pytest.fixture(scope="module")
def hub(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("parts")
    (folder / "tiny.gguf").write_bytes(files["tiny-f16.gguf"])
    with GGUFSource(folder / "tiny.gguf") as opened:
        execute(plan_split(opened, folder / "two-f16", Division(30, None, False)))
    parts = {path.name: path.read_bytes() for path in folder.glob("two-*.gguf")}
    checkpoint = {path.name: path.read_bytes() for path in TINY.iterdir() if path.is_file()}
    with serving(Hub({NAME: files, "org/tiny": checkpoint, SPLIT: parts})) as served:
        yield served


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def phiquant(*arguments: str, hub: Hub, home: Path, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "phiquant", *arguments, endpoint=hub.endpoint, home=home, stdin=stdin, **more)


def test_pull_list_and_rm(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    done = phiquant("pull", f"{NAME}:q8_0", hub=hub, home=tmp_path)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == files["tiny-q8_0.gguf"]
    assert re.fullmatch(r"phiquant: fetching tiny-q8_0\.gguf, [\d.]+ MB\n", done.stderr)
    assert phiquant("pull", "-q", "org/tiny", hub=hub, home=tmp_path).stderr == ""

    listed = phiquant("list", hub=hub, home=tmp_path, HF_HUB_OFFLINE="1").stdout
    rows = [line.split() for line in listed.splitlines() if line.strip().startswith(("org/", "name"))]
    assert rows[0] == ["name", "kind", "quant", "size", "last", "used", "path"]
    assert [row[:3] for row in rows[1:]] == [["org/tiny", "checkpoint", "-"], [f"{NAME}:Q8_0", "gguf", "Q8_0"]]
    assert rows[2][-1] == str(path)
    document = json.loads(phiquant("list", "--json", hub=hub, home=tmp_path).stdout)
    entry = document["models"][1]
    assert (entry["name"], entry["size"], entry["path"]) == (f"{NAME}:Q8_0", path.stat().st_size, str(path))
    assert document["unfinished"] == []

    refused = phiquant("rm", f"{NAME}:Q8_0", hub=hub, home=tmp_path)
    assert (refused.returncode, "--yes" in refused.stderr, path.exists()) == (1, True, True)
    wrong = phiquant("rm", "--yes", f"{NAME}:Q8_0", "org/none", hub=hub, home=tmp_path)
    assert (wrong.returncode, "no org/none" in wrong.stderr, path.exists()) == (1, True, True)
    gone = phiquant("rm", "--yes", f"{NAME}:Q8_0", "org/tiny", hub=hub, home=tmp_path)
    assert (gone.returncode, gone.stdout) == (0, "")
    assert re.fullmatch(r"[\d.]+ MB freed\n", gone.stderr)
    assert list((tmp_path / "hub").glob("models--*")) == []
    empty = phiquant("list", hub=hub, home=tmp_path)
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "phiquant pull" in empty.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
@pytest.mark.parametrize(("answer", "stays"), [("n\n", True), ("\n", True), ("y\n", False)])
def test_rm_asks(
    answer: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blob = tmp_path / "models--org--phi" / "blobs" / f"{'0' * 64}.incomplete"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(2_000_000))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path), raising=False)
    leader, follower = os.openpty()
    os.write(leader, answer.encode())
    with os.fdopen(follower, "r") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        assert app.run(["list"]) == 0
        assert "org/phi: 2.0 MB of an interrupted download" in capsys.readouterr().out
        assert app.run(["rm", "org/phi"]) == int(stays)
    os.close(leader)
    asked = "org/phi, with what an interrupted download left: frees 2.0 MB\nremove? [y/N] "
    assert capsys.readouterr().err.startswith(asked)
    assert blob.exists() == stays


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("arguments", "out"),
    [
        (("run", "-hf", NAME, "-p", "Once", "-n", "4", "-no-cnv", "--temp", "0"), "Once"),
        (("run", "-hfr", f"{NAME}:F16", "-hfd", NAME, "-p", "Once", "-n", "4", "-no-cnv", "--temp", "0"), "Once"),
        (("inspect", "--hf-repo", NAME), "tiny-q8_0.gguf"),
        (("verify", "-hf", f"{NAME}:fp16"), "tiny-f16.gguf"),
        (("perplexity", "-hf", NAME, "-f", str(TINY / "README.md"), "-c", "64", "--chunks", "1"), "PPL"),
        (("imatrix", "-hf", NAME, "-f", str(TINY / "README.md"), "-c", "64", "--chunks", "1"), "imatrix.gguf"),
        (("bench", "-hf", NAME, "-p", "8", "-n", "0", "-r", "1", "--no-limits"), "pp8"),
        (("quantize", "-hf", f"{NAME}:F16", "Q4_0"), "tiny-Q4_0.gguf"),
        (("quantize", "-hf", f"{NAME}:F16", "named.gguf", "Q4_0", "1"), "named.gguf"),
        (("quantize", "org/tiny", "Q4_0"), "tiny-Q4_0.gguf"),
        (("convert", "org/tiny"), "tiny-"),
        (("convert", "-hf", "org/tiny", "--outtype", "q8_0"), "tiny-Q8_0.gguf"),
        (("split", "-hf", NAME, "parts", "--split-max-tensors", "20"), "parts-00001-of-"),
        (("merge", "-hf", f"{SPLIT}:F16", "whole.gguf"), "whole.gguf"),
    ],
    ids=lambda value: "-".join(value[:3:2]) if isinstance(value, tuple) else None,
)
def test_verbs_take_models_of_the_hub(
    arguments: tuple[str, ...], out: str, hub: Hub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(home.rglob("*.gguf"))
    done = phiquant(*arguments, hub=hub, home=home)
    assert done.returncode == 0, done.stderr
    assert out in done.stdout
    fetched = {path.name for path in set(home.rglob("*.gguf")) - before}
    parts = {name for name in fetched if name.startswith("two-f16-0000")}
    assert fetched - parts <= {"tiny-q8_0.gguf", "tiny-f16.gguf"}  # what is made is made here, not in the cache


WITHOUT_A_MODEL = {"doctor", "pull", "list", "rm"}
"""The last three are about the Hub in any case."""
OF_SEVERAL = {"compare", "report"}
"""The first takes repositories by their names, like files; the second is about files that were made here."""


@pytest.mark.parametrize("verb", [verb for verbs in commands.GROUPS.values() for verb in verbs])
def test_every_verb_that_reads_a_model_takes_one_of_the_hub(verb: str) -> None:
    hints = get_type_hints(getattr(commands, verb), include_extras=True)
    told = [info for hint in hints.values() for info in getattr(hint, "__metadata__", ())]
    names = {name for info in told for name in info.param_decls or ()}
    assert ("-hf" in names) == (verb not in WITHOUT_A_MODEL | OF_SEVERAL)


def test_a_folder_of_that_name_is_not_the_repository(
    hub: Hub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert phiquant("convert", "org/tiny", hub=hub, home=home).returncode == 1
    done = phiquant("convert", "-hf", "org/tiny", "-o", "made.gguf", hub=hub, home=home)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made.gguf").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("split", "in.gguf"),
        ("split", "-hf", NAME, "in.gguf", "out"),
        ("merge", "in.gguf"),
        ("merge", "-hf", NAME, "in.gguf", "out.gguf"),
        ("convert",),
        ("convert", "folder", "-hf", NAME),
    ],
)
def test_too_few_or_too_many_names_are_told_with_an_example(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(list(arguments)) == 2
    told = capsys.readouterr().err
    assert "phiquant" in told
    assert "name" in told


def test_a_wrong_name_is_one_sentence_before_anything_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["run"], ["serve"], ["inspect"], ["perplexity"], ["verify"], ["bench"]):
        assert app.run([*verb, "-hf", "no name"]) == 1
        assert capsys.readouterr().err.startswith("phiquant: error: 'no name' is no model of the Hub; write owner/name")


def test_a_model_is_given_by_one_option() -> None:
    assert models.given(None, None) is None
    assert models.given("x.gguf", None) == Path("x.gguf")
    assert models.given(None, f"{NAME}:Q8_0") == Reference(NAME, quant="Q8_0")
    with pytest.raises(RequestError):
        models.given(None, "one")


@pytest.mark.cpu
def test_from_pretrained(hub: Hub, home: Path) -> None:
    program = (
        "from phiquant import LLM\n"
        f"with LLM.from_pretrained({NAME!r}, 'q8_0', context=64, quiet=True) as llm:\n"
        "    print(llm.context, llm.generate('Once', max_tokens=2, temperature=0).usage.completion_tokens)\n"
    )
    done = run("-c", program, endpoint=hub.endpoint, home=home)
    assert (done.stdout, done.stderr) == ("64 2\n", "")
