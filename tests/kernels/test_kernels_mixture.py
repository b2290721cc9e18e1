"""Mixtures of experts in the CPU backend: a small model against the reference backend, and what a step costs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant import quants
from phiquant.errors import KernelError
from phiquant.gguf.types import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.cpu import backend as backend_module
from phiquant.kernels.cpu.backend import CpuBackend, CpuExecutable
from phiquant.kernels.cpu.target import LOWERINGS, host
from phiquant.kernels.reference import ReferenceBackend

pytestmark = pytest.mark.cpu

CAPACITY = ops.Capacity(tokens=90, outputs=90, sequences=1, pages=4, page_tokens=32, pages_per_sequence=4, threads=2)
EXPERTS, USED, WIDTH, HIDDEN, VOCABULARY = 5, 2, 256, 256, 101


def weight(name: str, shape: tuple[int, ...], kind: GGMLType, seed: int, spread: float = 1.0) -> ops.Weight:
    values = np.random.default_rng(seed).standard_normal(shape) * spread / np.sqrt(shape[-1])
    data = quants.quantize(values.astype(np.float32), kind)
    return ops.Weight(name, kind, shape, np.ascontiguousarray(data).view(np.uint8).reshape(-1))


def mixture(kind: GGMLType = GGMLType.F32, *, layers: int = 2, fused: bool = False, used: int = USED) -> ops.Program:
    """Without attention: embedding, then layers of experts, then logits; gate and up apart as files have them."""
    r, f32 = ops.Recorder(ops.AttentionShape(1, 1, 64, 64, 1.0), 1), GGMLType.F32
    x, h, scores = r.buffer("x", WIDTH), r.buffer("h", WIDTH), r.buffer("scores", EXPERTS)
    both, gated, down = (
        r.buffer(name, width, "routes") for name, width in (("both", 2 * HIDDEN), ("gated", HIDDEN), ("down", WIDTH))
    )
    last, logits = r.buffer("last", WIDTH, "outputs"), r.buffer("logits", VOCABULARY, "outputs")
    r.embed(weight("token_embd.weight", (VOCABULARY, WIDTH), f32, 0, 16.0), x)
    for i in range(layers):
        name = f"blk.{i}.ffn"
        r.rms_norm(x, weight(f"{name}_norm.weight", (WIDTH,), f32, 1, 16.0), 1e-5, h)
        r.matmul(weight(f"{name}_gate_inp.weight", (EXPERTS, WIDTH), f32, 10 * i + 2), h, scores)
        route = r.route(scores, used, 0.01)
        if fused:
            r.expert_matmul(weight(f"{name}_up_exps.weight", (EXPERTS, 2 * HIDDEN, WIDTH), kind, 3), route, h, both)
        else:
            for part, (first, seed) in {"gate": (0, 3), "up": (HIDDEN, 4)}.items():
                w = weight(f"{name}_{part}_exps.weight", (EXPERTS, HIDDEN, WIDTH), kind, 10 * i + seed)
                r.expert_matmul(w, route, h, both.columns(first, HIDDEN))
        r.swiglu(both, gated)
        w = weight(f"{name}_down_exps.weight", (EXPERTS, WIDTH, HIDDEN), kind, 10 * i + 5)
        r.expert_matmul(w, route, gated, down)
        r.combine(route, down, x)
    r.select(x, last)
    r.matmul(weight("output.weight", (VOCABULARY, WIDTH), f32, 8), last, logits)
    return r.finish(logits)


def step(tokens: list[int], outputs: list[int] | None = None) -> ops.Step:
    n = len(tokens)
    angles = np.zeros((n, 32), np.float32)
    return ops.Step(
        np.array(tokens, np.int32),
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.int32),
        np.arange(4, dtype=np.int32)[None],
        angles,
        angles,
        np.array(range(n) if outputs is None else outputs, np.int32),
    )


def prepare(program: ops.Program, **changes: Any) -> CpuExecutable:
    return CpuBackend().prepare(program, dataclasses.replace(CAPACITY, **changes))


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, n).tolist()


def bits(x: NDArray[np.float32]) -> NDArray[np.int32]:
    return x.copy().view(np.int32)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("used", [1, 2, 3])
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_logits_equal_those_of_the_reference(name: str, used: int, fused: bool) -> None:
    program = mixture(GGMLType[name], used=used, fused=fused)
    reference, executable = ReferenceBackend().prepare(program, CAPACITY), prepare(program)
    for n in (1, 2, 90):
        made = step(random_tokens(n))
        expected = reference.run(made)
        error = np.abs(executable.run(made) - expected).max(axis=1) / np.abs(expected).max()
        assert np.median(error) < 4e-6
        # Where activations are rounded to 8 bits, one that lies between two levels may fall to either side.
        assert error.max() < (0.02 if GGMLType[name].is_quantized else 2e-5)
    executable.close()


@pytest.mark.parametrize("pack", [True, False])
def test_bits_depend_neither_on_company_nor_on_threads(pack: bool) -> None:
    program, tokens = mixture(GGMLType.Q4_K), random_tokens(90)
    executable = prepare(program, threads=2)
    whole = bits(executable.run(step(tokens)))
    executable.close()
    for threads in (1, 2, 3):
        executable = prepare(program, threads=threads, pack=pack)
        for first, last in ((0, 1), (1, 3), (3, 20), (20, 90), (89, 90)):
            part = bits(executable.run(step(tokens[first:last])))
            assert np.array_equal(part, whole[first:last])
        assert np.array_equal(bits(executable.run(step([tokens[40]] * 90))), np.tile(whole[40], (90, 1)))
        executable.close()


def test_only_the_outputs_asked_for_are_given() -> None:
    executable = prepare(mixture())
    everything = executable.run(step(random_tokens(20))).copy()
    assert executable.run(step(random_tokens(20), [])).shape == (0, VOCABULARY)
    assert np.array_equal(executable.run(step(random_tokens(20), [19, 3])), everything[[19, 3]])
    executable.close()


def test_activations_are_rounded_once_for_gate_and_up_and_gated_on_the_way() -> None:
    program = mixture(GGMLType.Q4_K)
    experts = [op for op in program.operations if isinstance(op, ops.ExpertMatMul)]
    gate_or_up = ["gate", "up", "down"] * 2
    assert [name in op.weight.name for name, op in zip(gate_or_up, experts, strict=True)] == [True] * 6
    executable = prepare(program)
    assert executable._keep.rounded == {id(experts[1]), id(experts[4])}
    assert set(executable._keep.before) == {id(experts[2]), id(experts[5])}
    # Of a layer: norm, router (2), route, gate (2), up (1), down (2: gating and rounding at once), combine.
    assert len(executable._native) == 2 * 10 + 1 + 2
    executable.close()


def test_other_types_other_rows_and_other_routes_are_rounded_anew() -> None:
    r = ops.Recorder(ops.AttentionShape(1, 1, 64, 64, 1.0), 1)
    x, h, scores, logits = r.buffer("x", 256), r.buffer("h", 256), r.buffer("s", 5), r.buffer("l", 256, "outputs")
    out = r.buffer("out", 6 * 32, "routes")
    r.embed(weight("e", (VOCABULARY, 256), GGMLType.F32, 0), x)
    r.rms_norm(x, weight("n", (256,), GGMLType.F32, 1), 1e-5, h)
    r.matmul(weight("router", (5, 256), GGMLType.F32, 2), h, scores)
    one, other = r.route(scores, 2, 0.01), r.route(scores, 2, 0.02)
    plan = [
        ("Q4_K", one, h),
        ("Q4_K", one, h),
        ("Q4_K", one, x),
        ("Q6_K", one, x),
        ("Q4_K", one, x),
        ("Q4_K", other, x),
    ]
    for i, (kind, route, source) in enumerate(plan):
        w = weight(str(i), (5, 32, 256), GGMLType[kind], 3 + i)
        r.expert_matmul(w, route, source, out.columns(32 * i, 32))
    r.select(x, logits)
    program = r.finish(logits)
    experts = [op for op in program.operations if isinstance(op, ops.ExpertMatMul)]
    executable = prepare(program)
    assert executable._keep.rounded == {id(experts[1])}
    executable.close()


def test_observations_change_no_bit_and_are_those_of_the_reference() -> None:
    program = mixture(GGMLType.Q8_0, layers=1)
    plain, tokens = prepare(program), random_tokens(70)
    expected = bits(plain.run(step(tokens)))
    plain.close()
    found = []
    for backend in (CpuBackend(), ReferenceBackend()):
        operations: list[ops.Operation] = []
        for op in program.operations:
            if isinstance(op, ops.ExpertMatMul):
                sums = np.zeros((EXPERTS, op.x.width)), np.zeros(EXPERTS, np.int64)
                operations.append(ops.SumSquares(op.x, *sums, op.route))
                found.append(sums)
            operations.append(op)
        executable = backend.prepare(dataclasses.replace(program, operations=tuple(operations)), CAPACITY)
        logits = executable.run(step(tokens))
        if isinstance(backend, CpuBackend):
            assert np.array_equal(bits(logits), expected)
        executable.close()
    for (sums, counts), (wanted, wanted_counts) in zip(found[:3], found[3:], strict=True):
        assert counts.tolist() == wanted_counts.tolist()
        assert counts.sum() == 70 * USED
        np.testing.assert_allclose(sums, wanted, rtol=1e-3)


def test_few_tokens_are_expected_to_read_few_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a step of one token is not cut into parts for weights that it never reads."""
    executable = prepare(mixture())
    size = EXPERTS * HIDDEN * WIDTH * 4
    costs = [c for c in zip(executable._bytes, executable._spared, strict=True) if c[1] > 0]
    assert {c[1] for c in costs} == {1 - USED / EXPERTS}
    assert len(costs) == 2 * (2 + 1 + 2)
    assert sum(c[0] for c in costs) == 2 * 3 * size
    # Memory so slow that the experts of one token take just less than a part, all of them more.
    one = 3 * size * USED / EXPERTS
    monkeypatch.setattr(backend_module, "_BYTES_PER_SECOND", one * 2.2 / backend_module._PART_SECONDS)
    lengths = {n: len(list(executable._parts(n, 1, 1, np.ones(1, np.int64)))) for n in (1, 90)}
    assert lengths[1] == 1 + 1, "the embedding and all of the rest"
    assert lengths[90] > lengths[1]
    executable.close()


