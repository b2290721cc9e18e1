"""`phiquant serve`: what its options become; the server itself has tests of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phiquant.cli.app import run
from phiquant.hub import Reference
from phiquant.server.settings import Settings


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    found: list[Settings] = []

    def serve(settings: Settings, *, ready: Any, quiet: bool) -> int:
        found.append(settings)
        ready("http://127.0.0.1:1")
        return 0

    monkeypatch.setattr("phiquant.server.run.serve", serve)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tiny.gguf").touch()
    return tmp_path / "tiny.gguf"


def test_options_become_settings(
    served: list[Settings], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text("two\n")
    arguments = ["-m", str(file), "-a", "phi", "--host", "0.0.0.0", "--port", "81", "--api-key", "one", "-c", "0"]
    arguments += [
        "--api-key-file",
        str(tmp_path / "keys"),
        "-np",
        "2",
        "-n",
        "9",
        "--embeddings",
        "--cors",
        "https://a.example",
    ]
    arguments += [
        "--allowed-hosts",
        "box",
        "--metrics",
        "--idle-timeout",
        "5",
        "--max-body",
        "2M",
        "--log-format",
        "json",
    ]
    assert run(["serve", *arguments]) == 0
    (found,) = served
    (model,) = found.models
    assert (model.path, model.name, model.ctx_size, model.parallel, model.embeddings) == (file, "phi", 0, 2, True)
    assert model.predict == 9
    assert (found.host, found.port, found.api_keys) == ("0.0.0.0", 81, ("one", "two"))
    assert (found.cors, found.allowed_hosts, found.metrics, found.slots) == (
        ("https://a.example",),
        ("box",),
        True,
        False,
    )
    assert (found.idle_timeout, found.max_body, found.log_format) == (5, 2_000_000, "json")
    told = capsys.readouterr().err
    assert "warning: without --tls-cert" in told
    assert "serving phi at http://127.0.0.1:1" in told


def test_a_file_of_options(served: list[Settings], file: Path, tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text("port = 9\nslots = true\n[[models]]\npath = 'tiny.gguf'\n")
    assert run(["serve", "--config", str(tmp_path / "serve.toml"), "--port", "10"]) == 0
    assert (served[0].port, served[0].slots, served[0].models[0].path) == (10, True, file)


def test_models_of_the_hub_come_after_files(
    served: list[Settings], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "phi-Q8_0.gguf").touch()
    asked: list[str] = []

    def gguf(reference: Reference, *, download: Any) -> Path:
        asked.append(str(reference))
        return tmp_path / f"phi-{reference.quant}.gguf"

    monkeypatch.setattr("phiquant.hub.gguf", gguf)
    assert run(["serve", "-hf", "org/phi:Q8_0", "-m", str(file), "-a", "first"]) == 0
    assert asked == ["org/phi:Q8_0"]
    assert [(model.path, model.name) for model in served[0].models] == [
        (file, "first"),
        (tmp_path / "phi-Q8_0.gguf", "phi-Q8_0"),
    ]
    assert run(["serve", "-hf", "org/phi:Q8_0"]) == 0
    assert [model.name for model in served[1].models] == ["phi-Q8_0"]


def test_no_key_on_an_open_address_is_warned_of(
    served: list[Settings], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "-m", str(file), "--host", "::"]) == 0
    assert "no --api-key is asked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "no model is named"),
        (["-m", "nothing.gguf"], 1, "nothing.gguf does not exist"),
        (["-m", "FILE", "--port", "99999"], 1, "port is 99999"),
        (["-m", "FILE", "--alias", "a", "--alias", "b"], 1, "names 2 models"),
        (["-m", "FILE", "--max-body", "much"], 1, "--max-body takes a size"),
        (["-m", "FILE", "--tls-cert", "x"], 1, "certificate and its key"),
        (["--config", "nothing.toml"], 1, "nothing.toml does not exist"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(
    served: list[Settings],
    file: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    assert run(["serve", *(str(file) if argument == "FILE" else argument for argument in arguments)]) == status
    assert message in capsys.readouterr().err
    assert not served
