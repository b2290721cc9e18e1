import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiquant.errors import KernelError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cpu import rotate_store
from phiquant.kernels.cpu.cache import KVCache, StepTables
from phiquant.kernels.ops import AttentionShape, Capacity

pytestmark = pytest.mark.cpu


def planes(cache: KVCache, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys [pages, heads, tokens, channels] and values, as the layout of the cache has them."""
    s, element = cache.shape, np.float16 if cache.half else np.float32
    all_ = cache.layers[layer].view(element)
    pages = all_.reshape(cache.pages, s.kv_heads, 2, cache.page_tokens * s.head_size)
    keys = pages[:, :, 0].reshape(cache.pages, s.kv_heads, s.head_size, cache.page_tokens).swapaxes(2, 3)
    return keys, pages[:, :, 1].reshape(cache.pages, s.kv_heads, cache.page_tokens, s.head_size)


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 3),
    head_size=st.integers(1, 100),
    portion=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    half=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_it_equals_the_formula_to_the_bit(
    each_target, machine, poisoned, kv_heads, group, head_size, portion, lengths, half, threads, seed
) -> None:
    rng = np.random.default_rng(seed)
    rotary = int(head_size * portion) // 2 * 2
    shape = AttentionShape(kv_heads * group, kv_heads, head_size, rotary, 1.0)
    n, room = sum(lengths), sum(lengths) + 1
    capacity = Capacity(
        tokens=room,
        sequences=len(lengths),
        pages=8 * len(lengths),
        page_tokens=16,
        pages_per_sequence=8,
        cache_type=GGMLType.F16 if half else GGMLType.F32,
    )
    cache, tables = KVCache(shape, 2, capacity), StepTables.of(shape, capacity)
    for layer in cache.layers:
        layer[:] = 255  # NaN
    starts = rng.integers(0, 8 * 16 - 40, len(lengths))
    tables.positions[:n] = np.concatenate([np.arange(s, s + m) for s, m in zip(starts, lengths, strict=True)])
    tables.slots[:n] = np.repeat(np.arange(len(lengths)), lengths)
    tables.pages[:] = rng.permutation(capacity.pages).reshape(len(lengths), 8)
    tables.cos[:], tables.sin[:] = rng.standard_normal((2, room, rotary // 2))
    qkv = rng.standard_normal((room, shape.q_width + 2 * shape.kv_width)).astype(np.float32)
    q_out = poisoned(room, shape.q_width)
    operation = rotate_store.bind(machine.region(qkv, n), machine.region(q_out, n), tables, cache, 1, each_target)
    machine.run(operation, threads=threads)

    heads = qkv[:n].reshape(n, -1, head_size)
    a, b = heads[:, :, : rotary // 2], heads[:, :, rotary // 2 : rotary]
    cos, sin = tables.cos[:n, None], tables.sin[:n, None]
    rotated = np.concatenate([a * cos - b * sin, b * cos + a * sin, heads[:, :, rotary:]], axis=2)
    assert np.array_equal(q_out[:n], rotated[:, : shape.heads].reshape(n, -1))
    assert np.isnan(q_out[n:]).all()

    expected, untouched = KVCache(shape, 2, capacity), cache.layers[0]
    for layer in expected.layers:
        layer[:] = 255
    keys, values = planes(expected, 1)
    for t in range(n):
        page, within = tables.pages[tables.slots[t], tables.positions[t] // 16], tables.positions[t] % 16
        keys[page, :, within] = rotated[t, shape.heads : shape.heads + kv_heads]
        values[page, :, within] = heads[t, shape.heads + kv_heads :]
    assert np.array_equal(cache.layers[1], expected.layers[1])
    assert (untouched == 255).all()


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
