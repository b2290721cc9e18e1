"""The files of an output: one, or the parts of a split model; and plans that only divide or join."""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phiquant.convert.entries import Entry
from phiquant.convert.filetypes import COPY
from phiquant.convert.overrides import apply_overrides
from phiquant.convert.plan import Plan, padded
from phiquant.convert.recipes import PlannedTensor
from phiquant.convert.source import GGUFSource
from phiquant.errors import RequestError
from phiquant.gguf.quality import Quality
from phiquant.gguf.split import MAX_PARTS, divide, part_path, split_name

__all__ = ["WHOLE", "Division", "in_parts", "keep_parts", "plan_merge", "plan_recorded", "plan_split", "plan_tuned"]


@dataclass(frozen=True)
class Division:
    """How tensors are divided among parts: at most so many in each, or so many bytes of them, whichever is given.

    `first_empty`: the first part holds metadata only.
    """

    max_tensors: int | None = None
    max_bytes: int | None = None
    first_empty: bool = False

    def __post_init__(self) -> None:
        if self.max_tensors is not None and self.max_bytes is not None:
            raise RequestError("--split-max-tensors and --split-max-size cannot be used together; give one.")
        for name, value in (("--split-max-tensors", self.max_tensors), ("--split-max-size", self.max_bytes)):
            if value is not None and value <= 0:
                raise RequestError(f"{name} is {value} and must be above 0.")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to divide by."""
        return self.max_tensors is not None or self.max_bytes is not None


WHOLE = Division()
"""No division: one file."""


def in_parts(plan: Plan, division: Division) -> Plan:
    """The plan with its output divided; the output path, without .gguf, is what the parts' names begin with."""
    if not division.wanted:
        if division.first_empty:
            raise RequestError("--no-tensor-first-split needs --split-max-tensors or --split-max-size.")
        return plan
    sizes = [padded(tensor.nbytes) for tensor in plan.tensors]
    counts = divide(
        sizes, max_tensors=division.max_tensors, max_bytes=division.max_bytes, first_empty=division.first_empty
    )
    return _with_parts(plan, counts)


def keep_parts(plan: Plan, division: Division = WHOLE) -> Plan:
    """The plan with its output divided as its source is; RequestError if that is in one file, or another is wanted."""
    if division.wanted or division.first_empty:
        raise RequestError("--keep-split and a new division into parts cannot be used together; give one.")
    source = plan.source
    if not isinstance(source, GGUFSource) or len(source.part_sizes) < 2:
        raise RequestError(
            f"--keep-split: {source.files[0]} is not the first part of a split model; leave out the option."
        )
    kept = {tensor.source_name for tensor in plan.tensors}
    names = iter([tensor.name for tensor in source.tensors])
    counts = [sum(next(names) in kept for _ in range(size)) for size in source.part_sizes]
    return _with_parts(plan, [count for i, count in enumerate(counts) if count or not i])


def _with_parts(plan: Plan, counts: Sequence[int]) -> Plan:
    if len(counts) > MAX_PARTS:
        raise RequestError(
            f"{plan.path} would have {len(counts)} parts, and more than {MAX_PARTS} are impossible; raise the limit."
        )
    named = split_name(plan.path)
    prefix = named[0] if named else plan.path.with_suffix("") if plan.path.suffix == ".gguf" else plan.path
    return replace(plan, path=part_path(prefix, 0, len(counts)), part_sizes=tuple(counts))


def plan_split(source: GGUFSource, prefix: Path, division: Division) -> Plan:
    """Plan `phiquant split`: the same tensors and metadata in parts whose names begin with `prefix`."""
    return in_parts(_copy(source, prefix), division)


def plan_merge(source: GGUFSource, path: Path) -> Plan:
    """Plan `phiquant merge`: all parts in one file; RequestError if there is only one."""
    if len(source.part_sizes) < 2:
        raise RequestError(f"{source.files[0]} is not the first part of a split model, so there is nothing to merge.")
    return _copy(source, path)


def plan_recorded(source: GGUFSource, path: Path | None, quality: Quality) -> Plan:
    """Plan a copy of a model with a quality in its metadata: at `path`, or in the place of the source, in its parts."""
    plan = replace(_copy(source, path or source.files[0]), quality=quality, in_place=path is None)
    return keep_parts(plan) if len(source.part_sizes) > 1 else plan


def plan_tuned(source: GGUFSource, names: Container[str], entries: Iterable[Entry], quality: Quality | None) -> Plan:
    """Plan a model in the place of the source, in its parts, of which a `Maker` makes the tensors with these names.

    `entries`: are added to the metadata; `quality`: that there will be such figures, or that there are none.
    """
    plan = _copy(source, source.files[0])
    plan = replace(
        plan,
        tensors=[replace(tensor, calibrated=tensor.name in names) for tensor in plan.tensors],
        entries=apply_overrides(plan.entries, entries),
        copied=False,
        quality=quality,
        in_place=True,
    )
    return keep_parts(plan) if len(source.part_sizes) > 1 else plan


def _copy(source: GGUFSource, path: Path) -> Plan:
    tensors = [PlannedTensor(t.name, t.shape, t.type, t.type) for t in source.tensors]
    return Plan(source, COPY, path, tensors, source.metadata, copied=True)
