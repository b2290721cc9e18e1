"""The bundled model as a `Llama`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from phiquant.compat.llama_cpp import Llama
from phiquant.convert import convert

TINY = Path(__file__).parents[2] / "models" / "phi3-tiny"


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("compat") / "tiny.gguf"
    convert(TINY, made, "q8_0", quiet=True)
    return str(made)


@pytest.fixture(scope="session")
def llm(path: str) -> Iterator[Llama]:
    with Llama(path, n_ctx=256, verbose=False, embedding=True) as loaded:
        yield loaded
