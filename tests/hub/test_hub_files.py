"""Single files to where they are wanted, against a server of our own."""

from pathlib import Path

from hub_server import Hub, run

CALL = """
import sys
from phiquant import hub
from phiquant.errors import RequestError

repository, name, folder = sys.argv[1:]
try:
    print(*hub.names(repository), sep=",")
    print(hub.fetched(repository, name, local_dir=folder))
    print(hub.fetched(repository, name, cache_dir=folder + "/cache"))
except RequestError as error:
    print("ERROR", error)
"""


def call(repository: str, name: str, hub: Hub, home: Path) -> list[str]:
    done = run("-c", CALL, repository, name, str(home / "there"), endpoint=hub.endpoint, home=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_file_lies_where_it_was_wanted(hub: Hub, tmp_path: Path) -> None:
    name = "f16/Phi-test-f16-00002-of-00002.gguf"
    files = hub.repositories["org/Phi-test-GGUF"]
    listed, plain, cached = call("org/Phi-test-GGUF", name, hub, tmp_path)
    assert listed.split(",") == list(files)
    assert Path(plain) == tmp_path / "there" / name
    assert Path(cached).is_relative_to(tmp_path / "there" / "cache" / "models--org--Phi-test-GGUF")
    assert Path(plain).read_bytes() == Path(cached).read_bytes() == files[name]


def test_refusals_are_one_sentence(hub: Hub, tmp_path: Path) -> None:
    (told,) = call("org/Phi-tset-GGUF", "x.gguf", hub, tmp_path)
    assert told.startswith("ERROR org/Phi-tset-GGUF is no file or directory here, and the Hub has no repository ")
    assert call("org/Phi-test-GGUF", "x.gguf", hub, tmp_path)[-1] == "ERROR org/Phi-test-GGUF has no file x.gguf."
    hub.gated["org/two-GGUF"] = "secret"
    assert "is gated: accept its terms" in call("org/two-GGUF", "a-Q4_K_M.gguf", hub, tmp_path)[-1]
