"""Blocks of logits that other threads compute meanwhile; what they hold is tested with `LLM.stream_logits`."""

from collections import deque
from typing import Any

import numpy as np
import pytest

from phiquant import logit_stream


class Engine:
    """Computes the first sequence when it is asked to, and the second when somebody else asks."""

    parallel = 2

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def submit(self, job: Any) -> None:
        self.jobs.append(job)

    def step(self, job: Any) -> None:
        if job.finish is None:
            job.sink(0, np.zeros((1, 4), np.float32))
            job.finish = "stop"

    def cancel(self, *jobs: Any) -> None: ...


def test_the_last_block_is_given_also_if_it_comes_just_after_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()

    class Blocks(deque[Any]):
        def __bool__(self) -> bool:
            found = len(self) > 0
            if not found and engine.jobs[0].finish:
                engine.step(engine.jobs[1])
            return found

    monkeypatch.setattr(logit_stream, "deque", Blocks)
    found = [index for index, _, _ in logit_stream.logit_blocks(engine, [[1], [2]], 0)]  # type: ignore[arg-type]
    assert found == [0, 1]
