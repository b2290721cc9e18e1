"""Error feedback over a whole model: stage by stage, each matrix rounded for what the rounded ones before it give it.

The residual stream of a calibration text goes through the model one stage at a time. Within a stage one group of
matrices after the other is observed (with those before it rounded already), rounded, and written; then the stream goes
on through the rounded stage. Beside it goes the stream of the model as it is: what the rounded one lacks of it, the
matrices that follow make up for. So one group's moments and one stage's weights are in memory, besides two streams and
what errors of the stream cost behind each stage, which is known of `curvature` tokens before anything is rounded:

    bytes = 8 tokens width + 4 stages curvature width
            + 4 columns² for the moments, some eight times as much while they are factorized
"""

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from phiquant import arch
from phiquant.arch import names
from phiquant.calibrate.chunks import DEFAULT_TOKENS, Chunks
from phiquant.calibrate.curvature import Curvature
from phiquant.calibrate.moments import Moments, check_finite
from phiquant.calibrate.moments_file import MomentsFile, identity, write_moments
from phiquant.calibrate.rounding import made_of
from phiquant.calibrate.saved_stream import SavedStream
from phiquant.calibrate.search import Search
from phiquant.calibrate.stages import Group, Stage, Stages
from phiquant.calibrate.stream import Stream
from phiquant.convert.entries import Entry, string, uint32
from phiquant.convert.output import Output
from phiquant.convert.plan import Plan
from phiquant.convert.recipes import PlannedTensor
from phiquant.convert.run import Progress
from phiquant.errors import UnsupportedError
from phiquant.gguf import keys, open_model, parameter_count
from phiquant.gguf.closing import Closing
from phiquant.kernels.coupled import Coupling
from phiquant.kernels.ops import ExpertMatMul, MatMul, Weight
from phiquant.kernels.select import select
from phiquant.model import Rope, load_weights, record
from phiquant.text import Tokenizer

__all__ = ["Feedback"]

METHOD: Final = "feedback"

TIED: Final = 1.0
"""How much an embedding that is the output too is rounded for what its rows are as an embedding, beside what their
products are: as a part of what errors in either cost, or of the moments' diagonal where that is not known."""

Tensors = Mapping[str, PlannedTensor]


