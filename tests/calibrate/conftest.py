"""The bundled model as F32, in which sums of squares can be followed to the last digits, and the text it reads."""

from pathlib import Path

import pytest

from phiquant.convert import convert

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("calibrate") / "tiny-F32.gguf"
    convert(TINY, made, "f32", quiet=True)
    return made


@pytest.fixture(scope="session")
def page() -> str:
    return (TINY / "page.txt").read_text(encoding="utf-8")
