"""The team of threads: nothing is done twice, early or never, and no way of ending leaves a thread behind."""

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from phiquant.errors import KernelError
from phiquant.kernels.cpu import team as team_module
from phiquant.kernels.cpu.emit import I64, Emitter, Value
from phiquant.kernels.cpu.library import emit_assembly, function
from phiquant.kernels.cpu.operation import ERROR_OFFSET, Arguments, NativeOp, tickets
from phiquant.kernels.cpu.target import Target, host
from phiquant.kernels.cpu.team import Team, available_threads, native_program
from phiquant.kernels.cpu.waiting import pause, sleep, wake, yield_core

pytestmark = pytest.mark.cpu

MIX = Arguments("target", "source", "count", "constant")
FLAGS = Arguments("reached", "go")


def mix(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    """target[i] = 3 target[i] + source[i + 1] + c: an element that is done early, late, twice or never shows."""
    target, source, count, constant = MIX.read_all(e, block)
    with tickets(e, counter, count) as i:
        neighbour = e.load(source + 8 * ((i + 1) % count), I64)
        e.store(3 * e.load(target + 8 * i, I64) + neighbour + constant, target + 8 * i)


def wait_for_go(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    reached, go = FLAGS.read_all(e, block)
    e.atomic_store(1, reached)
    with e.forever() as done:
        done(e.atomic_load(go) != 0)
        yield_core(e)


def fail(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    with e.when(thread == 0):
        e.atomic_store(7, counter + ERROR_OFFSET)


def kernel(body) -> int:
    return function(f"test_team_{body.__name__}", 4, body)


class Gate:
    """A step that runs until it is let go."""

    def __init__(self) -> None:
        self.words = np.zeros(32, np.int32)
        at = self.words.ctypes.data
        self.op = NativeOp(kernel(wait_for_go), FLAGS.pack(reached=at, go=at + 64))

    def wait(self) -> None:
        deadline = time.monotonic() + 30
        while not self.words[0]:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def open(self) -> None:
        self.words[16] = 1


class Mixing:
    """Random tiny operations on two buffers in turn, and what they must give."""

    def __init__(self, seed: int, operations: int = 250) -> None:
        rng = np.random.default_rng(seed)
        self.x = rng.integers(0, 1 << 40, (2, int(rng.integers(1, 12))))
        self.constants = rng.integers(1000, size=operations)
        rows = [int(self.x[i].ctypes.data) for i in (0, 1)]
        self.operations = [
            NativeOp(
                kernel(mix),
                MIX.pack(target=rows[i % 2], source=rows[1 - i % 2], count=self.x.shape[1], constant=int(c)),
            )
            for i, c in enumerate(self.constants)
        ]
        self.program = native_program(self.operations)

    def expected(self, steps: int) -> np.ndarray:
        x = self.x.copy()
        for c in np.tile(self.constants, (steps, 1)):
            for i, constant in enumerate(c):
                x[i % 2] = 3 * x[i % 2] + np.roll(x[1 - i % 2], -1) + constant
        return x


def run(team: Team, program: np.ndarray) -> None:
    with team.step():
        team.run(program)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_operations_run_once_and_in_order(threads: int) -> None:
    steps = 40
    mixing = Mixing(threads)
    expected = mixing.expected(steps)
    team = Team(threads)
    for step in range(steps):
        if step % 8 == 0:
            time.sleep(0.02)  # workers have fallen asleep
        run(team, mixing.program)
    team.close()
    assert np.array_equal(mixing.x, expected)


def test_a_step_may_run_in_parts() -> None:
    mixing = Mixing(9, 60)
    expected = mixing.expected(1)
    team = Team(2)
    with team.step():
        for i in range(0, 60, 7):
            team.run(mixing.program[i : i + 7])
        team.run(mixing.program[:0])
    team.close()
    assert np.array_equal(mixing.x, expected)


def test_two_teams_at_once() -> None:
    def work(seed: int) -> bool:
        mixing, team = Mixing(seed), Team(2)
        expected = mixing.expected(30)
        for _ in range(30):
            run(team, mixing.program)
        team.close()
        return np.array_equal(mixing.x, expected)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (1, 2))) == [True, True]


def test_steps_of_several_callers_wait_for_one_another() -> None:
    mixing, team = Mixing(3, 50), Team(2)
    expected = mixing.expected(40)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run(team, mixing.program), range(40)))
    team.close()
    assert np.array_equal(mixing.x, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_cancel_ends_the_running_step_and_no_other(threads: int) -> None:
    gate, mixing = Gate(), Mixing(5)
    before = mixing.x.copy()
    team = Team(threads)
    team.cancel()  # nothing runs
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(run, team, native_program([gate.op, *mixing.operations]))
        gate.wait()
        team.cancel()
        gate.open()
        with pytest.raises(KernelError, match="cancelled"):
            step.result(30)
    assert np.array_equal(mixing.x, before)
    expected = mixing.expected(1)
    run(team, mixing.program)
    assert np.array_equal(mixing.x, expected)
    team.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_ends_the_step(threads: int) -> None:
    mixing, team = Mixing(6), Team(threads)
    before = mixing.x.copy()
    failing = NativeOp(kernel(fail), np.zeros(1, np.int64))
    with pytest.raises(KernelError, match="error 7"):
        run(team, native_program([failing, *mixing.operations]))
    assert np.array_equal(mixing.x, before)
    expected = mixing.expected(1)
    run(team, mixing.program)
    team.close()
    assert np.array_equal(mixing.x, expected)


def own_threads() -> int:
    return sum(t.name.startswith("phiquant-") for t in threading.enumerate())


def test_threads_start_when_they_are_needed_and_end_with_close() -> None:
    start = own_threads()
    mixing, team = Mixing(7), Team(3)
    assert own_threads() == start
    run(team, mixing.program)
    assert own_threads() == start + 2
    team.close()
    team.close()
    assert own_threads() == start
    with pytest.raises(KernelError, match="closed"):
        run(team, mixing.program)


def test_close_ends_a_running_step() -> None:
    gate, mixing, team = Gate(), Mixing(8), Team(2)
    with ThreadPoolExecutor(2) as pool:
        step = pool.submit(run, team, native_program([gate.op, *mixing.operations]))
        gate.wait()
        closing = pool.submit(team.close)
        time.sleep(0.02)
        gate.open()
        with pytest.raises(KernelError, match="cancelled"):
            step.result(30)
        closing.result(30)


def test_garbage_collection_ends_threads() -> None:
    start = own_threads()
    mixing, team = Mixing(1), Team(3)
    run(team, mixing.program)
    del team
    gc.collect()
    assert own_threads() == start


def test_a_thread_that_cannot_start_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start, real = own_threads(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "phiquant-2":
            raise RuntimeError("can't start new thread")
        real(thread)

    mixing, team = Mixing(2), Team(4)
    expected = mixing.expected(1)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="start new thread"):
        run(team, mixing.program)
    assert own_threads() == start
    monkeypatch.undo()
    run(team, mixing.program)
    team.close()
    assert np.array_equal(mixing.x, expected)


def test_threads_by_default_are_as_many_as_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "process_cpu_count"):
        monkeypatch.setattr(os, "process_cpu_count", lambda: 3)
    elif hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 6})
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_threads() == Team().threads == 3


