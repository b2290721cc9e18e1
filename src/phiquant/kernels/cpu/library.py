"""Compiling kernels and keeping them: one object file per kernel in the user's cache directory.

A file is named by a hash of every kernel source and of the formats' definitions, llvmlite's version, the target and the
kernel's own name, which holds all of its parameters; so a hit is always right and nothing is ever invalidated. No
pickle: what is read back is a checksum and an ELF/Mach-O/COFF object that LLVM's loader links into the process. The
directory must belong to the user with mode 0700, else compiled kernels stay in memory.

Any thread may ask for any kernel: different ones are compiled side by side (`compiler`), and who asks for one that is
being compiled waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from ... import quants
from ...errors import KernelError
from .compiler import emit_object, optimise
from .emit import I64, VOID, Emitter, Value
from .target import Target, host

__all__ = ["Request", "asking", "cache_directory", "emit_assembly", "function", "linkers", "on_compile"]

_DIGEST = 32  # bytes of SHA-256 before the object
LIMIT = 256 << 20  # bytes kept in the cache directory; the files used longest ago go first

on_compile: list[Callable[[str], None]] = []
"""Called with a kernel's name before it is compiled (not when it is loaded): the place to show progress."""

linkers: dict[str, Callable[[Target, str, int, bytes], int]] = {}
"""By triple: who gives an object file for another processor an address that can be called here, as an emulator can.

Called with the target, the kernel's symbol, its number of arguments and the object file.
"""

_lock = threading.Lock()  # of what follows, and of LLVM's loader
_loaded: dict[str, int] = {}
_making: dict[str, threading.RLock] = {}  # held by the thread that makes a kernel
_engine: Any = None
_asked = threading.local()


@dataclass(frozen=True)
class Request:
    """What `function` was asked for."""

    name: str
    arguments: int
    body: Callable[..., None]
    target: Target

    @property
    def key(self) -> str:
        """Of the kernel among all."""
        return f"{self.name}.{self.target.lowering}"

    def make(self) -> int:
        """The kernel's address."""
        return function(self.name, self.arguments, self.body, self.target)


@contextlib.contextmanager
def asking() -> Iterator[dict[str, Request]]:
    """Within it `function`, in this thread, makes nothing and returns 0; what it was asked for is collected by key.

    So one learns what binding an operation will need, by binding it for nothing. Addresses must not be kept.
    """
    requests: dict[str, Request] = {}
    _asked.requests = requests
    try:
        yield requests
    finally:
        del _asked.requests


def function(name: str, arguments: int, body: Callable[..., None], target: Target | None = None) -> int:
    """The address of a native function void(int64 × arguments), compiled on first use and then cached.

    Args:
        name: identifies the kernel with all its parameters; the same name must always mean the same code.
        arguments: number of 64-bit integer arguments.
        body: body(e, *values) emits the code.
        target: the processor; the host by default.
    """
    request = Request(name, arguments, body, target or host())
    requests: dict[str, Request] | None = getattr(_asked, "requests", None)
    if requests is not None:
        requests.setdefault(request.key, request)
        return 0
    key = request.key
    with _lock:
        if key in _loaded:
            return _loaded[key]
        making = _making.setdefault(key, threading.RLock())
    with making:
        if key not in _loaded:
            address = _make(request)
            with _lock:
                _loaded[key] = address
        return _loaded[key]


def _make(request: Request) -> int:
    target = request.target
    symbol = "phiquant_" + hashlib.sha256(request.key.encode()).hexdigest()[:20]
    path = _path(request.key, target)
    data = _read(path)
    if data is None:
        for notify in tuple(on_compile):
            notify(request.name)
        data = emit_object(_module(symbol, request.arguments, request.body, target), target)
        _write(path, data)
    linker = linkers.get(target.triple)
    with _lock:
        return linker(target, symbol, request.arguments, data) if linker else _link(symbol, data)


