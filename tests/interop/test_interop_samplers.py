"""Every step of the chain against llama.cpp's own, on the same scores: which tokens are left, and with what scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.convert import convert
from phiquant.engine import Sampler, Sampling
from phiquant.engine import truncation as steps
from phiquant.engine.repetition import dry, penalize
from phiquant.engine.truncation import Candidates

pytestmark = pytest.mark.interop

MODEL = Path(__file__).parents[2] / "models/phi3-tiny"
SIZE = 400

_APPLY = """
import ctypes, json, sys
import llama_cpp as L
quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, ctypes.c_void_p(0))
job = json.load(sys.stdin)
mp = L.llama_model_default_params()
mp.vocab_only = True
vocab = L.llama_model_get_vocab(L.llama_model_load_from_file(job["model"].encode(), mp))
answers = []
for name, args, accepted, logits in job["jobs"]:
    if name == "dry":
        *numbers, breakers = args
        texts = (ctypes.c_char_p * max(len(breakers), 1))(*[text.encode() for text in breakers])
        step = L.llama_sampler_init_dry(vocab, *numbers, texts, len(breakers))
    else:
        step = getattr(L, "llama_sampler_init_" + name)(*args)
    for token in accepted:
        L.llama_sampler_accept(step, token)
    data = (L.llama_token_data * len(logits))()
    for i, value in enumerate(logits):
        data[i].id, data[i].logit, data[i].p = i, value, 0.0
    array = L.llama_token_data_array(ctypes.cast(data, ctypes.POINTER(L.llama_token_data)), len(logits), -1, False)
    L.llama_sampler_apply(step, ctypes.byref(array))
    left = [(array.data[i].id, array.data[i].logit) for i in range(array.size)]
    answers.append([(i, x) for i, x in left if x != float("-inf")])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("samplers") / "Phi-3-tiny-Q8_0.gguf"
    convert(MODEL, out, "q8_0", quiet=True)
    return out


@pytest.fixture(scope="module")
def theirs(llama_cpp: Any, vocabulary: Path) -> Any:
    """Runs steps on scores: [(token, score), ...] of what is left, for each job."""

    def run(jobs: Sequence[tuple[str, list[Any], list[int], list[float]]]) -> list[dict[int, float]]:
        answers = llama_cpp.answer(_APPLY, {"model": str(vocabulary), "jobs": jobs})
        return [dict(answer) for answer in answers]

    return run


def scores(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def left(c: Candidates) -> dict[int, float]:
    return dict(zip(c.ids.tolist(), c.scores.tolist(), strict=True))


STEPS = [
    ("top_k", [k], Sampling(top_k=k), steps.top_k)
    for k in (1, 7, 40, 400)
] + [
    ("top_p", [p, 0], Sampling(top_p=p), steps.top_p)
    for p in (0.1, 0.5, 0.95)
] + [
    ("min_p", [p, 0], Sampling(min_p=p), steps.min_p)
    for p in (0.01, 0.05, 0.5)
] + [
    ("typical", [p, 0], Sampling(typical_p=p), steps.typical)
    for p in (0.05, 0.5, 0.95)
] + [
    ("top_n_sigma", [n], Sampling(top_n_sigma=n), steps.top_n_sigma)
    for n in (0.5, 1.0, 2.0)
] + [
    ("xtc", [1.0, t, 0, 1], Sampling(xtc_probability=1.0, xtc_threshold=t), steps.xtc)
    for t in (0.01, 0.1, 0.3)
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments", "sampling", "step"), STEPS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_is_left(theirs: Any, name: str, arguments: list[float], sampling: Sampling, step: Any) -> None:
    seeds = range(8)
    found = theirs([(name, arguments, [], scores(seed).tolist()) for seed in seeds])
    for seed, expected in zip(seeds, found, strict=True):
        logits = scores(seed).astype(np.float64)
        assert left(step(Candidates(np.arange(SIZE), logits), sampling, 0.0)).keys() == expected.keys(), seed


@pytest.mark.parametrize(("temp", "delta", "exponent"), [(0.7, 0.0, 1.0), (1.0, 0.5, 1.0), (1.5, 1.5, 0.3)])
def test_temperatures(theirs: Any, temp: float, delta: float, exponent: float) -> None:
    (expected,) = theirs([("temp_ext", [temp, delta, exponent], [], scores(3).tolist())])
    s = Sampling(temp, dynatemp_range=delta, dynatemp_exponent=exponent)
    found = left(steps.temperature(Candidates(np.arange(SIZE), scores(3).astype(np.float64)), s, 0.0))
    ids = sorted(expected)
    differences = np.array([expected[i] - found[i] for i in ids])
    assert np.ptp(differences) < 1e-3 * np.abs(list(expected.values())).max()  # ours begin at 0


def test_penalties(theirs: Any) -> None:
    ids = np.random.default_rng(1).integers(0, SIZE, 300).tolist()
    for last, repeat, frequency, presence in ((64, 1.3, 0.0, 0.0), (64, 1.0, 0.2, 0.7), (500, 1.1, 0.1, -0.3)):
        (expected,) = theirs([("penalties", [SIZE, last, repeat, frequency, presence], ids, scores(2).tolist())])
        found = scores(2)
        s = Sampling(repeat_last_n=last, repeat_penalty=repeat, frequency_penalty=frequency, presence_penalty=presence)
        penalize(found, ids, s)
        assert np.allclose(found, [expected[i] for i in range(SIZE)], atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_dry(theirs: Any, seed: int) -> None:
    """Without breakers, whose tokens depend on the vocabulary."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 4, 200).tolist()
    ids += ids[20 : 20 + seed * 7]
    jobs = [("dry", [m, b, a, n, []], ids, [0.0] * 8) for m, b, a, n in ((0.8, 1.75, 2, 1000), (0.5, 1.2, 4, 64))]
    for (_, (m, b, a, n, _), _, _), expected in zip(jobs, theirs(jobs), strict=True):
        found = np.zeros(8, np.float32)
        dry(found, ids, Sampling(dry_multiplier=m, dry_base=b, dry_allowed_length=a, dry_penalty_last_n=n))
        assert np.allclose(found, [expected[i] for i in range(8)], rtol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [1.0, 3.0, 5.0])
def test_the_first_choice_of_mirostat_is_among_the_same_tokens(theirs: Any, version: int, tau: float) -> None:
    logits = (-1.1 * np.log(np.arange(1, SIZE + 1))).astype(np.float32)
    job = ("mirostat", [SIZE, 1, tau, 0.1, 100]) if version == 1 else ("mirostat_v2", [1, tau, 0.1])
    (expected,) = theirs([(*job, [], logits.tolist())])
    s = Sampling(1.0, mirostat=version, mirostat_tau=tau, mirostat_eta=0.1)
    found = {Sampler(s).choose(logits, [0] * n) for n in range(1, 6000)}
    assert found <= expected.keys()
    assert len(found) > 0.9 * len(expected)
