"""`phiquant certify` with transformers itself."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from phiquant.cli.certify import CertifyOptions, certify_checkpoint
from phiquant.errors import RequestError
from phiquant.eval.oracle import Transformers

pytestmark = pytest.mark.parity

MOST_KL = 1e-6


def test_the_bundled_model_is_certified(parity: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    report = tmp_path / "report.json"
    assert certify_checkpoint(CertifyOptions(parity.TINY, fail_above=MOST_KL, report=[report])) == 0
    found = json.loads(report.read_text("utf-8"))
    assert found["divergence"]["tokens"] == 1024
    assert found["divergence"]["mean"] <= MOST_KL
    assert found["divergence"]["top1"] == 1
    assert "256 to 1023" in capsys.readouterr().out


def test_both_sides_of_longrope_s_border_are_certified(parity: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = parity.MODELS["longrope_above_96"]
    checkpoint, report = parity.write_checkpoint(model, tmp_path / model.name), tmp_path / "report.json"
    assert certify_checkpoint(CertifyOptions(checkpoint, ctx_size=200, fail_above=MOST_KL, report=[report])) == 0
    parts = json.loads(report.read_text("utf-8"))["parts"]
    assert [(p["tokens"], p["factors"]) for p in parts] == [(model.original, "short"), (200, "long")]
    assert [r["stop"] for r in parts[1]["ranges"]] == [model.original, 200]


def test_logits_are_those_of_the_whole_model(parity: Any) -> None:
    """The worker takes hidden states and output matrix apart."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ids = list(range(400, 500))
    made = transformers.AutoModelForCausalLM.from_pretrained(parity.TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = made(torch.tensor([ids])).logits[0].numpy()
    with Transformers(parity.TINY, [ids], sys.executable) as oracle:
        ((_, _, found),) = oracle.blocks()
    assert oracle.vocabulary == expected.shape[1]
    assert abs(found - expected).max() < 1e-4


def test_what_transformers_does_not_know_is_told(parity: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "phi99", "max_position_embeddings": 64}')
    with pytest.raises(RequestError, match=r"transformers cannot run .*phi99"):
        Transformers(tmp_path, [[1]], sys.executable)
