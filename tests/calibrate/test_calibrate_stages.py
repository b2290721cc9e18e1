"""Models cut into stages: what is cut where, and that stage after stage gives the bits of the whole."""

from dataclasses import replace

import numpy as np
import pytest
from architectures import CONFIGS
from numpy.typing import NDArray

from phiquant.arch import Config
from phiquant.calibrate import stream as stream_module
from phiquant.calibrate.chunks import Chunks
from phiquant.calibrate.moments import FLOOR, Moments
from phiquant.calibrate.stages import Stages
from phiquant.calibrate.stream import Stream
from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.cpu.backend import CpuBackend
from phiquant.kernels.ops import Weight
from phiquant.model import Rope, record

CONTEXT, CHUNKS = 24, 5


def recorded(config: Config) -> ops.Program:
    rng = np.random.default_rng(3)
    weights = {
        name: Weight(name, GGMLType.F32, shape, rng.normal(0, 0.3, shape).astype("<f4").reshape(-1).view(np.uint8))
        for name, shape in config.tensor_shapes()
    }
    return record(config, weights)


def chunks() -> Chunks:
    return Chunks(np.random.default_rng(0).integers(0, 100, (CHUNKS, CONTEXT), np.int32), "text")


def begun(cut: Stages, config: Config) -> Stream:
    weight, text = cut.embed.weight, chunks()
    rows = weight.data.view(np.float32).reshape(weight.shape)[text.ids.reshape(-1)] * np.float32(cut.embed.scale)
    return Stream(cut, text, rows, Rope(config.rotary), CpuBackend(), threads=2)