class Feedback(Closing):
    """A model made ready to be rounded for what it computes on a text: a `convert.run.Maker`. A context manager.

    Args:
        path: a GGUF file with the weights as they are; of a model in several parts, the first.
        text: what the model reads.
        dataset: name of the text.
        tokens: how many of it are read at most.
        context: tokens of a chunk; None for the usual 512.
        search: how blocks are sought; None for the defaults.
        statistics: instead of a text, moments that were collected earlier; they are those of the model as it is, so
            that no weight is rounded for what the rounded ones before it give it, nor for what its errors cost.
        threads: native threads; 0 for as many as the process may use.
        backend: as for `LLM.load`.
        tell: is told, in a line, what takes its time before anything is rounded.

    Attributes:
        entries: metadata of the output.
        remarks: what the user should know of the text.
        embedding: whether an embedding that is not the output is made too; a plan is told by `Calibrated.embedding`.

    Raises:
        FormatError: the file is broken; ImportanceError: the statistics are of another model.
        UnsupportedError: not a model that this version runs.
        RequestError: the text is too short, or none that the model knows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        text: str = "",
        *,
        dataset: str = "",
        tokens: int = DEFAULT_TOKENS,
        context: int | None = None,
        search: Search | None = None,
        statistics: MomentsFile | None = None,
        threads: int = 0,
        backend: str = "auto",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._threads, self._statistics = threads, statistics
        self._backend = select(backend, tell)
        self._gguf = open_model(path)
        try:
            self._config = arch.load(self._gguf)
            search = (search or Search()).settled(parameter_count(self._gguf.tensors.values()))
            self._search, self.embedding = search, statistics is None and search.curvature_tokens != 0
            if statistics is None:
                tokenizer = Tokenizer.from_gguf(self._gguf)
                chunks = Chunks.of(text, tokenizer, dataset, tokens=tokens, context=context)
                self._chunks = chunks = chunks.with_drawn(tokenizer, search.drawn)
                self.remarks = chunks.remarks
                self.entries = entries(chunks.tokens, dataset, chunks.digest, search)
            else:
                statistics.check(self._gguf, str(path))
                self.remarks = (
                    f"{statistics.path} is of the model as it is ({statistics.tokens} tokens of {statistics.dataset}), "
                    "so no text is read, and weights are not rounded for what rounded ones before them give them, "
                    "nor for what their errors cost",
                )
                self.entries = entries(
                    statistics.tokens, statistics.dataset, statistics.digest, search, str(statistics.path)
                )
        except BaseException:
            self._gguf.close()
            raise

    def collect(self, path: str | os.PathLike[str], read: Callable[[int, int], None] | None = None) -> None:
        """Write the moments of the model as it is, of all its matrices, to a file; `read` is told tokens and total.

        WeightsError if the model computes something that is no number; OutputError.
        """
        cut = self._cut(lambda name: name.startswith("blk.") or name in (names.OUTPUT, names.TOKEN_EMBD))
        stages = cut.stages[: max(i for i, stage in enumerate(cut.stages) if stage.groups) + 1]
        stream = self._stream(cut, cut.embedded(self._chunks.ids))
        total, done = len(stages) * self._chunks.tokens, 0

        def advanced(tokens: int) -> None:
            nonlocal done
            done += tokens
            if read is not None:
                read(done, total)

        groups = [group for stage in stages for group in stage.groups]

        def found() -> Iterator[list[Moments]]:
            for stage in stages[:-1]:
                yield stream.advance(stage, {}, stage.groups, advanced)
            yield stream.moments(stages[-1], stages[-1].groups, {}, advanced)

        write_moments(path, identity(self._gguf), self._chunks, groups, found())

    def make(self, plan: Plan, output: Output, done: Container[str], progress: Progress | None) -> None:
        """See `Maker`. WeightsError if the model computes something that is no number; KernelError if it cannot."""
        planned = {tensor.source_name: tensor for tensor in plan.tensors}
        tensors = {name: tensor for name, tensor in planned.items() if tensor.calibrated}
        cut = self._cut(lambda name: name in tensors and name != names.TOKEN_EMBD)
        stages = [stage for stage in cut.stages if _kept(stage, planned)]
        cut = replace(cut, stages=tuple(stages))
        tied = names.TOKEN_EMBD in tensors and names.OUTPUT not in planned
        _check_all_read([name for name in tensors if name != names.TOKEN_EMBD], stages)
        if names.TOKEN_EMBD in tensors and not tied and not self.embedding:
            raise UnsupportedError(
                f"it is not known what errors of {names.TOKEN_EMBD} cost, so it cannot be rounded for that; leave it "
                f"out with --exclude-weights {names.TOKEN_EMBD}, or let the model read a text."
            )
        writing = _Writing(tensors, output, done, progress, self._threads, self._search)
        if self._statistics is not None:
            for group in (group for stage in stages for group in stage.groups):
                if not writing.is_done(group):
                    writing.make(group, self._statistics.moments(group.names[0], group.matrices, group.x.width))
            if tied:
                self._tied(writing, planned, None)
            return
        saved = SavedStream(plan.path, output.fingerprint) if output.kept else None
        rows = np.empty((2, self._chunks.tokens, cut.width), np.float32)
        first = saved.read(rows) if saved is not None else None
        if first is None or not all(writing.is_done(group) for stage in stages[:first] for group in stage.groups):
            first = 0
        curved = self._search.curvature_tokens
        costs = self._curvature(cut, first, curved, progress) if curved else None
        if first == 0:
            rows[0] = cut.embedded(
                self._chunks.ids,
                self._embedding(cut, writing, planned, costs) if names.TOKEN_EMBD in tensors else None,
                planned[names.TOKEN_EMBD].type if names.TOKEN_EMBD in planned else None,
            )
            rows[1] = cut.embedded(self._chunks.ids)
        stream, whole = self._stream(cut, rows[0]), self._stream(cut, rows[1])
        last = max((i for i, stage in enumerate(stages) if stage.groups), default=-1)  # if only the embedding is made
        for i, stage in enumerate(stages[first : last + 1], first):
            made: dict[str, Weight] = {}
            adding = [group for group in stage.groups if group.adds]
            couplings = {} if costs is None else _couplings(stage, costs, i + 1)
            if costs is not None:
                costs.drop(i)
            for group in [group for group in stage.groups if not group.adds]:
                made |= writing.found(group) or _made(group, stage, made, stream, whole, writing, couplings)
            if i == last and not adding:
                break
            whole.advance(stage, {})
            for group in adding:
                made |= writing.found(group) or _made(group, stage, made, stream, whole, writing, couplings)
            if i == last:
                break
            stream.advance(stage, made)
            if saved is not None and stages[i + 1].layer != stage.layer:
                output.settle()
                saved.write(i + 1, rows)

    def _cut(self, wanted: Callable[[str], bool]) -> Stages:
        return Stages.of(record(self._config, load_weights(self._gguf, self._config)), wanted)

    def _stream(self, cut: Stages, rows: NDArray[np.float32]) -> Stream:
        rope = Rope(self._config.rotary)
        return Stream(cut, self._chunks, rows, rope, self._backend, threads=self._threads)

    def _curvature(self, cut: Stages, first: int, tokens: int, progress: Progress | None) -> Curvature:
        def read(done: int, total: int) -> None:
            if progress is not None:
                progress.preparing("derivatives", done / total)

        return Curvature.of(
            cut,
            self._chunks,
            Rope(self._config.rotary),
            self._backend,
            tokens=tokens,
            first=first,
            threads=self._threads,
            read=read,
        )

    def _embedding(self, cut: Stages, writing: "_Writing", planned: Tensors, costs: Curvature | None) -> Weight:
        """The embedding, rounded for what errors of its rows cost."""
        if names.OUTPUT not in planned:
            return self._tied(writing, planned, costs)
        assert costs is not None
        group = Group((cut.embed.weight,), cut.embed.out, None, 0, False, False)
        made = writing.found(group) or writing.make(group, costs.moments(0))
        return made[names.TOKEN_EMBD]

    def _tied(self, writing: "_Writing", planned: Tensors, costs: Curvature | None) -> Weight:
        """The embedding, rounded for what the last norm gives it too: it is the output.

        That is of the model as it is, since nothing else is rounded yet; it takes one more pass over the text.
        """
        cut = self._cut(lambda name: name in planned)
        stages = [stage for stage in cut.stages if _kept(stage, planned)]
        (group,) = (group for stage in stages for group in stage.groups if names.TOKEN_EMBD in group.names)
        if not writing.is_done(group):
            if self._statistics is not None:
                moments = self._statistics.moments(names.TOKEN_EMBD, group.matrices, group.x.width)
            else:
                stream = self._stream(cut, cut.embedded(self._chunks.ids))
                for stage, after in pairwise(stages):
                    stream.advance(stage, {})
                    check_finite(stream.rows, after.groups[0].names[0])
                (moments,) = stream.moments(stages[-1], [group], {})
            if costs is None:
                moments = moments.with_identity(TIED)
            else:
                moments = Moments.together((moments, costs.spread), (costs.moments(0), TIED * cut.embed.scale**2))
            return writing.make(group, moments)[names.TOKEN_EMBD]
        return writing.found(group)[names.TOKEN_EMBD]

    def discard(self, plan: Plan) -> None:
        """See `Maker`."""
        SavedStream(plan.path, "").remove()

    def close(self) -> None:
        """Unmap the file."""
        self._gguf.close()


def _couplings(stage: Stage, costs: Curvature, after: int) -> dict[str, Coupling]:
    """Of the rows of a stage's matrices, by their names; `after`: number of the stage that follows."""
    found = {
        name: Coupling.of(costs.heads[name]) for group in stage.groups for name in group.names if name in costs.heads
    }
    ends = [name for group in stage.groups if group.ends for name in group.names]
    return found | dict.fromkeys(ends, Coupling.of(costs.moments(after).sums)) if ends else found


