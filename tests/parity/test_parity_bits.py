"""The bits of a row of logits do not depend on chunks, threads, neighbours or what was cached."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant import LLM
from phiquant.convert import quantize

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.fixture(scope="module", params=["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q6_K"])
def quantized(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / f"phi3-tiny-{request.param}.gguf"
    quantize(tiny, path, request.param)
    return path


def ids(count: int) -> list[int]:
    return np.random.Generator(np.random.PCG64(5)).integers(3, 32000, count).tolist()


def test_chunks_and_threads(quantized: Path) -> None:
    """One chunk, chunks of 7, token by token; 1, 2 and 3 threads."""
    with LLM.load(quantized, backend="cpu", threads=1) as llm:
        expected = llm.logits(ids(100))
    for threads, batch in ((2, 512), (3, 512), (1, 7), (3, 7), (2, 1)):
        with LLM.load(quantized, backend="cpu", threads=threads, batch=batch) as llm:
            assert np.array_equal(llm.logits(ids(100)), expected), (threads, batch)


@pytest.mark.parametrize("name", ["untied_grouped_128", "longrope_above_96", "tied_grouped_partial_128", "window_64"])
def test_chunks_and_threads_of_other_shapes(parity: Any, files: Callable[[Any], Path], name: str) -> None:
    model = parity.MODELS[name]
    path = files(model)
    with LLM.load(path, backend="cpu", threads=1) as llm:
        expected = llm.logits(model.ids(150))
    for threads, batch in ((2, 512), (3, 7), (2, 1)):
        with LLM.load(path, backend="cpu", threads=threads, batch=batch) as llm:
            assert np.array_equal(llm.logits(model.ids(150)), expected), (threads, batch)


@pytest.mark.parametrize(
    ("family", "name"), [("phi2", "phi_2"), ("llama", "biased_tied_grouped_64"), ("llama", "window_96")]
)
def test_chunks_and_threads_of_other_architectures(
    parity: Any, files: Callable[[Any], Path], family: str, name: str
) -> None:
    model = parity.FAMILIES[family][name]
    path = files(model)
    with LLM.load(path, backend="cpu", threads=1) as llm:
        expected = llm.logits(model.ids(80))
    for threads, batch, pack in ((2, 512, True), (3, 7, True), (2, 1, False)):
        with LLM.load(path, backend="cpu", threads=threads, batch=batch, pack=pack) as llm:
            assert np.array_equal(llm.logits(model.ids(80)), expected), (threads, batch, pack)


def test_neighbours_in_the_batch(tiny: Path) -> None:
    """Eight requests at once, three at a time, on a cache that is too small for them, give what each gives alone."""
    prompts = [ids(300)[: 40 + 30 * i] for i in range(8)]
    with LLM.load(tiny, backend="cpu", context=320) as llm:
        alone = [llm.generate(p, max_tokens=30, seed=i, temperature=1.0).ids for i, p in enumerate(prompts)]
    with LLM.load(tiny, backend="cpu", context=320, parallel=3, batch=64) as llm, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(llm.generate, p, max_tokens=30, seed=i, temperature=1.0) for i, p in enumerate(prompts)]
        assert [job.result().ids for job in jobs] == alone


def test_what_was_cached_changes_nothing(tiny: Path) -> None:
    with LLM.load(tiny, backend="cpu") as llm:
        first = llm.generate(ids(150), max_tokens=20, seed=3)
        again = llm.generate(ids(150), max_tokens=20, seed=3)
        longer = llm.generate([*ids(150), *first.ids, 450], max_tokens=20, seed=4)
    assert first.usage.cached_tokens == 0
    assert again.usage.cached_tokens == 149
    assert longer.usage.cached_tokens == 169  # the last of the generated tokens was never computed
    assert again.ids == first.ids
    with LLM.load(tiny, backend="cpu") as llm:
        assert llm.generate([*ids(150), *first.ids, 450], max_tokens=20, seed=4).ids == longer.ids
