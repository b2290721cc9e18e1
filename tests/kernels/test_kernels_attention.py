"""Attention against the formula in float64, and to the bit against itself under any division of the work."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from phiquant.errors import KernelError
from phiquant.gguf.types import GGMLType
from phiquant.kernels.cache_types import CACHE_TYPES
from phiquant.kernels.cpu import attention
from phiquant.kernels.cpu.cache import KVCache, StepTables
from phiquant.kernels.cpu.operation import StepHeader
from phiquant.kernels.cpu.target import Target, host
from phiquant.kernels.ops import AttentionShape, BlockSparse, Capacity
from phiquant.quants import dequantize, quantize

pytestmark = pytest.mark.cpu

Floats = NDArray[np.float32]
TYPES = tuple(CACHE_TYPES.values())


@dataclasses.dataclass
class Case:
    """Whole sequences: queries [tokens, heads, channels], keys and values [tokens, kv_heads, channels] of each."""

    shape: AttentionShape
    kind: GGMLType
    sequences: list[tuple[Floats, Floats, Floats]]
    sparse: BlockSparse | None = None

    @classmethod
    def random(
        cls,
        shape: AttentionShape,
        kind: GGMLType,
        lengths: list[int],
        seed: int,
        spread: float = 1.0,
        sparse: BlockSparse | None = None,
    ) -> "Case":
        rng = np.random.default_rng(seed)

        def draw(n: int, heads: int) -> Floats:
            return rng.standard_normal((n, heads, shape.head_size)).astype(np.float32)

        def kept(x: Floats) -> Floats:
            return dequantize(quantize(x, kind), kind, x.shape)

        made = []
        for n in lengths:
            q, k, v = draw(n, shape.heads) * np.float32(spread), draw(n, shape.kv_heads), draw(n, shape.kv_heads)
            made.append((q, kept(k), kept(v)))
        return cls(shape, kind, made, sparse)

    def formula(self, sequence: int) -> NDArray[np.float64]:
        q, k, v = (a.astype(np.float64) for a in self.sequences[sequence])
        group = self.shape.heads // self.shape.kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("thc,shc->hts", q, k) * self.shape.scale
        t, s = np.indices(scores.shape[1:])
        seen = (s <= t) & (s > t - (self.shape.window or 1 << 40))
        if self.sparse is not None:
            mine, theirs = t // self.sparse.block, s // self.sparse.block
            head = np.arange(self.shape.heads)[:, None, None]
            seen = seen & ((mine - theirs < self.sparse.local) | ((theirs + head + 1) % self.sparse.stride == 0))
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        return np.einsum("hts,shc->thc", weights, v).reshape(len(q), -1)

    def compute(
        self,
        machine: Any,
        target: Target,
        parts: list[tuple[int, int, int]],
        *,
        threads: int = 2,
        page_tokens: int = 64,
        seed: int = 0,
        tiles_at_once: int = 0,
    ) -> list[Floats]:
        """Results of parts (sequence, from, to), computed in one step over a cache that is NaN wherever it may."""
        shape, rng = self.shape, np.random.default_rng(seed)
        total = sum(b - a for _, a, b in parts)
        longest = max(len(q) for q, _, _ in self.sequences)
        columns = -(-longest // page_tokens)
        capacity = Capacity(
            tokens=total + 1,
            sequences=len(self.sequences),
            pages=columns * len(self.sequences) + 1,
            page_tokens=page_tokens,
            pages_per_sequence=columns,
            cache_type=self.kind,
        )
        cache, tables, header = KVCache(shape, 1, capacity), StepTables.of(shape, capacity), StepHeader()
        cache.layers[0][:] = 255
        tables.pages[:] = rng.permutation(capacity.pages)[:-1].reshape(tables.pages.shape)
        for s, _, end in parts:  # later keys have not been stored yet
            _, keys, values = self.sequences[s]
            t = np.arange(end)
            machine.fill(cache, 0, tables.pages[s, t // page_tokens], t % page_tokens, keys[:end], values[:end])
        tables.positions[:total] = np.concatenate([np.arange(a, b) for _, a, b in parts])
        tables.slots[:total] = np.concatenate([np.full(b - a, s) for s, a, b in parts])
        q = np.full((total + 1, shape.q_width), np.nan, np.float32)
        q[:total] = np.concatenate([self.sequences[s][0][a:b].reshape(b - a, -1) for s, a, b in parts])
        out = np.full((total + 1, shape.q_width), np.nan, np.float32)
        tiles, _ = attention.tile(
            tables.positions[:total],
            tables.slots[:total],
            shape.heads // shape.kv_heads,
            shape.window,
            tables.tiles,
        )
        operation = attention.bind(
            machine.region(q, total),
            machine.region(out, total),
            tables,
            header,
            cache,
            0,
            attention.scratch(cache, threads),
            threads,
            target,
            sparse=self.sparse,
        )
        for first in range(0, tiles, tiles_at_once or tiles):
            header.set("first_tile", first)
            header.set("last_tile", min(tiles, first + (tiles_at_once or tiles)))
            machine.run(operation, threads=threads)
        assert np.isnan(out[total:]).all()
        return np.split(out[:total], np.cumsum([b - a for _, a, b in parts])[:-1])


def shape_of(kv_heads: int, group: int, head_size: int, window: int = 0) -> AttentionShape:
    return AttentionShape(kv_heads * group, kv_heads, head_size, 0, head_size**-0.5, window)


def same_bits(a: Floats, b: Floats) -> bool:
    return np.array_equal(a.view(np.int32), b.view(np.int32))


@settings(max_examples=25, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    kind=st.sampled_from(TYPES),
    window=st.sampled_from([0, 1, 17, 64, 100]),
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=2),
    spread=st.sampled_from([1.0, 30.0]),
    page_tokens=st.sampled_from([16, 48, 64]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_it_equals_the_formula(
    each_target, machine, kv_heads, group, kind, window, lengths, spread, page_tokens, threads, seed
) -> None:
    case = Case.random(shape_of(kv_heads, group, 32, window), kind, lengths, seed, spread)
    parts = [(i, 0, n) for i, n in enumerate(lengths)]
    got = case.compute(machine, each_target, parts, threads=threads, page_tokens=page_tokens, seed=seed)
    for i, result in enumerate(got):
        np.testing.assert_allclose(result, case.formula(i), rtol=0, atol=5e-6 * max(1.0, spread))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_size", "kind"),
    [
        *((size, GGMLType.F16) for size in attention.HEAD_SIZES),
        *((size, GGMLType.Q8_0) for size in attention.HEAD_SIZES if size % 32 == 0),
        (64, GGMLType.Q4_0),
        (96, GGMLType.Q4_0),  # an odd number of blocks
        (96, GGMLType.F32),
    ],
)
def test_every_head_size(machine, head_size, kind) -> None:
    case = Case.random(shape_of(2, 2, head_size), kind, [75], head_size)
    (got,) = case.compute(machine, host(), [(0, 0, 75)])
    np.testing.assert_allclose(got, case.formula(0), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q4_0], ids=lambda kind: kind.name)
def test_heads_that_blocks_do_not_divide_are_refused(kind) -> None:
    for size in (80, 16):
        with pytest.raises(KernelError, match=f"heads of {size}; use f16"):
            KVCache(shape_of(2, 2, size), 1, Capacity(cache_type=kind))


@settings(max_examples=20, deadline=None)
@given(
    group=st.integers(1, 5),
    kind=st.sampled_from(TYPES),
    window=st.sampled_from([0, 1, 20, 64, 130]),
    length=st.integers(2, 300),
    neighbour=st.integers(1, 40),
    data=st.data(),
)
def test_no_division_of_the_work_changes_a_bit(
    each_target, machine, group, kind, window, length, neighbour, data
) -> None:
    case = Case.random(shape_of(2, group, 32, window), kind, [length, neighbour], length)
    (whole,) = case.compute(machine, each_target, [(0, 0, length)], threads=1)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    chunks = list(zip([0, *cuts], [*cuts, length], strict=True))
    for i, (a, b) in enumerate(chunks):
        parts = [(0, a, b)] if i % 2 else [(1, 0, neighbour), (0, a, b)]
        got = case.compute(
            machine,
            each_target,
            parts,
            threads=data.draw(st.integers(1, 3)),
            page_tokens=data.draw(st.sampled_from([16, 48, 64, 128])),
            seed=i,
            tiles_at_once=data.draw(st.integers(0, 2)),
        )[-1]
        assert same_bits(got, whole[a:b])


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_long_sequence_token_by_token(each_target, machine, kind) -> None:
    case = Case.random(shape_of(1, 3, 32), kind, [150], 1)
    (whole,) = case.compute(machine, each_target, [(0, 0, 150)])
    for t in range(0, 150, 7):
        (one,) = case.compute(machine, each_target, [(0, t, t + 1)], seed=t)
        assert same_bits(one, whole[t : t + 1])


PATTERNS = st.builds(
    BlockSparse,
    st.sampled_from([16, 32, 48, 64, 80, 128, 1 << 20]),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 5, 8]),
)


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    kind=st.sampled_from(TYPES),
    sparse=PATTERNS,
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=2),
    spread=st.sampled_from([1.0, 30.0]),
    page_tokens=st.sampled_from([16, 48, 64]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_sparse_attention_equals_the_formula(
    each_target, machine, kv_heads, group, kind, sparse, lengths, spread, page_tokens, threads, seed
) -> None:
    case = Case.random(shape_of(kv_heads, group, 32), kind, lengths, seed, spread, sparse)
    parts = [(i, 0, n) for i, n in enumerate(lengths)]
    got = case.compute(machine, each_target, parts, threads=threads, page_tokens=page_tokens, seed=seed)
    for i, result in enumerate(got):
        np.testing.assert_allclose(result, case.formula(i), rtol=0, atol=5e-6 * max(1.0, spread))


@settings(max_examples=20, deadline=None)
@given(
    group=st.integers(1, 5),
    kind=st.sampled_from(TYPES),
    sparse=PATTERNS,
    length=st.integers(2, 400),
    neighbour=st.integers(1, 40),
    data=st.data(),
)
def test_no_division_of_the_work_changes_a_bit_of_sparse_attention(
    each_target, machine, group, kind, sparse, length, neighbour, data
) -> None:
    case = Case.random(shape_of(2, group, 32), kind, [length, neighbour], length, sparse=sparse)
    (whole,) = case.compute(machine, each_target, [(0, 0, length)], threads=1)
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    chunks = list(zip([0, *cuts], [*cuts, length], strict=True))
    for i, (a, b) in enumerate(chunks):
        got = case.compute(
            machine,
            each_target,
            [(0, a, b)] if i % 2 else [(1, 0, neighbour), (0, a, b)],
            threads=data.draw(st.integers(1, 3)),
            page_tokens=data.draw(st.sampled_from([16, 48, 64, 128])),
            seed=i,
            tiles_at_once=data.draw(st.integers(0, 2)),
        )[-1]
        assert same_bits(got, whole[a:b])


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_the_released_pattern_of_phi_3_small(each_target, machine, kind) -> None:
    """Each of 4 heads sees another eighth of the blocks before the nearest 16; in a prompt as token by token."""
    case = Case.random(shape_of(2, 4, 32), kind, [1500], 5, sparse=BlockSparse(64, 16, 8))
    expected = case.formula(0)
    (whole,) = case.compute(machine, each_target, [(0, 0, 1500)])
    np.testing.assert_allclose(whole, expected, rtol=0, atol=5e-6)
    for t in range(0, 1500, 149):
        (one,) = case.compute(machine, each_target, [(0, t, t + 1)], seed=t)
        assert same_bits(one, whole[t : t + 1])


def test_a_pattern_that_leaves_nothing_out_is_dense_attention_to_the_bit(each_target, machine) -> None:
    """A stride of 1 sees every block, and so do enough near ones."""
    shape = shape_of(1, 3, 32)
    dense = Case.random(shape, GGMLType.F16, [300], 6)
    (expected,) = dense.compute(machine, each_target, [(0, 0, 300)])
    for sparse in (BlockSparse(64, 1, 1), BlockSparse(16, 19, 7), BlockSparse(1 << 28, 1 << 28, 1 << 28)):
        (got,) = dataclasses.replace(dense, sparse=sparse).compute(machine, each_target, [(0, 0, 300)])
        assert same_bits(got, expected)


def test_blocks_that_are_never_seen_are_never_read(machine, each_target) -> None:
    """They may hold NaN, by which what is read and given no weight would still spoil the sum."""
    sparse = BlockSparse(64, 1, 3)  # of 5 blocks the last sees, with head 0, itself and block 2
    case = Case.random(shape_of(1, 1, 32), GGMLType.F16, [300], 7, sparse=sparse)
    expected = case.formula(0)[-1:]
    _, keys, values = case.sequences[0]
    for block in (0, 1, 3):
        keys[64 * block : 64 * block + 64] = values[64 * block : 64 * block + 64] = np.nan
    (got,) = case.compute(machine, each_target, [(0, 299, 300)])
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6)


def test_more_heads_than_a_tile_has_rows(machine, each_target) -> None:
    case = Case.random(shape_of(1, 41, 16), GGMLType.F16, [9], 2)
    (got,) = case.compute(machine, each_target, [(0, 0, 9)])
    np.testing.assert_allclose(got, case.formula(0), rtol=0, atol=5e-6)


def test_a_quantized_cache_is_as_small_as_its_blocks() -> None:
    sizes = {
        kind: sum(layer.nbytes for layer in KVCache(shape_of(2, 1, 96), 3, Capacity(cache_type=kind)).layers)
        for kind in TYPES
    }
    assert sizes[GGMLType.F16] == 3 * 64 * 64 * 2 * 2 * 96 * 2  # layers, pages, tokens, keys and values, heads
    assert sizes[GGMLType.F32] == 2 * sizes[GGMLType.F16]
    assert sizes[GGMLType.Q8_0] * 64 == sizes[GGMLType.F16] * 34
    assert sizes[GGMLType.Q4_0] * 64 == sizes[GGMLType.F16] * 18


def test_tiles_cover_every_token_once_and_begin_with_the_heaviest() -> None:
    positions = np.concatenate([np.arange(100), np.arange(7, 8), np.arange(500, 540)]).astype(np.int32)
    slots = np.repeat([0, 1, 2], [100, 1, 40]).astype(np.int32)
    out = np.zeros((141, 4), np.int32)
    count, cost = attention.tile(positions, slots, 2, 0, out)
    tiles = out[:count]
    covered = np.concatenate([np.arange(first, first + n) for first, n, _, _ in tiles])
    assert sorted(covered) == list(range(141))
    assert np.all(np.diff(cost) <= 0)
    for (first, n, low, high), c in zip(tiles, cost, strict=True):
        assert len(set(slots[first : first + n])) == 1
        assert (low, high) == (positions[first], positions[first + n - 1])
        assert c == (high + 1) * n * 2


@pytest.mark.parametrize("sparse", [BlockSparse(64, 4, 8), BlockSparse(16, 1, 3), BlockSparse(64, 16, 1)])
def test_keys_that_sparse_attention_is_expected_to_meet_are_those_of_the_pattern_to_a_block(
    sparse: BlockSparse,
) -> None:
    positions, out = np.arange(1500, dtype=np.int32), np.zeros((1500, 4), np.int32)
    count, _ = attention.tile(positions, np.zeros(1500, np.int32), 2, 0, out)
    last = out[:count, 3]
    heads, own, theirs = np.arange(sparse.stride), last[:, None] // sparse.block, np.arange(1500) // sparse.block
    remote = (theirs[:, None] + heads + 1) % sparse.stride == 0
    seen = ((own - theirs < sparse.local)[:, :, None] | remote) & (np.arange(1500) <= last[:, None])[:, :, None]
    met = seen.sum(axis=1).mean(axis=1)
    np.testing.assert_allclose(attention.sparse_share(out[:count], sparse) * (last + 1), met, rtol=0, atol=sparse.block)


def test_positions_that_do_not_ascend_are_refused() -> None:
    slots = np.zeros(3, np.int32)
    for positions in ([0, 1, 1], [2, 1, 3]):
        with pytest.raises(KernelError, match="ascend"):
            attention.tile(np.array(positions, np.int32), slots, 1, 0, np.zeros((3, 4), np.int32))


def test_shapes_that_do_not_fit_are_refused(machine) -> None:
    shape = shape_of(1, 2, 16)
    capacity = Capacity(tokens=4)
    cache, tables, header = KVCache(shape, 1, capacity), StepTables.of(shape, capacity), StepHeader()
    memory = attention.scratch(cache, 2)

    def region(rows: int, width: int):
        return machine.region(np.zeros((rows, width), np.float32), rows)

    attention.bind(region(4, 32), region(4, 32), tables, header, cache, 0, memory, 2)
    for q, out, layer, threads in (
        (region(4, 31), region(4, 31), 0, 2),
        (region(4, 32), region(3, 32), 0, 2),
        (region(5, 32), region(5, 32), 0, 2),
        (region(4, 32), region(4, 32), 1, 2),
        (region(4, 32), region(4, 32), 0, 3),
    ):
        with pytest.raises(KernelError):
            attention.bind(q, out, tables, header, cache, layer, memory, threads)
    attention.bind(region(4, 32), region(4, 32), tables, header, cache, 0, memory, 2, sparse=BlockSparse(48, 1, 2))
    with pytest.raises(KernelError, match="blocks of 24 keys and a window of 0; possible are multiples of 16"):
        attention.bind(region(4, 32), region(4, 32), tables, header, cache, 0, memory, 2, sparse=BlockSparse(24, 1, 2))
    near = KVCache(shape_of(1, 2, 16, window=5), 1, capacity)
    with pytest.raises(KernelError, match="blocks of 64 keys and a window of 5"):
        attention.bind(region(4, 32), region(4, 32), tables, header, near, 0, memory, 2, sparse=BlockSparse(64, 1, 2))
    odd = KVCache(shape_of(1, 2, 24), 1, capacity)
    with pytest.raises(KernelError, match="24 channels; possible"):
        attention.bind(region(4, 48), region(4, 48), tables, header, odd, 0, memory, 2)