def _made(
    group: Group,
    stage: Stage,
    made: dict[str, Weight],
    stream: Stream,
    whole: Stream,
    writing: "_Writing",
    couplings: Mapping[str, Coupling],
) -> dict[str, Weight]:
    """The weights of a group, rounded for what the `made` ones before it give it and for what it lacks thereby."""
    if group.route is not None:  # the unrounded model sends other tokens to an expert, and too few to learn from
        (moments,) = stream.moments(stage, [group], made)
        return writing.make(group, moments, couplings)
    shortfall = stream.shortfall(stage, group, made, whole)
    targets, moments = shortfall.targets(group.weights, group.names[0]), shortfall.moments
    del shortfall  # four matrices as large as the moments, which the factors take the place of
    return writing.make(replace(group, weights=targets), moments, couplings)


class _Writing:
    """Weights of a plan, rounded and written where that is not done yet; all by the source's names."""

    def __init__(
        self,
        tensors: Tensors,
        output: Output,
        done: Container[str],
        progress: Progress | None,
        threads: int,
        search: Search,
    ) -> None:
        self._tensors, self._output, self._done = tensors, output, done
        self._progress, self._threads, self._search = progress, threads, search

    def is_done(self, group: Group) -> bool:
        """Whether an earlier run made all of a group."""
        return all(self._tensors[name].name in self._done for name in group.names)

    def found(self, group: Group) -> dict[str, Weight]:
        """What it made, if all of it."""
        if not self.is_done(group):
            return {}
        return {
            w.name: Weight(w.name, self._tensors[w.name].type, w.shape, self._output.read(self._tensors[w.name]))
            for w in group.weights
        }

    def make(
        self, group: Group, moments: Moments, couplings: Mapping[str, Coupling] = MappingProxyType({})
    ) -> dict[str, Weight]:
        """Round the weights of a group by the moments of what they read, and the couplings of their rows."""
        weights = {weight.name: weight for weight in group.weights}
        made = made_of(weights, self._tensors, moments, self._threads, self._search, couplings)
        for name, weight in made.items():
            tensor = self._tensors[name]
            if tensor.name not in self._done:
                self._output.write_whole(tensor, weight.data)
                if self._progress is not None:
                    self._progress.advanced(tensor.source_bytes, tensor.name)
        return made


