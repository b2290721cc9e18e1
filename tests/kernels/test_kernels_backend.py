"""The CPU backend as a whole: small models against the reference backend, and life with an Executable."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phiquant import quants
from phiquant.errors import ContextError, KernelError, TokenError, UnsupportedError
from phiquant.gguf.types import GGMLType
from phiquant.kernels import ops
from phiquant.kernels.cache_types import CACHE_TYPES
from phiquant.kernels.cpu import backend as backend_module
from phiquant.kernels.cpu import fusion, library, matmul
from phiquant.kernels.cpu.backend import CpuBackend, CpuExecutable
from phiquant.kernels.cpu.describe import describe
from phiquant.kernels.cpu.operation import Arguments
from phiquant.kernels.cpu.target import LOWERINGS, host
from phiquant.kernels.reference import ReferenceBackend
from phiquant.kernels.select import select

pytestmark = pytest.mark.cpu

_ENGINES: list[Any] = []  # owners of code that stays in use
CAPACITY = ops.Capacity(tokens=90, outputs=90, sequences=2, pages=16, page_tokens=32, pages_per_sequence=8, threads=2)


def weight(name: str, shape: tuple[int, ...], type: GGMLType, seed: int, spread: float = 1.0) -> ops.Weight:
    values = np.random.default_rng(seed).standard_normal(shape) * spread / np.sqrt(shape[-1])
    data = quants.quantize(values.astype(np.float32), type)
    return ops.Weight(name, type, shape, np.ascontiguousarray(data).view(np.uint8).reshape(-1))


def model(
    type: GGMLType = GGMLType.F32,
    shape: ops.AttentionShape | None = None,
    layers: int = 2,
    vocabulary: int = 101,
    width: int = 256,
    tied: bool = True,
) -> ops.Program:
    a = shape or ops.AttentionShape(4, 2, 64, 48, 0.125)
    r, f32 = ops.Recorder(a, layers), GGMLType.F32
    hidden = 256
    x, h, qkv = r.buffer("x", width), r.buffer("h", width), r.buffer("qkv", a.q_width + 2 * a.kv_width)
    q, attended, up, gated = (
        r.buffer(n, w) for n, w in (("q", a.q_width), ("o", a.q_width), ("u", 2 * hidden), ("g", hidden))
    )
    last, normed = r.buffer("last", width, "outputs"), r.buffer("normed", width, "outputs")
    logits = r.buffer("logits", vocabulary, "outputs")
    embedding = weight("token_embd", (vocabulary, width), type, 0, 16.0)
    r.embed(embedding, x)
    for i in range(layers):
        r.rms_norm(x, weight("attn_norm", (width,), f32, 1, 16.0), 1e-5, h)
        r.matmul(weight("attn_qkv", (qkv.width, width), type, 10 * i + 2), h, qkv)
        r.rotate_store(qkv, i, q)
        r.attention(q, i, attended)
        r.matmul(weight("attn_output", (width, a.q_width), type, 10 * i + 3), attended, x, add=True)
        r.rms_norm(x, weight("ffn_norm", (width,), f32, 4, 16.0), 1e-5, h)
        r.matmul(weight("ffn_up", (2 * hidden, width), type, 10 * i + 5), h, up)
        r.swiglu(up, gated)
        r.matmul(weight("ffn_down", (width, hidden), type, 10 * i + 6), gated, x, add=True)
    r.select(x, last)
    r.rms_norm(last, weight("output_norm", (width,), f32, 7, 16.0), 1e-5, normed)
    head = embedding if tied else weight("output", (vocabulary, width), type, 8)
    r.matmul(head, normed, logits)
    return r.finish(logits)


def step(
    program: ops.Program,
    parts: list[tuple[int, int, int]],
    outputs: list[int] | None = None,
    capacity: ops.Capacity = CAPACITY,
) -> ops.Step:
    """Parts (sequence, from, to); the sequence decides token ids and pages."""
    positions = np.concatenate([np.arange(a, b) for _, a, b in parts]).astype(np.int32)
    sequences = np.concatenate([np.full(b - a, s) for s, a, b in parts])
    angles = positions[:, None] / 100 ** (np.arange(program.attention.rotary // 2) / 24)
    table = np.arange(capacity.pages, dtype=np.int32).reshape(-1, capacity.pages_per_sequence)[:, ::-1]
    return ops.Step(
        tokens=((positions * 7 + sequences * 31) % program.vocab_size).astype(np.int32),
        positions=positions,
        slots=np.concatenate([np.full(b - a, i) for i, (_, a, b) in enumerate(parts)]).astype(np.int32),
        pages=np.ascontiguousarray(table[[s for s, _, _ in parts]]),
        cos=np.cos(angles).astype(np.float32),
        sin=np.sin(angles).astype(np.float32),
        outputs=np.array(range(len(positions)) if outputs is None else outputs, np.int32),
    )


def prepare(program: ops.Program, **changes: Any) -> CpuExecutable:
    return CpuBackend().prepare(program, dataclasses.replace(CAPACITY, **changes))


def bits(x: NDArray[np.float32]) -> NDArray[np.int32]:
    return x.copy().view(np.int32)


TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("name", TYPES)
def test_logits_equal_those_of_the_reference(name: str) -> None:
    program, type = model(GGMLType[name], layers=1), GGMLType[name]
    capacity = dataclasses.replace(CAPACITY, cache_type=GGMLType.F32)
    reference = ReferenceBackend().prepare(program, capacity)
    executable = CpuBackend().prepare(program, capacity)
    for parts in ([(0, 0, 40), (1, 0, 33)], [(1, 33, 34), (0, 40, 41)]):
        expected = reference.run(step(program, parts))
        error = np.abs(executable.run(step(program, parts)) - expected).max(axis=1) / np.abs(expected).max()
        assert np.median(error) < 4e-6
        # Where activations are rounded to 8 bits, one that lies between two levels may fall to either side.
        assert error.max() < (0.02 if type.is_quantized else 2e-5)
    executable.close()


@pytest.mark.parametrize("name", ["F32", "Q4_K"])
@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states_are_what_logits_are_made_of(name: str, tied: bool) -> None:
    program = model(GGMLType[name], layers=1, tied=tied)
    assert program.hidden is program.operations[-1].x  # type: ignore[union-attr]
    capacity = dataclasses.replace(CAPACITY, cache_type=GGMLType.F32)
    reference = ReferenceBackend().prepare(program, capacity)
    executable = CpuBackend().prepare(program, capacity)
    both = step(program, [(0, 0, 40), (1, 0, 33)])
    hidden = dataclasses.replace(both, hidden=True)
    logits = bits(executable.run(both))
    found, expected = executable.run(hidden).copy(), reference.run(hidden)
    assert found.shape == expected.shape == (73, program.hidden.width)
    error = np.abs(found - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(error) < 4e-6
    assert error.max() < (0.02 if GGMLType[name].is_quantized else 2e-5)
    few = dataclasses.replace(hidden, outputs=np.array([3, 72], np.int32))
    assert np.array_equal(bits(executable.run(few)), bits(found[[3, 72]]))
    assert np.array_equal(bits(executable.run(both)), logits)
    for without in (reference, executable):
        without.program = dataclasses.replace(program, hidden=None)
        with pytest.raises(KernelError, match="no hidden states"):
            without.run(hidden)
    executable.close()


@pytest.mark.parametrize("backend", [ReferenceBackend, CpuBackend])
@pytest.mark.parametrize("kind", CACHE_TYPES.values(), ids=lambda kind: kind.name)
def test_pages_of_the_cache_are_read_and_written(backend: type[ReferenceBackend | CpuBackend], kind: GGMLType) -> None:
    program, capacity = model(GGMLType.F16), dataclasses.replace(CAPACITY, cache_type=kind)
    one, other = backend().prepare(program, capacity), backend().prepare(program, capacity)
    first, more = step(program, [(0, 0, 40)]), step(program, [(0, 40, 45)])
    one.run(first)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(bits(one.run(more)), bits(other.run(more)))
    for page in sorted(set(first.pages.flatten().tolist())):
        data = one.read_page(page)
        assert (data.dtype, data.shape) == (np.uint8, (one.page_bytes,))
        other.write_page(page, data)
    assert np.array_equal(bits(one.run(more)), bits(other.run(more)))
    with pytest.raises(KernelError, match="bytes"):
        other.write_page(0, np.zeros(7, np.uint8))
    one.close()
    other.close()


@pytest.mark.parametrize("kind", CACHE_TYPES.values(), ids=lambda kind: kind.name)
def test_the_cache_is_the_references(kind: GGMLType) -> None:
    """Without a product before it, so that what is stored is the same to the bit: no channel falls to another level."""
    a = ops.AttentionShape(6, 3, 96, 48, 0.1, window=50)
    r = ops.Recorder(a, 1)
    qkv, q, out = r.buffer("qkv", a.q_width + 2 * a.kv_width), r.buffer("q", a.q_width), r.buffer("o", a.q_width)
    last = r.buffer("last", a.q_width, "outputs")
    r.embed(weight("token_embd", (1001, qkv.width), GGMLType.F32, 5, qkv.width**0.5), qkv)
    r.rotate_store(qkv, 0, q)
    r.attention(q, 0, out)
    r.select(out, last)
    program, capacity = r.finish(last), dataclasses.replace(CAPACITY, cache_type=kind)
    reference, executable = ReferenceBackend().prepare(program, capacity), CpuBackend().prepare(program, capacity)
    for parts in ([(0, 0, 57), (1, 0, 33)], [(1, 33, 34), (0, 57, 80)]):
        expected = reference.run(step(program, parts))
        np.testing.assert_allclose(executable.run(step(program, parts)), expected, rtol=0, atol=2e-6)
    executable.close()


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("window", [0, 20])
def test_chunks_threads_and_neighbours_change_no_bit(window: int, kind: GGMLType) -> None:
    program = model(GGMLType.Q4_K, ops.AttentionShape(8, 2, 32, 32, 0.2, window))
    executable = prepare(program, threads=1, cache_type=kind)
    whole = bits(executable.run(step(program, [(0, 0, 70)])))
    executable.close()
    for threads in (1, 2, 3):
        executable = prepare(program, threads=threads, cache_type=kind)
        done: list[NDArray[np.int32]] = []
        for parts in ([(0, 0, 1)], [(1, 0, 9), (0, 1, 30)], [(0, 30, 31), (1, 9, 10)], [(0, 31, 70)]):
            logits = bits(executable.run(step(program, parts)))
            begin = sum(b - a for s, a, b in parts[: [s for s, _, _ in parts].index(0)])
            length = next(b - a for s, a, b in parts if s == 0)
            done.append(logits[begin : begin + length])
        executable.close()
        assert np.array_equal(np.concatenate(done), whole)


def test_only_the_outputs_asked_for_are_given() -> None:
    program = model()
    executable = prepare(program)
    everything = executable.run(step(program, [(0, 0, 20)])).copy()
    assert executable.run(step(program, [(0, 0, 20)], [])).shape == (0, 101)
    picked = executable.run(step(program, [(0, 0, 20)], [19, 3]))
    assert np.array_equal(picked, everything[[19, 3]])
    executable.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_matrix_that_is_used_twice_is_packed_once(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    packed: list[str] = []
    real = backend_module.matmul.prepare

    def prepare_counted(w: ops.Weight, **options: Any) -> Any:
        packed.append(w.name)
        return real(w, **options)

    program = model(tied=tied, layers=1)
    r = ops.Recorder(program.attention, 1)
    x, y, logits = r.buffer("x", 256), r.buffer("y", 256), r.buffer("logits", 256, "outputs")
    picked = r.buffer("picked", 256, "outputs")
    square = weight("square", (256, 256), GGMLType.F32, 1)
    r.embed(weight("token_embd", (256, 256), GGMLType.F32, 2), x)
    r.matmul(square, x, y)
    r.select(y, picked)
    r.matmul(square, picked, logits)
    monkeypatch.setattr(backend_module.matmul, "prepare", prepare_counted)
    twice = r.finish(logits)
    executable = prepare(twice)
    assert packed == ["square"]
    expected = ReferenceBackend().prepare(twice, CAPACITY).run(step(twice, [(0, 0, 5)]))
    assert np.allclose(executable.run(step(twice, [(0, 0, 5)])), expected, atol=1e-5)
    executable.close()


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_0], ids=lambda kind: kind.name)
def test_a_page_is_copied_in_all_layers(kind: GGMLType) -> None:
    program = model()
    executable = prepare(program, cache_type=kind)
    executable.run(step(program, [(0, 0, 40)]))
    following = step(program, [(0, 40, 41)])
    expected = bits(executable.run(following))
    moved = following.pages.copy()
    for i in (0, 1):
        moved[0, i] = i  # of the other sequence, whose pages are 15 and down
        executable.copy_page(int(following.pages[0, i]), i + 8)
        moved[0, i] = i + 8
    assert np.array_equal(bits(executable.run(dataclasses.replace(following, pages=moved))), expected)
    for source, target in ((-1, 0), (0, 16)):
        with pytest.raises(KernelError, match="16 pages"):
            executable.copy_page(source, target)
    executable.close()


def test_steps_that_reach_beyond_their_room_are_refused() -> None:
    program = model(layers=1)
    executable = prepare(program)
    good = step(program, [(0, 0, 8)])
    expected = bits(executable.run(good))
    bad: list[tuple[type[Exception], dict[str, Any]]] = [
        (TokenError, {"tokens": np.full(8, 101, np.int32)}),
        (TokenError, {"tokens": np.full(8, -1, np.int32)}),
        (ContextError, {"positions": np.arange(250, 258, dtype=np.int32)}),
        (ContextError, {"pages": np.full((1, 8), 16, np.int32)}),
        (ContextError, {"slots": np.full(8, 1, np.int32)}),
        (KernelError, {"outputs": np.full(8, 8, np.int32)}),
        (KernelError, {"positions": np.zeros(8, np.int32)}),
        (KernelError, {"cos": good.cos[:, 1:]}),
    ]
    for error, change in bad:
        with pytest.raises(error):
            executable.run(dataclasses.replace(good, **change))
    with pytest.raises(ContextError):
        executable.run(step(program, [(0, 0, 91)]))
    assert np.array_equal(bits(executable.run(good)), expected)
    executable.close()


def test_long_steps_are_cut_and_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    program = model()
    executable = prepare(program)
    parts = [(0, 0, 70), (1, 0, 20)]
    whole = bits(executable.run(step(program, parts)))
    monkeypatch.setattr(backend_module, "_PART_SECONDS", 1e-9)
    calls: list[int] = []
    real = executable._team.run
    monkeypatch.setattr(executable._team, "run", lambda part: (calls.append(len(part)), real(part)))
    assert np.array_equal(bits(executable.run(step(program, parts))), whole)
    assert set(calls) == {1}
    tiles = 3 + 1 + 2  # 35 + 10 tokens of 16 rows each ...
    assert len(calls) > len(executable._native) + tiles
    executable.close()


def test_attention_by_blocks_of_keys_is_expected_to_take_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is not cut into as many parts as if it met all keys."""
    program, pattern = model(layers=2), ops.BlockSparse(16, 1, 8)
    _, second = (op for op in program.operations if isinstance(op, ops.Attention))
    operations = tuple(dataclasses.replace(op, sparse=pattern) if op is second else op for op in program.operations)
    executable = prepare(dataclasses.replace(program, operations=operations))
    made = step(program, [(0, 0, 90)])
    whole = bits(executable.run(made))
    tiles, costs = executable._load(made)
    a, threads = program.attention, executable.threads
    # Dense attention takes four and a half parts.
    seconds = 8 * a.head_size * a.kv_heads * int(costs.sum()) / (backend_module._PRODUCTS_PER_SECOND * threads)
    monkeypatch.setattr(backend_module, "_PART_SECONDS", seconds / 4.5)
    parts = [part for part in executable._parts(90, 90, tiles, costs) if isinstance(part, tuple)]
    at = [i for mine in executable._attentions.values() for i in mine]
    ranges = {i: [p[1:] for p in parts if i in p[0]] for i in at}
    for of_one in ranges.values():
        assert [begin for begin, _ in of_one] == [0, *(end for _, end in of_one[:-1])]
        assert of_one[-1][1] == tiles
    dense, sparse = (len(ranges[i]) for i in at)
    assert 1 < sparse < dense
    assert np.array_equal(bits(executable.run(made)), whole)
    executable.close()


