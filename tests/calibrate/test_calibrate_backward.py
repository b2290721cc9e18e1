"""Derivatives of a model's divergence, beside differences of the divergence itself, in double precision."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from architectures import CONFIGS, weights_of
from numpy.typing import NDArray

from phiquant.arch import Config, Phi3Config, Phi3SmallConfig
from phiquant.calibrate.attending import Attending
from phiquant.calibrate.backward import Pass
from phiquant.calibrate.network import Network, divergence
from phiquant.calibrate.scale_fields import scale_fields, scales_of, values_of_field
from phiquant.calibrate.stages import Stages
from phiquant.calibrate.tuned import Tuned
from phiquant.errors import UnsupportedError
from phiquant.gguf import GGMLType
from phiquant.kernels.ops import Buffer, Capacity, Step, SumSquares, Weight
from phiquant.kernels.reference import ReferenceBackend
from phiquant.model import Rope, record

CONTEXT, SEQUENCES = 12, 3
MODELS: dict[str, Config] = {
    **CONFIGS,
    "phi3 tied": replace(CONFIGS["phi3"], tied=True),  # type: ignore[type-var]
    "phi3small": replace(  # type: ignore[type-var]
        CONFIGS["phi3small"], sparse_block_size=2, sparse_local_blocks=1, sparse_vertical_stride=3, gate_limit=0.5
    ),
    "llama with biases": replace(CONFIGS["llama"], qkv_bias=True, output_bias=True, ffn_bias=True),  # type: ignore[type-var]
}


class Exact(Tuned):
    """In double precision, with scales that are not rounded: what the derivatives are of."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        super().__init__(weights)
        self.changes: dict[str, Any] = {name: value.astype(np.float64) for name, value in self.changes.items()}
        self.gradients: dict[str, Any] = {name: np.zeros_like(value) for name, value in self.changes.items()}

    def _widened(self, weight: Weight, data: NDArray[np.uint8], blocks: Any) -> NDArray[Any]:
        change = self.changes.get(weight.name)
        if change is None:
            return super()._widened(weight, data, blocks).astype(np.float64)
        scales = scales_of(data, weight.type) * (1 + change[:, blocks])
        parts = [
            values_of_field(data, weight.type, field, len(data), weight.columns).reshape(-1, weight.type.block_elements)
            * scale[:, None]
            for field, scale in zip(scale_fields(weight.type), scales, strict=True)
        ]
        whole: NDArray[Any] = np.sum(parts, axis=0).reshape(len(data), -1)
        return whole


def network(config: Config, weights: Mapping[str, Weight], tuned: Tuned) -> Network:
    cut = Stages.of(record(config, weights), lambda name: False)
    rope = Rope(config.rotary)
    turning = rope.rotation(np.arange(CONTEXT, dtype=np.int32), rope.regime(CONTEXT))
    return Network(cut, tuned, Attending(cut.program.attention, *turning))


def ids() -> NDArray[np.int32]:
    return np.random.default_rng(0).integers(0, 100, (SEQUENCES, CONTEXT), np.int32)


@pytest.mark.cpu
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_are_what_differences_say(name: str) -> None:
    config = MODELS[name]
    weights = weights_of(config, GGMLType.Q4_1)
    tuned = Exact(weights)
    model = network(config, weights, tuned)
    rng = np.random.default_rng(5)
    target = rng.normal(0, 2, (SEQUENCES * CONTEXT, 100))
    loss = model.learn(ids(), target.copy())
    assert loss == pytest.approx(divergence(target.copy(), model.logits(ids())).mean(), rel=1e-12)
    assert set(tuned.changes) == {name for name in weights if "ffn_gate_inp.weight" not in name}, "all are tuned"
    for weight, change in tuned.changes.items():
        way = rng.normal(0, 1, change.shape)
        found = []
        for side in (1e-5, -1e-5):
            change[...] = side * way
            found.append(divergence(target.copy(), model.logits(ids())).mean())
        change[...] = 0
        slope, expected = float((tuned.gradients[weight] * way).sum()), (found[0] - found[1]) / 2e-5
        size = float(np.sqrt(np.square(tuned.gradients[weight]).sum()))
        assert abs(slope - expected) < 1e-5 * size + 1e-9, weight
        assert size > 0, weight


@pytest.mark.cpu
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_definition(name: str) -> None:
    config = MODELS[name]
    if isinstance(config, Phi3Config):
        config = replace(config, sliding_window=5)
    weights = weights_of(config, GGMLType.F32)
    program, rope = record(config, weights), Rope(config.rotary)
    page = Capacity(tokens=CONTEXT, outputs=CONTEXT, pages=1, page_tokens=16, pages_per_sequence=1)
    executable = ReferenceBackend().prepare(program, page)
    at, none = np.arange(CONTEXT, dtype=np.int32), np.zeros(CONTEXT, np.int32)
    turning = rope.rotation(at, rope.regime(CONTEXT))
    found = network(config, weights, Tuned(weights)).logits(ids()).reshape(SEQUENCES, CONTEXT, -1)
    for sequence, rows in zip(ids(), found, strict=True):
        expected = executable.run(Step(sequence, at, none, np.zeros((1, 1), np.int32), *turning, at))
        scale = np.abs(expected).max()
        assert np.abs(rows - expected).max() < 2e-3 * scale, "the cache of the definition holds float16"
        assert np.abs(rows - expected).mean() < 2e-4 * scale


def test_the_sparse_pattern_and_the_limit_matter_in_these_tests() -> None:
    config = MODELS["phi3small"]
    assert isinstance(config, Phi3SmallConfig)
    weights = weights_of(config, GGMLType.F32)
    found = network(config, weights, Tuned(weights)).logits(ids())
    for change in ({"sparse_layers": (False, False)}, {"gate_limit": 20.0}):
        other = replace(config, **change)  # type: ignore[arg-type]
        assert np.abs(network(other, weights, Tuned(weights)).logits(ids()) - found).max() > 1e-3


@pytest.mark.cpu
def test_tuned_weights_are_read_as_a_file_would_hold_them() -> None:
    config = CONFIGS["phi3"]
    weights = weights_of(config, GGMLType.Q5_1)
    tuned = Tuned(weights)
    before = network(config, weights, tuned).logits(ids())
    rng = np.random.default_rng(1)
    for change in tuned.changes.values():
        change += rng.normal(0, 0.02, change.shape).astype(np.float32)
    after = network(config, weights, tuned).logits(ids())
    assert np.abs(after - before).max() > 0.01
    written = {name: tuned.weight(name) for name in weights}
    read = network(config, written, Tuned(written)).logits(ids())
    assert (read == after).all()


def test_an_operation_without_a_derivative_is_refused_by_name() -> None:
    x = Buffer("x", 4)
    config = CONFIGS["phi3"]
    cos = np.ones((2, 6), np.float32)
    shape = record(config, weights_of(config, GGMLType.F32)).attention
    run = Pass([SumSquares(x, np.zeros((1, 4)), np.zeros(1, np.int64))], Tuned({}), Attending(shape, cos, cos))
    with pytest.raises(UnsupportedError, match="SumSquares"):
        run.forward(x, np.zeros((2, 4), np.float32), x)