def test_an_operation_costs_next_to_nothing() -> None:
    mixing, team = Mixing(4), Team(1)
    operation = NativeOp(kernel(lone), np.zeros(1, np.int64))
    idle = native_program([operation] * 250)
    run(team, mixing.program)
    took = []
    for _ in range(50):
        begin = time.perf_counter()
        run(team, idle)
        took.append(time.perf_counter() - begin)
    team.close()
    assert min(took) / 250 < 1e-6  # 0.03 microseconds when measured alone


def lone(e: Emitter, block: Value, thread: Value, threads: Value, counter: Value) -> None:
    pass


SCRIPT = """
import contextlib, os, signal, sys, threading, time
import numpy as np
from phiquant.errors import KernelError
from phiquant.kernels.cpu.emit import I64
from phiquant.kernels.cpu.library import function
from phiquant.kernels.cpu.operation import NativeOp
from phiquant.kernels.cpu.team import Team, native_program

def spin(e, block, thread, threads, counter):
    x = e.var(e.load(block, I64))
    with e.loop(0, 100_000) as i:
        e.store(x.get() + i, block + 8 * thread)

block = np.zeros(8, np.int64)
op = NativeOp(function("test_team_spin", 4, spin), block)
program = native_program([op] * 100)
team = Team(2)

def step(parts=1):
    with team.step():
        for _ in range(parts):
            team.run(program)

def endless():
    with contextlib.suppress(KernelError):  # the end of the process cancels it
        step(100_000)

step()
"""


