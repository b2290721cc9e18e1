"""Who imports whom: the rooms of src/phiquant keep to the table of docs/architecture.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "phiquant"

# room: the rooms it may import, besides its own and `errors`.
DIRECT = {
    "errors": set(),
    "gguf": set(),
    "quants": {"gguf"},
    "arch": {"gguf"},
    "text": {"gguf"},
    "kernels": {"gguf", "quants"},
    "hub": {"gguf"},
    "convert": {"gguf", "quants", "arch", "text", "kernels", "hub"},
    "model": {"gguf", "quants", "arch", "kernels"},
    "engine": {"gguf", "quants", "arch", "kernels", "model"},
    "completion": {"engine", "text"},
    "loading": {"gguf", "arch", "kernels", "model", "engine", "text"},
    "request": {"engine", "text", "completion"},
    "embedding": {"engine", "completion"},
    "saved_cache": {"gguf", "engine"},
    "logit_stream": {"engine"},
    "llm": {
        "gguf",
        "quants",
        "arch",
        "kernels",
        "model",
        "engine",
        "text",
        "completion",
        "loading",
        "request",
        "embedding",
        "saved_cache",
        "logit_stream",
        "hub",
    },
    "async_llm": {"engine", "text", "completion", "request", "embedding", "llm"},
    "compat": {"llm"},
    "server": {"gguf", "engine", "text", "completion", "llm", "async_llm"},
    "eval": {"llm"},
    "bench": {"kernels", "llm"},
    "report": {"gguf", "quants", "kernels", "convert", "text", "llm", "eval"},
    "calibrate": {"gguf", "quants", "arch", "text", "kernels", "convert", "model", "engine", "eval"},
    "cli": {
        "gguf",
        "quants",
        "arch",
        "text",
        "kernels",
        "hub",
        "convert",
        "model",
        "engine",
        "completion",
        "llm",
        "eval",
        "bench",
        "report",
        "calibrate",
        "server",
    },
}
OUTSIDE = {
    "__init__": {"llm", "async_llm", "completion", "engine", "text"},
    "__main__": {"cli"},
}  # the package's own front doors
ORACLES = {"torch", "transformers", "gguf", "openai", "anthropic", "ollama", "mlx_lm", "llama_cpp"}  # for tests only
# What a caller asks for by name: objects of a package that he must have.
ON_REQUEST = {"compat/llama_cpp/chats.py": {"openai"}}
# Programs that another Python runs: the package never imports them, and they import nothing of it.
PROGRAMS = {"eval/oracle_worker.py": {"torch", "transformers"}}
HEAVY = {  # libraries that one room owns
    "llvmlite": {"kernels", "cli"},
    "tokenizers": {"text"},
    "jinja2": {"text"},
    "llguidance": {"text"},
    "huggingface_hub": {"hub"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "pydantic": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "typer": {"cli"},
    "rich": {"cli"},
    "prompt_toolkit": {"cli"},
    "matplotlib": {"report"},
}
BACKENDS = {"reference", "cpu", "triton", "wgpu", "sycl"}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, at the top or inside functions."""
    package = ("phiquant", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def rooms_imported(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("phiquant.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in FILES} <= DIRECT.keys() | OUTSIDE.keys()


def test_the_table_has_no_cycle() -> None:
    order: list[str] = []
    left = dict(DIRECT)
    while left:
        ready = [room for room, uses in left.items() if uses <= set(order)]
        assert ready, f"these rooms import one another in a circle: {sorted(left)}"
        order += ready
        for room in ready:
            del left[room]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_keep_to_the_table(path: Path) -> None:
    room = room_of(path)
    allowed = DIRECT.get(room, OUTSIDE.get(room, set())) | {room, "errors"}
    if room in ("compat", "eval"):
        allowed |= DIRECT["llm"]
    assert rooms_imported(path) <= allowed, f"{room} may import {sorted(allowed)}"
    top = {name.split(".")[0] for name in imports(path)}
    file = path.relative_to(PACKAGE).as_posix()
    allowed_oracles = PROGRAMS.get(file, set()) | ON_REQUEST.get(file, set())
    assert not top & (ORACLES - allowed_oracles), (
        "torch, transformers, gguf and the like are for tests, never for the package"
    )
    for library, rooms in HEAVY.items():
        assert library not in top or room in rooms, f"{library} belongs to {sorted(rooms)}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_and_the_package_do_not_import_one_another(program: str) -> None:
    assert not any(name.split(".")[0] == "phiquant" for name in imports(PACKAGE / program))
    name = "phiquant." + program.removesuffix(".py").replace("/", ".")
    assert not any(name in imports(path) for path in FILES)


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_backends_do_not_import_one_another(path: Path) -> None:
    own = path.relative_to(PACKAGE / "kernels").parts[0]
    if own not in BACKENDS:
        return
    named = {name.split(".")[2] for name in imports(path) if name.startswith("phiquant.kernels.")}
    assert named & BACKENDS <= {own}


def test_the_reader_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "engine").mkdir()
    (tmp_path / "llm.py").write_text("")
    file = tmp_path / "engine" / "runner.py"
    file.write_text(
        "def f():\n    from .. import llm\n    import torch.nn\n    from ..llm import LLM\n    from . import x\n"
    )
    assert rooms_imported(file) == {"llm", "engine"}
    assert "torch.nn" in imports(file)