def entries(tokens: int, dataset: str, digest: str, search: Search, statistics: str | None = None) -> list[Entry]:
    """What the output says of how it was made."""
    found = [
        string(keys.QUANTIZE_METHOD, METHOD),
        string(keys.QUANTIZE_DATASET, _shortened(dataset)),
        string(keys.QUANTIZE_DATASET_HASH, digest),
        uint32(keys.QUANTIZE_TOKENS, tokens),
        string(keys.QUANTIZE_SEARCH, str(search) if statistics is None else search.of_blocks),
    ]
    return found if statistics is None else [*found, string(keys.QUANTIZE_STATISTICS, _shortened(statistics))]


def _shortened(text: str) -> str:
    return text.encode(errors="replace")[:127].decode(errors="ignore")


def _kept(stage: Stage, planned: Tensors) -> bool:
    """Whether the plan has the weights of a stage; blocks can be left out."""
    found = {op.weight.name for op in stage.operations if isinstance(op, MatMul | ExpertMatMul)}
    return found <= planned.keys()


def _check_all_read(tensors: Iterable[str], stages: list[Stage]) -> None:
    read = {name for stage in stages for group in stage.groups for name in group.names}
    for name in tensors:
        if name not in read:
            raise UnsupportedError(
                f"{name} is no matrix that the model multiplies by, so what it is given cannot be observed; leave it "
                f"out with --exclude-weights {name}."
            )