def test_cancel_ends_a_step() -> None:
    program = model()
    executable = prepare(program)
    executable.cancel()  # nothing runs: means nothing
    long, stop = step(program, [(0, 0, 90)]), threading.Event()
    outcomes: list[str] = []

    def work() -> None:
        while not stop.is_set():
            try:
                executable.run(long)
            except KernelError as error:
                outcomes.append(str(error))
                return

    worker = threading.Thread(target=work)
    worker.start()
    deadline = time.monotonic() + 30
    while worker.is_alive() and time.monotonic() < deadline:
        executable.cancel()
        time.sleep(0.0005)
    stop.set()
    worker.join()
    assert outcomes == ["the step was cancelled"]
    assert np.isfinite(executable.run(long)).all()
    executable.close()
    with pytest.raises(KernelError, match="closed"):
        executable.run(long)


def test_several_threads_may_share_an_executable() -> None:
    program = model(layers=1)
    executable = prepare(program)
    wanted = [bits(executable.run(step(program, [(s, 0, 30)]))) for s in (0, 1)]
    wrong: list[int] = []

    def work(s: int) -> None:
        for _ in range(20):
            try:
                executable.run(step(program, [(s, 0, 30)]))
            except Exception:
                wrong.append(s)

    threads = [threading.Thread(target=work, args=(s,)) for s in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    for s in (0, 1):
        assert np.array_equal(bits(executable.run(step(program, [(s, 0, 30)]))), wanted[s])
    executable.close()


def test_progress_is_told_when_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    script = """
from phiquant.kernels.cpu.describe import describe
from phiquant.kernels.select import select
import test_kernels_backend as t
said = []
for _ in range(2):
    select("auto", said.append).prepare(t.model(layers=1), t.CAPACITY).close()
print(said, describe()["kernel cache"].endswith("MB)"))
"""
    environment = os.environ | {
        "PHIQUANT_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    lines = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment, check=True
        ).stdout
        for _ in range(2)
    ]
    assert lines == ["['compiling kernels for this processor, once'] True\n", "[] True\n"]


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_forced_lowering_runs_the_whole_model(lowering: str) -> None:
    try:
        host(lowering)
    except KernelError as error:
        pytest.skip(str(error))
    script = f"""
import numpy as np
import test_kernels_backend as t
from phiquant.kernels.cpu.library import _loaded
from phiquant.kernels.reference import ReferenceBackend
program = t.model(t.GGMLType.Q4_K)
executable = t.prepare(program)
s = t.step(program, [(0, 0, 40), (1, 0, 5)])
expected = ReferenceBackend().prepare(program, t.CAPACITY).run(s)
error = np.abs(executable.run(s) - expected).max(axis=1) / np.abs(expected).max()
assert np.median(error) < 1e-5, error
print({{name.rpartition(".")[2] for name in _loaded}} == {{{lowering!r}}})
"""
    environment = os.environ | {
        "PHIQUANT_LOWERING": lowering,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, env=environment)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_all_kernels_are_asked_for_before_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a step needs has been compiled by other threads, or has been asked of them, when packing begins."""
    made: dict[str, str] = {}
    real = library._make

    def make(request: library.Request) -> int:
        made[request.name] = threading.current_thread().name
        return real(request)

    def waiting(weight: ops.Weight, **options: Any) -> matmul.Packed:
        deadline = time.monotonic() + 120
        while any(t.name.startswith("phiquant-compiler") for t in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return prepare_matrix(weight, **options)

    prepare_matrix = matmul.prepare
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_engine", None)
    monkeypatch.setattr(library, "_make", make)
    monkeypatch.setattr(backend_module.matmul, "prepare", waiting)
    executable = prepare(model(GGMLType.Q4_K))
    _ENGINES.append(library._engine)  # the team keeps its kernels
    executable.run(step(model(GGMLType.Q4_K), [(0, 0, 5)]))
    executable.close()
    ahead_names = {name for name, thread in made.items() if thread.startswith("phiquant-compiler")}
    assert {"pack.Q4_K", "matmul.Q4_K", "attention_f16_64", "rotate_store_f16", "rms_norm"} <= ahead_names
    assert made.keys() == ahead_names


def test_a_kernel_that_cannot_be_made_is_told_by_prepare_and_no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    for error in (KernelError("no code"), KeyboardInterrupt()):

        def make(request: library.Request, error: BaseException = error) -> int:
            raise error if threading.current_thread() is threading.main_thread() else KernelError("told to nobody")

        monkeypatch.setattr(library, "_loaded", {})
        monkeypatch.setattr(library, "_make", make)
        with pytest.raises(type(error)):
            prepare(model())
        assert threading.active_count() == threads


def test_select_names_what_it_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select().name == "cpu"
    assert select("reference").name == "reference"
    with pytest.raises(UnsupportedError, match="'cuda'; possible are auto, cpu, reference"):
        select("cuda")
    monkeypatch.setenv("PHIQUANT_LOWERING", "mmx")
    host.cache_clear()
    try:
        with pytest.raises(KernelError, match=r"tried the backend cpu: .*mmx.* reference"):
            select()
        assert "mmx" in describe()["kernels"]
    finally:
        host.cache_clear()


def test_describe_names_the_lowering() -> None:
    facts = describe()
    assert facts["lowering"] == host().lowering
    assert int(facts["threads"]) >= 1


def test_more_memory_than_there_is_is_refused() -> None:
    program = model(layers=1)
    for change in ({"pages": 1 << 40}, {"outputs": 1 << 44}, {"pages_per_sequence": 1 << 44}):
        with pytest.raises(KernelError, match="not enough memory"):
            prepare(program, **change)


def test_argument_blocks_are_complete_or_refused() -> None:
    with pytest.raises(KernelError, match="given for a block"):
        Arguments("x", "y").pack(x=1)


def test_only_what_nothing_else_reads_is_gated_on_the_way() -> None:
    program = model(GGMLType.Q4_K)
    products = [op for before, op in itertools.pairwise(program.operations) if isinstance(before, ops.SwiGLU)]
    assert set(fusion.done_before(program)) == {id(op) for op in products}
    first = products[0]
    assert isinstance(first, ops.MatMul)
    sums, counts = np.zeros(first.x.width, np.float64), np.zeros(1, np.int64)
    watched = list(program.operations)
    watched.insert(watched.index(first) + 1, ops.SumSquares(first.x, sums, counts))
    observed = dataclasses.replace(program, operations=tuple(watched))
    assert set(fusion.done_before(observed)) == {id(op) for op in products[1:]}
