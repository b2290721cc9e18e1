"""What is in the cache, and taking it out: caches as the library makes them, laid out by hand."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from phiquant.errors import RequestError
from phiquant.hub import cached_models, removal, unfinished

MAIN, OLD = "a" * 40, "b" * 40
Add = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(folder), raising=False)
    return folder


@pytest.fixture
def add(cache: Path) -> Add:
    def add(repository: str, name: str, blob: str, size: int, commit: str = MAIN, ref: str | None = "main") -> Path:
        """A file of a repository, with its content under the name `blob`; returns its path in the snapshot."""
        folder = cache / ("models--" + repository.replace("/", "--"))
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / "blobs" / blob).write_bytes(bytes(size))
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(folder / "blobs" / blob, path.parent))
        if ref:
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / ref).write_text(commit)
        return path

    return add


def names() -> list[str]:
    return [model.name for model in cached_models()]


def test_an_empty_cache_and_none(cache: Path) -> None:
    assert cached_models() == []
    cache.rmdir()
    assert cached_models() == []
    assert unfinished() == []


def test_models_are_listed_with_size_quant_path_and_when_they_were_used(add: Add) -> None:
    path = add("org/Phi-GGUF", "phi-Q4_K_M.gguf", "one", 1000)
    os.utime(path.resolve(), (1_700_000_000, 1))
    first = add("org/Phi-GGUF", "f16/phi-00001-of-00002.gguf", "two", 300)
    add("org/Phi-GGUF", "f16/phi-00002-of-00002.gguf", "three", 200)
    add("org/Phi-GGUF", "mmproj-f16.gguf", "four", 10)
    add("org/Phi-GGUF", "README.md", "five", 5)
    add("org/Phi", "config.json", "six", 20)
    add("org/Phi", "model-00001-of-00002.safetensors", "seven", 80)
    add("org/bert", "pytorch_model.bin", "eight", 80)
    found = {model.name: model for model in cached_models()}
    assert list(found) == ["org/Phi", "org/Phi-GGUF:F16", "org/Phi-GGUF:Q4_K_M"]
    small = found["org/Phi-GGUF:Q4_K_M"]
    assert (small.kind, small.quant, small.size, small.used, small.path) == (
        "gguf",
        "Q4_K_M",
        1000,
        1_700_000_000,
        path,
    )
    assert (found["org/Phi-GGUF:F16"].size, found["org/Phi-GGUF:F16"].path) == (500, first)
    whole = found["org/Phi"]
    assert (whole.kind, whole.quant, whole.size, whole.path.name) == ("checkpoint", "", 100, MAIN)
    assert [model.complete for model in found.values()] == [False, True, True]


def test_models_of_a_quant_are_told_apart_by_their_files(add: Add) -> None:
    add("org/two", "a-Q4_0.gguf", "one", 10)
    add("org/two", "b-Q4_0.gguf", "two", 10)
    assert names() == ["org/two:a-Q4_0.gguf", "org/two:b-Q4_0.gguf"]
    assert [model.name for model in removal("org/two:b-Q4_0.gguf").models] == ["org/two:b-Q4_0.gguf"]


def test_other_revisions_are_named(add: Add) -> None:
    add("org/Phi", "phi-Q4_0.gguf", "new", 10)
    add("org/Phi", "phi-Q4_0.gguf", "old", 10, commit=OLD, ref=None)
    add("org/Phi", "phi-Q4_0.gguf", "old", 10, commit="c" * 40, ref="v1")
    assert names() == ["org/Phi:Q4_0", f"org/Phi@{OLD[:12]}:Q4_0", "org/Phi@v1:Q4_0"]


def test_what_an_interrupted_download_left_is_listed_and_removed(cache: Path) -> None:
    blobs = cache / "models--org--Phi-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{'0' * 64}.incomplete").write_bytes(bytes(70))
    assert [(part.repository, part.size) for part in unfinished()] == [("org/Phi-GGUF", 70)]
    going = removal("org/Phi-GGUF")
    assert (going.models, going.freed) == ((), 70)
    going.execute()
    assert list(cache.iterdir()) == []


def test_one_of_several_models_is_removed_and_the_others_stay(add: Add, cache: Path) -> None:
    path = add("org/Phi", "phi-Q4_0.gguf", "one", 100)
    other = add("org/Phi", "phi-Q8_0.gguf", "two", 200)
    blob = path.resolve()
    going = removal("org/Phi:q4_0")
    assert [model.name for model in going.models] == ["org/Phi:Q4_0"]
    assert going.freed == 100
    assert path.exists()  # until it is executed
    going.execute()
    assert not path.is_symlink()
    assert not blob.exists()
    assert other.read_bytes() == bytes(200)
    assert names() == ["org/Phi:Q8_0"]
    removal("org/Phi:Q8_0").execute()
    assert not (cache / "models--org--Phi").exists()  # nothing is left, so the folder goes, too


def test_a_model_that_two_revisions_share_is_freed_in_both(add: Add) -> None:
    add("org/Phi", "phi-Q4_0.gguf", "one", 100)
    old = add("org/Phi", "phi-Q4_0.gguf", "one", 100, commit=OLD, ref=None)
    going = removal("org/Phi:Q4_0")
    assert len(going.models) == 2
    assert going.freed == 100
    going.execute()
    assert names() == []
    assert not old.parent.exists()


def test_of_one_revision_only_what_no_other_uses_is_freed(add: Add) -> None:
    kept = add("org/Phi", "phi-Q4_0.gguf", "one", 100)
    add("org/Phi", "phi-Q4_0.gguf", "one", 100, commit=OLD, ref=None)
    add("org/Phi", "phi-Q8_0.gguf", "two", 50, commit=OLD, ref=None)
    going = removal(f"org/Phi@{OLD[:12]}")
    assert going.freed == 50
    going.execute()
    assert kept.read_bytes() == bytes(100)
    assert names() == ["org/Phi:Q4_0"]


def test_a_copy_of_a_repository_with_the_same_commits_stays(add: Add) -> None:
    for name in ("org/Phi", "me/Phi", "you/Phi"):
        add(name, "phi-Q4_0.gguf", "one", 100)
    removal("me/Phi").execute()
    assert names() == ["org/Phi:Q4_0", "you/Phi:Q4_0"]
    removal("you/Phi:Q4_0").execute()
    assert names() == ["org/Phi:Q4_0"]


def test_other_files_of_the_repository_stay_with_other_tools(add: Add) -> None:
    add("org/Phi", "phi-Q4_0.gguf", "one", 100)
    other = add("org/Phi", "tokenizer.json", "two", 30)
    removal("org/Phi:Q4_0").execute()
    assert other.exists()


def test_a_damaged_entry_is_left_alone_and_told(add: Add, cache: Path) -> None:
    add("org/Phi", "phi-Q4_0.gguf", "one", 100).resolve().unlink()
    assert names() == []
    with pytest.raises(RequestError, match=r"of org/Phi is damaged and stays; delete .*models--org--Phi yourself"):
        removal("org/Phi")


def test_what_is_not_there_is_told_with_what_is(add: Add) -> None:
    add("org/Phi", "phi-Q4_0.gguf", "one", 100)
    with pytest.raises(RequestError, match=r"The cache has no org/Phi:Q8_0; it has org/Phi:Q4_0\."):
        removal("org/Phi:Q8_0")
    with pytest.raises(RequestError, match="The cache has no org/other; `phiquant list` shows what it has"):
        removal("org/other")
    with pytest.raises(RequestError, match="The cache has no org/Phi@v2"):
        removal("org/Phi@v2")
