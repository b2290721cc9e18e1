"""From names to paths, against a server of our own on 127.0.0.1 that answers as the Hub does."""

import socket
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, run, sha256

from phiquant.errors import RequestError
from phiquant.hub import resolve

CALL = """
import sys
from phiquant import hub
from phiquant.errors import RequestError

class Told:
    def planned(self, name, total): print("planned", name, total)
    def advanced(self, count): pass
    def resumed(self, count): print("resumed", count)
    def note(self, sentence): print("note", sentence)

try: print(getattr(hub, sys.argv[1])(sys.argv[2], download=Told()))
except RequestError as error: print("ERROR", error)
"""


def call(function: str, model: str, hub: Hub | str, home: Path, **environment: str) -> list[str]:
    """The lines that are told, of which the last is the path or the error."""
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    done = run("-c", CALL, function, model, endpoint=endpoint, home=home, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def refused(function: str, model: str, hub: Hub | str, home: Path, **environment: str) -> str:
    lines = call(function, model, hub, home, **environment)
    assert lines[-1].startswith("ERROR "), lines
    return lines[-1].removeprefix("ERROR ")


def nobody() -> str:
    """An address at which nobody answers."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_of_a_checkpoint_only_what_is_needed_is_fetched(hub: Hub, tmp_path: Path) -> None:
    lines = call("resolve", "org/Phi-test", hub, tmp_path / "home")
    path, files = Path(lines[-1]), hub.repositories["org/Phi-test"]
    unneeded = {"original/model.bin", "pytorch_model.bin", "adapter.safetensors"}
    assert {seen.name for seen in hub.seen} == set(files) - unneeded
    for name in set(files) - unneeded:
        assert (path / name).read_bytes() == files[name]
    assert path.parent.parent == tmp_path / "home" / "hub" / "models--org--Phi-test"
    assert lines[0] == "planned Phi-test 3001000"


def test_what_two_files_share_is_fetched_and_counted_once(hub: Hub, tmp_path: Path) -> None:
    files = hub.repositories["org/Phi-test"]
    one, same = "model-00001-of-00002.safetensors", "model-copy.safetensors"
    hub.repositories["org/Phi-test"] = {**files, same: files[one]}
    lines = call("resolve", "org/Phi-test", hub, tmp_path)
    assert lines[:-1] == ["planned Phi-test 3001000", "resumed 0", "resumed 0"]
    assert (Path(lines[-1]) / same).read_bytes() == files[one]
    assert hub.gets(same) == []


def test_a_quant_is_fetched_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    path = Path(call("gguf", "org/Phi-test-GGUF:q8_0", hub, tmp_path)[-1])
    data = hub.repositories["org/Phi-test-GGUF"]["Phi-test-Q8_0.gguf"]
    assert path.name == "Phi-test-Q8_0.gguf"
    assert path.read_bytes() == data
    assert {seen.name for seen in hub.seen} == {"Phi-test-Q8_0.gguf"}
    folder = tmp_path / "hub" / "models--org--Phi-test-GGUF"
    assert path.resolve() == folder / "blobs" / sha256(data)  # as every user of the library keeps it
    assert (folder / "refs" / "main").read_text() == COMMIT


def test_q4_k_m_is_usual_and_what_is_taken_instead_is_said(hub: Hub, tmp_path: Path) -> None:
    lines = call("gguf", "org/Phi-test-GGUF", hub, tmp_path)
    assert lines[0] == "planned Phi-test-Q4_K_M.gguf 6000000"
    assert lines[-1].endswith("/Phi-test-Q4_K_M.gguf")
    lines = call("gguf", "other/Phi-test-GGUF", hub, tmp_path)
    assert "note other/Phi-test-GGUF has no Q4_K_M; this is Q2_K" in lines
    assert lines[-1].endswith("/phi-Q2_K.gguf")


def test_all_parts_of_a_split_model_are_fetched(hub: Hub, tmp_path: Path) -> None:
    lines = call("gguf", "org/Phi-test-GGUF:F16", hub, tmp_path)
    path = Path(lines[-1])
    assert path.name == "Phi-test-f16-00001-of-00002.gguf"
    for part in sorted(path.parent.iterdir()):
        assert part.read_bytes() == hub.repositories["org/Phi-test-GGUF"][f"f16/{part.name}"]
    assert len(list(path.parent.iterdir())) == 2
    assert lines[0].endswith(" 4000")


def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    first = call("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path)
    hub.seen.clear()
    assert call("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path) == first[-1:]
    assert hub.gets("Phi-test-Q8_0.gguf") == []


def test_a_new_commit_with_the_same_file_costs_no_download(hub: Hub, tmp_path: Path) -> None:
    first = call("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path)[-1]
    hub.commit = "b" * 40
    hub.seen.clear()
    second = call("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path)[-1]
    assert second == first.replace(COMMIT, hub.commit)
    assert hub.gets("Phi-test-Q8_0.gguf") == []
    assert Path(first).resolve() == Path(second).resolve()


def test_revisions_and_single_files(hub: Hub, tmp_path: Path) -> None:
    assert call("gguf", "org/Phi-test-GGUF@v1:Q8_0", hub, tmp_path)[-1].endswith("/Phi-test-Q8_0.gguf")
    projector = "mmproj-Phi-test-f16.gguf"
    for name in (f"org/Phi-test-GGUF/{projector}", f"org/Phi-test-GGUF:{projector}"):
        path = Path(call("resolve", name, hub, tmp_path)[-1])
        assert path.read_bytes() == hub.repositories["org/Phi-test-GGUF"][projector]
    assert refused("resolve", "org/Phi-test@nope", hub, tmp_path).startswith("org/Phi-test has no revision 'nope'")
    assert refused("resolve", "org/Phi-test/x.gguf", hub, tmp_path) == "org/Phi-test has no file x.gguf."


def test_pull_takes_what_a_repository_has(hub: Hub, tmp_path: Path) -> None:
    assert call("pull", "org/Phi-test-GGUF", hub, tmp_path)[-1].endswith("/Phi-test-Q4_K_M.gguf")
    assert (Path(call("pull", "org/Phi-test", hub, tmp_path)[-1]) / "config.json").exists()
    assert "holds neither a GGUF model nor a checkpoint" in refused("pull", "org/nothing", hub, tmp_path)


def test_choices_are_listed(hub: Hub, tmp_path: Path) -> None:
    sentence = refused("gguf", "org/Phi-test-GGUF:Q3_K_S", hub, tmp_path)
    assert sentence == "org/Phi-test-GGUF has no Q3_K_S; it has IQ4_XS, Q4_K_M, Q8_0, F16."
    assert "org/two-GGUF:a-Q4_K_M.gguf, org/two-GGUF:b-q4_k_m.gguf" in refused("gguf", "org/two-GGUF", hub, tmp_path)
    assert "has 1 of the 2 parts" in refused("gguf", "org/cut-GGUF:Q4_0", hub, tmp_path)
    assert "org/Phi-test holds no GGUF model" in refused("gguf", "org/Phi-test", hub, tmp_path)
    assert not (tmp_path / "hub").exists()  # nothing was begun


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (404, "RepoNotFound", "the Hub has no repository org/Phi-test"),
        (401, "RepoNotFound", "the Hub has no repository org/Phi-test"),
        (403, "GatedRepo", "org/Phi-test is gated: accept its terms"),
        (403, "", "The Hub does not give out org/Phi-test: 403 Forbidden"),
    ],
)
def test_refusals_are_one_sentence(hub: Hub, tmp_path: Path, status: int, code: str, sentence: str) -> None:
    hub.status["/"] = (status, code)
    for function in ("resolve", "gguf", "pull"):
        assert sentence in refused(function, "org/Phi-test", hub, tmp_path)


def test_names_near_one_that_there_is_not_are_offered(hub: Hub, tmp_path: Path) -> None:
    sentence = refused("gguf", "org/phi-tset-gguf", hub, tmp_path)
    assert "has no repository org/phi-tset-gguf" in sentence
    assert sentence.endswith("did you mean org/Phi-test-GGUF?")
    assert refused("gguf", "orgg/Phi-test-GGUF", hub, tmp_path).endswith(
        "did you mean org/Phi-test-GGUF or other/Phi-test-GGUF?"
    )
    assert refused("gguf", "xyz/abc", hub, tmp_path).endswith(
        "check the name, or, if it is private, log in with `hf auth login` or set HF_TOKEN."
    )


def test_a_gated_repository_needs_the_token_which_no_other_host_sees(hub: Hub, tmp_path: Path) -> None:
    hub.gated["org/Phi-test-GGUF"] = "hf_secret"
    sentence = refused("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path)
    assert sentence.startswith("org/Phi-test-GGUF is gated: accept its terms on its page at the Hub, then log in with")
    assert "HF_TOKEN" in sentence
    assert list((tmp_path / "hub").glob("models--*")) == []
    lines = call("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path, HF_TOKEN="hf_secret")
    assert lines[-1].endswith("/Phi-test-Q8_0.gguf")
    assert [seen.authorization for seen in hub.seen if seen.store] == [None]
    assert "Bearer hf_secret" in {seen.authorization for seen in hub.seen if not seen.store}


def test_without_a_network_the_cache_answers(hub: Hub, tmp_path: Path) -> None:
    there, gone = "org/Phi-test-GGUF:Q8_0", nobody()
    for unreachable, environment in ((gone, {}), (hub.endpoint, {"HF_HUB_OFFLINE": "1"})):
        for function, model in (("gguf", there), ("resolve", "org/Phi-test"), ("pull", "org/Phi-test")):
            sentence = refused(function, model, unreachable, tmp_path / "empty", **environment)
            assert sentence.startswith(f"{model} is neither here nor in the cache, and ")
            assert ("HF_HUB_OFFLINE" if environment else "the Hub cannot be reached ([Errno 111]") in sentence
    path = call("gguf", there, hub, tmp_path / "home")[-1]
    checkpoint = call("resolve", "org/Phi-test", hub, tmp_path / "home")[-1]
    for name in (there, "org/Phi-test-GGUF:q8_0", "org/Phi-test-GGUF"):
        assert call("gguf", name, hub, tmp_path / "home", HF_HUB_OFFLINE="1")[-1] == path
        assert call("gguf", name, gone, tmp_path / "home")[-1] == path
    assert call("resolve", "org/Phi-test", hub, tmp_path / "home", HF_HUB_OFFLINE="1") == [checkpoint]
    assert call("resolve", "org/Phi-test", gone, tmp_path / "home")[-1] == checkpoint
    assert "note the Hub cannot be asked" in call("gguf", there, gone, tmp_path / "home")[0]


def test_what_the_cache_lacks_is_said_with_what_it_has(hub: Hub, tmp_path: Path) -> None:
    call("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path)
    sentence = refused("gguf", "org/Phi-test-GGUF:Q4_K_M", hub, tmp_path, HF_HUB_OFFLINE="1")
    assert sentence == (
        "org/Phi-test-GGUF has no Q4_K_M; it has Q8_0 in the cache, and HF_HUB_OFFLINE forbids to ask the Hub for more."
    )
    sentence = refused("gguf", "org/Phi-test-GGUF:Q4_K_M", nobody(), tmp_path)
    assert sentence.endswith("it has Q8_0 in the cache, and the Hub cannot be reached for more.")


def test_the_cache_is_where_the_library_has_it(hub: Hub, tmp_path: Path) -> None:
    path = call("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path / "a", HF_HUB_CACHE=str(tmp_path / "b"))[-1]
    assert Path(path).is_relative_to(tmp_path / "b")
    program = "import sys, huggingface_hub as h; print(h.hf_hub_download(sys.argv[1], sys.argv[2]))"
    home = tmp_path / "c"
    other = run("-c", program, "org/Phi-test-GGUF", "Phi-test-Q8_0.gguf", endpoint=hub.endpoint, home=home)
    hub.seen.clear()
    assert call("gguf", "org/Phi-test-GGUF:Q8_0", hub, home) == [other.stdout.strip()]
    assert hub.gets("Phi-test-Q8_0.gguf") == []


def test_names_that_a_server_should_not_give_are_not_used(hub: Hub, tmp_path: Path) -> None:
    files = hub.repositories["org/Phi-test-GGUF"]
    for name in ("../../evil-Q8_0.gguf", "/evil-Q8_0.gguf", "evil\x1b[2J-Q8_0.gguf", "a//evil-Q8_0.gguf"):
        files[name] = b"GGUF"
    assert call("gguf", "org/Phi-test-GGUF:Q8_0", hub, tmp_path)[-1].endswith("/Phi-test-Q8_0.gguf")
    assert "\x1b" not in refused("gguf", "org/Phi-test-GGUF:Q3_K", hub, tmp_path)
    hub.sha256 = "../../../evil"
    assert call("gguf", "org/Phi-test-GGUF:IQ4_XS", hub, tmp_path / "other")[-1].endswith("/Phi-test-IQ4_XS.gguf")
    assert list(tmp_path.rglob("evil*")) == []


@pytest.mark.parametrize(
    "model",
    ["a b/c", "one", "a/b/c", "../x/y", "org/..", "", "org/name@", "\0", "https://huggingface.co/org/name", "x" * 5000],
)
def test_what_is_no_repository(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match="neither a file, a directory nor a repository id"):
        resolve(model or "nothing")


def test_what_exists_is_not_fetched(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path


def test_programs_that_stay_at_home_do_not_import_the_library(tmp_path: Path) -> None:
    program = "import sys, phiquant.hub, phiquant.llm, phiquant.cli.models; print('huggingface_hub' in sys.modules)"
    assert run("-c", program, endpoint=nobody(), home=tmp_path).stdout == "False\n"
