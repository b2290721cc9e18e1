"""The reference backend against definitions written out by hand."""

import numpy as np
import pytest

from phiquant.errors import ContextError, KernelError, TokenError
from phiquant.gguf import GGMLType
from phiquant.kernels.ops import AttentionShape, Capacity, Recorder, Step, Weight
from phiquant.kernels.reference import ReferenceBackend
from phiquant.kernels.reference.activations import activation_block, round_activations
from phiquant.quants import block_dtype, dequantize, quantize

RNG = np.random.default_rng(1)
SHAPE = AttentionShape(heads=4, kv_heads=2, head_size=8, rotary=6, scale=0.3, window=0)


def weight(name: str, values: np.ndarray, type_: GGMLType = GGMLType.F32) -> Weight:
    return Weight(name, type_, values.shape, quantize(values.astype(np.float32), type_).reshape(-1))


def step(tokens: list[int], positions: list[int], pages: list[list[int]], slots: list[int] | None = None) -> Step:
    angles = np.array(positions, np.float32)[:, None] * np.float32(0.1) ** np.arange(3, dtype=np.float32)
    return Step(
        np.array(tokens, np.int32),
        np.array(positions, np.int32),
        np.array(slots or [0] * len(tokens), np.int32),
        np.array(pages, np.int32),
        np.cos(angles),
        np.sin(angles),
        np.arange(len(tokens), dtype=np.int32),
    )


@pytest.mark.parametrize(("type_", "block"), [(GGMLType.Q8_0, 32), (GGMLType.Q4_K, 256), (GGMLType.F16, 0)])
def test_activations_are_rounded_per_block(type_: GGMLType, block: int) -> None:
    assert activation_block(type_) == block
    if not block:
        return
    x = RNG.normal(size=(5, 512)).astype(np.float32)
    x[0] = 0
    levels, scale = round_activations(x, block)
    assert not levels[0].any()
    assert np.abs(levels).max() == 127
    widened = levels * np.repeat(scale, block, axis=1)
    assert (np.abs(widened - x) <= np.abs(np.repeat(scale, block, axis=1)) * 0.5001).all()
    if block == 256:  # the largest becomes -127
        largest = np.abs(x[1, :256]).argmax()
        assert levels[1, largest] == -127


def test_a_quantized_product_is_the_sum_of_exact_integer_sums() -> None:
    w = weight("w", RNG.normal(size=(7, 96)), GGMLType.Q8_0)
    x = RNG.normal(size=(11, 96)).astype(np.float32)
    r = Recorder(SHAPE, 1)
    a, b = r.buffer("a", 96), r.buffer("b", 7, "outputs")
    last = r.buffer("last", 96, "outputs")
    r.embed(weight("e", x), a)
    r.select(a, last)
    r.matmul(w, last, b)
    found = ReferenceBackend().prepare(r.finish(b), Capacity()).run(step(list(range(7)), list(range(7)), [[0]]))
    blocks = w.data.view(block_dtype(GGMLType.Q8_0)).reshape(7, 3)
    levels, scale = round_activations(x, 32)
    for token in range(7):
        for row in range(7):
            sums = (blocks["qs"][row].astype(int) * levels[token].reshape(3, 32)).sum(axis=1)
            exact = (sums * blocks["d"][row].astype(float) * scale[token]).sum()
            assert found[token, row] == np.float32(exact)


def attend(pages: list[int], split: list[int], window: int = 0, size: int = 16) -> np.ndarray:
    """Attention over 32 tokens with the same queries, keys and values, in steps and pages as given."""
    shape = AttentionShape(4, 2, 8, 6, 0.3, window)
    r = Recorder(shape, 1)
    qkv, q, out = r.buffer("qkv", 64), r.buffer("q", 32), r.buffer("out", 32)
    last = r.buffer("last", 32, "outputs")
    r.embed(weight("e", np.random.default_rng(2).normal(size=(32, 64))), qkv)
    r.rotate_store(qkv, 0, q)
    r.attention(q, 0, out)
    r.select(out, last)
    capacity = Capacity(page_tokens=size, pages=8, cache_type=GGMLType.F32)
    executable = ReferenceBackend().prepare(r.finish(last), capacity)
    parts = np.split(np.arange(32), split)
    return np.concatenate([executable.run(step(p.tolist(), p.tolist(), [pages])) for p in parts])


