"""A Hub with a checkpoint, GGUF files as repositories name them, and what goes wrong."""

import random
from collections.abc import Iterator

import pytest
from hub_server import Hub, serving


def content(seed: int, size: int) -> bytes:
    return b"GGUF" + random.Random(seed).randbytes(size - 4)


CHECKPOINT = {
    "config.json": b'{"model_type": "phi3"}',
    "tokenizer.model": b"pieces",
    "README.md": b"---\nlicense: mit\n---\n",
    "model-00001-of-00002.safetensors": content(1, 3_000_000),
    "model-00002-of-00002.safetensors": content(2, 1000),
    "original/model.bin": b"x" * 100,
    "pytorch_model.bin": b"y" * 100,
    "adapter.safetensors": b"z" * 100,
}
GGUF = {
    "README.md": b"# Phi",
    "Phi-test-IQ4_XS.gguf": content(3, 900),
    "Phi-test-Q4_K_M.gguf": content(4, 6_000_000),
    "Phi-test-Q8_0.gguf": content(5, 2000),
    "mmproj-Phi-test-f16.gguf": content(6, 500),
    "f16/Phi-test-f16-00001-of-00002.gguf": content(7, 3000),
    "f16/Phi-test-f16-00002-of-00002.gguf": content(8, 1000),
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    repositories = {
        "org/Phi-test": CHECKPOINT,
        "org/Phi-test-GGUF": GGUF,
        "org/two-GGUF": {"a-Q4_K_M.gguf": content(9, 100), "b-q4_k_m.gguf": content(10, 100)},
        "org/cut-GGUF": {"a-Q4_0-00001-of-00002.gguf": content(11, 100)},
        "org/nothing": {"README.md": b"# Nothing"},
        "other/Phi-test-GGUF": {"phi-Q2_K.gguf": content(12, 100)},
    }
    with serving(Hub(repositories)) as served:
        yield served
