"""The soak test, `make soak`, in small: the real process under all that clients do; and that it finds what is wrong."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak

    return soak


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_crowded_server_says_to_each_what_it_says_to_them_alone(gguf: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "soak.py"), "--requests", "150", "--model", str(gguf)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("no violation\n")
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) ([a-z ]+)[,\n]", done.stdout)}
    assert sum(counts[kind] for kind in ("whole", "streamed", "left midway", "left at once", "malformed")) == 150
    assert counts["refused"] > 0
    assert int(re.findall(r"pages ran out (\d+) times", done.stdout)[0]) > 0


def test_another_answer_than_alone_is_a_violation(soak: Any) -> None:
    known = soak.cases(0)
    run = soak.Soak(1, 0, known, {case.name: "right" for case in known})
    run._check(known[0], "right")
    with pytest.raises(soak.Violation, match="wrong"):
        run._check(known[0], "wrong")


def test_what_grows_is_a_violation(soak: Any) -> None:
    def after(*last: int) -> list[str]:
        flat = soak.Usage(200 << 20, 14, 8)
        found: list[str] = soak.grown([soak.Usage(1 << 20, 5, 5), flat, flat, flat, soak.Usage(*last)])
        return found

    assert after((200 << 20) + soak.GROWTH, 14, 7) == []
    assert after((201 << 20) + soak.GROWTH, 14, 8) == ["memory grew from 200 to 217 MB"]
    assert after(200 << 20, 15, 9) == ["threads grew from 14 to 15", "descriptors grew from 8 to 9"]


def test_requests_follow_from_the_seed_and_have_names_of_their_own(soak: Any) -> None:
    again, other = soak.cases(7), soak.cases(8)
    assert [case.body for case in soak.cases(7)] == [case.body for case in again] != [case.body for case in other]
    assert len({case.name for case in again}) == len(again)
