"""Distillation: what is continuous in a quantized model, tuned for the predictions of the model that it was made from.

    minimized is the mean of KL(original || quantized) over the tokens of a text, by Adam on relative changes

Integers stay as rounding chose them, so the file keeps its size. The original reads the text once; of it the rows
before its last stage are kept, from which its logits are made again whenever they are needed. The quantized model goes
through some chunks of the text stage by stage, forwards with only the residual stream kept, then backwards with each
stage run once more. So what is in memory does not grow with the number of blocks, but for the stream:

    bytes = 4 width (tokens + stages * tokens of a batch) + 20 for every number that is tuned

The last tenth of the chunks is held out: the state with the least divergence on it is what is kept, and none if that is
not clearly less than at the start.
"""

import math
import os
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from phiquant import arch
from phiquant.calibrate.adam import Adam
from phiquant.calibrate.attending import Attending
from phiquant.calibrate.chunks import Chunks
from phiquant.calibrate.network import Network, divergence
from phiquant.calibrate.stages import Stages
from phiquant.calibrate.stream import Stream
from phiquant.calibrate.tuned import Tuned
from phiquant.convert.entries import Entry, float32, uint32
from phiquant.convert.output import Output
from phiquant.convert.parts import plan_tuned
from phiquant.convert.plan import Plan
from phiquant.convert.run import Progress
from phiquant.convert.source import GGUFSource
from phiquant.errors import RequestError, WeightsError
from phiquant.gguf import GGUFFile, keys, open_model
from phiquant.gguf.closing import Closing
from phiquant.gguf.quality import Quality
from phiquant.kernels.ops import Weight
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record
from phiquant.text import Tokenizer

__all__ = ["DEFAULT_EPOCHS", "DEFAULT_TOKENS", "Distillation", "Distilled", "learnt_chunks"]

DEFAULT_EPOCHS: Final = 2
DEFAULT_TOKENS: Final = 32_768
"""Tokens of a text that are read, if it has as many."""

RATE: Final = 0.01
"""Of the first steps, as a part of how far off values are (see `Tuned.sizes`); it falls to 0 as half a cosine."""

LEAST_GAIN: Final = 0.05
"""Of the divergence on what is held out, else nothing is kept: other texts gain less, and with 0.03 they lost."""

_LOGITS: Final = 1 << 25  # of a batch, if a chunk has not more: 128 MB in float32
_BATCH: Final = 4  # chunks of a batch at most

_SHARE: Final = 10  # one chunk in so many is held out
_LEAST: Final = 2  # chunks that are held out, and those that are not

Array = NDArray[Any]
Read = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Distilled:
    """What became of it: mean divergence on the text that was held out, in nats, and how many epochs were of use.

    Attributes:
        before: as the file was.
        after: at best; `before` if nothing was better.
        epochs: after how many that was; 0 if it was not better by `LEAST_GAIN`.
        tokens: that were read in an epoch.
    """

    before: float
    after: float
    epochs: int
    tokens: int

    @property
    def pays(self) -> bool:
        """Whether there is a better file to be written."""
        return self.epochs > 0

    @property
    def entries(self) -> list[Entry]:
        """Metadata of the output."""
        return [
            uint32(keys.DISTILL_EPOCHS, self.epochs),
            uint32(keys.DISTILL_TOKENS, self.tokens),
            float32(keys.DISTILL_KL_BEFORE, self.before),
            float32(keys.DISTILL_KL_AFTER, self.after),
        ]


