"""What `phiquant bench` measures, and how it is told."""

import csv
import io
import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phiquant.bench import Bench, Peer, Result, grouped, jobs, ratio, render
from phiquant.bench.measure import Setting
from phiquant.convert import convert
from phiquant.errors import RequestError

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    convert(TINY, made, "f16", quiet=True)
    return made


def test_jobs_are_all_combinations() -> None:
    every = jobs(["a", "b"], prompts=[0, 512], generated=[128], both=[(16, 8)], depths=[0, 64], threads=[1, 2])
    assert [job.name for job in every][:6] == [
        "pp512",
        "tg128",
        "pp16+tg8",
        "pp512 @ d64",
        "tg128 @ d64",
        "pp16+tg8 @ d64",
    ]
    assert [(s.model, s.threads, len(some)) for s, some in grouped(every)] == [
        ("a", 1, 6),
        ("a", 2, 6),
        ("b", 1, 6),
        ("b", 2, 6),
    ]
    assert every[5].room == 64 + 16 + 8 + 2
    assert jobs(["a"], context=4096)[0].room == 4096
    with pytest.raises(RequestError, match="nothing to measure"):
        jobs(["a"], prompts=[0], generated=[0])


@pytest.mark.cpu
def test_every_kind_of_job_runs(path: Path) -> None:
    every = jobs([path], prompts=[40], generated=[5], both=[(30, 4)], depths=[0, 33, 128], batches=[32])
    ((setting, some),) = grouped(every)
    with Bench(setting, max(job.room for job in some)) as model:
        for job in some:
            for _ in range(2):
                assert 0 < model.seconds(job) < 60
        assert 1.4e7 < model.parameters < 1.7e7
        assert path.stat().st_size * 0.9 < model.size < path.stat().st_size


@pytest.mark.cpu
def test_a_context_that_is_too_short_is_refused(path: Path) -> None:
    (setting, _), *_ = grouped(jobs([path], prompts=[5000]))
    with pytest.raises(RequestError, match=r"has a context of \d+ tokens, and a test takes 50000"):
        Bench(setting, 50000)


def made(peer: bool = True) -> Result:
    (job, _) = jobs(["m.gguf"], depths=[16])
    result = Result(job, "Phi", 2 << 30, 3_800_000_000, "cpu", 2, speeds=[30.0, 20.0, 40.0])
    if peer:
        result.peer = [10.0, 20.0, 20.0]
        result.products, result.bandwidth = [9e11, 8e11, 8.5e11], [3e10, 2e10, 4e10]
    return result


def test_rendering() -> None:
    assert ratio(made()) == 2
    table = render([made()], "md").splitlines()
    assert [cell.strip() for cell in table[2].strip("|").split("|")] == [
        "Phi",
        "2.00 GiB",
        "3.80 B",
        "cpu",
        "2",
        "512",
        "f16",
        "pp512 @ d16",
        "30.00 ± 10.00",
        "16.67 ± 5.77",
        "2.00",
        "850",
        "30.0",
    ]
    assert len({len(line) for line in table}) == 1
    (document,) = json.loads(render([made()], "json"))
    assert (document["avg_ts"], document["stddev_ts"], document["ratio"], document["n_depth"]) == (30, 10, 2, 16)
    assert json.loads(render([made()], "jsonl")) == document
    (row,) = csv.DictReader(io.StringIO(render([made()], "csv")))
    assert (row["test"], row["avg_ts"], row["read_bytes_per_second"]) == ("pp512 @ d16", "30.0", "30000000000.0")
    assert "peer_avg_ts" not in json.loads(render([made(peer=False)], "json"))[0]
    lone = made(peer=False)
    lone.speeds = [5.0]
    assert "5.00 ± 0.00" in render([lone], "md")


PROGRAM = """#!/bin/sh
echo "$@" >> {log}
echo '{answer}'
echo 'error: {said}' >&2
"""


def program(folder: Path, answer: str, said: str = "") -> Path:
    path = folder / "llama-bench"
    path.write_text(PROGRAM.format(log=folder / "log", answer=answer, said=said))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_peer(tmp_path: Path) -> None:
    pp, tg, both = jobs(["m.gguf"], both=[(16, 8)], depths=[7], batches=[256])
    peer = Peer(program(tmp_path, json.dumps([{"avg_ts": 12.5, "build_commit": "abc", "build_number": 7}])))
    assert [peer.speed(job, 3) for job in (pp, tg, both)] == [12.5] * 3
    assert peer.version == "llama.cpp abc (7)"
    common = "-d 7 -r 1 -o json -t 3 -b 256 -ub 256 -ctk f16 -ctv f16"
    assert (tmp_path / "log").read_text().splitlines() == [
        f"-m m.gguf -p 512 -n 0 {common}",
        f"-m m.gguf -p 0 -n 128 {common}",
        f"-m m.gguf -p 0 -n 0 -pg 16,8 {common}",
    ]
    failing = Peer(program(tmp_path, "", "no such model"))
    with pytest.raises(RequestError, match=r"gave no result for pp512 @ d7 of m.gguf: error: no such model"):
        failing.speed(pp, 1)
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RequestError, match="is not a program"):
            Peer(wrong)


@pytest.mark.cpu
def test_a_depth_at_the_border_of_longrope_is_computed_beyond_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(Setting(str(path), 2, 32, "f16"), 64) as bench:
        lengths, usual = [], bench.llm.generate
        monkeypatch.setattr(bench.llm, "config", replace(bench.llm.config, original_context_length=32))

        def generate(ids: list[int], **options: Any) -> Any:
            lengths.append(len(ids))
            return usual(ids, **options)

        monkeypatch.setattr(bench.llm, "generate", generate)
        for job in jobs([path], prompts=[4], generated=[3], depths=[31, 32, 33], batches=[32]):
            bench.seconds(job)
    assert lengths == [35, 35, 31, 32, 36, 36, 33, 33, 33, 37, 33, 34]
