"""Distillation of the bundled model: what it gains on text that it has not read, and when it is not kept."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from phiquant import LLM
from phiquant.calibrate.distill import Distillation, Distilled
from phiquant.convert import execute, quantize
from phiquant.convert.parts import Division
from phiquant.convert.source import GGUFSource
from phiquant.errors import RequestError
from phiquant.eval import divergence
from phiquant.gguf import GGUFFile

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "models" / "phi3-tiny"
LEAST_GAIN = 0.12  # of the divergence; 0.17 for Q2_K when this was written
TOKENS = 6144


@pytest.fixture(scope="module")
def text() -> str:
    return (MODEL / "calibration.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def rounded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill") / "Q2_K.gguf"
    quantize(tiny, path, "Q2_K", quiet=True)
    return path


@pytest.fixture(scope="module")
def tuned(tiny: Path, rounded: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distilled]:
    path = tmp_path_factory.mktemp("distill") / "tuned.gguf"
    shutil.copy(rounded, path)
    told: list[tuple[int, int]] = []
    with Distillation(tiny, path, text, dataset="text", tokens=TOKENS, epochs=1) as made:
        found = made.run(lambda done, total, what: told.append((done, total)))
        with GGUFSource(path) as source:
            execute(made.plan(source, found), maker=made)
    assert told == sorted(told)
    assert {total for _, total in told} == {told[-1][0]}, "what was announced is what was read"
    return path, found


def test_it_brings_a_model_nearer_to_the_whole_one(tiny: Path, rounded: Path, tuned: tuple[Path, Distilled]) -> None:
    unseen, found = (MODEL / "evaluation.txt").read_text("utf-8"), []
    with LLM.load(tiny, context=512) as whole:
        for path in (rounded, tuned[0]):
            with LLM.load(path, context=512) as llm:
                found.append(divergence(whole, llm, unseen, limit=2048).mean)
    print(f"KL divergence {found[0]:.5f}, distilled {found[1]:.5f}")
    assert found[1] < (1 - LEAST_GAIN) * found[0]
    assert tuned[1].after < (1 - LEAST_GAIN) * tuned[1].before
    assert tuned[1].tokens == TOKENS - 2 * 512


def test_only_scales_and_norms_are_others(rounded: Path, tuned: tuple[Path, Distilled]) -> None:
    with GGUFFile.open(rounded) as before, GGUFFile.open(tuned[0]) as after:
        assert list(before.tensors) == list(after.tensors)
        changed = 0
        for name, tensor in before.tensors.items():
            assert after.tensors[name].type is tensor.type
            one, other = before.data(name), after.data(name)
            assert one.size == other.size
            share = float((one != other).mean())
            if len(tensor.shape) == 1:
                assert share > 0, name
            else:  # four bytes of 84 or 110 at most, or two
                assert 0 < share < 0.05, name
            changed += share > 0
        assert changed == len(before.tensors)
        assert after.require("phiquant.quantize.distilled.epochs", int) == 1
        kl = [after.require(f"phiquant.quantize.distilled.kl_{when}", float) for when in ("before", "after")]
        assert kl == pytest.approx([tuned[1].before, tuned[1].after])


def test_the_same_again_is_the_same_file(
    tiny: Path, rounded: Path, tuned: tuple[Path, Distilled], text: str, tmp_path: Path
) -> None:
    """In parts, too."""
    path = tmp_path / "parts.gguf"
    quantize(rounded, path, "COPY", division=Division(max_tensors=30), quiet=True)
    first = tmp_path / "parts-00001-of-00002.gguf"
    with Distillation(tiny, first, text, dataset="text", tokens=TOKENS, epochs=1) as made, GGUFSource(first) as source:
        execute(made.plan(source, made.run()), maker=made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts-00001-of-00002.gguf", "parts-00002-of-00002.gguf"]
    with GGUFSource(first) as parts, GGUFFile.open(tuned[0]) as whole:
        for tensor in parts.tensors:
            data = np.empty(whole.data(tensor.name).size, np.uint8)
            parts.read_into(tensor.name, 0, data)
            assert (data == whole.data(tensor.name)).all(), tensor.name


def test_what_does_not_pay_leaves_everything_as_it_was(tiny: Path, rounded: Path, text: str) -> None:
    with Distillation(tiny, rounded, text, tokens=2048, epochs=1, rate=3.0) as made, GGUFSource(rounded) as source:
        found = made.run()
        assert not found.pays
        assert found.after == found.before
        plan = made.plan(source, found)
        with GGUFFile.open(rounded) as file:
            for tensor in plan.tensors:
                assert (made.tuned(tensor.name).data == file.data(tensor.name)).all()


def test_what_is_refused(tiny: Path, rounded: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"1536 tokens of text are .* at least 2048"):
        Distillation(tiny, rounded, text, dataset="text", tokens=1536)
    with pytest.raises(RequestError, match="0 epochs"):
        Distillation(tiny, rounded, text, epochs=0)
    with pytest.raises(RequestError, match="has no scales"):
        Distillation(tiny, tiny, text)
    short = tmp_path / "short.gguf"
    quantize(tiny, short, "COPY", prune=range(3, 8), quiet=True)
    with pytest.raises(RequestError, match="was not made of"):
        Distillation(short, rounded, text)
