import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cache_types import CACHE_TYPES
from phiquant.kernels.cpu import rotate_store
from phiquant.kernels.cpu.cache import KVCache, StepTables
from phiquant.kernels.ops import AttentionShape, Capacity

pytestmark = pytest.mark.cpu

TYPES = tuple(CACHE_TYPES.values())


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 3),
    head_size=st.integers(1, 100),
    kind=st.sampled_from(TYPES),
    portion=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    page_tokens=st.sampled_from([16, 64]),
    threads=st.integers(1, 3),
    neighbours=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_equals_the_formula_to_the_bit(
    each_target,
    machine,
    poisoned,
    kv_heads,
    group,
    head_size,
    kind,
    portion,
    lengths,
    page_tokens,
    threads,
    neighbours,
    seed,
) -> None:
    rng = np.random.default_rng(seed)
    head_size = -(-head_size // kind.block_elements) * kind.block_elements
    rotary = int(head_size * portion) // 2 * 2
    shape = AttentionShape(kv_heads * group, kv_heads, head_size, rotary, 1.0, neighbours=neighbours)
    n, room = sum(lengths), sum(lengths) + 1
    capacity = Capacity(
        tokens=room,
        sequences=len(lengths),
        pages=8 * len(lengths),
        page_tokens=page_tokens,
        pages_per_sequence=8,
        cache_type=kind,
    )
    cache, tables = KVCache(shape, 2, capacity), StepTables.of(shape, capacity)
    for layer in cache.layers:
        layer[:] = 255  # NaN
    starts = rng.integers(0, 8 * page_tokens - 40, len(lengths))
    tables.positions[:n] = np.concatenate([np.arange(s, s + m) for s, m in zip(starts, lengths, strict=True)])
    tables.slots[:n] = np.repeat(np.arange(len(lengths)), lengths)
    tables.pages[:] = rng.permutation(capacity.pages).reshape(len(lengths), 8)
    tables.cos[:], tables.sin[:] = rng.standard_normal((2, room, rotary // 2))
    qkv = rng.standard_normal((room, shape.q_width + 2 * shape.kv_width)).astype(np.float32)
    q_out = poisoned(room, shape.q_width)
    operation = rotate_store.bind(machine.region(qkv, n), machine.region(q_out, n), tables, cache, 1, each_target)
    machine.run(operation, threads=threads)

    heads = qkv[:n].reshape(n, -1, head_size)
    half = rotary // 2
    first, second = np.s_[:half], np.s_[half:rotary]
    if neighbours:
        first, second = np.s_[:rotary:2], np.s_[1:rotary:2]
    a, b = heads[:, :, first], heads[:, :, second]
    cos, sin = tables.cos[:n, None], tables.sin[:n, None]
    rotated = heads.copy()
    rotated[:, :, first], rotated[:, :, second] = a * cos - b * sin, b * cos + a * sin
    assert np.array_equal(q_out[:n], rotated[:, : shape.heads].reshape(n, -1))
    assert np.isnan(q_out[n:]).all()

    expected, untouched = KVCache(shape, 2, capacity), cache.layers[0]
    for layer in expected.layers:
        layer[:] = 255
    places = tables.pages[tables.slots[:n], tables.positions[:n] // page_tokens], tables.positions[:n] % page_tokens
    first = shape.heads + kv_heads
    machine.fill(expected, 1, *places, rotated[:, shape.heads : first], heads[:, first:])
    assert np.array_equal(cache.layers[1], expected.layers[1])
    assert (untouched == 255).all()


CORNERS = {
    "zero": [0.0] * 32,
    "negative zero": [-0.0] * 32,
    "the peak twice, negative first": [0.5, -2.0, 2.0, 1.0] + [0.25] * 28,
    "the peak twice, positive first": [0.5] * 17 + [2.0, -2.0] + [0.25] * 13,
    "the peak last": [0.1] * 31 + [-3.0],
    "halves": [127.0, *(i + 0.5 for i in range(-16, 15))],
    "subnormal": [1e-40 * i for i in range(-16, 16)],
    "so small that 1 / d is infinite": [1e-38, *([-2e-39] * 31)],
    "a scale that is subnormal in half precision": [1e-5 * i for i in range(-16, 16)],
    "larger than half precision": [1e5 * i for i in range(-16, 16)],
}


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q4_0], ids=lambda kind: kind.name)
def test_levels_and_scales_are_those_of_the_quantizer(each_target, machine, kind) -> None:
    rows = np.array([*CORNERS.values()], np.float32)
    random = np.random.default_rng(5).standard_normal((300, 32)).astype(np.float32)
    channels = np.concatenate([rows, random]).reshape(-1, 1, 32)
    n, shape = len(channels), AttentionShape(1, 1, 32, 0, 1.0)
    capacity = Capacity(tokens=n, pages=n // 64 + 1, pages_per_sequence=n // 64 + 1, cache_type=kind)
    cache, expected, tables = KVCache(shape, 1, capacity), KVCache(shape, 1, capacity), StepTables.of(shape, capacity)
    tables.pages[0], tables.positions[:] = np.arange(capacity.pages), np.arange(n)
    qkv = np.tile(channels.reshape(n, 32), 3)
    q_out = np.zeros((n, 32), np.float32)
    machine.run(rotate_store.bind(machine.region(qkv, n), machine.region(q_out, n), tables, cache, 0, each_target))
    machine.fill(expected, 0, np.arange(n) // 64, np.arange(n) % 64, channels, channels)
    assert np.array_equal(cache.layers[0], expected.layers[0])


def test_shapes_that_do_not_fit_are_refused(machine) -> None:
    shape = AttentionShape(2, 1, 16, 8, 1.0)
    capacity = Capacity(tokens=4)
    cache, tables = KVCache(shape, 1, capacity), StepTables.of(shape, capacity)

    def region(rows: int, width: int):
        return machine.region(np.zeros((rows, width), np.float32), rows)

    rotate_store.bind(region(4, 64), region(4, 32), tables, cache, 0)
    for qkv, q_out, layer in (
        (region(4, 63), region(4, 32), 0),
        (region(4, 64), region(4, 31), 0),
        (region(5, 64), region(5, 32), 0),
        (region(4, 64), region(3, 32), 0),
        (region(4, 64), region(4, 32), 1),
    ):
        with pytest.raises(KernelError):
            rotate_store.bind(qkv, q_out, tables, cache, layer)
    wide = dataclasses.replace(shape, head_size=257)
    big = KVCache(wide, 1, capacity)
    with pytest.raises(KernelError, match="up to 256"):
        rotate_store.bind(region(4, 4 * 257), region(4, 2 * 257), StepTables.of(wide, capacity), big, 0)
