"""A team of threads that run native operations together, without the interpreter.

The caller is thread 0; the others are daemons that spend their life in one native call. An array of operations is run
by all threads at once, with a barrier after each operation. Threads that wait pause in short bursts, yield the core
between them (to whoever shares it: on busy cores often the thread that is waited for), and after a bounded while sleep
in the operating system.

The protocol, on 32-bit words that each have a cache line of their own:
    STEP      number of the running step; changed by the caller, waited for by workers between steps
    ARRIVED   threads that have finished the present operation; the last to arrive resets it and the COUNTER, and
    PHASE     adds one here, which the others wait for
    END       number of a step that was cut short: a number, not a flag, since a slow worker may look at it when the
              next step has begun
    CANCEL    set from any thread; the last to arrive at a barrier decides for all
    ERROR     8 bytes after COUNTER: a kernel cannot raise, so it leaves a code here
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...errors import KernelError
from .emit import I64, Emitter, Value
from .library import function
from .operation import ERROR_OFFSET, NativeOp, aligned
from .waiting import pause, sleep, wake, yield_core

__all__ = ["OPERATION", "Team", "available_threads", "native_program", "prepare_team"]

OPERATION = np.dtype([("kernel", np.int64), ("block", np.int64)])
"""What a team runs: an array of these addresses."""

_STEP, _PHASE, _ARRIVED, _COUNTER, _STEP_SLEEPERS, _PHASE_SLEEPERS, _END, _CANCEL, _STOP = range(0, 9 * 64, 64)
_PROGRAM, _LENGTH, _THREADS, _SPINS, _PARK = range(9 * 64, 9 * 64 + 40, 8)  # 64 bits, written between steps only
_SIZE = 10 * 64
_BURST = 16  # pauses between yields
_OPERATION_BURSTS, _STEP_BURSTS = 128, 512  # bursts before sleeping: between operations, between steps


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def native_program(operations: list[NativeOp]) -> NDArray[np.void]:
    """The addresses that a team runs; the operations must outlive it."""
    program = np.zeros(len(operations), OPERATION)
    program["kernel"] = [op.kernel for op in operations]
    program["block"] = [op.block.ctypes.data for op in operations]
    return program


def _change(e: Emitter, team: Value, word: int, value: Value, sleepers: int) -> None:
    e.atomic_store(value, team + word)
    # Both sides are sequentially consistent, or a thread that is about to sleep would be missed.
    with e.when(e.atomic_load(team + sleepers) != 0):
        wake(e, team + word)


def _until_changed(e: Emitter, team: Value, word: int, held: Value, sleepers: int, bursts: Value) -> None:
    left, waiting = e.var(bursts), e.var(1)
    with e.forever() as done:
        spins = e.var(_BURST)
        with e.forever() as burst_over:
            with e.when(e.atomic_load(team + word) != held):
                waiting.set(0)
                spins.set(0)
            burst_over(spins.get() <= 0)
            pause(e)
            spins.set(spins.get() - 1)
        left.set(left.get() - 1)
        done((waiting.get() == 0) | (left.get() <= 0))
        yield_core(e)
    with e.when(waiting.get() != 0):
        e.atomic_add(team + sleepers, 1)
        with e.forever() as done:
            done(e.atomic_load(team + word) != held)
            sleep(e, team + word, held)
        e.atomic_add(team + sleepers, -1)


def _execute(e: Emitter, team: Value, step: Value, thread: Value) -> None:
    program, length, threads, bursts = (e.load(team + w, I64) for w in (_PROGRAM, _LENGTH, _THREADS, _SPINS))
    i = e.var(0)
    with e.forever() as done:
        done(i.get() >= length)
        at = program + 16 * i.get()
        e.call(e.load(at, I64), e.load(at + 8, I64), thread, threads, team + _COUNTER)
        phase = e.atomic_load(team + _PHASE)
        arrived = e.atomic_add(team + _ARRIVED, 1)
        with e.choose(arrived == threads - 1) as (last, other):
            with last:
                e.atomic_store(0, team + _ARRIVED)
                e.atomic_store(0, team + _COUNTER)
                failed = e.atomic_load(team + _CANCEL) | e.atomic_load(team + (_COUNTER + ERROR_OFFSET))
                with e.when(failed != 0):
                    e.atomic_store(step, team + _END)
                _change(e, team, _PHASE, phase + 1, _PHASE_SLEEPERS)
            with other:
                _until_changed(e, team, _PHASE, phase, _PHASE_SLEEPERS, bursts)
        i.set(i.get() + 1)
        done(e.atomic_load(team + _END) == step)


def _emit_work(e: Emitter, team: Value, thread: Value) -> None:
    """The whole life of a worker: between steps it waits here, not for the interpreter."""
    step = e.var(0)
    with e.forever() as done:
        _until_changed(e, team, _STEP, step.get(), _STEP_SLEEPERS, e.load(team + _PARK, I64))
        step.set(e.atomic_load(team + _STEP))
        done(e.atomic_load(team + _STOP) != 0)
        _execute(e, team, step.get(), thread)


def _emit_run(e: Emitter, team: Value, program: Value, length: Value) -> None:
    e.store(program, team + _PROGRAM)
    e.store(length, team + _LENGTH)
    step = (e.atomic_load(team + _STEP) + 1) & 0xFFFFFFFF
    _change(e, team, _STEP, step, _STEP_SLEEPERS)
    _execute(e, team, step, e.integer(0))


def _emit_stop(e: Emitter, team: Value) -> None:
    e.atomic_store(1, team + _STOP)
    _change(e, team, _STEP, e.atomic_load(team + _STEP) + 1, _STEP_SLEEPERS)


class _Native:
    """The three native entry points."""

    def __init__(self) -> None:
        def bound(name: str, arguments: int, body: Callable[..., None]) -> Any:
            address = function(name, arguments, body)
            return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)

        self.run, self.work = bound("team_run", 3, _emit_run), bound("team_work", 2, _emit_work)
        self.stop = bound("team_stop", 1, _emit_stop)


@cache
def _native() -> _Native:
    return _Native()


def prepare_team() -> None:
    """Make the kernels of all teams, or find them in the cache; else the first step does."""
    _native()


class _State:
    """What workers share; outlives the Team that made it until they have ended."""

    def __init__(self, threads: int) -> None:
        self.memory = aligned(_SIZE)
        self.words = self.memory.view(np.int32)
        self.address = int(self.memory.ctypes.data)
        settings = self.memory.view(np.int64)
        settings[_THREADS // 8] = threads
        settings[_SPINS // 8], settings[_PARK // 8] = _OPERATION_BURSTS, _STEP_BURSTS
        self.lock = threading.Lock()
        self.workers: list[threading.Thread] = []
        self.closed = False

    def end(self) -> None:
        """End the running step after its present operation, then the workers; from any thread, once."""
        self.closed = True
        self.words[_CANCEL // 4] = 1
        with self.lock:
            self.stop_workers()

    def stop_workers(self) -> None:
        if self.workers:
            _native().stop(self.address)
            for worker in self.workers:
                worker.join()
            self.workers = []


class Team:
    """Threads that run arrays of native operations; several teams may exist at once.

    Args:
        threads: native threads, the caller's included; 0 for as many as the process may use.
    """

    _every: ClassVar[weakref.WeakSet[Team]] = weakref.WeakSet()

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads or available_threads()
        self._renew()
        Team._every.add(self)

    def _renew(self) -> None:
        self._state = _State(self.threads)
        # Also runs at exit: daemons that are still in native code would otherwise use memory that is going away.
        self._finalizer = weakref.finalize(self, self._state.end)

    def _start(self) -> None:
        state, work = self._state, _native().work
        try:
            for t in range(1, self.threads):
                # Daemons: the interpreter joins all other threads before it runs finalizers, so those would hang it.
                worker = threading.Thread(target=work, args=(state.address, t), daemon=True, name=f"phiquant-{t}")
                worker.start()
                state.workers.append(worker)
        except BaseException:
            state.stop_workers()
            self._finalizer.detach()
            self._renew()
            raise

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The time of one step: others wait, `run` may be called, `cancel` has a meaning."""
        state = self._state
        with state.lock:
            if state.closed:
                raise KernelError("these threads were closed; prepare the model again")
            state.words[_CANCEL // 4] = state.words[(_COUNTER + ERROR_OFFSET) // 4] = 0
            yield

    def run(self, program: NDArray[np.void]) -> None:
        """Run operations, within a `step`. Python sees Ctrl-C only between native calls: run a long step in parts.

        Raises:
            KernelError: a kernel reported an error, or the step was cancelled.
        """
        state = self._state
        if not len(program):
            return  # there would be no barrier at which the workers meet
        if self.threads > 1 and not state.workers:
            self._start()
            state = self._state
        _native().run(state.address, program.ctypes.data, len(program))
        code = int(state.words[(_COUNTER + ERROR_OFFSET) // 4])
        if code:
            raise KernelError(f"a kernel reported error {code}")
        if state.words[_CANCEL // 4]:
            raise KernelError("the step was cancelled")

    def cancel(self) -> None:
        """From any thread: end the running step after its present operation; its `run` raises KernelError."""
        self._state.words[_CANCEL // 4] = 1

    def close(self) -> None:
        """End a running step and the threads. A second call does nothing."""
        self._finalizer()

    @classmethod
    def _forked(cls) -> None:
        """A forked child has the memory but not the threads: leave it and start afresh."""
        for team in list(cls._every):
            if team._finalizer.detach():
                team._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Team._forked)
