"""Collecting an importance matrix: a text in chunks through the model, the squares of what each weight is given.

As llama-imatrix does it: the text is tokenized as a whole and cut into chunks of `context` tokens, the first of each
replaced by the token of beginning if the model wants one; every chunk begins with an empty cache; what is left over at
the end is not used. Observed are the weights of the blocks (`blk.*`), and output.weight if asked for; sums run over all
tokens. llama.cpp adds up in float32, this in float64, in the order of the tokens, and rounds when a matrix is made.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant import arch
from phiquant.arch import names
from phiquant.calibrate.chunks import chunk_step, cut
from phiquant.calibrate.observe import observe
from phiquant.convert.imatrix import DEFAULT_CHUNK_SIZE, ImportanceMatrix, Statistic
from phiquant.errors import RequestError
from phiquant.gguf import open_model
from phiquant.gguf.closing import Closing
from phiquant.kernels.ops import Capacity
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record
from phiquant.text import Tokenizer

__all__ = ["Calibration", "Done", "collect"]

_STEP_TOKENS: Final = 512
_LOGITS_BYTES: Final = 1 << 27  # of a step; more outputs go into the next one
_PAGE_TOKENS: Final = 64
_ROWS: Final = 32  # distributions widened to float64 at a time


@dataclass(frozen=True)
class Done:
    """How far a calibration is.

    Attributes:
        chunks: how many are done.
        total: how many there are to do.
        perplexity: of the second half of all chunks so far; None if it is not computed.
        error: its standard error.
    """

    chunks: int
    total: int
    perplexity: float | None = None
    error: float | None = None


class Calibration(Closing):
    """A model made ready to be observed while it reads a text; `run` it, then take the `matrix`. A context manager.

    Args:
        path: a GGUF file; of a model in several parts, the first.
        text: what the model reads.
        context: tokens of a chunk.
        skip: leave out this many chunks at the beginning.
        chunks: read at most this many; None for all.
        process_output: observe output.weight too. A model without one (its embedding is used instead) has nothing more
            to observe.
        parse_special: special tokens in the text are tokens, not text.
        perplexity: measure it on the way.
        dataset: name of the text, for the matrix.
        threads: native threads; 0 for as many as the process may use.
        backend: as for `LLM.load`.
        tell: is told, in a line, what takes its time before the first chunk.

    Attributes:
        total: chunks that `run` will read.
        shapes: of the observed weights, by name: (matrices, columns).

    Raises:
        FormatError: the file is broken. UnsupportedError: not a model that this version runs.
        RequestError: the text is too short, or an argument makes no sense.
        KernelError: a kernel could not be made.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        text: str,
        *,
        context: int = DEFAULT_CHUNK_SIZE,
        skip: int = 0,
        chunks: int | None = None,
        process_output: bool = False,
        parse_special: bool = False,
        perplexity: bool = True,
        dataset: str = "",
        threads: int = 0,
        backend: str = "auto",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if context < 2 or skip < 0 or threads < 0 or (chunks is not None and chunks < 1):
            raise RequestError(
                f"a calibration cannot have {chunks} chunks of {context} tokens after {skip}, with {threads} threads"
            )
        self.context, self.dataset = context, dataset
        self._perplexity, self._all_outputs = perplexity, process_output
        self._gguf = open_model(path)
        try:
            config = arch.load(self._gguf)
            if context > config.context_length:
                raise RequestError(
                    f"chunks of {context} tokens are longer than the {config.context_length} that {path} was trained "
                    "for; choose a smaller context"
                )
            tokenizer = Tokenizer.from_gguf(self._gguf)
            self._bos = tokenizer.bos_id if tokenizer.add_bos else None
            ids = np.array(tokenizer.encode(text, special=parse_special), np.int32)
            self._chunks = cut(ids, context, skip, chunks)
            self.total = len(self._chunks)
            wanted = {names.OUTPUT} if process_output else set[str]()
            program, self._observations = observe(
                record(config, load_weights(self._gguf, config)),
                lambda name: name.startswith("blk.") or name in wanted,
            )
            outputs = min(_STEP_TOKENS, context, max(1, _LOGITS_BYTES // (4 * config.vocab_size)))
            pages = -(-context // _PAGE_TOKENS)
            capacity = Capacity(
                tokens=min(_STEP_TOKENS, context),
                outputs=outputs if perplexity or process_output else 1,
                pages=pages,
                page_tokens=_PAGE_TOKENS,
                pages_per_sequence=pages,
                threads=threads,
            )
            self._executable = select(backend, tell).prepare(program, capacity)
            rope = Rope(config.rotary)
            self._rotation = rope.rotation(np.arange(context, dtype=np.int32), rope.regime(context))
        except BaseException:
            self._gguf.close()
            raise
        self._losses: list[float] = []
        self._done = 0

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the observed weights, by name: matrices and columns."""
        return {name: (len(o.counts), o.sums.shape[1]) for o in self._observations for name in o.names}

    def run(self) -> Iterator[Done]:
        """Read the text, one chunk for each `Done`; go on where an earlier call was left.

        Raises WeightsError if the model computes something that is not a number, KernelError if it cannot compute.
        """
        while self._done < self.total:
            self._read(self._chunks[self._done])
            self._done += 1
            yield self.done

    @property
    def done(self) -> Done:
        """How far it is."""
        if not self._losses:
            return Done(self._done, self.total)
        count = len(self._losses)
        mean = math.fsum(self._losses) / count
        variance = math.fsum((loss - mean) ** 2 for loss in self._losses) / count
        value = math.exp(mean)
        return Done(self._done, self.total, value, value * math.sqrt(variance / max(count - 1, 1)))

    def matrix(self) -> ImportanceMatrix:
        """What has been collected so far; a copy."""
        entries = {
            name: Statistic(observation.sums.astype(np.float32), observation.counts.copy())
            for observation in self._observations
            for name in observation.names
        }
        return ImportanceMatrix(entries, self._done, self.context, (self.dataset,) if self.dataset else ())

    def close(self) -> None:
        """Free threads and memory, and unmap the file."""
        self._executable.close()
        self._gguf.close()

    def _read(self, tokens: NDArray[np.int32]) -> None:
        if self._bos is not None:
            tokens = np.concatenate([np.array([self._bos], np.int32), tokens[1:]])
        half, losses = self.context // 2, []
        scored = range(half, self.context - 1) if self._perplexity else range(0)
        wanted = range(self.context) if self._all_outputs else scored
        for start, stop in self._parts(wanted):
            outputs = range(max(start, wanted.start), min(stop, wanted.stop))
            wanted_rows = np.array(outputs, np.int32) - np.int32(start)
            logits = self._executable.run(
                chunk_step(tokens[start:stop], self._rotation, self._executable.capacity.pages, wanted_rows, start)
            )
            first, last = max(start, scored.start), min(stop, scored.stop)
            if first < last:
                rows = logits[first - outputs.start : last - outputs.start]
                losses += _losses(rows, tokens[first + 1 : last + 1])
        for observation in self._observations:
            observation.check()
        self._losses += losses

    def _parts(self, wanted: range) -> Iterator[tuple[int, int]]:
        """The tokens of a chunk in steps that have room, also for the wanted rows of logits."""
        capacity, start = self._executable.capacity, 0
        while start < self.context:
            stop = min(start + capacity.tokens, self.context)
            first = max(start, wanted.start)
            if min(stop, wanted.stop) - first > capacity.outputs:
                stop = first + capacity.outputs
            yield start, stop
            start = stop


def collect(
    path: str | os.PathLike[str],
    text: str,
    *,
    chunks: int | None = None,
    context: int = DEFAULT_CHUNK_SIZE,
    process_output: bool = False,
    progress: Callable[[Done], None] | None = None,
    dataset: str = "",
    threads: int = 0,
) -> ImportanceMatrix:
    """The importance matrix of a model on a text; arguments and errors as for `Calibration`.

    `progress` is told after every chunk how far it is.

        matrix = collect("phi-F16.gguf", Path("calibration.txt").read_text())
        matrix.write_gguf("imatrix.gguf")
    """
    with Calibration(
        path,
        text,
        context=context,
        chunks=chunks,
        process_output=process_output,
        perplexity=False,
        dataset=dataset,
        threads=threads,
    ) as calibration:
        for done in calibration.run():
            if progress is not None:
                progress(done)
        return calibration.matrix()


def _losses(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> list[float]:
    """Negative log-likelihoods, in nats, of the tokens that came."""
    losses: list[float] = []
    for start in range(0, len(targets), _ROWS):
        rows, wanted = logits[start : start + _ROWS].astype(np.float64), targets[start : start + _ROWS]
        rows -= rows.max(axis=1, keepdims=True)
        likely = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), wanted]
        losses += likely.tolist()
    return losses
