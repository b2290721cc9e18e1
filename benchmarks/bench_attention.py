"""Speed of attention: multiplications for prompts, bytes of the cache read for single tokens; and what storing costs.

    python benchmarks/bench_attention.py [--threads 1,2] [--cache f16,q8_0,q4_0] [--lowering avx2] [--repeat 9]

Figures are medians; those of several types of cache are taken in turns, and the factor is the speed beside the first
type's, the median of the turns. With one thread they are of processor time, so that they mean something on a busy
machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np

from phiquant.gguf.types import GGMLType
from phiquant.kernels.cache_types import CACHE_TYPES
from phiquant.kernels.cpu import attention, rotate_store
from phiquant.kernels.cpu.cache import KVCache, StepTables
from phiquant.kernels.cpu.operation import NativeOp, Region, StepHeader
from phiquant.kernels.cpu.target import Target, host
from phiquant.kernels.cpu.team import Team, native_program
from phiquant.kernels.ops import AttentionShape, BlockSparse, Capacity


@dataclass(frozen=True)
class Case:
    name: str
    heads: int
    kv_heads: int
    head_size: int
    tokens: int
    start: int
    sparse: BlockSparse | None = None

    def keys(self) -> tuple[int, int]:
        """Keys that are met by all queries of all heads, and keys that the last token reads of all key-value heads."""
        positions = np.arange(self.start, self.start + self.tokens)
        if self.sparse is None:
            return int((positions + 1).sum()) * self.heads, (self.start + self.tokens) * self.kv_heads
        size = self.sparse.block
        mine, theirs = (positions // size)[:, None], np.arange(positions[-1] // size + 1)
        within = np.clip(positions[:, None] + 1 - theirs * size, 0, size)
        met, read = 0, 0
        for heads in np.arange(self.heads).reshape(self.kv_heads, -1):
            seen = [(mine - theirs < self.sparse.local) | ((theirs + h + 1) % self.sparse.stride == 0) for h in heads]
            met += sum(int((within * s).sum()) for s in seen)
            read += int((within * np.any(seen, axis=0))[-1].sum())
        return met, read


PHI_3_SMALL = BlockSparse(64, 16, 8)
CASES = (
    Case("Phi-3.5-mini, prompt of 512", 32, 32, 96, 512, 0),
    Case("Phi-3.5-mini, 512 after 3584", 32, 32, 96, 512, 3584),
    Case("Phi-3-medium, 512 after 1536", 40, 10, 128, 512, 1536),
    Case("Phi-3.5-mini, token 1024", 32, 32, 96, 1, 1023),
    Case("Phi-3.5-mini, token 4096", 32, 32, 96, 1, 4095),
    Case("Phi-3-medium, token 4096", 40, 10, 128, 1, 4095),
    Case("Phi-3-small, 512 after 7680, dense", 32, 8, 128, 512, 7680),
    Case("Phi-3-small, 512 after 7680, sparse", 32, 8, 128, 512, 7680, PHI_3_SMALL),
    Case("Phi-3-small, token 8192, dense", 32, 8, 128, 1, 8191),
    Case("Phi-3-small, token 8192, sparse", 32, 8, 128, 1, 8191, PHI_3_SMALL),
)


def bound(case: Case, kind: GGMLType, threads: int, target: Target) -> tuple[NativeOp, NativeOp]:
    """Attention and the storing of keys, over a full cache of random keys."""
    shape = AttentionShape(case.heads, case.kv_heads, case.head_size, case.head_size, case.head_size**-0.5)
    n, total, rng = case.tokens, case.start + case.tokens, np.random.default_rng(0)
    pages = -(-total // 64)
    capacity = Capacity(tokens=n, pages=pages, pages_per_sequence=pages, cache_type=kind)
    cache, tables, header = KVCache(shape, 1, capacity), StepTables.of(shape, capacity), StepHeader()
    if kind is GGMLType.F32:
        cache.layers[0].view(np.float32)[:] = rng.standard_normal(cache.layers[0].size // 4, dtype=np.float32)
    else:
        cache.layers[0].view(np.float16)[:] = rng.standard_normal(cache.layers[0].size // 2, dtype=np.float32)
    tables.pages[0] = rng.permutation(pages)
    tables.positions[:] = np.arange(case.start, total)
    header.set("tokens", n)
    tiles, _ = attention.tile(tables.positions, tables.slots, case.heads // case.kv_heads, 0, tables.tiles)
    header.set("last_tile", tiles)

    def rows(width: int) -> Region:
        return Region(rng.standard_normal((n, width), dtype=np.float32), header.address("tokens"))

    q, memory = rows(shape.q_width), attention.scratch(cache, threads)
    out = rows(shape.q_width)
    attend = attention.bind(q, out, tables, header, cache, 0, memory, threads, target, sparse=case.sparse)
    store = rotate_store.bind(rows(shape.q_width + 2 * shape.kv_width), q, tables, cache, 0, target)
    return attend, store


def seconds(team: Team, operations: list[NativeOp], repeat: int) -> list[list[float]]:
    """What each operation took, again and again, in turns."""
    clock = time.thread_time if team.threads == 1 else time.perf_counter
    programs = [native_program([operation]) for operation in operations]
    took: list[list[float]] = [[] for _ in operations]
    for _ in range(repeat):
        for program, times in zip(programs, took, strict=True):
            begin = clock()
            with team.step():
                team.run(program)
            times.append(clock() - begin)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--cache", default="f16", help="types of the cache, such as f16,q8_0,q4_0")
    parser.add_argument("--lowering")
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    target = host(options.lowering)
    kinds = [CACHE_TYPES[name] for name in options.cache.split(",")]
    for threads in map(int, options.threads.split(",")):
        team = Team(threads)
        print(f"{target.lowering}, {threads} threads")
        for case in CASES:
            operations = [bound(case, kind, threads, target) for kind in kinds]
            attending = seconds(team, [attend for attend, _ in operations], options.repeat)
            storing = seconds(team, [store for _, store in operations], options.repeat)
            met, keys = case.keys()
            products = 4 * met * case.head_size
            for kind, times, stores in zip(kinds, attending, storing, strict=True):
                took, read = statistics.median(times), 2 * keys * kind.row_bytes(case.head_size)
                factor = statistics.median(a / b for a, b in zip(attending[0], times, strict=True))
                print(
                    f"  {case.name:36} {kind.name:4} {1e3 * took:9.3f} ms {products / took / 1e9:7.1f} GFLOP/s"
                    f" {read / took / 1e9:6.1f} GB/s x{factor:.2f}; storing {1e3 * statistics.median(stores):7.3f} ms"
                )
        team.close()


if __name__ == "__main__":
    main()