@pytest.mark.parametrize("window", [0, 1, 7])
def test_attention_is_its_formula_whatever_the_pages_and_steps(window: int) -> None:
    x = np.random.default_rng(2).normal(size=(32, 64)).astype(np.float32).astype(np.float64)
    q, k, v = x[:, :32].reshape(32, 4, 8), x[:, 32:48].reshape(32, 2, 8), x[:, 48:].reshape(32, 2, 8)
    angles = np.arange(32)[:, None, None] * 0.1 ** np.arange(3)
    cos, sin = np.cos(angles), np.sin(angles)

    def rotated(a: np.ndarray) -> np.ndarray:
        first, second = a[:, :, :3], a[:, :, 3:6]
        return np.concatenate((first * cos - second * sin, second * cos + first * sin, a[:, :, 6:]), axis=2)

    q, k = rotated(q), rotated(k)
    expected = np.zeros((32, 4, 8))
    for t in range(32):
        first = max(0, t + 1 - window) if window else 0
        for head in range(4):
            weights = np.exp(0.3 * k[first : t + 1, head // 2] @ q[t, head])
            expected[t, head] = weights @ v[first : t + 1, head // 2] / weights.sum()
    whole = attend([0, 1, 2], [], window)
    assert np.abs(whole - expected.reshape(32, 32)).max() < 1e-6
    assert np.array_equal(attend([5, 0, 7], [1, 15, 29], window), whole)


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q4_0], ids=lambda kind: kind.name)
def test_a_quantized_cache_holds_rotated_keys_and_values_of_each_head_in_blocks_of_32(kind: GGMLType) -> None:
    shape = AttentionShape(4, 2, 64, 6, 0.1)
    x = np.random.default_rng(4).normal(size=(32, 512)).astype(np.float32)
    r = Recorder(shape, 1)
    qkv, q, out, last = r.buffer("qkv", 512), r.buffer("q", 256), r.buffer("out", 256), r.buffer("l", 256, "outputs")
    r.embed(weight("e", x), qkv)
    r.rotate_store(qkv, 0, q)
    r.attention(q, 0, out)
    r.select(out, last)
    executable = ReferenceBackend().prepare(r.finish(last), Capacity(page_tokens=16, pages=8, cache_type=kind))
    made = step(list(range(32)), list(range(32)), [[3, 1]])
    found = executable.run(made)

    def rotated(heads: np.ndarray) -> np.ndarray:
        first, second = heads[:, :, :3].copy(), heads[:, :, 3:6].copy()
        cos, sin = made.cos[:, None], made.sin[:, None]
        return np.concatenate((first * cos - second * sin, second * cos + first * sin, heads[:, :, 6:]), axis=2)

    def kept(heads: np.ndarray) -> np.ndarray:
        return np.stack([dequantize(quantize(heads[:, h], kind), kind, (32, 64)) for h in (0, 1)], axis=1)

    queries = rotated(x[:, :256].reshape(32, 4, 64)).astype(np.float64)
    k, v = kept(rotated(x[:, 256:384].reshape(32, 2, 64))), kept(x[:, 384:].reshape(32, 2, 64))
    for t in range(32):
        for head in range(4):
            weights = np.exp(0.1 * k[: t + 1, head // 2].astype(np.float64) @ queries[t, head])
            expected = weights @ v[: t + 1, head // 2] / weights.sum()
            assert np.abs(found[t, 64 * head : 64 * head + 64] - expected).max() < 1e-6


def test_heads_that_blocks_do_not_divide_are_refused() -> None:
    r = Recorder(SHAPE, 1)
    x, last = r.buffer("x", 32), r.buffer("last", 32, "outputs")
    r.embed(weight("e", RNG.normal(size=(32, 32))), x)
    r.select(x, last)
    with pytest.raises(KernelError, match=r"Q8_0 cache has blocks of 32 channels.* heads of 8; use f16"):
        ReferenceBackend().prepare(r.finish(last), Capacity(cache_type=GGMLType.Q8_0))
    with pytest.raises(KernelError, match="cannot hold Q4_K; it can hold f16, f32, q8_0, q4_0"):
        Capacity(cache_type=GGMLType.Q4_K)


def test_pages_are_copied_in_all_layers() -> None:
    r = Recorder(SHAPE, 2)
    qkv, q, last = r.buffer("qkv", 64), r.buffer("q", 32), r.buffer("last", 32, "outputs")
    r.embed(weight("e", RNG.normal(size=(40, 64))), qkv)
    for layer in range(2):
        r.rotate_store(qkv, layer, q)
        r.attention(q, layer, q_out := r.buffer(f"out{layer}", 32))
    r.select(q_out, last)
    executable = ReferenceBackend().prepare(r.finish(last), Capacity(page_tokens=16, pages=4))
    executable.run(step([1, 2, 3], [0, 1, 2], [[1]]))
    expected = executable.run(step([4], [3], [[1]])).copy()
    executable.copy_page(1, 3)
    assert np.array_equal(executable.run(step([4], [3], [[3]])), expected)


def test_refusals_and_cancellation() -> None:
    r = Recorder(SHAPE, 1)
    x, last = r.buffer("x", 32), r.buffer("last", 32, "outputs")
    r.embed(weight("e", RNG.normal(size=(32, 32))), x)
    r.select(x, last)
    executable = ReferenceBackend().prepare(r.finish(last), Capacity(tokens=4))
    with pytest.raises(TokenError):
        executable.run(step([32], [0], [[0]]))
    with pytest.raises(ContextError):
        executable.run(step([1] * 5, [0, 1, 2, 3, 4], [[0]]))
    executable._execute = {kind: lambda op, s: executable.cancel() for kind in executable._execute}
    with pytest.raises(KernelError, match="cancel"):
        executable.run(step([1], [0], [[0]]))


def test_every_quantized_type_is_widened_as_quants_says() -> None:
    values = RNG.normal(size=(3, 256))
    for type_ in (GGMLType.Q4_0, GGMLType.Q5_1, GGMLType.Q3_K, GGMLType.Q6_K, GGMLType.BF16):
        w = weight("e", values, type_)
        r = Recorder(SHAPE, 1)
        x, last = r.buffer("x", 256), r.buffer("last", 256, "outputs")
        r.embed(w, x)
        r.select(x, last)
        found = ReferenceBackend().prepare(r.finish(last), Capacity()).run(step([2, 0], [0, 1], [[0]]))
        assert np.array_equal(found, dequantize(w.data, type_, (3, 256))[[2, 0]])
