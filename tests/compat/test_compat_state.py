"""States of a Llama and caches of them: they come back as they were, or not at all."""

import io
import os
import pickle
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiquant.compat.llama_cpp import Llama, LlamaCache, LlamaDiskCache, LlamaRAMCache, LlamaState
from phiquant.errors import CacheError, OutputError

TEXT = "Once upon a time there was a little girl who had a red ball. " * 8
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6}

pytestmark = pytest.mark.cpu


@pytest.fixture
def fresh(path: str) -> Iterator[Llama]:
    with Llama(path, n_ctx=256, verbose=False) as loaded:
        yield loaded


def state(ids: list[int], size: int = 0) -> LlamaState:
    padded = np.zeros(256, np.intc)
    padded[: len(ids)] = ids
    return LlamaState(padded, np.empty((0, 10), np.single), len(ids), bytes(size), size, 7)


def computed(llm: Llama) -> int:
    """Tokens of prompts that were computed, not taken from a cache, in jobs that generate."""
    stats = llm.llm.stats()
    return stats.prompt_tokens - stats.cached_tokens


def test_a_state_goes_on_in_another_process_s_model(llm: Llama, fresh: Llama) -> None:
    ids = llm.tokenize(TEXT.encode())
    llm.reset()
    llm.eval(ids)
    llm.set_seed(11)
    saved = llm.save_state()
    assert saved.n_tokens == len(ids) > 64
    assert saved.llama_state_size == len(saved.llama_state) > 10_000
    again = LlamaState.from_bytes(saved.to_bytes())
    fresh.load_state(again)
    assert list(fresh.eval_tokens) == ids
    known = fresh.llm.stats().pages_known
    assert known == len(ids) // 64
    assert fresh.sample(temp=0) == llm.sample(temp=0)
    assert fresh.sample(temp=1.5) == llm.sample(temp=1.5), "the seed is part of it"
    assert fresh(TEXT, **GREEDY)["choices"] == llm(TEXT, **GREEDY)["choices"]


def test_a_short_state_has_no_pages(llm: Llama, fresh: Llama) -> None:
    llm.reset()
    assert llm.save_state().n_tokens == 0
    llm.eval(llm.tokenize(b"Once"))
    saved = llm.save_state()
    assert saved.llama_state == b""
    fresh.load_state(saved)
    assert fresh.sample(temp=0) == llm.sample(temp=0)


def test_scores_are_part_of_a_state(path: str, llm: Llama) -> None:
    with Llama(path, n_ctx=96, logits_all=True, verbose=False) as one:
        one.eval(one.tokenize(b"Once upon a time"))
        saved = LlamaState.from_bytes(one.save_state().to_bytes())
        scores = one._scores.copy()
        one.reset()
        one.eval(one.tokenize(b"The sun"))
        one.load_state(saved)
        assert np.array_equal(one._scores, scores)
        llm.reset()
        llm.eval([300])
        with pytest.raises(ValueError, match="without logits_all"):
            one.load_state(llm.save_state())


def test_what_is_no_state_is_refused_and_never_run(llm: Llama, fresh: Llama, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    good = state([300, 301]).to_bytes()
    objects = tmp_path / "objects.npz"
    np.savez(objects, allow_pickle=True, input_ids=np.array([Evil()]), scores=0, llama_state=0, numbers=0)
    array, huge = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    with zipfile.ZipFile(huge, "w") as file:
        header = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000000,)}\n"
        file.writestr("input_ids.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    broken = [pickle.dumps(Evil()), objects.read_bytes(), array.getvalue(), huge.getvalue()]
    for data in (*broken, b"", b"PK\x03\x04", good[:-30], b"x" * 99):
        with pytest.raises(CacheError, match="no saved state"):
            LlamaState.from_bytes(data)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="from_bytes"):
        fresh.load_state(pickle.dumps(Evil()))  # type: ignore[arg-type]

    llm.reset()
    llm.eval(llm.tokenize(TEXT.encode()))
    saved = llm.save_state()
    broken = bytearray(saved.llama_state)
    broken[-2000] ^= 1
    for change, message in (
        ({"llama_state": bytes(broken)}, "damaged"),
        ({"llama_state": b"x" * 4000}, "no saved cache"),
        ({"input_ids": saved.input_ids + 1}, "other tokens"),
    ):
        with pytest.raises(CacheError, match=message):
            fresh.load_state(LlamaState(**{**vars(saved), **change}))
    with pytest.raises(ValueError, match="from 0 to"):
        fresh.n_tokens = 3
    llm.reset()


