"""LongRoPE belongs to a sequence: around its border, in every way of computing, equal to transformers in float32."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phiquant import LLM
from phiquant.convert import convert

pytestmark = pytest.mark.parity

BORDER = 64
LENGTHS = (1, BORDER - 1, BORDER, BORDER + 1, 2 * BORDER + 5)
MOST_KL = 1e-9
USED = 32011  # ids beyond have no text and are never sampled


@pytest.fixture(scope="module", params=["derived", "factor", "explicit"])
def pair(
    request: pytest.FixtureRequest, parity: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, Path]:
    """(model, transformers' model, our file), with each way to say by how much attention grows."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    said = {"derived": {}, "factor": {"factor": 7.0}, "explicit": {"attention_factor": 1.35}}[request.param]

    @dataclass(frozen=True)
    class Said(parity.Model):
        def config(self) -> dict[str, Any]:
            made = super().config()
            return {**made, "rope_parameters": {**made["rope_parameters"], **said}}

    model = Said("border", 21, heads=4, kv_heads=2, head_size=64, original=BORDER)
    settings = {k: v for k, v in model.config().items() if k not in ("architectures", "model_type", "dtype")}
    made = transformers.Phi3ForCausalLM._from_config(
        transformers.Phi3Config(**settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    made.load_state_dict({name: torch.from_numpy(value) for name, value in model.weights().items()})
    directory = tmp_path_factory.mktemp(request.param)
    path = directory / "model.gguf"
    convert(parity.write_checkpoint(model, directory / "hf"), path, "f32")
    return model, made, path


def greedy(made: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest continuation, each token from the whole sequence anew, but for ids that have no text."""
    import torch

    ids, begin = list(ids), len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(made(torch.tensor([ids]), use_cache=False).logits[0, -1, :USED].argmax()))
    return ids[begin:]


@pytest.mark.parametrize("batch", [512, 7, 1], ids=["one prefill", "chunks", "token by token"])
def test_lengths_around_the_border(
    parity: Any, pair: tuple[Any, Any, Path], batch: int, record_property: Callable[[str, object], None]
) -> None:
    model, made, path = pair
    with LLM.load(path, backend="cpu", cache_type="f32", batch=batch) as llm:
        for length in LENGTHS:
            ids = model.ids(length)
            expected, found = parity.truth(made, ids), parity.log_softmax(llm.logits(ids))
            divergence = parity.kl(expected, found)
            record_property(f"{length} tokens", divergence)
            assert divergence <= MOST_KL, length
            assert (expected.argmax(axis=1) == found.argmax(axis=1)).all(), length


def test_the_regimes_differ(parity: Any, pair: tuple[Any, Any, Path]) -> None:
    """Or the tests above would show nothing: the first tokens of a long sequence are not those of a short one."""
    model, made, _ = pair
    short, long = (parity.truth(made, model.ids(length))[: BORDER // 2] for length in (BORDER, BORDER + 1))
    assert parity.kl(short, long) > 1e-3


@pytest.mark.parametrize("begin", [BORDER - 20, BORDER - 1, BORDER, BORDER + 1])
def test_generation_from_either_side_of_the_border(pair: tuple[Any, Any, Path], begin: int) -> None:
    model, made, path = pair
    prompt = model.ids(begin)
    with LLM.load(path, backend="cpu", cache_type="f32") as llm:
        found = list(llm.generate(prompt, max_tokens=40, temperature=0).ids)
    assert found == greedy(made, prompt, 40)


@pytest.mark.parametrize("lengths", [(BORDER - 10, BORDER + 30), (BORDER + 30, BORDER - 10)], ids=["grows", "shrinks"])
def test_a_short_and_a_long_sequence_with_one_beginning(pair: tuple[Any, Any, Path], lengths: tuple[int, int]) -> None:
    """What the cache holds of the one is no use to the other, whichever comes first."""
    model, made, path = pair
    with LLM.load(path, backend="cpu", cache_type="f32", parallel=2) as llm:
        for length in (*lengths, *lengths):
            found = llm.generate(model.ids(length), max_tokens=8, temperature=0)
            assert list(found.ids) == greedy(made, model.ids(length), 8), length


def test_short_and_long_sequences_in_one_batch(pair: tuple[Any, Any, Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, made, path = pair
    prompts = [model.ids(length) for length in (BORDER - 10, BORDER + 30, BORDER - 3, BORDER)]
    with LLM.load(path, backend="cpu", cache_type="f32", parallel=4, batch=32) as llm, ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(llm.generate, prompt, max_tokens=12, temperature=0) for prompt in prompts]
        assert [list(job.result().ids) for job in jobs] == [greedy(made, prompt, 12) for prompt in prompts]
