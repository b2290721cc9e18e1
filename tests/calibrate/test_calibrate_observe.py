"""Observations in a Program: where they are placed, what they share, and what they see."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant.calibrate.observe import observe
from phiquant.convert.imatrix import ImportanceMatrix, Statistic, read
from phiquant.errors import WeightsError
from phiquant.gguf import GGMLType, GGUFFile
from phiquant.kernels import ops
from phiquant.kernels.cpu.backend import CpuBackend
from phiquant.kernels.reference import ReferenceBackend

WIDTH = 64
CAPACITY = ops.Capacity(tokens=20, outputs=20, pages=1, page_tokens=32, pages_per_sequence=1, threads=2)


def weight(name: str, *shape: int) -> ops.Weight:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32)
    return ops.Weight(name, GGMLType.F32, shape, values.view(np.uint8).reshape(-1))


def values(w: ops.Weight) -> NDArray[np.float64]:
    return w.data.view(np.float32).reshape(w.shape).astype(np.float64)


def square(name: str) -> ops.Weight:
    return weight(name, WIDTH, WIDTH)


def program() -> ops.Program:
    """x is read by q and k as it is, by v after it has changed; the output reads the outputs only."""
    r = ops.Recorder(ops.AttentionShape(1, 1, WIDTH, WIDTH, 1.0), 1)
    x, y, z = (r.buffer(name, WIDTH) for name in "xyz")
    last, logits = r.buffer("last", WIDTH, "outputs"), r.buffer("logits", WIDTH, "outputs")
    r.embed(square("token_embd.weight"), x)
    r.matmul(square("blk.0.attn_q.weight"), x, y)
    r.matmul(square("blk.0.attn_k.weight"), x, z)
    r.matmul(square("blk.0.attn_output.weight"), z, x, add=True)
    r.matmul(square("blk.0.attn_v.weight"), x, y)
    r.select(x, last)
    r.matmul(square("output.weight"), last, logits)
    return r.finish(logits)


def step(tokens: list[int], outputs: list[int]) -> ops.Step:
    n = len(tokens)
    angles = np.zeros((n, WIDTH // 2), np.float32)
    return ops.Step(
        np.array(tokens, np.int32),
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.int32),
        np.zeros((1, 1), np.int32),
        angles,
        angles,
        np.array(outputs, np.int32),
    )


def test_what_reads_the_same_rows_shares_an_observation() -> None:
    observed, observations = observe(program(), lambda name: True)
    assert [o.names for o in observations] == [
        ("blk.0.attn_q.weight", "blk.0.attn_k.weight"),
        ("blk.0.attn_output.weight",),
        ("blk.0.attn_v.weight",),
        ("output.weight",),
    ]
    kinds = [type(op).__name__ for op in observed.operations]
    assert kinds == ["Embed", "SumSquares", "MatMul", "MatMul", *["SumSquares", "MatMul"] * 2, "Select", *kinds[-2:]]
    assert kinds[-2:] == ["SumSquares", "MatMul"]


def test_only_what_is_wanted_is_observed() -> None:
    recorded = program()
    observed, observations = observe(recorded, lambda name: name == "blk.0.attn_v.weight")
    assert [o.names for o in observations] == [("blk.0.attn_v.weight",)]
    assert len(observed.operations) == len(recorded.operations) + 1
    unchanged, none = observe(recorded, lambda name: False)
    assert none == []
    assert unchanged == recorded


@pytest.mark.cpu
@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_every_backend_adds_up_what_the_weights_are_given(backend: type) -> None:
    recorded, rng = program(), np.random.default_rng(0)
    observed, observations = observe(recorded, lambda name: True)
    executable = backend().prepare(observed, CAPACITY)
    plain = backend().prepare(recorded, CAPACITY)
    weights = {op.weight.name: values(op.weight) for op in recorded.operations if hasattr(op, "weight")}
    expected, rows = [np.zeros(WIDTH) for _ in observations], [0, 0, 0, 0]
    for count, outputs in ((20, [3, 19]), (1, []), (7, [6])):
        tokens = rng.integers(0, WIDTH, count).tolist()
        assert np.array_equal(executable.run(step(tokens, outputs)), plain.run(step(tokens, outputs)))
        x = weights["token_embd.weight"][tokens]
        z = x @ weights["blk.0.attn_k.weight"].T
        after = x + z @ weights["blk.0.attn_output.weight"].T
        for i, seen in enumerate((x, z, after, after[outputs])):
            expected[i] += (seen**2).sum(axis=0)
            rows[i] += len(seen)
    executable.close()
    plain.close()
    for observation, total, count in zip(observations, expected, rows, strict=True):
        np.testing.assert_allclose(observation.sums[0], total, rtol=1e-4)
        assert observation.counts.tolist() == [count]


EXPERTS, USED = 4, 2


def mixture() -> ops.Program:
    """The router and two matrices of experts read x, a third what the experts made of it."""
    r = ops.Recorder(ops.AttentionShape(1, 1, WIDTH, WIDTH, 1.0), 1)
    x, scores = r.buffer("x", WIDTH), r.buffer("scores", EXPERTS)
    both, down = r.buffer("both", 2 * WIDTH, "routes"), r.buffer("down", WIDTH, "routes")
    last, logits = r.buffer("last", WIDTH, "outputs"), r.buffer("logits", WIDTH, "outputs")
    r.embed(square("token_embd.weight"), x)
    r.matmul(weight("blk.0.ffn_gate_inp.weight", EXPERTS, WIDTH), x, scores)
    route = r.route(scores, USED, 0.01)
    r.expert_matmul(weight("blk.0.ffn_gate_exps.weight", EXPERTS, WIDTH, WIDTH), route, x, both.columns(0, WIDTH))
    r.expert_matmul(weight("blk.0.ffn_up_exps.weight", EXPERTS, WIDTH, WIDTH), route, x, both.columns(WIDTH, WIDTH))
    r.expert_matmul(weight("blk.0.ffn_down_exps.weight", EXPERTS, WIDTH, 2 * WIDTH), route, both, down)
    r.combine(route, down, x)
    r.matmul(weight("blk.1.ffn_gate_inp.weight", EXPERTS, WIDTH), x, scores)
    r.select(x, last)
    r.matmul(square("output.weight"), last, logits)
    return r.finish(logits)


def test_experts_share_an_observation_by_rows_and_routes() -> None:
    recorded = mixture()
    observed, observations = observe(recorded, lambda name: True)
    assert [o.names for o in observations] == [
        ("blk.0.ffn_gate_inp.weight",),
        ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"),
        ("blk.0.ffn_down_exps.weight",),
        ("blk.1.ffn_gate_inp.weight",),
        ("output.weight",),
    ]
    shapes = [(o.sums.shape, o.counts.shape) for o in observations[:3]]
    assert shapes == [((1, WIDTH), (1,)), ((EXPERTS, WIDTH), (EXPERTS,)), ((EXPERTS, 2 * WIDTH), (EXPERTS,))]
    assert len(observed.operations) == len(recorded.operations) + 5


@pytest.mark.cpu
@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_an_expert_is_observed_by_what_is_routed_to_it(backend: type, tmp_path: Path) -> None:
    recorded, rng = mixture(), np.random.default_rng(1)
    observed, observations = observe(recorded, lambda name: name.startswith("blk.0"))
    executable = backend().prepare(observed, CAPACITY)
    weights = {op.weight.name: values(op.weight) for op in recorded.operations if hasattr(op, "weight")}
    gate, up = (weights[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up"))
    wanted, after, counts = np.zeros((EXPERTS, WIDTH)), np.zeros((EXPERTS, 2 * WIDTH)), np.zeros(EXPERTS, np.int64)
    for count in (20, 1, 7):
        tokens = rng.integers(0, WIDTH, count).tolist()
        executable.run(step(tokens, [0]))
        x = weights["token_embd.weight"][tokens]
        chosen = np.argsort(-(x @ weights["blk.0.ffn_gate_inp.weight"].T), axis=1)[:, :USED]
        for row, experts in zip(x, chosen, strict=True):
            for expert in experts:
                wanted[expert] += row**2
                after[expert] += np.concatenate([gate[expert] @ row, up[expert] @ row]) ** 2
                counts[expert] += 1
    executable.close()
    np.testing.assert_allclose(observations[1].sums, wanted, rtol=1e-12)
    np.testing.assert_allclose(observations[2].sums, after, rtol=1e-4)
    for observation in observations[1:]:
        assert observation.counts.tolist() == counts.tolist()
    assert 0 < counts.min() < counts.max()

    # In the file a weight's sums are [experts, columns] and its counts [experts, 1], as llama.cpp has them.
    entries = {n: Statistic(o.sums.astype(np.float32), o.counts.copy()) for o in observations for n in o.names}
    path = tmp_path / "imatrix.gguf"
    ImportanceMatrix(entries, 1, 28, ("text",)).write_gguf(path)
    with GGUFFile.open(path) as file:
        name = "blk.0.ffn_down_exps.weight"
        assert file.tensors[f"{name}.in_sum2"].shape == (EXPERTS, 2 * WIDTH)
        assert file.tensors[f"{name}.counts"].shape == (EXPERTS, 1)
        assert file.data(f"{name}.counts").view(np.float32).tolist() == counts.tolist()
    back = read(path)
    assert back.entries["blk.0.ffn_up_exps.weight"].sums.shape == (EXPERTS, WIDTH)
    np.testing.assert_allclose(back.importance(name), after / counts[:, None], rtol=1e-4)


def test_experts_whose_inputs_are_no_numbers_end_it() -> None:
    _, observations = observe(mixture(), lambda name: "exps" in name)
    observations[0].check()
    observations[0].sums[2, 5] = np.inf
    with pytest.raises(WeightsError, match=r"blk\.0\.ffn_gate_exps\.weight are not finite"):
        observations[0].check()