def whole(program: ops.Program, config: Config) -> NDArray[np.float32]:
    """Hidden states of all chunks after the last norm, each chunk computed in a step of its own."""
    page = ops.Capacity(tokens=CONTEXT, outputs=CONTEXT, pages=1, page_tokens=64, pages_per_sequence=1, threads=1)
    executable = CpuBackend().prepare(program, page)
    rope, positions = Rope(config.rotary), np.arange(CONTEXT, dtype=np.int32)
    cos, sin = rope.rotation(positions, rope.regime(CONTEXT))
    none = np.zeros(CONTEXT, np.int32)
    found = [
        executable.run(
            ops.Step(ids, positions, none, np.zeros((1, 1), np.int32), cos, sin, positions, hidden=True)
        ).copy()
        for ids in chunks().ids
    ]
    executable.close()
    return np.concatenate(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_cut_where_only_the_stream_is_alive(name: str) -> None:
    cut = Stages.of(recorded(CONFIGS[name]), lambda weight: weight.startswith("blk.") or weight == "output.weight")
    layers = [stage.layer for stage in cut.stages]
    assert layers == ([0, 1, None] if name == "phi2" else [0, 0, 1, 1, None])
    groups = [
        tuple(n.removesuffix(".weight") for n in g.names)
        for s in cut.stages
        for g in s.groups
        if ".1." not in g.names[0]
    ]
    qkv = ("blk.0.attn_qkv",) if name in ("phi3", "phi3small") else tuple(f"blk.0.attn_{part}" for part in "qkv")
    expected = {
        "phi2": [(*qkv, "blk.0.ffn_up"), ("blk.0.attn_output",), ("blk.0.ffn_down",)],
        "phi3": [qkv, ("blk.0.attn_output",), ("blk.0.ffn_up",), ("blk.0.ffn_down",)],
        "phimoe": [
            *(qkv, ("blk.0.attn_output",), ("blk.0.ffn_gate_inp",)),
            *(("blk.0.ffn_gate_exps", "blk.0.ffn_up_exps"), ("blk.0.ffn_down_exps",)),
        ],
        "llama": [qkv, ("blk.0.attn_output",), ("blk.0.ffn_gate", "blk.0.ffn_up"), ("blk.0.ffn_down",)],
    }
    expected["phi3small"] = expected["phi3"]
    assert groups == [*expected[name], *([] if name == "phi3small" else [("output",)])]
    operations = [op for stage in cut.stages for op in stage.operations]
    assert operations == list(cut.program.operations[1:])


@pytest.mark.cpu
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("most", [2 * CONTEXT, 10], ids=["chunks in a step", "steps in a chunk"])
def test_stage_after_stage_gives_the_bits_of_the_whole(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "STEP_TOKENS", most)
    config = CONFIGS[name]
    program = recorded(config)
    cut = Stages.of(program, lambda weight: True)
    stream = begun(cut, config)
    counted = 0

    def read(tokens: int) -> None:
        nonlocal counted
        counted += tokens

    for stage in cut.stages[:-1]:
        stream.advance(stage, {}, read=read)
    assert counted == CONTEXT * CHUNKS * (len(cut.stages) - 1)
    last = cut.stages[-1]
    kept: list[NDArray[np.float32]] = []
    add = Moments.add

    def spy(self: Moments, rows: NDArray[np.float32], experts: NDArray[np.int32] | None = None) -> None:
        kept.append(rows.copy())
        add(self, rows, experts)

    monkeypatch.setattr(Moments, "add", spy)
    (moments,) = stream.moments(last, last.groups, {})
    hidden = whole(program, config)
    assert np.array_equal(np.concatenate(kept).view(np.uint32), hidden.view(np.uint32))
    exact = hidden.astype(np.float64).T @ hidden.astype(np.float64)
    np.testing.assert_allclose(moments.sums[0], exact, atol=1e-5 * exact.diagonal().max())
    assert moments.counts.tolist() == [CONTEXT * CHUNKS]


@pytest.mark.cpu
def test_later_matrices_are_observed_behind_those_that_were_made() -> None:
    config = CONFIGS["phi3"]
    cut = Stages.of(recorded(config), lambda weight: True)
    stage, stream = cut.stages[0], begun(cut, config)
    first, second = stage.groups
    halved = replace(first.weights[0], data=(first.weights[0].data.view(np.float32) / 2).view(np.uint8))
    before = stream.rows.copy()
    (plain,), (changed,) = (stream.moments(stage, [second], made) for made in ({}, {halved.name: halved}))
    assert np.array_equal(stream.rows, before)
    assert not np.allclose(plain.sums, changed.sums)
    (together,) = stream.advance(stage, {}, [second])
    assert np.array_equal(together.sums, plain.sums)
    assert not np.array_equal(stream.rows, before)


@pytest.mark.cpu
def test_experts_have_moments_of_what_is_routed_to_them() -> None:
    config = CONFIGS["phimoe"]
    cut = Stages.of(recorded(config), lambda weight: weight.endswith("exps.weight"))
    stream = begun(cut, config)
    stream.advance(cut.stages[0], {})
    first, second = cut.stages[1].groups
    inputs, gated = stream.moments(cut.stages[1], [first, second], {})
    tokens = CONTEXT * CHUNKS
    assert inputs.counts.tolist() == gated.counts.tolist()
    assert inputs.counts.sum() == 2 * tokens
    assert (inputs.counts > 0).sum() > 2
    assert (inputs.sums.shape, gated.sums.shape) == ((5, 64, 64), (5, 96, 96))
    # Each token is read by two experts, so that their moments add up to twice those of all.
    router = Stages.of(cut.program, lambda weight: "ffn_gate_inp" in weight).stages[1]
    (every,) = stream.moments(router, router.groups, {})
    np.testing.assert_allclose(inputs.sums.sum(axis=0), 2 * every.sums[0], rtol=1e-3, atol=1e-2)


def test_an_expert_without_tokens_has_the_average_of_its_layer() -> None:
    rng = np.random.default_rng(1)
    moments = Moments.none(3, 8)
    rows, chosen = rng.standard_normal((400, 8)).astype(np.float32), np.array([0, 1] * 400, np.int32)
    chosen[::4] = 1
    moments.add(rows, chosen)
    assert moments.counts.tolist() == [200, 600, 0]
    every = moments.sums.sum(axis=0)
    np.testing.assert_allclose(moments.of(2), every * FLOOR / 800, rtol=1e-5)
    np.testing.assert_allclose(moments.of(0), moments.sums[0] + every * FLOOR / 800, rtol=1e-5)
    for matrix in range(3):  # a mean square, however many tokens there were
        np.testing.assert_allclose(moments.importance(matrix), 1, atol=0.4)
    one = Moments.none(1, 8)
    one.add(rows)
    np.testing.assert_allclose(one.of(0), rows.T @ rows, rtol=1e-5)


def test_what_is_no_number_ends_it() -> None:
    moments = Moments.none(1, 4)
    moments.add(np.array([[1, 2, np.nan, 4]], np.float32))
    with pytest.raises(WeightsError, match=r"blk\.0\.attn_q\.weight are not finite"):
        moments.check("blk.0.attn_q.weight")


def test_blocks_that_share_more_than_a_stream_are_refused() -> None:
    program = recorded(CONFIGS["phi3"])
    with pytest.raises(UnsupportedError, match="does not begin with an embedding"):
        Stages.of(replace(program, operations=program.operations[1:]), lambda weight: True)
    x, extra = program.buffers[0], ops.Buffer("extra", 64)
    embed = program.operations[0]
    assert isinstance(embed, ops.Embed)
    square = next(op.weight for op in program.operations if isinstance(op, ops.MatMul) and "output" in op.weight.name)
    late = ops.MatMul(square, extra, x, add=True)  # of a stream that no embedding begins
    operations = (embed, *program.operations[1:-3], late, *program.operations[-3:])
    with pytest.raises(UnsupportedError, match="share more than one stream"):
        Stages.of(replace(program, operations=operations), lambda weight: True)
