"""Error feedback over a whole model: stage by stage, each matrix rounded for what the rounded ones before it give it.

The residual stream of a calibration text goes through the model one stage at a time. Within a stage one group of
matrices after the other is observed (with those before it rounded already), rounded, and written; then the stream goes
on through the rounded stage. So only one group's moments and one stage's weights are in memory, besides the stream:

    bytes = 4 tokens width + 4 columns² for the moments, some eight times as much while they are factorized
"""

import os
from collections.abc import Callable, Container, Mapping
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from phiquant import arch
from phiquant.calibrate.chunks import DEFAULT_TOKENS, Chunks
from phiquant.calibrate.rounding import made_of
from phiquant.calibrate.saved_stream import SavedStream
from phiquant.calibrate.stages import Group, Stage, Stages
from phiquant.calibrate.stream import Stream
from phiquant.convert.entries import Entry, string, uint32
from phiquant.convert.output import Output
from phiquant.convert.plan import Plan
from phiquant.convert.recipes import PlannedTensor
from phiquant.convert.run import Progress
from phiquant.errors import UnsupportedError
from phiquant.gguf import GGMLType, keys, open_model
from phiquant.kernels.dequantize import dequantize_rows
from phiquant.kernels.ops import ExpertMatMul, MatMul, Weight
from phiquant.kernels.quantize import quantize_rows
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record
from phiquant.text import Tokenizer

__all__ = ["Feedback"]

METHOD: Final = "feedback"

Tensors = Mapping[str, PlannedTensor]


class Feedback:
    """A model made ready to be rounded for what it computes on a text: a `convert.run.Maker`. A context manager.

    Args:
        path: a GGUF file with the weights as they are; of a model in several parts, the first.
        text: what the model reads.
        dataset: name of the text.
        tokens: how many of it are read at most.
        context: tokens of a chunk; None for the usual 512.
        threads: native threads; 0 for as many as the process may use.
        backend: as for `LLM.load`.
        tell: is told, in a line, what takes its time before anything is rounded.

    Attributes:
        chunks: what of the text will be read.
        entries: metadata of the output.

    Raises:
        FormatError: the file is broken. UnsupportedError: not a model that this version runs.
        RequestError: the text is too short, or none that the model knows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        text: str,
        *,
        dataset: str = "",
        tokens: int = DEFAULT_TOKENS,
        context: int | None = None,
        threads: int = 0,
        backend: str = "auto",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._threads, self._backend = threads, select(backend, tell)
        self._gguf = open_model(path)
        try:
            self._config = arch.load(self._gguf)
            self.chunks = Chunks.of(text, Tokenizer.from_gguf(self._gguf), dataset, tokens=tokens, context=context)
        except BaseException:
            self._gguf.close()
            raise
        self.entries = entries(self.chunks.tokens, dataset, self.chunks.digest)

    def make(self, plan: Plan, output: Output, done: Container[str], progress: Progress | None) -> None:
        """See `Maker`. WeightsError if the model computes something that is no number; KernelError if it cannot."""
        planned = {tensor.source_name: tensor for tensor in plan.tensors}
        tensors = {name: tensor for name, tensor in planned.items() if tensor.calibrated}
        weights = load_weights(self._gguf, self._config)
        cut = Stages.of(record(self._config, weights), lambda name: name in tensors)
        stages = [stage for stage in cut.stages if _kept(stage, planned)]
        _check_all_read(tensors, stages)
        rows = np.empty((self.chunks.tokens, cut.width), np.float32)
        saved = SavedStream(plan.path, output.fingerprint) if output.kept else None
        first = saved.read(rows) if saved is not None else None
        if first is None or not all(
            tensors[name].name in done for stage in stages[:first] for group in stage.groups for name in group.names
        ):
            first = 0
            embed = cut.embed
            rows[:] = _embedded(embed.weight, planned, self.chunks.ids.reshape(-1)) * np.float32(embed.scale)
        stream = Stream(cut, self.chunks, rows, Rope(self._config.rotary), self._backend, threads=self._threads)
        last = max(i for i, stage in enumerate(stages) if stage.groups)
        for i, stage in enumerate(stages[: last + 1]):
            if i < first:
                continue
            made: dict[str, Weight] = {}
            for group in stage.groups:
                self._make(group, stage, stream, made, tensors, output, done, progress)
            if i == last:
                break
            stream.advance(stage, made)
            if saved is not None and stages[i + 1].layer != stage.layer:
                output.settle()
                saved.write(i + 1, rows)

    def discard(self, plan: Plan) -> None:
        """See `Maker`."""
        SavedStream(plan.path, "").remove()

    def close(self) -> None:
        """Unmap the file."""
        self._gguf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make(
        self,
        group: Group,
        stage: Stage,
        stream: Stream,
        made: dict[str, Weight],
        tensors: Tensors,
        output: Output,
        done: Container[str],
        progress: Progress | None,
    ) -> None:
        """Put the rounded weights of a group into `made`, and into the output what is not there yet."""
        mine = {weight.name: weight for weight in group.weights}
        if all(tensors[name].name in done for name in mine):
            for name, weight in mine.items():
                made[name] = Weight(name, tensors[name].type, weight.shape, output.read(tensors[name]))
            return
        (moments,) = stream.moments(stage, [group], made)
        for name, weight in made_of(mine, tensors, moments, self._threads).items():
            tensor = tensors[name]
            if tensor.name not in done:
                output.write_whole(tensor, weight.data)
                if progress is not None:
                    progress.advanced(tensor.source_bytes, tensor.name)
            made[name] = weight


def entries(tokens: int, dataset: str, digest: str) -> list[Entry]:
    """What the output says of how it was made."""
    return [
        string(keys.QUANTIZE_METHOD, METHOD),
        string(keys.QUANTIZE_DATASET, dataset.encode(errors="replace")[:127].decode(errors="ignore")),
        string(keys.QUANTIZE_DATASET_HASH, digest),
        uint32(keys.QUANTIZE_TOKENS, tokens),
    ]


def _kept(stage: Stage, planned: Tensors) -> bool:
    """Whether the plan has the weights of a stage; blocks can be left out."""
    names = {op.weight.name for op in stage.operations if isinstance(op, MatMul | ExpertMatMul)}
    return names <= planned.keys()


def _check_all_read(tensors: Tensors, stages: list[Stage]) -> None:
    read = {name for stage in stages for group in stage.groups for name in group.names}
    for name in tensors:
        if name not in read:
            raise UnsupportedError(
                f"{name} is no matrix that the model multiplies by, so what it is given cannot be observed; leave it "
                f"out with --exclude-weights {name}."
            )


def _embedded(weight: Weight, planned: Tensors, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Rows of the embedding as the output will have them, float32 [tokens, width]."""
    used, places = np.unique(ids, return_inverse=True)
    data, type = weight.data.reshape(weight.rows, -1)[used], weight.type
    target = planned[weight.name].type
    if target is not type:
        widened = dequantize_rows(data, type, len(used), weight.columns)
        data, type = quantize_rows(widened, GGMLType.F32, target), target
    return dequantize_rows(data, type, len(used), weight.columns)[places]