class Distillation(Closing):
    """A quantized model and its original, made ready on a text. A context manager, and a `convert.run.Maker`.

    Args:
        original: a GGUF file with the weights as they were; of a model in several parts, the first.
        rounded: what was made of it.
        text: what both read.
        dataset: name of the text.
        tokens: how many of it are read at most, those held out included.
        epochs: how often; each is a pass over all that is not held out.
        rate: see `RATE`.
        context: tokens of a chunk; None for the usual 512.
        threads: native threads; 0 for as many as the process may use. NumPy's own are not counted.
        backend: as for `LLM.load`.
        tell: is told, in a line, what takes its time before anything is read.

    Raises:
        FormatError: a file is broken; UnsupportedError: not a model that this version tunes.
        RequestError: the text is too short, or none that the model knows; or the files are of different models.
    """

    def __init__(
        self,
        original: str | os.PathLike[str],
        rounded: str | os.PathLike[str],
        text: str,
        *,
        dataset: str = "",
        tokens: int = DEFAULT_TOKENS,
        epochs: int = DEFAULT_EPOCHS,
        rate: float = RATE,
        context: int | None = None,
        threads: int = 0,
        backend: str = "auto",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if epochs < 1:
            raise RequestError(f"{epochs} epochs of distillation were asked for; it takes at least one.")
        self._epochs, self._rate, self._threads = epochs, rate, threads
        self._backend = select(backend, tell)
        with ExitStack() as stack:
            self._original = stack.enter_context(open_model(original))
            self._rounded = stack.enter_context(open_model(rounded))
            tokenizer = Tokenizer.from_gguf(self._original)
            self._chunks = chunks = Chunks.of(text, tokenizer, dataset, tokens=tokens, context=context)
            self.remarks = chunks.remarks
            self._learnt = learnt_chunks(chunks)
            teacher, student = _cut(self._original), _cut(self._rounded)
            if _measure(teacher) != _measure(student):
                raise RequestError(f"{rounded} was not made of {original}: they have not the same blocks and tokens.")
            self._rope = Rope(arch.load(self._original).rotary)
            regime = self._rope.regime(chunks.context)
            turning = self._rope.rotation(np.arange(chunks.context, dtype=np.int32), regime)
            self._teacher = teacher
            self._teaching = Network(teacher, Tuned({}, tune=False), Attending(teacher.program.attention, *turning))
            self._tuned = Tuned(load_weights(self._rounded, arch.load(self._rounded)))
            if not self._tuned.matrices:
                raise RequestError(f"{rounded} has no scales that could be tuned; leave out --distill.")
            self._network = Network(student, self._tuned, Attending(student.program.attention, *turning))
            self._batch = max(1, min(_BATCH, _LOGITS // (chunks.context * student.program.vocab_size)))
            self._closing = stack.pop_all()

    def run(self, read: Read | None = None) -> Distilled:
        """Tune; `read` is told how many tokens were read, of how many, and what was found so far.

        WeightsError if a model computes something that is no number.
        """
        chunks, epochs, found = self._chunks, self._epochs, ""
        held = len(chunks.ids) - self._learnt
        passes = len(chunks.ids) * (len(self._teacher.stages) - 1) + held * (epochs + 1) + self._learnt * epochs
        done = 0

        def advanced(tokens: int) -> None:
            nonlocal done
            done += tokens
            if read is not None:
                read(done, passes * chunks.context, found)

        rows = self._original_rows(advanced)
        before = after = self._divergence(rows, advanced)
        best, kept = 0, {name: change.copy() for name, change in self._tuned.changes.items()}
        found = f"KL divergence {before:.6f}"
        descent, random = Adam(self._tuned.changes, self._tuned.sizes), np.random.default_rng(0)
        count = -(-self._learnt // self._batch) * epochs
        for epoch in range(epochs):
            for batch in self._batches(random.permutation(self._learnt)):
                loss = self._network.learn(chunks.ids[batch], self._targets(rows, batch))
                self._check(loss)
                rate = self._rate * (1 + math.cos(math.pi * descent.count / count)) / 2
                descent.step(self._tuned.gradients, rate)
                advanced(len(batch) * chunks.context)
            now = self._divergence(rows, advanced)
            if now < after:
                after, best = now, epoch + 1
                for name, change in self._tuned.changes.items():
                    kept[name][...] = change
            found = f"KL divergence {before:.6f} -> {now:.6f}"
        if after > (1 - LEAST_GAIN) * before:
            best = 0
        for name, change in kept.items():
            self._tuned.changes[name][...] = change if best else 0
        return Distilled(before, after, best, self._learnt * chunks.context)

    def tuned(self, name: str) -> Weight:
        """A weight of the model as it is now."""
        return self._tuned.weight(name)

    def plan(self, source: GGUFSource, distilled: Distilled, quality: Quality | None = None) -> Plan:
        """What `execute` needs, with this as its maker, to put the tuned model in the place of `source`."""
        return plan_tuned(source, self._tuned.changes, distilled.entries, quality)

    def make(self, plan: Plan, output: Output, done: Container[str], progress: Progress | None) -> None:
        """See `Maker`."""
        for tensor in plan.tensors:
            if tensor.calibrated and tensor.name not in done:
                output.write_whole(tensor, self.tuned(tensor.source_name).data)
                if progress is not None:
                    progress.advanced(tensor.source_bytes, tensor.name)

    def discard(self, plan: Plan) -> None:
        """See `Maker`; nothing was kept."""

    def _original_rows(self, advanced: Callable[[int], None]) -> Array:
        """What the last stage of the original reads, float32 [chunks, context, width]."""
        stages, chunks = self._teacher, self._chunks
        rows = stages.embedded(chunks.ids)
        stream = Stream(stages, chunks, rows, self._rope, self._backend, threads=self._threads)
        for stage in stages.stages[:-1]:
            stream.advance(stage, {}, read=advanced)
        return rows.reshape(*chunks.ids.shape, -1)

    def _targets(self, rows: Array, batch: NDArray[np.int64]) -> Array:
        return self._teaching.ended(rows[batch].reshape(-1, rows.shape[2]))

    def _divergence(self, rows: Array, advanced: Callable[[int], None]) -> float:
        """Mean over what is held out."""
        total, held = 0.0, range(self._learnt, len(self._chunks.ids))
        for batch in self._batches(np.array(held)):
            logits = self._network.logits(self._chunks.ids[batch])
            total += float(divergence(self._targets(rows, batch), logits).sum())
            advanced(len(batch) * self._chunks.context)
        self._check(total)
        return total / (len(held) * self._chunks.context)

    def _batches(self, order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        for start in range(0, len(order), self._batch):
            yield order[start : start + self._batch]

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise WeightsError(
                f"{self._rounded.path} or {self._original.path} predicts something of this text that is no number; "
                "check both with another text"
            )

    def close(self) -> None:
        """Unmap the files."""
        self._closing.close()


def learnt_chunks(chunks: Chunks) -> int:
    """How many of the chunks are learnt from; those after them are held out. RequestError if there are too few."""
    count = len(chunks.ids)
    if count < 2 * _LEAST:
        raise RequestError(
            f"{chunks.tokens} tokens of {chunks.dataset} are for distillation, and it needs at least "
            f"{2 * _LEAST * chunks.context}: two chunks of {chunks.context} to learn from, and two that are held out; "
            "give a longer text"
        )
    return count - max(_LEAST, (count + _SHARE // 2) // _SHARE)


def _cut(gguf: GGUFFile) -> Stages:
    config = arch.load(gguf)
    return Stages.of(record(config, load_weights(gguf, config)), lambda name: False)


def _measure(stages: Stages) -> tuple[int, ...]:
    """What two models must have in common."""
    return stages.program.vocab_size, stages.width, stages.program.layers, len(stages.stages)
