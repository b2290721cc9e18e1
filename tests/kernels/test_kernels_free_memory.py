"""What the operating system says is free, from files as Linux writes them."""

from pathlib import Path

import pytest

from phiquant.kernels import free_memory

GB = 1 << 30


def written(root: Path, **files: str) -> Path:
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_the_machine(tmp_path: Path) -> None:
    root = written(tmp_path, proc__meminfo=f"MemTotal: 1 kB\nMemAvailable:  {8 * GB // 1024} kB\n")
    assert free_memory.free_memory(root) == 8 * GB


@pytest.mark.parametrize(
    ("limit", "left"), [(str(4 * GB), 2 * GB), ("max", 8 * GB), (str(GB), 0), (str(100 * GB), 8 * GB)]
)
def test_a_container(tmp_path: Path, limit: str, left: int) -> None:
    root = written(
        tmp_path,
        proc__meminfo=f"MemAvailable: {8 * GB // 1024} kB\n",
        sys__fs__cgroup__memory_dot_max=limit + "\n",
        sys__fs__cgroup__memory_dot_current=f"{3 * GB}\n",
        sys__fs__cgroup__memory_dot_stat=f"anon 5\ninactive_file {GB}\n",
    )
    assert free_memory.free_memory(root) == left


def test_a_container_of_the_older_kind(tmp_path: Path) -> None:
    root = written(
        tmp_path,
        proc__meminfo=f"MemAvailable: {8 * GB // 1024} kB\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes=str(4 * GB),
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes=str(GB),
        sys__fs__cgroup__memory__memory_dot_stat="total_inactive_file 0\n",
    )
    assert free_memory.free_memory(root) == 3 * GB


def test_systems_that_tell_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (free_memory.free_memory(tmp_path) or 0) > GB // 8
    monkeypatch.delattr("os.sysconf")
    assert free_memory.free_memory(tmp_path) is None
