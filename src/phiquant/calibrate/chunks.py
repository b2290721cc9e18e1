"""The chunks of a text, and a step that reads a part of one."""

import numpy as np
from numpy.typing import NDArray

from phiquant.errors import RequestError
from phiquant.kernels.ops import Step

__all__ = ["chunk_step", "cut"]


def cut(ids: NDArray[np.int32], context: int, skip: int, chunks: int | None) -> NDArray[np.int32]:
    """The chunks that will be read, int32 [chunks, context].

    RequestError if there are not two of them after the first `skip`, whatever is read of them.
    """
    left = len(ids) - skip * context
    if left < 2 * context:
        after = f" after the {skip} chunks that are skipped" if skip else ""
        raise RequestError(
            f"the text has {max(left, 0)} tokens{after} and must have at least {2 * context}, two chunks of {context}; "
            "give a longer text or a smaller context"
        )
    count = min(left // context, chunks or left)
    return ids[skip * context :][: count * context].reshape(count, context)


def chunk_step(
    tokens: NDArray[np.int32],
    rotation: tuple[NDArray[np.float32], NDArray[np.float32]],
    pages: int,
    outputs: NDArray[np.int32],
    start: int = 0,
) -> Step:
    """The step that reads `tokens`, which begin at position `start` of their chunk, into the pages 0 to `pages` - 1.

    `rotation`: cos and sin of all positions of a chunk; `outputs`: indices of the tokens whose logits are wanted.
    """
    stop = start + len(tokens)
    cos, sin = rotation
    return Step(
        tokens=tokens,
        positions=np.arange(start, stop, dtype=np.int32),
        slots=np.zeros(len(tokens), np.int32),
        pages=np.arange(pages, dtype=np.int32)[None],
        cos=cos[start:stop],
        sin=sin[start:stop],
        outputs=outputs,
    )
