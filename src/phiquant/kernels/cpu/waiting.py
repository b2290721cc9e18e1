"""How a native thread waits: the one module with calls to the operating system's scheduler.

Linux sleeps on a word of memory (a futex) and is woken at once. Elsewhere a waiter sleeps for short whiles and looks
again, which needs nothing but the C library: correct everywhere, some tens of microseconds late.
"""

from __future__ import annotations

from .emit import I32, I64, VOID, Emitter, Value

__all__ = ["pause", "sleep", "wake", "yield_core"]

# Linux numbers its system calls per processor family. Families that are not here use the portable way.
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
_WAIT, _WAKE, _ALL = 128, 129, (1 << 31) - 1  # private to the process
_NAP = 50_000  # nanoseconds


def _family(e: Emitter) -> str:
    return str(e.target.triple).partition("-")[0]


def _futex(e: Emitter) -> int | None:
    return _FUTEX.get(_family(e)) if "linux" in e.target.triple else None


def pause(e: Emitter) -> None:
    """Tell the core that this is a spinning loop."""
    if _family(e) in ("x86_64", "i686"):
        e.intrinsic("llvm.x86.sse2.pause", VOID)
    elif _family(e) in ("aarch64", "arm64"):
        e.intrinsic("llvm.aarch64.hint", VOID, e.const(I32, 1))


def yield_core(e: Emitter) -> None:
    """Let another thread that is ready have the core."""
    if "windows" in e.target.triple:
        e.intrinsic("SwitchToThread", I32)
    else:
        e.intrinsic("sched_yield", I32)


def sleep(e: Emitter, word: Value, held: Value) -> None:
    """Sleep while the 32-bit word at the address holds `held`; may return early."""
    number = _futex(e)
    if number is not None:
        # The kernel compares once more, so that a change in between is not slept through.
        e.intrinsic("syscall", I64, e.integer(number), word, e.integer(_WAIT), held, e.integer(0))
    elif "windows" in e.target.triple:
        e.intrinsic("Sleep", VOID, e.const(I32, 1))
    else:
        duration = e.scratch(16)
        e.store(e.integer(0), duration)
        e.store(e.integer(_NAP), duration + 8)
        e.intrinsic("nanosleep", I32, duration, e.integer(0))


def wake(e: Emitter, word: Value) -> None:
    """Wake all that sleep on the word."""
    number = _futex(e)
    if number is not None:
        e.intrinsic("syscall", I64, e.integer(number), word, e.integer(_WAKE), e.integer(_ALL), e.integer(0))
