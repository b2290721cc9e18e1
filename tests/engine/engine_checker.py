"""A processor that checks every key a token may see and predicts by arithmetic, and an engine on it."""

import threading
import time

import numpy as np
from numpy.typing import NDArray

from phiquant.engine import Engine, Sampling, Sequence
from phiquant.kernels.ops import AttentionShape, Buffer, Capacity, Program, Step
from phiquant.model import Regime

VOCABULARY = 50
GREEDY = Sampling(0)
NONE = np.array([], np.int64)


class TwoRegimes:
    """Rotations that tell the regime: cos is 0 or 1."""

    def __init__(self, border: int = 1 << 30) -> None:
        self.border = border

    def regime(self, length: int) -> Regime:
        return Regime.LONG if length > self.border else Regime.SHORT

    def rotation(self, positions: NDArray[np.int32], regime: Regime) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        cos = np.full((len(positions), 1), float(regime is Regime.LONG), np.float32)
        return cos, cos


def following(ids: list[int], long: bool) -> int:
    """The next token is a function of all tokens before it, and of the regime."""
    return (sum((i + 1) * token for i, token in enumerate(ids)) + 7 * long) % VOCABULARY


class Checker:
    """An Executable whose cache holds tokens; refuses to go on where a key is missing or not the sequence's own."""

    def __init__(self, capacity: Capacity) -> None:
        logits = Buffer("logits", VOCABULARY, "outputs")
        hidden = Buffer("hidden", 2, "outputs")
        shape = AttentionShape(1, 1, 2, 2, 1.0)
        self.program = Program((), (logits, hidden), shape, 1, VOCABULARY, logits, hidden=hidden)
        self.capacity = capacity
        self.cache: dict[tuple[int, int], tuple[int, int, bool]] = {}
        self.steps: list[Step] = []
        self.fail_at, self.failure = -1, KeyboardInterrupt()
        self.broken = False
        self.pause = 0.0  # seconds that a step takes
        self.gate: threading.Event | None = None  # steps wait for it
        self.entered = threading.Event()
        self.threads = 1

    def run(self, step: Step) -> NDArray[np.float32]:
        step.check(self.program, self.capacity)
        self.steps.append(step)
        time.sleep(self.pause)
        if self.gate is not None:
            self.entered.set()
            assert self.gate.wait(20)
        if len(self.steps) == self.fail_at:
            raise self.failure
        size = self.capacity.page_tokens
        seen = []
        for token, position, slot, cos in zip(step.tokens, step.positions, step.slots, step.cos[:, 0], strict=True):
            pages = step.pages[slot]
            self.cache[int(pages[position // size]), int(position % size)] = (int(token), int(position), bool(cos))
            keys = [self.cache[int(pages[p // size]), p % size] for p in range(position + 1)]
            assert [place for _, place, _ in keys] == list(range(position + 1))
            assert {regime for _, _, regime in keys} == {bool(cos)}, "keys of another regime"
            seen.append([key for key, _, _ in keys])
        if step.hidden:
            return np.array([[sum(seen[index]), len(seen[index])] for index in step.outputs], np.float32).reshape(-1, 2)
        out = np.zeros((len(step.outputs), VOCABULARY), np.float32)
        for row, index in zip(out, step.outputs, strict=True):
            row[following(seen[index], bool(step.cos[index, 0]))] = np.nan if self.broken else 1
        return out

    def copy_page(self, source: int, target: int) -> None:
        for place in range(self.capacity.page_tokens):
            if (source, place) in self.cache:
                self.cache[target, place] = self.cache[source, place]

    page_bytes = 8

    def read_page(self, page: int) -> NDArray[np.uint8]:
        return np.full(8, page, np.uint8)

    def write_page(self, page: int, data: NDArray[np.uint8]) -> None:
        for place in range(self.capacity.page_tokens):
            self.cache[page, place] = self.cache[int(data[0]), place]

    def cancel(self) -> None: ...

    def close(self) -> None: ...


def engine(border: int = 1 << 30, context: int = 160, **sizes: int) -> tuple[Engine, Checker]:
    pages = {"pages_per_sequence": -(-context // 16), "pages": -(-context // 16)}
    checker = Checker(Capacity(**{"tokens": 24, "outputs": 24, "page_tokens": 16, **pages, **sizes}))
    return Engine(checker, TwoRegimes(border), context, NONE), checker  # type: ignore[arg-type]


def expected(prompt: list[int], count: int, border: int = 1 << 30) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(following(ids, len(ids) > border))
    return ids[len(prompt) :]


def run(e: Engine, prompt: list[int], count: int | None, **more: object) -> Sequence:
    sequence = Sequence(prompt, GREEDY, max_tokens=count, **more)  # type: ignore[arg-type]
    e.submit(sequence)
    while sequence.finish is None:
        e.advance(sequence, len(sequence.ids))
    return sequence
