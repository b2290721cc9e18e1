"""Downloads that break, are damaged, or are interrupted, against a server of our own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub_server import Hub, interrupted, run, sha256

NAME = "Phi-test-Q4_K_M.gguf"
MODEL = "org/Phi-test-GGUF:Q4_K_M"
CALL = """
import sys
from phiquant import hub
from phiquant.errors import RequestError

class Told:
    have = 0
    def planned(self, name, total): self.total = total
    def advanced(self, count): self.have += count
    def resumed(self, count): self.have += count; print("resumed", count)
    def note(self, sentence): print("note", sentence)

told = Told()
try: print(hub.gguf(sys.argv[1], download=told)); assert told.have == told.total
except RequestError as error: print("ERROR", error)
"""


def data(hub: Hub) -> bytes:
    return hub.repositories["org/Phi-test-GGUF"][NAME]


def pull(hub: Hub, home: Path) -> list[str]:
    done = run("-c", CALL, MODEL, endpoint=hub.endpoint, home=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def partial(hub: Hub, home: Path) -> Path:
    return home / "hub" / "models--org--Phi-test-GGUF" / "blobs" / f"{sha256(data(hub))}.incomplete"


def test_a_download_goes_on_where_the_connection_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cut[NAME] = [2_000_000, 1_000_000]
    path = Path(pull(hub, tmp_path)[-1])
    assert path.read_bytes() == data(hub)
    first, *ranges = [int((seen or "bytes=0-")[6:-1]) for seen in hub.gets(NAME)[1::2]]  # each by way of a redirect
    assert first == 0
    assert len(ranges) == 2
    assert 1_500_000 < ranges[0] <= 2_000_000 < ranges[1] <= 3_000_000
    assert not partial(hub, tmp_path).exists()


def test_a_download_goes_on_in_another_process(hub: Hub, tmp_path: Path) -> None:
    kept = data(hub)[:4_000_000]
    partial(hub, tmp_path).parent.mkdir(parents=True)
    partial(hub, tmp_path).write_bytes(kept)
    lines = pull(hub, tmp_path)
    assert lines[0] == f"resumed {len(kept)}"
    assert Path(lines[-1]).read_bytes() == data(hub)
    assert set(hub.gets(NAME)) == {f"bytes={len(kept)}-"}


def test_ctrl_c_keeps_what_came_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    hub.pause[NAME] = 0.2
    part = partial(hub, tmp_path)
    stopped = interrupted(
        *("-m", "phiquant", "pull", MODEL),
        endpoint=hub.endpoint,
        home=tmp_path,
        when=lambda: part.exists() and part.stat().st_size > 500_000,
    )
    assert (stopped.returncode, stopped.stdout) == (130, "")
    assert "Traceback" not in stopped.stderr
    came = part.read_bytes()
    assert 0 < len(came) < len(data(hub))
    assert data(hub).startswith(came)
    files = [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and ".locks" not in path.parts]
    assert files == [part]
    hub.pause.clear()
    assert Path(pull(hub, tmp_path)[-1]).read_bytes() == data(hub)
    assert f"bytes={len(came)}-" in hub.gets(NAME)


def test_two_at_once_fetch_it_once(hub: Hub, tmp_path: Path) -> None:
    hub.pause[NAME] = 0.1
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda _: pull(hub, tmp_path)[-1], range(2))
    assert first == second
    assert Path(first).read_bytes() == data(hub)
    assert hub.gets(NAME) == [None, None]  # the redirect and the file


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(hub: Hub, tmp_path: Path) -> None:
    hub.no_ranges = True
    partial(hub, tmp_path).parent.mkdir(parents=True)
    partial(hub, tmp_path).write_bytes(b"x" * 1000)
    assert Path(pull(hub, tmp_path)[-1]).read_bytes() == data(hub)


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * 6_000_000])
def test_what_is_not_what_the_hub_announced_is_not_kept(hub: Hub, tmp_path: Path, left: bytes) -> None:
    hub.damaged.add(NAME)
    for before in (b"", left):
        if before:
            partial(hub, tmp_path).parent.mkdir(parents=True)
            partial(hub, tmp_path).write_bytes(before)
        sentence = pull(hub, tmp_path)[-1]
        assert sentence.startswith(f"ERROR {NAME} arrived damaged: its SHA-256 is not the one that the Hub gives;")
        assert list((tmp_path / "hub").glob("models--*")) == []
    hub.damaged.clear()
    assert Path(pull(hub, tmp_path)[-1]).read_bytes() == data(hub)


def test_more_than_the_file_is_dropped(hub: Hub, tmp_path: Path) -> None:
    partial(hub, tmp_path).parent.mkdir(parents=True)
    partial(hub, tmp_path).write_bytes(data(hub) + b"more")
    assert Path(pull(hub, tmp_path)[-1]).read_bytes() == data(hub)


def test_a_store_that_refuses_is_told_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.status["/store/"] = (403, "")
    assert pull(hub, tmp_path)[-1].startswith("ERROR The Hub does not give out org/Phi-test-GGUF: 403 Forbidden")
    assert list((tmp_path / "hub").glob("models--*")) == []


def test_a_disk_without_room_is_told_before_anything_comes(hub: Hub, tmp_path: Path) -> None:
    full = "import shutil\nshutil.disk_usage = lambda path: type('', (), {'free': 10**6})()\n"
    done = run("-c", full + CALL, MODEL, endpoint=hub.endpoint, home=tmp_path)
    assert "needs 6 MB more and the disk of the cache has 1 MB free; make room, or set HF_HUB_CACHE" in done.stdout
    assert hub.gets(NAME) == []
