"""The programs of examples/ run against the real process; `make examples` installs what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .process import Process

pytestmark = pytest.mark.cpu

FOLDER = Path(__file__).parents[2] / "examples"
PYTHON = os.environ.get("PHIQUANT_EXAMPLES_PYTHON", sys.executable)
NEEDS = {
    "openai_client": "openai",
    "anthropic_client": "anthropic",
    "langchain_openai_chat": "langchain_openai",
    "litellm_chat": "litellm",
}


@pytest.fixture(scope="module")
def served(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("examples"), "-m", gguf, "--alias", "phi", "-c", "1024")
    yield process
    assert process.end() == 0
    assert "Traceback" not in process.lines()


def test_every_example_is_run() -> None:
    assert {file.stem for file in FOLDER.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_shows_an_answer_a_stream_a_call_and_a_form(served: Process, tmp_path: Path, name: str) -> None:
    there = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({NEEDS[name]!r}) is None)"
    if subprocess.run([PYTHON, "-c", there], check=False).returncode:
        pytest.skip(f"{NEEDS[name]} is not installed; make examples installs it")
    # No telemetry, and no list of prices from the network.
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
    done = subprocess.run(
        [PYTHON, FOLDER / f"{name}.py", served.address],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.split(":")[0] in LABELS)
    assert set(LABELS) <= set(said), done.stdout
    assert len(said["answer"]) > 1
    assert len(said["stream"]) > 1
    call, person = json.loads(said["call"]), json.loads(said["person"])
    assert call.keys() == {"city", "days"}
    assert call["city"] in ("Rome", "Oslo", "Lima")
    assert call["days"] in (1, 2, 3)
    assert person.keys() == {"kind", "age"}
    assert 1 <= person["age"] <= 99


LABELS = ("answer", "stream", "call", "person")
