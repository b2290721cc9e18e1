"""What becomes of the rows that a step gives: they are handed on, or tokens are sampled from them."""

import numpy as np
from numpy.typing import NDArray

from phiquant.engine.logprobs import token_logprob
from phiquant.engine.sampler import Sampler
from phiquant.engine.scheduler import Chunk
from phiquant.engine.sequence import Sequence

__all__ = ["take"]

Rows = NDArray[np.float32]


def take(chunk: Chunk, rows: Rows, *, context: int, unused: NDArray[np.int64]) -> None:
    """Keep the rows, or sample the next token of the sequence, and more as long as they were guessed.

    `unused`: ids that are never sampled. Raises whatever the sampler, the mask or the sink of the sequence raises.
    """
    sequence, sampler = chunk.sequence, chunk.sequence.sampler
    if sampler is None:
        _hand_on(chunk, rows)
        return
    right = 0
    for row in rows:
        token = _next(sequence, sampler, row, context, unused)
        if sequence.finish is not None or right == len(chunk.draft) or token != chunk.draft[right]:
            break
        right += 1
    if chunk.draft and sequence.odds is not None:
        sequence.odds.drafted(len(chunk.draft), right)
        sequence.drafted += len(chunk.draft)
        sequence.accepted += right


def _hand_on(chunk: Chunk, rows: Rows) -> None:
    sequence = chunk.sequence
    if sequence.sink is not None:
        if len(rows):
            sequence.sink(chunk.outputs.start, rows)
    elif sequence.logits is not None:
        sequence.logits[chunk.outputs.start : chunk.stop] = rows
    sequence.first = max(sequence.first, chunk.stop)  # if it has to begin again, these rows are not given again
    if chunk.stop == len(sequence.ids):
        sequence.finish = "stop"


def _next(sequence: Sequence, sampler: Sampler, logits: Rows, context: int, unused: NDArray[np.int64]) -> int:
    """Append the next token, and see whether it is the last."""
    allowed = None if sequence.mask is None else sequence.mask.allowed()
    banned = None
    if len(sequence.ids) - sequence.prompt_length < sampler.sampling.min_tokens:
        banned = np.array(sorted(i for i in sequence.end_ids if i < len(logits)), np.int64)
    token = sampler.choose(logits, sequence.ids, unused=unused, allowed=allowed, banned=banned)
    if sequence.logprobs is not None:
        sequence.found.append(token_logprob(logits, token, sequence.logprobs))
    if sequence.mask is not None:
        sequence.mask.accept(token)
    sequence.ids.append(token)
    if token in sequence.end_ids:
        sequence.finish = "stop"
    elif len(sequence.ids) - sequence.prompt_length == sequence.max_tokens or len(sequence.ids) >= context:
        sequence.finish = "length"
    return token
