"""What a server is told, by options and by a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from phiquant.errors import RequestError
from phiquant.server.settings import Model, Settings, read_keys

CONFIG = """
host = "0.0.0.0"
port = 9000
api-keys = ["one"]
cors = ["https://a.example"]
ctx-size = 1024
metrics = true
idle-timeout = 60
tls-cert = "cert.pem"
tls_key = "/keys/key.pem"

[[models]]
path = "a.gguf"
parallel = 2

[[models]]
path = "/models/b.gguf"
name = "big"
ctx-size = 0
embeddings = true
"""


def test_a_file_says_everything(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(CONFIG)
    found = Settings.gather(tmp_path / "serve.toml")
    first, second = found.models
    assert (first.path, first.name, first.ctx_size, first.parallel) == (tmp_path / "a.gguf", "a", 1024, 2)
    assert (second.path, second.name, second.ctx_size, second.embeddings) == (Path("/models/b.gguf"), "big", 0, True)
    assert (found.host, found.port, found.api_keys, found.metrics) == ("0.0.0.0", 9000, ("one",), True)
    assert (found.idle_timeout, found.tls_cert, found.tls_key) == (60, tmp_path / "cert.pem", Path("/keys/key.pem"))


def test_what_is_given_besides_counts_more(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text(CONFIG)
    found = Settings.gather(
        tmp_path / "serve.toml", models=[Path("c.gguf"), Path("d.gguf")], alias=["see"], port=1, parallel=8, host=None
    )
    known = [(model.name, model.parallel, model.ctx_size) for model in found.models]
    assert known == [("see", 8, 1024), ("d", 8, 1024)]
    assert (found.port, found.host) == (1, "0.0.0.0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "did you mean port"),
        ("port = 'x'", "port is 'x'"),
        ("port = true", "port is True"),
        ("port = 70000", "0 to 65535"),
        ("cors = ['example.org']", "no origin"),
        ("api-keys = ['a b']", "printable ASCII"),
        ("api-keys = 'one'", "api-keys"),
        ("tls-cert = 'x'", "certificate and its key"),
        ("log-format = 'xml'", "text or json"),
        ("models = 1", "must be tables"),
        ("max-body = 0", "above 0"),
        ("idle-timeout = -1", "0 or more"),
        ("idle-timeout = nan", "0 or more"),
        ("= 1", "not valid TOML"),
        ("[[models]]\nparallel = 1", "has no path"),
        ("[[models]]\npath = 1", "path is 1"),
        ("[[models]]\npath = 'a'\nparalel = 1", "did you mean parallel"),
        ("[[models]]\npath = 'a'\nparallel = 0", "at least 1"),
        ("[[models]]\npath = 'a'\n[[models]]\npath = 'b/a'", "two models are called 'a'"),
        ('[[models]]\npath = "a"\nname = "a\\nb"', "printable"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text if "[[models]]" in text or "models" in text else text + "\n[[models]]\npath = 'a.gguf'")
    with pytest.raises(RequestError, match=message):
        Settings.gather(file)


def test_names_for_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="names 2 models"):
        Settings.gather(models=[Path("a")], alias=["x", "y"])
    with pytest.raises(RequestError, match="no model is named"):
        Settings(())


def test_what_is_risky_is_said() -> None:
    model = (Model(Path("a.gguf")),)
    assert Settings(model).warnings == []
    assert Settings(model, host="::1").warnings == []
    assert "reached from other machines" in Settings(model, host="0.0.0.0").warnings[0]
    assert "readable to all" in Settings(model, host="box.example", api_keys=("k",)).warnings[0]
    assert "every page" in Settings(model, cors=("*",)).warnings[0]


def test_keys_from_files(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# mine\none\n\n two \n")
    assert read_keys([tmp_path / "keys"]) == ("one", "two")
