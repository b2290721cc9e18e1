"""Certificates: where a model is looked at, and what is made of what is found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.errors import CheckpointError, RequestError
from phiquant.eval.certify import Borders, certify, compared, default_text, lengths
from phiquant.eval.measure import RowsBase

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


def borders(folder: Path, **config: Any) -> Borders:
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 131072} | config))
    return Borders.of_checkpoint(folder)


def test_borders_are_read_from_old_and_new_configurations(tmp_path: Path) -> None:
    assert Borders.of_checkpoint(TINY) == Borders(2048)
    new = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    assert borders(tmp_path, rope_parameters=new) == Borders(131072, original=4096)
    for name in ("su", "longrope", "yarn"):
        old = {"rope_scaling": {"type": name}, "original_max_position_embeddings": 4096}
        assert borders(tmp_path, **old) == Borders(131072, original=4096)
    assert borders(tmp_path, rope_scaling=None, original_max_position_embeddings=4096) == Borders(131072)
    assert borders(tmp_path, rope_parameters={"rope_type": "default"}, sliding_window=2047) == Borders(
        131072, window=2047
    )
    assert borders(tmp_path, sliding_window=262144) == Borders(131072), "a window that holds the context is none"
    assert borders(tmp_path, sliding_window=None) == Borders(131072)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Borders.of_checkpoint(tmp_path)
    for text in (
        "{",
        "[]",
        "{}",
        '{"max_position_embeddings": "many"}',
        '{"max_position_embeddings": 64, "sliding_window": "wide"}',
        '{"max_position_embeddings": 64, "rope_scaling": "longrope"}',
        '{"max_position_embeddings": 64, "rope_scaling": ["su"]}',
        '{"max_position_embeddings": 64, "sliding_window": [2047]}',
        '{"max_position_embeddings": 64, "sliding_window": 1e999}',
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="max_position_embeddings"):
            Borders.of_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (Borders(2048), (1024,)),
        (Borders(512), (512,)),
        (Borders(131072, original=4096), (4096, 4352)),
        (Borders(4096, window=2047), (2303,)),
        (Borders(4200, original=4096), (4096, 4200)),
        (Borders(8192, original=4096, window=6000), (4096, 6256)),
    ],
)
def test_sequences_go_to_and_beyond_the_borders(at: Borders, expected: tuple[int, ...]) -> None:
    assert lengths(at) == expected


def test_the_length_may_be_chosen() -> None:
    assert lengths(Borders(131072, original=4096), 300) == (300,)
    assert lengths(Borders(131072, original=4096), 4096) == (4096,)
    assert lengths(Borders(131072, original=4096), 4097) == (4096, 4097)
    with pytest.raises(RequestError, match="2049 tokens does not fit the context of 2048"):
        lengths(Borders(2048), 2049)


def test_ranges_end_at_every_border_and_at_no_other_place() -> None:
    rng = np.random.default_rng(1)
    found = [(rng.random(n), rng.random(n) < 0.5) for n in (700, 1500)]
    certificate = certify({"checkpoint": "x"}, Borders(131072, original=700, window=300), found)
    assert [(p.tokens, p.factors, [r.stop for r in p.ranges]) for p in certificate.parts] == [
        (700, "short", [256, 300, 700]),
        (1500, "long", [256, 300, 700, 1024, 1500]),
    ]
    last = certificate.parts[1].ranges[3]
    assert last.divergence.mean == pytest.approx(found[1][0][700:1024].mean())
    assert last.divergence.top1 == found[1][1][700:1024].mean()
    assert certificate.divergence.mean == pytest.approx(np.concatenate([v for v, _ in found]).mean())
    assert certificate.divergence.tokens == 2200
    assert certify({}, Borders(2048), found[:1]).parts[0].factors is None


def test_reports_hold_every_range() -> None:
    values = np.full(300, 2.5e-7)
    certificate = certify({"checkpoint": "some", "file": "F32"}, Borders(2048), [(values, np.ones(300, np.bool_))])
    page = certificate.markdown()
    assert page.startswith("# some: phiquant beside transformers\n")
    assert "| 300 tokens | 0 to 255 | 2.5e-07 | 2.5e-07 | 100.00 % |\n|  | 256 to 299 |" in page
    read = json.loads(certificate.json())
    assert read["about"] == {"checkpoint": "some", "file": "F32"}
    assert read["borders"] == {"context": 2048, "original": 0, "window": 0}
    assert [r["stop"] for r in read["parts"][0]["ranges"]] == [256, 300]
    assert read["divergence"]["mean"] == pytest.approx(2.5e-7)


def test_all_positions_of_all_sequences_are_compared() -> None:
    rng = np.random.default_rng(2)
    a, b = ([rng.normal(size=(n, 7)).astype(np.float32) for n in (3, 5)] for _ in range(2))
    blocks = [(1, 0, b[1][:4]), (0, 0, b[0]), (1, 4, b[1][4:])]
    found = compared(RowsBase(iter([(0, 0, a[0]), (1, 0, a[1])])), iter(blocks), [3, 5])
    assert [len(values) for values, _ in found] == [3, 5]
    assert all((values > 0).all() for values, _ in found)
    with pytest.raises(RequestError, match="no logits for some positions"):
        compared(RowsBase(iter([(0, 0, a[0]), (1, 0, a[1])])), iter(blocks[:2]), [3, 5])
    with pytest.raises(RequestError, match="checkpoint has 8 tokens and the file 7"):
        compared(RowsBase(iter([(0, 0, np.zeros((3, 8), np.float32))])), iter([(0, 0, b[0])]), [3])


def test_the_text_that_is_shipped_is_the_bundled_model_s_evaluation_text() -> None:
    assert default_text() == (TINY / "evaluation.txt").read_text("utf-8")
