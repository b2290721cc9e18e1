"""`phiquant doctor` and the lines on stderr."""

import json
import os
import re
import stat
import tomllib
from pathlib import Path

import pytest

from phiquant.cli import app
from phiquant.cli.memory import peak_bytes, sized
from phiquant.cli.notices import Notices
from phiquant.kernels.cpu import library, target

pytestmark = pytest.mark.cpu


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert app.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def test_json_says_what_was_chosen_and_why_the_rest_was_not(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    lowering = target.host().lowering
    assert found["cpu"]["lowering"] == lowering  # type: ignore[index]
    assert found["not_chosen"].keys() == set(target.LOWERINGS) - {lowering}  # type: ignore[attr-defined]
    assert found["backends"]["cpu"] == "available"  # type: ignore[index]
    assert "not part of this version" in found["backends"]["triton"]  # type: ignore[index]
    assert "missing" not in found["libraries"].values()  # type: ignore[attr-defined]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = {re.split("[^\\w-]", text)[0].replace("-", "_") for text in project["dependencies"]}
    assert found["libraries"].keys() == needed  # type: ignore[attr-defined]


def test_a_forced_lowering_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    best = target.host().lowering
    monkeypatch.setenv("PHIQUANT_LOWERING", "generic")
    target.host.cache_clear()
    try:
        found = report(capsys)
        assert found["forced"] == found["cpu"]["lowering"] == "generic"  # type: ignore[index]
        assert found["not_chosen"][best] == "PHIQUANT_LOWERING asks for generic"  # type: ignore[index]
        monkeypatch.setenv("PHIQUANT_LOWERING", "nonsense")
        target.host.cache_clear()
        assert app.run(["doctor"]) == 0
        assert "nonsense is not one of" in capsys.readouterr().out
    finally:
        monkeypatch.undo()
        target.host.cache_clear()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_the_kernel_cache_and_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PHIQUANT_CACHE_DIR", str(tmp_path))
    (tmp_path / "kernels").mkdir(mode=0o700)
    (tmp_path / "kernels" / "x.o").write_bytes(b"12345")
    cache = report(capsys)["kernel_cache"]
    assert cache == {
        "directory": str(tmp_path / "kernels"),
        "state": "usable",
        "files": 1,
        "bytes": 5,
        "limit": library.LIMIT,
        "mode": "0700",
    }
    open_to_all = tmp_path / "open" / "kernels"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    assert stat.S_IMODE(open_to_all.stat().st_mode) == 0o777
    monkeypatch.setenv("PHIQUANT_CACHE_DIR", str(tmp_path / "open"))
    assert report(capsys)["kernel_cache"]["directory"] is None  # type: ignore[index]
    assert app.run(["doctor"]) == 0
    assert "in memory only" in capsys.readouterr().out


def test_compiling_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    notices = Notices(quiet=False)
    with notices.compiling():
        for name in ("a", "b"):
            for tell in library.on_compile:
                tell(name)
    notices.progress("compiling kernels for this processor, once")
    notices.progress("arranging weights: 1.0 of 2.0 GB")
    assert capsys.readouterr().err == "phiquant: compiling kernels for this processor, once\n"
    assert not library.on_compile
    quiet = Notices(quiet=True)
    quiet.progress("compiling kernels for this processor, once")
    quiet.note("x")
    assert capsys.readouterr().err == ""


def test_memory_is_measured_in_bytes() -> None:
    before = peak_bytes()
    block = bytearray(os.urandom(1 << 20) * 300)
    after = peak_bytes()
    if before is None or after is None:
        pytest.skip("this system does not tell the peak memory")
    assert after >= len(block)
    assert after < 64 << 30
    assert sized(999_000_000) == "999.0 MB"
    assert sized(2_396_000_000) == "2.40 GB"
