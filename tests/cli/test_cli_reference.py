"""docs/cli.md is what the declarations say."""

from pathlib import Path

from phiquant.cli import reference
from phiquant.cli.app import VERBS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.render(), "run `make docs` and commit docs/cli.md"


def test_the_page_has_every_verb_and_escapes_cells() -> None:
    page = reference.render()
    assert all(f"## phiquant {verb}" in page for verb in VERBS)
    assert "| `-ngl`, `--gpu-layers`, `--n-gpu-layers` `N` | `auto` |" in page