def python(script: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT + script], capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize(
    "script",
    [
        "print('end', flush=True)",
        "time.sleep(0.3)\nprint('end', flush=True)",
        "threading.Thread(target=endless, daemon=True).start()\ntime.sleep(0.2)\nprint('end', flush=True)",
        "print('end', flush=True)\nsys.exit(0)",
        "team.close()\nprint('end', flush=True)",
    ],
    ids=["at once", "asleep", "during a step", "exit", "closed"],
)
def test_the_process_ends(script: str) -> None:
    done = python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_has_a_team_of_its_own(busy: bool) -> None:
    script = f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of any fork of a process with threads
if {busy}:
    threading.Thread(target=endless, daemon=True).start()
    time.sleep(0.1)
child = os.fork()
if not child:
    step(3)
    team.close()
    os._exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
if not {busy}:
    step()
"""
    done = python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_control_c_is_heard_between_parts() -> None:
    script = """
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.perf_counter()
try:
    step(100000)
except KeyboardInterrupt:
    print("interrupted", time.perf_counter() - begin < 5)
step(2)
print("again")
"""
    done = python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted True\nagain\n", "")


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_storm_of_signals_changes_nothing() -> None:
    script = """
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
for _ in range(40):
    step()
    time.sleep(0.003)
signal.setitimer(signal.ITIMER_REAL, 0)
print("end")
"""
    done = python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def waiting(e: Emitter, word: Value) -> None:
    pause(e)
    yield_core(e)
    sleep(e, word, e.atomic_load(word))
    wake(e, word)


def test_linux_sleeps_on_a_word_and_others_for_a_while() -> None:
    here = host()
    assembly = emit_assembly("waiting", 1, waiting, here)
    assert ("syscall" in assembly) == ("linux" in here.triple)
    machine = here.triple.partition("-")[0]
    portable = Target(f"{machine}-unknown-freebsd", here.cpu, here.features, here.lowering)
    assembly = emit_assembly("waiting", 1, waiting, portable)
    assert "syscall" not in assembly
    assert "nanosleep" in assembly
    assert "sched_yield" in assembly
    windows = Target(f"{machine}-pc-windows-msvc", here.cpu, here.features, here.lowering)
    assembly = emit_assembly("waiting", 1, waiting, windows)
    assert "SwitchToThread" in assembly
    assert "Sleep" in assembly


def test_the_portable_way_of_waiting_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from phiquant.kernels.cpu import waiting as waiting_module

    monkeypatch.setattr(waiting_module, "_futex", lambda e: None)
    monkeypatch.setattr(team_module, "function", lambda name, n, body: function(f"{name}_portable", n, body))
    native = team_module._Native()
    monkeypatch.setattr(team_module, "_native", lambda: native)
    mixing, team = Mixing(11), Team(2)
    expected = mixing.expected(20)
    for step in range(20):
        if step % 4 == 0:
            time.sleep(0.02)
        run(team, mixing.program)
    team.close()
    assert np.array_equal(mixing.x, expected)