def test_long_steps_are_cut_and_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    executable, made = prepare(mixture(GGMLType.Q4_K)), step(random_tokens(90))
    whole = bits(executable.run(made))
    monkeypatch.setattr(backend_module, "_PART_SECONDS", 1e-9)
    assert np.array_equal(bits(executable.run(made)), whole)
    executable.close()


def test_experts_that_meet_the_wrong_router_are_refused() -> None:
    program = mixture(layers=1)
    changed = tuple(
        dataclasses.replace(op, weight=weight("fewer", (EXPERTS - 1, WIDTH, HIDDEN), GGMLType.F32, 0))
        if isinstance(op, ops.ExpertMatMul) and "down" in op.weight.name
        else op
        for op in program.operations
    )
    with pytest.raises(KernelError, match="fewer: its 4 matrices meet 5 experts"):
        prepare(dataclasses.replace(program, operations=changed))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_forced_lowering_runs_the_whole_model(lowering: str) -> None:
    try:
        host(lowering)
    except KernelError as error:
        pytest.skip(str(error))
    script = f"""
import numpy as np
import test_kernels_mixture as t
from phiquant.kernels.cpu.library import _loaded
from phiquant.kernels.reference import ReferenceBackend
program = t.mixture(t.GGMLType.Q4_K)
executable = t.prepare(program)
s = t.step(t.random_tokens(60))
expected = ReferenceBackend().prepare(program, t.CAPACITY).run(s)
error = np.abs(executable.run(s) - expected).max(axis=1) / np.abs(expected).max()
assert np.median(error) < 1e-5, error
ran = {{name.rpartition(".")[0] for name in _loaded}}
assert {{"route", "combine", "expert_matmul.Q4_K"}} <= ran, ran
print({{name.rpartition(".")[2] for name in _loaded}} == {{{lowering!r}}})
"""
    environment = os.environ | {
        "PHIQUANT_LOWERING": lowering,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, env=environment)
    assert (done.stdout, done.stderr) == ("True\n", "")
