"""Importance in a quantization: which weights it reaches, what is refused without it, what the file says of it."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from phiquant import quants
from phiquant.arch import names
from phiquant.convert import imatrix
from phiquant.convert.entries import Entry, string, uint32
from phiquant.convert.filetypes import Target
from phiquant.convert.imatrix import ImportanceMatrix
from phiquant.convert.mixture import is_embedding, needs_importance
from phiquant.convert.recipes import PlannedTensor
from phiquant.errors import ImportanceError, RequestError
from phiquant.gguf import GGMLType, keys
from phiquant.kernels.feedback import SUPPORTED

__all__ = [
    "Calibrated",
    "Importance",
    "importance_entries",
    "mark_calibrated",
    "missing_importance",
    "partial_run",
    "weigh",
]

_MAX_TEXT = 127  # bytes that llama-quantize records of a name


@dataclass(frozen=True)
class Importance:
    """An importance matrix and how it is called: the path as it was given, or the text it was made from."""

    matrix: ImportanceMatrix
    origin: str

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> "Importance":
        """Read a file and choose of it; ImportanceError and GGUFError from `imatrix.read`, RequestError as `chosen`."""
        return cls.chosen(imatrix.read(path), os.fspath(path), include, exclude)

    @classmethod
    def chosen(
        cls, matrix: ImportanceMatrix, origin: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> "Importance":
        """Keep the entries whose names contain any of `include`, or none of `exclude`.

        RequestError if both are given, if a part is in no name, or if nothing is left.
        """
        if include and exclude:
            raise RequestError("--include-weights and --exclude-weights cannot be used together.")
        for option, parts in (("--include-weights", include), ("--exclude-weights", exclude)):
            for part in parts:
                if not any(part in name for name in matrix.entries):
                    raise RequestError(
                        f"{option} {part}: no entry of {origin} has this in its name; names are like "
                        f"{next(iter(matrix.entries))}."
                    )
        kept = matrix.chosen(include, exclude)
        if not kept.entries:
            raise RequestError(f"--exclude-weights leaves no entry of {origin}; quantize without importance instead.")
        return cls(kept, origin)


@dataclass(frozen=True)
class Calibrated:
    """That weights are made of what a model computes on a text: which, and what the file says of it.

    `origin`: the text; `include`, `exclude`: parts of names as for `Importance.chosen`; `remarks`: for the user;
    `needed`: that it changes nothing is an error, but not while types are still to be chosen; `embedding`: it is known
    what errors of the embedding cost, so that it is made too where it is not the output.
    """

    origin: str
    entries: Sequence[Entry]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    remarks: Sequence[str] = ()
    needed: bool = True
    embedding: bool = True

    def wanted(self, name: str, type: GGMLType, tied: bool) -> bool:
        """Whether a weight is: one of a block, output or embedding, if chosen; `tied`: the embedding is the output."""
        embedding = name == names.TOKEN_EMBD and (tied or self.embedding) and type in SUPPORTED
        return (
            (name.startswith("blk.") or name == names.OUTPUT or embedding)
            and (not self.include or any(part in name for part in self.include))
            and not any(part in name for part in self.exclude)
        )


def mark_calibrated(planned: Sequence[PlannedTensor], calibrated: Calibrated) -> tuple[list[PlannedTensor], list[str]]:
    """Mark the weights of a plan that are quantized and wanted, and say what the user should know of it.

    RequestError if calibration is `needed` and changes none of them.
    """
    if calibrated.include and calibrated.exclude:
        raise RequestError("--include-weights and --exclude-weights cannot be used together.")
    for option, parts in (("--include-weights", calibrated.include), ("--exclude-weights", calibrated.exclude)):
        for part in parts:
            if not any(part in tensor.source_name for tensor in planned):
                example = planned[-1].source_name
                raise RequestError(f"{option} {part}: no weight has this in its name; names are like {example}.")
    marked = []
    tied = names.OUTPUT not in {tensor.source_name for tensor in planned}
    for tensor in planned:
        changes = tensor.type.is_quantized and tensor.type is not tensor.source
        wanted = calibrated.wanted(tensor.source_name, tensor.type, tied)
        marked.append(replace(tensor, calibrated=changes and wanted))
    changed = any(t.calibrated and (t.type in SUPPORTED or t.type not in quants.IMPORTANCE_IGNORED) for t in marked)
    if calibrated.needed and not changed:
        raise RequestError(
            f"--calibrate {calibrated.origin}: no weight of this file would be rounded by it; leave the option out."
        )
    return marked, _ways(marked)


def _ways(marked: Iterable[PlannedTensor]) -> list[str]:
    """Notes on the types that error feedback does not make."""
    others = Counter(t.type for t in marked if t.calibrated and t.type not in SUPPORTED)
    return [
        f"{count} weights become {type.name}, which is not made by error feedback: they are "
        + ("rounded as without calibration" if type in quants.IMPORTANCE_IGNORED else "weighed by importance instead")
        for type, count in others.items()
    ]


def weigh(
    planned: Sequence[PlannedTensor], importance: Importance, present: Iterable[str]
) -> tuple[list[PlannedTensor], list[str]]:
    """Give the weights of a plan their importance; what the user should know of it comes second.

    `present` are the names of all tensors of the source. ImportanceError if the matrix is of another model, or if
    nothing came to a weight for which it is used.
    """
    matrix, origin = importance.matrix, importance.origin
    known = set(present)
    for name in matrix.entries:
        if name not in known and name.startswith("blk."):
            raise ImportanceError(
                f"{origin} was made with another model: it has an entry for {name}, and this model has no such tensor."
            )
    weighed, used, missing, partial = [], 0, [], []
    for tensor in planned:
        entry = matrix.entries.get(tensor.source_name)
        matrices = tensor.shape[-3] if len(tensor.shape) > 2 else 1
        if entry is not None and entry.sums.size != matrices * tensor.shape[-1]:
            if not is_embedding(tensor.source_name):  # tied to the output, it may have an entry of other rows
                raise ImportanceError(
                    f"{origin} was made with another model: it has {entry.sums.size} values for {tensor.source_name}, "
                    f"and this model's tensor takes {matrices * tensor.shape[-1]}."
                )
            entry = None
        if tensor.type in quants.IMPORTANCE_IGNORED or tensor.type is tensor.source:
            weighed.append(tensor)
            continue
        if entry is None:
            missing.append(tensor.source_name)
            weighed.append(tensor)
            continue
        used += 1
        if not entry.counts.any():
            raise ImportanceError(
                f"{origin} has an entry for {tensor.source_name} to which no token came (all counts are 0); make it "
                "again from a longer text with `phiquant imatrix`."
            )
        if not entry.counts.all():
            partial.append(tensor.source_name)
        weights = entry.importance.reshape(matrices, tensor.shape[-1])
        weighed.append(replace(tensor, importance=np.ascontiguousarray(weights)))
    notes = partial_run(matrix)
    inner = [name for name in missing if name.startswith("blk.")]
    if inner and not used:
        raise ImportanceError(
            f"{origin} was made with another model, or for other weights: it has no entry for {inner[0]}, nor for any "
            "other weight that would be quantized by it."
        )
    if inner:
        notes.append(f"{len(inner)} weights have no entry in {origin}, the first is {inner[0]}")
    if not used:
        notes.append(f"{origin} is not used: the types of this file do not depend on importance")
    if partial:
        notes.append(f"{len(partial)} weights have experts to which no token came, the first is {partial[0]}")
    return weighed, notes


def partial_run(matrix: ImportanceMatrix) -> list[str]:
    """What its counts say of a matrix that was saved before its run ended."""
    counts = {int(entry.counts[0]) for entry in matrix.entries.values() if len(entry.counts) == 1} - {0}
    unit = "tokens" if matrix.chunk_size else "chunks"
    if len(counts) > 1:
        return [
            f"the importance matrix comes from a run that did not end: {min(counts)} {unit} reached some weights, "
            f"{max(counts)} others"
        ]
    if matrix.chunk_size and counts and max(counts) < matrix.chunk_count * matrix.chunk_size:
        return [
            f"the importance matrix comes from a run that did not end: it announces {matrix.chunk_count} chunks of "
            f"{matrix.chunk_size} tokens, and {max(counts)} reached the weights"
        ]
    return []


def missing_importance(
    planned: Iterable[PlannedTensor], target: Target, model: str, origin: str | None
) -> RequestError | None:
    """The refusal of a plan in which a weight gets so few bits that it needs importance and has none.

    `model`: the source, to be named in the command that makes a matrix; `origin`: the matrix, if there is one.
    """
    for tensor in planned:
        if tensor.importance is None and not tensor.calibrated and tensor.type is not tensor.source:
            needed = needs_importance(tensor.name, tensor.type, target.file_type)
            if needed or tensor.type in quants.IMPORTANCE_REQUIRED:  # embedding and output too
                lack = f"{tensor.name} would become {tensor.type.name}, which is useless without an importance matrix"
                if origin is not None:
                    return RequestError(
                        f"{lack}, and {origin} has no entry for it; give it another type with --tensor-type."
                    )
                return RequestError(
                    f"{lack}; make one with `phiquant imatrix -m {model} -f TEXT -o imatrix.gguf` and pass "
                    "`--imatrix imatrix.gguf`, or let `--calibrate TEXT` do both."
                )
    return None


def importance_entries(importance: Importance) -> list[Entry]:
    """The keys with which llama-quantize records what it used."""
    matrix = importance.matrix
    entries = [string(keys.QUANTIZE_IMATRIX_FILE, _shortened(importance.origin))]
    if matrix.datasets:
        entries.append(string(keys.QUANTIZE_IMATRIX_DATASET, _shortened(matrix.datasets[0])))
    entries.append(uint32(keys.QUANTIZE_IMATRIX_ENTRIES, len(matrix.entries)))
    if matrix.chunk_count > 0:
        entries.append(uint32(keys.QUANTIZE_IMATRIX_CHUNKS, matrix.chunk_count))
    return entries


def _shortened(text: str) -> str:
    return text.encode(errors="replace")[:_MAX_TEXT].decode(errors="ignore")
