"""Models with norms that have a mean, biases, projections side by side in one buffer, and other activations."""

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant.gguf.types import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.cpu import binding, fusion
from phiquant.kernels.cpu.backend import CpuBackend
from phiquant.kernels.reference import ReferenceBackend

from .test_kernels_backend import CAPACITY, bits, prepare, step, weight

pytestmark = pytest.mark.cpu

F32 = GGMLType.F32
Activation = Literal["gelu", "gegelu", "swiglu"]
ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gegelu", "swiglu")


def model(type: GGMLType, activation: Activation = "gelu", layers: int = 2, width: int = 256) -> ops.Program:
    """Attention and feed-forward network side by side after one norm, as Phi-2 has them."""
    a, hidden, vocabulary = ops.AttentionShape(4, 2, 64, 24, 0.125), 512, 101
    r, parts = ops.Recorder(a, layers), 1 if activation == "gelu" else 2
    x, h, qkv = r.buffer("x", width), r.buffer("h", width), r.buffer("qkv", a.q_width + 2 * a.kv_width)
    q, o, up, act = (
        r.buffer(n, w) for n, w in zip("qoua", (a.q_width, a.q_width, parts * hidden, hidden), strict=True)
    )
    last, normed, logits = (r.buffer(n, w, "outputs") for n, w in (("l", width), ("n", width), ("y", vocabulary)))
    seeds = iter(range(1000))

    def vector(size: int, spread: float = 0.3) -> ops.Weight:
        return weight("vector", (size,), F32, next(seeds), spread * size**0.5)

    def matrix(rows: int, columns: int) -> ops.Weight:
        return weight("matrix", (rows, columns), type, next(seeds))

    r.embed(weight("token_embd", (vocabulary, width), type, next(seeds), 4.0), x, scale=3.0)
    for i in range(layers):
        r.layer_norm(x, vector(width, 1.0), vector(width), 1e-5, h)
        first = 0
        for size in (a.q_width, a.kv_width, a.kv_width):
            r.matmul(matrix(size, width), h, qkv.columns(first, size), bias=vector(size))
            first += size
        r.rotate_store(qkv, i, q)
        r.attention(q, i, o)
        r.matmul(matrix(width, a.q_width), o, x, add=True, bias=vector(width))
        for part in range(parts):
            r.matmul(matrix(hidden, width), h, up.columns(part * hidden, hidden), bias=vector(hidden))
        if activation == "gelu":
            r.gelu(up, act)
        elif activation == "gegelu":
            r.gegelu(up, act, 1.5)
        else:
            r.swiglu(up, act)
        r.matmul(matrix(width, hidden), act, x, add=True, bias=vector(width))
    r.select(x, last)
    r.layer_norm(last, vector(width, 1.0), vector(width), 1e-5, normed)
    r.matmul(matrix(vocabulary, width), normed, logits, bias=vector(vocabulary))
    return r.finish(logits)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("type", [F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_K], ids=lambda type: type.name)
def test_logits_equal_those_of_the_reference(type: GGMLType, activation: Activation) -> None:
    program = model(type, activation, layers=1)
    capacity = dataclasses.replace(CAPACITY, cache_type=F32)
    reference, executable = ReferenceBackend().prepare(program, capacity), CpuBackend().prepare(program, capacity)
    errors = []
    for parts in ([(0, 0, 40), (1, 0, 33)], [(1, 33, 34), (0, 40, 41)]):
        expected = reference.run(step(program, parts))
        errors.append(np.abs(executable.run(step(program, parts)) - expected).max(axis=1) / np.abs(expected).max())
    error = np.concatenate(errors)
    assert np.median(error) < 4e-6
    # Where activations are rounded to 8 bits, one that lies between two levels may fall to either side, and all tokens
    # after it see its key.
    assert error.max() < (0.02 if type.is_quantized else 2e-5)
    executable.close()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_chunks_threads_and_neighbours_change_no_bit(activation: Activation) -> None:
    program = model(GGMLType.Q4_K, activation)
    executable = prepare(program, threads=1)
    whole = bits(executable.run(step(program, [(0, 0, 70)])))
    executable.close()
    for threads in (1, 3):
        executable = prepare(program, threads=threads)
        done: list[NDArray[np.int32]] = []
        for parts in ([(0, 0, 1)], [(1, 0, 9), (0, 1, 30)], [(0, 30, 31), (1, 9, 10)], [(0, 31, 70)]):
            logits = bits(executable.run(step(program, parts)))
            begin = sum(b - a for s, a, b in parts[: [s for s, _, _ in parts].index(0)])
            length = next(b - a for s, a, b in parts if s == 0)
            done.append(logits[begin : begin + length])
        executable.close()
        assert np.array_equal(np.concatenate(done), whole)


def natives(program: ops.Program) -> list[int]:
    """How many native operations each operation became."""
    made = binding.Binder(program, CAPACITY, binding.Report(None))
    return [len(bound) if isinstance(bound, list) else -1 for bound in made.bound]


