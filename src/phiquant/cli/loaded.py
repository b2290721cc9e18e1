"""Models loaded to read windows of a text."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phiquant.cli.notices import Notices
from phiquant.errors import RequestError
from phiquant.llm import LLM

__all__ = ["BATCH", "WINDOW", "reading_model"]

BATCH = 2048
WINDOW = 512
"""Tokens of a step and of a window if nothing is said, as llama-perplexity has them."""


@contextmanager
def reading_model(
    path: Path,
    size: int,
    notices: Notices,
    *,
    batch: int = BATCH,
    room: int = 0,
    threads: int = 0,
    cache_type: str = "f16",
) -> Iterator[LLM]:
    """The model, with room for the windows of `size` tokens that a batch holds; RequestError if they are too long.

    `room`: tokens that a text must have room for, if the model can, besides windows.
    """
    parallel = max(1, batch // size)
    with LLM.load(
        path,
        context=max(size, room),
        batch=min(batch, parallel * size),
        parallel=parallel,
        threads=threads,
        cache_type=cache_type,
        speculate=False,
        progress=notices.progress,
    ) as llm:
        notices.clear()
        if llm.context < size:
            raise RequestError(
                f"windows of {size} tokens are longer than the {llm.context} that {path} was trained for; "
                "choose a smaller context"
            )
        yield llm
