"""Logits of many sequences, a block at a time, in memory that does not grow with their length."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from phiquant.engine import Engine
from phiquant.engine import Sequence as Job

__all__ = ["logit_blocks"]

Block = tuple[int, int, NDArray[np.float32]]


def logit_blocks(engine: Engine, sequences: Iterable[Sequence[int]], first: int) -> Iterator[Block]:
    """See `LLM.stream_logits`. A sequence is on hold until its last block has been taken."""
    blocks: deque[Block] = deque()
    waiting, running = enumerate(sequences), dict[int, Job]()

    def sink(index: int, position: int, rows: NDArray[np.float32]) -> None:
        running[index].hold = True
        blocks.append((index, position, rows.copy()))  # the next step, which may be another thread's, overwrites it

    try:
        while True:
            while len(running) < engine.parallel:
                index, ids = next(waiting, (-1, ()))
                if index < 0:
                    break
                running[index] = Job(ids, None, sink=partial(sink, index), first=first)
                engine.submit(running[index])
            if not running:
                return
            for job in running.values():
                job.hold = False
            engine.step(next(iter(running.values())))
            left = {index: job for index, job in running.items() if job.finish is None}
            while blocks:  # after that: all blocks of those that are not left are there
                yield blocks.popleft()
            running = left
    finally:
        engine.cancel(*running.values())
