"""A file beside the model that it was made from, in the few figures that a file records."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError
from ..gguf.quality import Quality, shortened
from ..llm import LLM
from ..text import Tokenizer
from .measure import Done, Measurement, RowsBase, stream
from .statistics import Comparison
from .windows import Windows

__all__ = ["beside", "check_vocabularies", "quality_of", "token_windows"]


def token_windows(model: LLM, text: str, size: int, *, first: int = 0, limit: int | None = None) -> Windows:
    """A text's windows of `size` tokens, the second half of each scored: from window `first` on, at most `limit`.

    RequestError if these are not two.
    """
    ids: NDArray[np.int32] = np.array(model.tokenize(text, special=False), np.int32)
    left = ids[first * size :]
    if first and len(left) < 2 * size:
        raise RequestError(
            f"the text has {len(ids)} tokens, and after {first} windows of {size} must have two more; "
            "leave out fewer, or give a longer text"
        )
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    return Windows.halves(left, size, limit=limit, bos=bos)


def check_vocabularies(model: Tokenizer, reference: Tokenizer, names: tuple[str, str]) -> None:
    """RequestError, with the names of both, if they do not predict the same tokens."""
    if list(model.vocabulary.tokens) != list(reference.vocabulary.tokens):
        raise RequestError(f"{names[1]} has another vocabulary than {names[0]}; choose another reference")


def beside(model: LLM, reference: LLM, windows: Windows) -> tuple[Measurement, Iterator[Done]]:
    """A measurement of a model beside its reference, both of which are run at once, and its course: nothing is rounded.

    Take what is wanted of the measurement when the course is at its end.
    """
    blocks = stream(reference, (windows.read(window) for window in range(len(windows))), windows)
    measured = Measurement(model, windows, base=RowsBase(blocks))
    return measured, measured.run()


def quality_of(
    found: Comparison, windows: Windows, *, first: int, text_sha256: str, reference: str, method: str
) -> Quality:
    """What a file records of a comparison; `first`: windows of the text that were left out before."""
    divergence = found.divergence
    return Quality(
        kl_mean=divergence.mean,
        kl_p999=divergence.percentiles[99.9],
        top1=divergence.top1,
        perplexity=found.perplexity.value,
        reference_perplexity=found.base_perplexity.value,
        tokens=divergence.tokens,
        context=windows.size,
        first_window=first,
        text_sha256=text_sha256,
        reference=shortened(reference),
        method=method,
    )