def test_a_cache_spares_computing(path: str) -> None:
    # 4 pages, so that what lies between throws the first prompt out of the engine's own cache.
    with Llama(path, n_ctx=256, verbose=False) as llm:
        other = ("The sun was warm and the dog ran to the park. " * 30)[:800]
        counts = {}
        for name, cache in (("none", None), ("ram", LlamaRAMCache())):
            llm.set_cache(cache)
            first = llm(TEXT, **GREEDY)["choices"]
            llm.set_cache(None)
            llm(other, **GREEDY)
            llm.set_cache(cache)
            before = computed(llm)
            assert llm(TEXT, **GREEDY)["choices"] == first
            counts[name] = computed(llm) - before
        assert counts["none"] > 100
        assert counts["ram"] < 64
        assert cache is not None
        assert cache.cache_size > 0


def test_caches_find_the_longest_beginning(tmp_path: Path) -> None:
    assert LlamaCache is LlamaRAMCache
    for cache in (LlamaRAMCache(), LlamaDiskCache(tmp_path / "states")):
        for ids in ([1, 2], [1, 2, 3, 4], [5]):
            cache[ids] = state(ids)
        assert cache[[1, 2, 3, 9]].ids == [1, 2, 3, 4]
        assert cache[[5, 6]].ids == [5]
        assert [9] not in cache
        assert [1] in cache
        with pytest.raises(KeyError):
            _ = cache[[9]]


def test_caches_let_the_oldest_go(tmp_path: Path) -> None:
    ram = LlamaRAMCache(capacity_bytes=25_000)
    disk = LlamaDiskCache(tmp_path / "states", capacity_bytes=25_000)
    for cache in (ram, disk):
        for ids in ([1], [2]):
            cache[ids] = state(ids, 10_000)
            time.sleep(0.02)  # files tell their age by the clock
        assert cache[[1]].ids == [1]
        time.sleep(0.02)
        cache[[3]] = state([3], 10_000)
        assert cache.cache_size <= 25_000
        assert [[ids] in cache for ids in (1, 2, 3)] == [True, False, True]
        cache[[1]] = state([1], 10_000)
        assert cache.cache_size <= 25_000


def test_a_cache_on_disk_lets_other_processes_take_files_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LlamaDiskCache(tmp_path / "states")
    cache[[1]] = cache[[2]] = state([1])
    files = sorted((tmp_path / "states").iterdir())
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([*files, self / "gone.npz"]))
    assert cache.cache_size == sum(file.stat().st_size for file in files)
    cache[[2]] = state([2])
    assert cache[[2]].ids == [2]
    for file in files:
        file.unlink()
    assert [1] not in cache
    assert cache.cache_size == 0


def test_a_cache_on_disk_outlives_its_process(path: str, fresh: Llama, tmp_path: Path) -> None:
    fresh.set_cache(LlamaDiskCache(str(tmp_path / "states")))
    first = fresh(TEXT, **GREEDY)["choices"]
    (file,) = (tmp_path / "states").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    with Llama(path, n_ctx=256, verbose=False) as later:
        later.set_cache(LlamaDiskCache(tmp_path / "states"))
        assert later(TEXT, **GREEDY)["choices"] == first
        assert computed(later) < 64
    file.write_bytes(b"damaged")
    assert later.tokenize(b"x") not in LlamaDiskCache(tmp_path / "states")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made"):
        LlamaDiskCache(tmp_path / "file" / "states")
