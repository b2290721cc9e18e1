"""The other process, played by small programs: what it gives, and what is said when it does not."""

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from phiquant.errors import RequestError
from phiquant.eval.oracle import Transformers

SEQUENCES = [[1, 2, 3], [4, 5]]
HEAD = '{"vocabulary": 4, "torch": "2", "transformers": "5", "class": "PhiForCausalLM"}'


def python(folder: Path, body: str) -> Path:
    """Something that is run as a Python and does this instead of what it is told to."""
    made = folder / "python"
    made.write_text(f"#!{sys.executable}\nimport json, os, struct, sys\n{textwrap.dedent(body)}")
    made.chmod(0o755)
    return made


def test_logits_come_in_blocks(tmp_path: Path) -> None:
    fake = python(
        tmp_path,
        f"""
        job = json.load(sys.stdin)
        assert job["sequences"] == {SEQUENCES}, job
        assert os.path.isabs(job["model"])
        assert sys.argv[1].endswith("oracle_worker.py")
        print('{HEAD}', flush=True)
        sys.stdout.buffer.write(struct.pack("<20f", *range(20)))
        """,
    )
    with Transformers(tmp_path, SEQUENCES, fake) as oracle:
        assert (oracle.vocabulary, oracle.model_class, oracle.versions["transformers"]) == (4, "PhiForCausalLM", "5")
        blocks = list(oracle.blocks())
    assert [(index, position, rows.shape) for index, position, rows in blocks] == [(0, 0, (3, 4)), (1, 0, (2, 4))]
    assert np.concatenate([rows for _, _, rows in blocks]).reshape(-1).tolist() == list(range(20))


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ('print(\'{"missing": "torch"}\')', r"has no torch: install it \(pip install torch transformers\)"),
        ('print(\'{"error": "ValueError: odd"}\')', "transformers cannot run .*: ValueError: odd"),
        ("sys.exit('out of luck')", "transformers failed: out of luck while"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9, perhaps for want of memory"),
    ],
)
def test_what_goes_wrong_at_first_is_one_sentence(tmp_path: Path, body: str, what: str) -> None:
    with pytest.raises(RequestError, match=what):
        Transformers(tmp_path, SEQUENCES, python(tmp_path, "sys.stdin.read()\n" + body))


def test_a_process_that_does_not_even_read_is_told(tmp_path: Path) -> None:
    many = [list(range(100_000))]  # more than a pipe holds
    with pytest.raises(RequestError, match="failed: no"):
        Transformers(tmp_path, many, python(tmp_path, "sys.exit('no')"))


def test_an_early_end_is_told(tmp_path: Path) -> None:
    fake = python(tmp_path, f"print('{HEAD}', flush=True)\nsys.stdout.buffer.write(bytes(50))\nsys.exit('lost it')")
    with Transformers(tmp_path, SEQUENCES, fake) as oracle, pytest.raises(RequestError, match="lost it"):
        list(oracle.blocks())


def test_there_must_be_a_python(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be run: No such file"):
        Transformers(tmp_path, SEQUENCES, tmp_path / "nothing")


def test_leaving_ends_the_process(tmp_path: Path) -> None:
    fake = python(tmp_path, f"print('{HEAD}', flush=True)\nimport time\ntime.sleep(600)")
    with Transformers(tmp_path, SEQUENCES, fake) as oracle:
        process = oracle._process
        assert process.poll() is None
    assert process.poll() is not None