def emit_assembly(name: str, arguments: int, body: Callable[..., None], target: Target) -> str:
    """The assembly of a kernel for any target LLVM was built with; for tests of what a lowering becomes."""
    optimised = optimise(_module(name, arguments, body, target), target.machine())
    return str(target.machine(jit=False).emit_assembly(optimised))


def _module(symbol: str, arguments: int, body: Callable[..., None], target: Target) -> str:
    """The IR."""
    # An own context: llvmlite's default one is shared by all threads.
    m = ir.Module(symbol, context=ir.Context())
    m.triple, m.data_layout = target.triple, str(target.machine().target_data)
    f = ir.Function(m, ir.FunctionType(VOID, [I64] * arguments), symbol)
    f.attributes.add("nounwind")
    entry = f.append_basic_block("entry")
    b = ir.IRBuilder(f.append_basic_block("body"))
    with b.goto_block(entry):
        b.branch(f.basic_blocks[1])
    e = Emitter(b, target)
    body(e, *(Value(e, a) for a in f.args))
    b.ret_void()
    text = str(m)
    if target.vector_bytes == 64:
        text = _prefer_wide(text, symbol)
    return text


def _prefer_wide(text: str, symbol: str) -> str:
    """Without this attribute LLVM keeps to 256-bit registers on processors that have 512-bit ones."""
    head, _, tail = text.partition(f'define void @"{symbol}"')
    line, newline, rest = tail.partition("\n")
    return f'{head}define void @"{symbol}"{line} "prefer-vector-width"="512"{newline}{rest}'


def _link(symbol: str, data: bytes) -> int:
    global _engine
    if _engine is None:
        _engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host().machine())
    _engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    address = int(_engine.get_function_address(symbol))
    if not address:
        raise KernelError(f"the loader did not find {symbol} in the object file it was given")
    return address


@cache
def _sources() -> bytes:
    """A hash of all that shapes machine code: this folder's sources, the formats' tables, the libraries' versions."""
    h = hashlib.sha256(f"{llvmlite.__version__} {'.'.join(map(str, llvm.llvm_version_info))}".encode())
    formats = Path(quants.__file__).parent
    for source in sorted([*Path(__file__).parent.glob("*.py"), *formats.glob("*.py"), *formats.glob("*.bin")]):
        h.update(source.name.encode() + b"\0" + source.read_bytes())
    return h.digest()


def _path(key: str, target: Target) -> Path | None:
    directory = cache_directory()
    if directory is None:
        return None
    with _lock:
        sources = _sources()
    h = hashlib.sha256(sources + f"{target}\0{key}".encode())
    return directory / f"{h.hexdigest()[:40]}.o"


@cache
def _checked(directory: Path) -> Path | None:
    """The directory, made if need be, if it is safe to link code from."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError:
        return None
    if os.name == "posix":
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            return None
    return directory


def cache_directory() -> Path | None:
    """Where object files are kept; None if there is no directory of the user's own (mode 0700) to keep them in."""
    root = os.environ.get("PHIQUANT_CACHE_DIR")
    if root:
        return _checked(Path(root) / "kernels")
    import platformdirs

    return _checked(Path(platformdirs.user_cache_dir("phiquant", appauthor=False)) / "kernels")


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:_DIGEST], content[_DIGEST:]
    return data if hashlib.sha256(data).digest() == digest else None  # LLVM's loader crashes on a damaged object


def _write(path: Path | None, data: bytes) -> None:
    """Atomically; a cache that cannot be written costs time, nothing else."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(descriptor, "wb") as f:
                f.write(hashlib.sha256(data).digest() + data)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
        _trim(path.parent)


def _trim(directory: Path) -> None:
    files = sorted(((s.st_atime, s.st_size, p) for p in directory.glob("*.o") for s in [p.stat()]), reverse=True)
    total = 0
    for _, size, path in files:
        total += size
        if total > LIMIT:
            path.unlink(missing_ok=True)