def test_activations_are_rounded_once_for_neighbouring_products_of_one_form() -> None:
    program = model(GGMLType.Q4_K, "swiglu", layers=1)
    # Embedding; norm; q, k, v; rotation, attention; output; gate, up; (SwiGLU); down; selection, norm, logits.
    assert natives(program) == [-1, 1, 2, 1, 1, 1, 1, 2, 2, 1, 0, 2, 1, 1, 2]
    others = list(program.operations)
    assert isinstance(others[3], ops.MatMul)
    # Another form: float32.
    shape = others[3].weight.shape
    others[3] = dataclasses.replace(others[3], weight=weight("matrix", shape, GGMLType.F16, 1))
    assert natives(dataclasses.replace(program, operations=tuple(others)))[2:5] == [2, 2, 2]


def test_rounded_activations_are_not_taken_for_those_of_a_buffer_that_has_changed() -> None:
    r = ops.Recorder(ops.AttentionShape(4, 2, 64, 24, 0.125), 1)
    x, y, last, logits = (
        r.buffer(n, 256, rows) for n, rows in (("x", "tokens"), ("y", "tokens"), ("l", "outputs"), ("z", "outputs"))
    )
    first, second, third = (weight("w", (256, 256), GGMLType.Q8_0, i) for i in range(3))
    r.embed(weight("token_embd", (101, 256), F32, 9, 16.0), x)
    r.matmul(first, x, y)
    r.gelu(x, x)
    r.matmul(second, x, y, add=True)
    r.matmul(third, x, y, add=True)
    r.select(y, last)
    r.matmul(first, last, logits)
    program = r.finish(logits)
    # The last product but one reads what GELU has written, so GELU is not done on the way into the one before.
    assert natives(program) == [-1, 2, 1, 2, 1, 1, 2]
    executable = prepare(program)
    expected = ReferenceBackend().prepare(program, CAPACITY).run(step(program, [(0, 0, 5)]))
    np.testing.assert_allclose(executable.run(step(program, [(0, 0, 5)])), expected, rtol=0, atol=0.02)
    executable.close()


def read_after(*operations: Any) -> bool:
    return fusion.read(operations[0], operations[1:])


def test_columns_that_are_read_or_added_to_are_of_the_buffer() -> None:
    a, b = ops.Buffer("a", 32), ops.Buffer("b", 32)
    w, half = weight("w", (32, 32), F32, 0), weight("w", (16, 32), F32, 0)
    assert not read_after(a)
    assert read_after(a, ops.MatMul(w, a, b))
    assert not read_after(a, ops.MatMul(w, b, a), ops.MatMul(w, a, b))
    assert read_after(a, ops.MatMul(w, b, a, add=True))
    # Columns that are written leave the others as they were.
    assert read_after(a, ops.MatMul(half, b, a.columns(0, 16)), ops.MatMul(w, a, b))
    assert read_after(a, ops.MatMul(half, b, a.columns(0, 16), add=True))
    assert read_after(a, ops.GELU(a.columns(0, 16), b.columns(0, 16)))
    assert not read_after(a, ops.MatMul(half, b, a.columns(0, 16)))
    # Combine adds, as its definition says.
    route = ops.Route(b, 2, 0.01)
    assert read_after(a, ops.Combine(route, ops.Buffer("r", 32, "routes"), a))


def test_what_a_product_overwrites_is_not_read_by_it_on_the_way() -> None:
    """GELU of `up`, then a product into `up`: the activations must be there before the product writes."""
    r = ops.Recorder(ops.AttentionShape(4, 2, 64, 24, 0.125), 1)
    up, act, last = r.buffer("up", 256), r.buffer("act", 256), r.buffer("last", 256, "outputs")
    r.embed(weight("token_embd", (101, 256), F32, 9, 16.0), up)
    r.gelu(up, act)
    r.matmul(weight("w", (256, 256), F32, 1), act, up)
    r.select(up, last)
    program = r.finish(last)
    assert natives(program) == [-1, 1, 2, 1]
    executable = prepare(program)
    expected = ReferenceBackend().prepare(program, CAPACITY).run(step(program, [(0, 0, 5)]))
    np.testing.assert_allclose(executable.run(step(program, [(0, 0, 5)])), expected, rtol=0, atol=1e-5)
    executable.close()


def test_hidden_states_that_a_step_may_ask_for_are_written() -> None:
    """GELU, then the product that makes logits of it: what lies between is the hidden states."""
    r = ops.Recorder(ops.AttentionShape(4, 2, 64, 24, 0.125), 1)
    x, last, act, logits = (
        r.buffer(n, width, rows)
        for n, width, rows in (
            ("x", 256, "tokens"),
            ("l", 256, "outputs"),
            ("a", 256, "outputs"),
            ("y", 101, "outputs"),
        )
    )
    r.embed(weight("token_embd", (101, 256), F32, 9, 16.0), x)
    r.select(x, last)
    r.gelu(last, act)
    r.matmul(weight("output", (101, 256), F32, 1), act, logits)
    program = r.finish(logits)
    assert program.hidden is act
    executable, reference = prepare(program), ReferenceBackend().prepare(program, CAPACITY)
    for hidden in (True, False):
        made = dataclasses.replace(step(program, [(0, 0, 5)]), hidden=hidden)
        np.testing.assert_allclose(executable.run(made), reference.run(made), rtol=0, atol=1e-5)
    executable.close()
