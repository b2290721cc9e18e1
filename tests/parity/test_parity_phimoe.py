"""PhiMoE against transformers in float32 and, beyond LongRoPE's border, against NumPy in float64 (numpy_phimoe.py).

transformers (5.24) departs there from the released model: its rotary embedding asks for the inverse frequencies without
the length of the sequence, and so keeps the short factors, while it does take long_mscale. The released model takes the
long factors too, and so do we. `test_transformers_keeps_the_short_factors` measures it: on a random model transformers
is 1e-12 from the float64 implementation with short factors, and 0.42 from the released one (mean KL divergence).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from phiquant import LLM
from phiquant.convert import convert
from phiquant.gguf import GGUFFile

from .conftest import copy_tokenizer, kl, log_softmax
from .models_phimoe import LENGTH, MODELS, Model, beyond, write_checkpoint
from .numpy_phimoe import PhiMoE
from .routing import chosen_experts
from .transformers_phimoe import asked, saved

pytestmark = pytest.mark.parity

MOST_KL = 1e-9  # mean, with a cache in float32
# Sparsemixer is not continuous: an expert within 1e-4 of the edge of the jitter falls on the other side of it with a
# cache in half precision, and another's weight is halved or doubled. Up to 3 of 200 tokens meet it, at 0.02 to 0.06.
MOST_MEDIAN_KL = 1e-6
BACKENDS = ("reference", "cpu")


@dataclass(frozen=True, eq=False)
class Truth:
    """A model and what it must say: of transformers below the border of LongRoPE, of NumPy beyond it.

    `expected`: log-probabilities [tokens, vocabulary]; `chosen`: experts [layers, tokens, 2]; `theirs`: what
    transformers says wherever.
    """

    model: Model
    checkpoint: Path
    path: Path
    expected: np.ndarray
    chosen: np.ndarray
    theirs: np.ndarray


@pytest.fixture(scope="module", params=list(MODELS))
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    model = MODELS[request.param]
    directory = tmp_path_factory.mktemp(model.name)
    logits, chosen = asked(saved(model, directory), model.ids())
    theirs = log_softmax(logits)
    expected = theirs
    if beyond(model):
        wide = PhiMoE(model.config(), model.weights())
        expected, chosen = log_softmax(wide.logits(model.ids())), np.stack(wide.chosen)
    convert(directory, directory / "model.gguf", "f32", quiet=True)
    return Truth(model, directory, directory / "model.gguf", expected, chosen, theirs)


def check(truth: Truth, found: np.ndarray, cache_type: str, what: object) -> None:
    """KL divergence within bounds; with a cache in float32 the same likeliest token everywhere."""
    each = (np.exp(truth.expected) * (truth.expected - found)).sum(axis=1)
    print(f"KL {truth.model.name:24} {what} {cache_type} mean {each.mean():.2e} median {np.median(each):.2e}")
    assert np.median(each) <= MOST_MEDIAN_KL, what
    if cache_type == "f32":
        assert each.mean() <= MOST_KL, what
        assert (truth.expected.argmax(axis=1) == found.argmax(axis=1)).all(), what


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence(truth: Truth, backend: str) -> None:
    for cache_type in ("f32", "f16"):
        with LLM.load(truth.path, backend=backend, cache_type=cache_type) as llm:
            assert llm.notes == []  # a file of ours leaves nothing to be assumed
            check(truth, log_softmax(llm.logits(truth.model.ids())), cache_type, backend)


def test_divergence_in_chunks_and_token_by_token(truth: Truth) -> None:
    for batch in (7, 1):
        with LLM.load(truth.path, backend=BACKENDS[-1], cache_type="f32", batch=batch) as llm:
            check(truth, log_softmax(llm.logits(truth.model.ids())), "f32", f"{BACKENDS[-1]} chunks of {batch}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_is_routed_to_the_same_experts(truth: Truth, backend: str) -> None:
    count = LENGTH if backend != "reference" else 40
    found = chosen_experts(truth.path, truth.model.ids(), count, backend)
    assert np.array_equal(found, np.sort(truth.chosen[:, :count], axis=2))


def test_transformers_keeps_the_short_factors(truth: Truth) -> None:
    """Where this fails beyond the border, transformers was corrected. Elsewhere it confirms the other oracle."""
    other = PhiMoE(truth.model.config(), truth.model.weights(), keep_short_factors=True)
    assert kl(log_softmax(other.logits(truth.model.ids())), truth.theirs) < 1e-9
    departs = kl(truth.expected, truth.theirs)
    print(f"KL {truth.model.name:24} transformers {departs:.2e}")
    assert (departs > 0.1) == beyond(truth.model)


def test_transformers_own_layouts_make_the_same_file(truth: Truth, tmp_path: Path) -> None:
    """Saved anew by transformers 5, in the released layout and in its own."""
    import torch
    import transformers

    made = transformers.AutoModelForCausalLM.from_pretrained(truth.checkpoint, dtype=torch.float32)
    for original in (True, False):
        directory = tmp_path / str(original)
        made.save_pretrained(directory, save_original_format=original)
        copy_tokenizer(directory)
        convert(directory, directory / "model.gguf", "f32", quiet=True)
        with GGUFFile.open(truth.path) as ours, GGUFFile.open(directory / "model.gguf") as again:
            assert set(ours.tensors) == set(again.tensors)
            for name in ours.tensors:
                assert np.array_equal(ours.data(name), again.data(name)), name
            for key, field in ours.fields.items():
                if key.startswith(("phimoe.", "phiquant.norm", "phiquant.ro")):
                    assert again.fields[key].value == field.value, key


@pytest.mark.parametrize("backend", BACKENDS[-1:])
def test_text_across_the_border_of_longrope(backend: str, tmp_path: Path) -> None:
    """Greedy, from below the border to beyond it: there the whole sequence gets the long factors."""
    model = MODELS["longrope_above_64"]
    write_checkpoint(model, tmp_path)
    convert(tmp_path, tmp_path / "model.gguf", "f32", quiet=True)
    wide, prompt = PhiMoE(model.config(), model.weights()), model.ids()[:92]
    ids = list(prompt)
    while len(ids) < 100:
        ids.append(int(wide.logits(ids)[-1].argmax()))
    with LLM.load(tmp_path / "model.gguf", backend=backend) as llm:
        assert list(llm.generate(prompt, max_tokens=8, temperature=0, ignore_eos=True).ids) == ids[92:]


def test_the_models_tell_what_matters_apart(truth: Truth) -> None:
    """An error in norms, routing, factors or mscale is thousands of times the tolerance."""
    model, config, weights = truth.model, truth.model.config(), truth.model.weights()
    uncentred = PhiMoE(config, weights)
    uncentred._norm = lambda name, x: (  # type: ignore[method-assign]
        x / np.sqrt((x**2).mean(-1, keepdims=True)) * uncentred.weights[f"{name}.weight"]
        + uncentred.weights[f"{name}.bias"]
    )
    variants = {"RMSNorm": uncentred, "jitter": PhiMoE({**config, "router_jitter_noise": 0.0}, weights)}
    if model.original:
        scaling = config["rope_scaling"]
        other = {"short_mscale": scaling["long_mscale"], "long_mscale": scaling["short_mscale"]}
        variants["mscale"] = PhiMoE({**config, "rope_scaling": {**scaling, **other}}, weights)
    for what, variant in variants.items():
        assert kl(truth.expected, log_softmax(variant.logits(model.ids()))) > 1e-3, what
