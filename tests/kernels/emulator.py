"""Kernels of another processor, run by the tests of this one: the object file that LLVM makes for AArch64 is linked to
`arm_harness.c` and lives as a process of qemu-user, to which an address that can be called here passes its arguments.

A kernel's arguments are addresses in this process. The harness asks for every page that the kernel touches, at the
address where it is here, and sends back what the kernel changed; so a kernel that touches what this process must not
is found out too.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from phiquant.kernels.cpu import library
from phiquant.kernels.cpu.target import Target

__all__ = ["TARGETS", "Emulator"]

TRIPLE = "aarch64-unknown-linux-gnu"
TARGETS = {
    "i8mm": Target(TRIPLE, "generic", "+neon,+i8mm,+dotprod", "i8mm"),
    "neon": Target(TRIPLE, "generic", "+neon,+dotprod", "neon"),
}
# A processor that has the features of the target and, as far as there is one, no more: others end the process.
PROCESSORS = {"i8mm": "max", "neon": "neoverse-n1"}

_COMPILER, _QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
_ORIGIN = "0x100000000000"  # where the harness itself lies: far from whatever a Linux process of 47 bits has
_ARGUMENTS = 24  # of any kernel, at most
_PAGE, _CHANGED, _DONE, _TAKEN = range(4)
_MESSAGE = struct.Struct("<3Q")
_BYTES = 4096
_ALIVE = 24  # processes; those used longest ago are ended
_MARGIN = 4 << 30  # bytes that this process and an emulator may grow without meeting
_TRIES = 40


class Emulator:
    """Runs every kernel that is compiled for `TRIPLE` until it is closed. `calls` counts them."""

    def __init__(self) -> None:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        self.calls = 0
        self._folder = tempfile.TemporaryDirectory()
        self._harness = Path(self._folder.name) / "harness.o"
        source = Path(__file__).with_name("arm_harness.c")
        _run(_COMPILER, "-O2", "-Wall", "-Wextra", "-Werror", "-c", str(source), "-o", str(self._harness))
        self._lock = threading.Lock()
        self._programs: dict[int, _Program] = {}  # by the address given out
        self._alive: dict[int, _Process] = {}  # in the order of their last use
        library.linkers[TRIPLE] = self._link

    def close(self) -> None:
        """End all processes; the addresses given out must not be called any more."""
        del library.linkers[TRIPLE]
        while self._alive:
            self._alive.popitem()[1].end()
        self._folder.cleanup()

    def _link(self, target: Target, symbol: str, arguments: int, data: bytes) -> int:
        """The address of a function of this process that runs a kernel of the other processor."""
        path = self._harness.with_name(f"{symbol}.{target.lowering}")
        code = path.with_suffix(".o")
        code.write_bytes(data)
        _run(
            _COMPILER, "-static", f"-Wl,-Ttext-segment={_ORIGIN}", f"-Wl,--defsym=kernel={symbol}",
            str(self._harness), str(code), "-o", str(path),
        )  # fmt: skip
        callback = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(lambda *values: self.run(address, *values))
        address = ctypes.cast(callback, ctypes.c_void_p).value or 0
        self._programs[address] = _Program(path, PROCESSORS[target.lowering], callback)
        return address

    def run(self, address: int, *arguments: int) -> None:
        """What a call of that address does; its threads take turns.

        Raises:
            RuntimeError: the kernel touched memory that it must not, or did not return.
        """
        with self._lock:
            self.calls += 1
            for _ in range(_TRIES):
                process = self._alive.pop(address, None) or _Process(self._programs[address])
                try:
                    done = process.call(arguments)
                except BaseException:
                    process.end()
                    raise
                if done:
                    self._alive[address] = process
                    break
                process.end()
            else:
                raise RuntimeError(f"in {_TRIES} tries no emulator left the addresses of the tests' arrays free")
            while len(self._alive) > _ALIVE:
                self._alive.pop(next(iter(self._alive))).end()


@dataclass(frozen=True)
class _Program:
    """A kernel and the harness; `callback` is the function whose address was given out."""

    path: Path
    processor: str
    callback: Any


class _Process:
    """One kernel in an emulator."""

    def __init__(self, program: _Program) -> None:
        command = [_QEMU, "-cpu", program.processor, str(program.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._apart = False

    def call(self, values: tuple[int, ...]) -> bool:
        """Run the kernel; False if this process cannot, and has changed nothing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(struct.pack(f"<{_ARGUMENTS}q", *values, *[0] * (_ARGUMENTS - len(values))))
        self._process.stdin.flush()
        read = self._process.stdout.read
        while True:
            message = read(_MESSAGE.size)
            if len(message) < _MESSAGE.size:
                raise RuntimeError(f"the emulated kernel ended with status {self._process.wait()}")
            what, address, count = _MESSAGE.unpack(message)
            if what == _TAKEN or not self._is_apart(address):
                return False
            if what == _DONE:
                return True
            if what == _CHANGED:
                ctypes.memmove(address, read(count), count)
            elif self._libc.write(self._process.stdin.fileno(), ctypes.c_void_p(address), _BYTES) != _BYTES:
                # The system has looked whether this process may read there.
                raise RuntimeError(f"the kernel touched {address:#x}: {os.strerror(ctypes.get_errno())}")

    def _is_apart(self, page: int) -> bool:
        """Whether the emulator's own memory is far from ours, which a kernel would otherwise find instead of ours.

        `page` is the first of ours that it has mapped.
        """
        if not self._apart:
            ours, theirs = _mapped("self"), _mapped(str(self._process.pid)) - {(page, page + _BYTES)}
            self._apart = not any(a - _MARGIN < d and c < b + _MARGIN for a, b in ours for c, d in theirs)
        return self._apart

    def end(self) -> None:
        """Also what waits for an answer."""
        self._process.kill()
        self._process.communicate()


def _mapped(process: str) -> set[tuple[int, int]]:
    """Ranges of addresses, without the stacks, which no array lies on and whose places are few."""
    found = set()
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        if not line.endswith(("[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")):
            first, last = line.split()[0].split("-")
            found.add((int(first, 16), int(last, 16)))
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
