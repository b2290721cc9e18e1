"""Mixes of the bundled model: what is predicted is measured, and file types of the same size are farther off."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from phiquant.calibrate import collect
from phiquant.calibrate.budget import Menu
from phiquant.calibrate.candidates import reader_types
from phiquant.calibrate.mix import find_mix, smallest
from phiquant.calibrate.probe import Probe
from phiquant.calibrate.quantizing import Bytes, quantized
from phiquant.calibrate.sensitivity import Sensitivities, Substitutes, closest, grouped, kind_of, measure
from phiquant.convert import Importance, Options, Plan, Target, parse_file_type
from phiquant.convert.entries import Entry
from phiquant.convert.plan import plan_quantize
from phiquant.convert.recipes import PlannedTensor
from phiquant.convert.source import Source, open_source
from phiquant.errors import RequestError
from phiquant.gguf import GGMLType

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

MODEL = Path(__file__).parents[2] / "models" / "phi3-tiny"


@dataclass
class Known:
    """A model, what it is measured with, and what was measured."""

    source: Source
    importance: Importance
    menu: Menu
    probe: Probe
    sensitivities: Sensitivities

    def plan(self, target: Target, options: Options, entries: Sequence[Entry] = ()) -> Plan:
        return plan_quantize(self.source, target, Path("out.gguf"), options, importance=self.importance)

    def file_type(self, name: str) -> dict[str, GGMLType]:
        plan = self.plan(parse_file_type(name), Options())
        return {tensor.name: tensor.type for tensor in plan.tensors if tensor.name in self.menu.types}


@pytest.fixture(scope="module")
def known(tiny: Path) -> Iterator[Known]:
    text = (MODEL / "calibration.txt").read_text("utf-8")
    importance = Importance(collect(tiny, text, chunks=16), "calibration.txt")
    source = open_source(tiny)

    def planned(target: Target, options: Options, entries: Sequence[Entry]) -> Plan:
        return plan_quantize(source, target, Path("out.gguf"), options, importance=importance)

    menu = Menu.of(source, planned, Options(), importance, reader_types("llama.cpp"))
    probe = Probe(tiny, text, tokens=512, context=256)
    stages: list[tuple[str, int, int]] = []
    found = measure(probe, menu.weights, menu.types, quantized, told=lambda *stage: stages.append(stage))
    assert stages[-1] == ("measuring weights", 34, 34)
    yield Known(source, importance, menu, probe, found)
    probe.close()
    source.close()


def test_nothing_replaced_is_no_divergence(known: Known) -> None:
    assert (known.probe.tokens, known.probe.scored) == (512, 512)
    assert known.probe.divergence({}) == 0
    stored = Substitutes(known.probe, known.menu.weights, quantized).all(
        {weight.tensor.name: weight.tensor.source for weight in known.menu.weights}
    )
    assert known.probe.divergence(stored) == 0


def test_predictions_are_what_is_measured(known: Known) -> None:
    rng = random.Random(1)
    substitutes = Substitutes(known.probe, known.menu.weights, quantized)
    predicted, measured = [], []
    for start in range(0, 14, 2):
        mix = {
            name: rng.choice([kind for kind in types if kind.is_quantized][start : start + 4])
            if start < sum(kind.is_quantized for kind in types)
            else GGMLType.Q8_0
            for name, types in known.menu.types.items()
        }
        predicted.append(known.sensitivities.total(mix))
        measured.append(known.probe.divergence(substitutes.all(mix)))
    correlation = np.corrcoef(np.log(predicted), np.log(measured))[0, 1]
    ratios = np.array(predicted) / measured
    print(f"measured {measured}, predicted {predicted}, correlation of logarithms {correlation:.4f}")
    assert max(measured) > 30 * min(measured)
    assert correlation > 0.99
    assert (ratios > 0.6).all()
    assert (ratios < 1.4).all()


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M"])
def test_a_mix_is_nearer_than_the_file_type_of_its_size(known: Known, tiny: Path, name: str) -> None:
    types = known.file_type(name)
    room = known.menu.bytes(types)
    mix = find_mix(known.probe, known.menu.weights, known.menu.types, room, known=known.sensitivities, rounds=0)
    assert 0.998 * room < known.menu.bytes(mix.types) <= room
    assert mix.measured == pytest.approx(mix.predicted, rel=0.4)
    unseen = (MODEL / "evaluation.txt").read_text("utf-8")
    with Probe(tiny, unseen, tokens=512) as held:
        substitutes = Substitutes(held, known.menu.weights, quantized)
        theirs, ours = (held.divergence(substitutes.all(chosen)) for chosen in (types, mix.types))
    print(f"{name}: {theirs:.5f}, the mix {ours:.5f}, {ours / theirs:.2f}")
    assert ours < 0.95 * theirs  # 0.11, 0.22, 0.39, 0.47 and 0.88 when this was written


def test_what_costs_more_in_the_file_is_given_more(known: Known) -> None:
    room, name = known.menu.bytes(known.file_type("IQ4_XS")), "token_embd.weight"
    assert known.menu.feedback_factors == {name: 2.0}, "it is the output too"
    some, more = (
        find_mix(
            known.probe,
            known.menu.weights,
            known.menu.types,
            room,
            known=known.sensitivities,
            rounds=0,
            factors=factors,
        )
        for factors in ({}, {name: 8.0})
    )
    assert more.types[name].bits_per_weight > some.types[name].bits_per_weight
    assert known.menu.bytes(more.types) <= room
    assert more.predicted == known.sensitivities.total(more.types), "as the quantizer makes them that measured them"
    assert more.costs[name] == known.sensitivities.cost(name, more.types[name])


def test_an_output_of_its_own_costs_no_more_unless_experts_are_chosen(known: Known) -> None:
    alone = replace(known.menu, others=[*known.menu.others, "output.weight"])
    assert alone.feedback_factors == {}
    first, *rest = alone.weights
    experts = replace(first, tensor=replace(first.tensor, shape=(2, *first.tensor.shape)))
    assert replace(alone, weights=[experts, *rest]).feedback_factors == {"token_embd.weight": 2.0}


def test_some_of_what_is_read_is_drawn_at_random(known: Known, tiny: Path) -> None:
    text, name = (MODEL / "calibration.txt").read_text("utf-8"), "token_embd.weight"
    coarse = Substitutes(known.probe, known.menu.weights, quantized).all({name: GGMLType.Q2_K})
    found = []
    for drawn in (0.0, 0.5, 0.5):
        with Probe(tiny, text, tokens=512, context=256, drawn=drawn) as probe:
            assert probe.tokens == 512
            found.append(probe.divergence(coarse))
    assert found[1] == found[2], "the same tokens each time"
    assert found[1] > 1.2 * found[0], "it is worse at words that the text does not have"


def test_a_wrong_prediction_is_corrected(known: Known) -> None:
    room = known.menu.bytes(known.file_type("IQ4_XS"))
    wrong = known.sensitivities.scaled({"ffn_down.weight": 1 / 8})  # as if it mattered far less than it does
    plain, better = (
        find_mix(known.probe, known.menu.weights, known.menu.types, room, known=wrong, rounds=rounds)
        for rounds in (0, 2)
    )
    assert plain.measured is not None
    assert better.measured is not None
    assert better.first == plain.first
    assert better.measured < 0.97 * plain.measured
    assert abs(better.measured / better.predicted - 1) < abs(plain.measured / plain.predicted - 1)  # type: ignore[operator]
    assert known.menu.bytes(better.types) <= room


def test_the_quantizer_is_the_callers(known: Known, tiny: Path) -> None:
    asked: list[str] = []

    def rougher(tensor: PlannedTensor, data: Bytes) -> Bytes:
        """Adds noise to what it quantizes in one kind of weights."""
        asked.append(tensor.name)
        if "ffn_up" in tensor.name:
            values = data.view(np.float32)
            data = (values + 0.02 * np.random.default_rng(0).standard_normal(values.shape, np.float32)).view(np.uint8)
        return quantized(tensor, data)

    weights = known.menu.weights[:9]
    types = {weight.tensor.name: known.menu.types[weight.tensor.name] for weight in weights}
    room = smallest(weights, types) * 3 // 2
    usual = find_mix(known.probe, weights, types, room, rounds=0, groups=1)
    mix = find_mix(known.probe, weights, types, room, quantizer=rougher, rounds=0, groups=1)
    assert {weight.tensor.name for weight in weights} == set(asked)
    assert mix.measured is not None
    assert usual.measured is not None
    assert mix.measured > usual.measured
    assert mix.types != usual.types


def test_too_small_a_room_is_refused(known: Known) -> None:
    least = smallest(known.menu.weights, known.menu.types)
    with pytest.raises(RequestError, match=f"{least:,} bytes at least"):
        find_mix(known.probe, known.menu.weights, known.menu.types, least - 1, known=known.sensitivities)
    exact = find_mix(known.probe, known.menu.weights, known.menu.types, least, known=known.sensitivities, rounds=0)
    assert known.menu.bytes(exact.types) == least


def test_what_is_measured_at_all(known: Known) -> None:
    for weight in known.menu.weights:
        assert closest(weight) is GGMLType.Q8_0
    embedding = known.menu.types["token_embd.weight"]
    assert not {GGMLType.IQ1_S, GGMLType.IQ2_XXS, GGMLType.IQ2_XS} & {*embedding}, "there is no importance for it"
    assert GGMLType.IQ1_S in known.menu.types["blk.0.ffn_up.weight"]
    assert known.menu.others == [
        name
        for name in (tensor.name for tensor in known.plan(parse_file_type("Q4_0"), Options()).tensors)
        if name not in known.menu.types
    ]
    assert all("norm" in name for name in known.menu.others)


def test_groups_keep_the_ends_alone() -> None:
    names = ["token_embd.weight"] + [
        f"blk.{b}.{kind}.weight" for kind in ("ffn_up", "ffn_down", "attn_qkv", "attn_output") for b in range(32)
    ]
    for most in (1000, 129, 40, 13, 1):
        parts = grouped(names, most)
        assert sorted(name for part in parts for name in part) == sorted(names)
        assert all(len({kind_of(name) for name in part}) == 1 for part in parts)
        assert len(parts) == 129 if most > 128 else len(parts) <= max(most, 13)
        for kind in ("ffn_up", "attn_output"):
            assert [f"blk.0.{kind}.weight"] in parts
            assert [f"blk.31.{kind}.weight"] in parts
