"""`phiquant compare A B -p PROMPT`: two texts, where they part, and what is refused."""

import json
from pathlib import Path

import pytest

from phiquant import LLM
from phiquant.cli import compare as module
from phiquant.cli.app import run
from phiquant.cli.compare import MARK, CompareOptions, compare
from phiquant.convert import convert, quantize
from phiquant.gguf import GGUFFile, GGUFWriter, keys

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"
PROMPT = "Once upon a time"

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compare")
    convert(TINY, folder / "f16.gguf", "f16", quiet=True)
    quantize(folder / "f16.gguf", folder / "q2.gguf", "Q2_K", quiet=True)
    return folder / "f16.gguf", folder / "q2.gguf"


def changed(source: Path, path: Path, key: str, change: object) -> Path:
    """The file with another value of a key."""
    with GGUFFile.open(source) as old, GGUFWriter(path) as writer:
        for name, field in old.fields.items():
            value = change(field.value) if name == key else field.value  # type: ignore[operator]
            writer.add(name, value, field.type, field.item_type)
        for info in old.tensors.values():
            writer.add_tensor(info.name, info.shape, info.type)
        writer.begin()
        for name in old.tensors:
            writer.write(name, old.data(name))
        writer.commit()
    return path


def test_json_has_both_texts_and_the_place(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = models
    assert run(["compare", str(a), str(b), "-p", PROMPT, "-n", "20", "--raw", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for model, path in zip(found["models"], models, strict=True):
        with LLM.load(path, context=64) as llm:
            assert model["text"] == llm.generate(PROMPT, max_tokens=20, temperature=0.0).text
        assert model["text"] == "".join(model["pieces"])
    parting, common = found["parting"], found["common_characters"]
    texts = [model["text"] for model in found["models"]]
    assert texts[0][:common] == texts[1][:common]
    assert found["models"][0]["ids"][parting["tokens"]] == parting["left"] != parting["right"]
    assert {c["token"] for c in parting["candidates"]} >= {parting["left"], parting["right"]}
    assert (found["chat"], found["texts_only"]) == (False, None)


def test_text_marks_the_place_in_both(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = models
    assert run(["compare", str(a), str(b), "-p", PROMPT, "-n", "20", "-no-cnv"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count(MARK) == 2
    assert out.startswith(f"A: {a.name}\n")
    assert f"B: {b.name}\n" in out
    assert "tokens are the same; then A has" in out
    assert "taken by A" in out
    assert "taken by B" in out


def test_a_model_beside_itself(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(models[0]), str(models[0]), "-p", "Hello", "-n", "5", "--chat"]) == 0
    out = capsys.readouterr().out
    assert MARK not in out
    assert "Both say the same, for 5 tokens." in out
    assert f"A: {models[0]}\n" in out, "the same name is not name enough"
    command = ["compare", str(models[0]), str(models[0]), "-p", "Hello", "-n", "9", "--temp", "1.5", "-o", "json"]
    assert run([*command, "--seed", "7"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["parting"] is None, "chance is the same for both"
    assert first["chat"]
    assert run([*command, "--seed", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["ids"] != first["models"][0]["ids"]


def test_different_vocabularies_are_compared_as_texts(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def renamed(tokens: list[str]) -> list[str]:
        return [*tokens[:-1], "<|another|>"]

    other = changed(models[1], tmp_path / "other.gguf", keys.TOKENS, renamed)
    assert run(["compare", str(models[0]), str(other), "-p", PROMPT, "-n", "20", "--raw", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parting"] is None
    texts = [model["text"] for model in found["models"]]
    common = found["common_characters"]
    assert texts[0][:common] == texts[1][:common]
    assert texts[0][common] != texts[1][common]
    assert run(["compare", str(models[0]), str(other), "-p", PROMPT, "-n", "20", "--raw"]) == 0
    out = capsys.readouterr().out
    assert out.count("The models have different vocabularies, so that only their texts are compared.") == 1
    assert f"The first {common} characters are the same." in out


def test_templates_that_differ_are_told(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(models[0], tmp_path / "other.gguf", keys.CHAT_TEMPLATE, lambda template: "Say: " + template)
    assert run(["compare", str(models[0]), str(other), "-p", "Hello", "-n", "3"]) == 0
    assert "chat templates differ" in capsys.readouterr().out


def test_a_model_cannot_steer_the_terminal(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from phiquant.completion import TokenLogprob
    from phiquant.eval.continuations import Continuation

    def fake(path: Path, *_: object) -> Continuation:
        token = 1 if path == models[0] else 2
        place = TokenLogprob(token, -1.0, ((token, -1.0),))
        return Continuation((5,), (token,), ("\x1b[31m[bold]red",), (place,), {token: "\x1b[31m"}, "length")

    monkeypatch.setattr(module, "_continued", fake)
    assert compare(CompareOptions(models=models, prompt="x", conversation=False)) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]red" in out


def test_what_is_refused(models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, models)
    for arguments, status, sentence in (
        ([a, b], 2, "with -p"),
        ([a, b, "-p", "x", "-n", "0"], 2, "at least one token"),
        ([a, b, "-p", "x", "-o", "xml"], 2, "text or json"),
        ([a, b, "-p", "x", "--raw", "-sys", "y"], 1, "needs a chat"),
        ([a, "nothing.gguf", "-p", "x"], 1, "nothing.gguf cannot be opened"),
    ):
        assert run(["compare", *arguments]) == status
        assert sentence in capsys.readouterr().err
