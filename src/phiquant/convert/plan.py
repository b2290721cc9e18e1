"""What a conversion will do, decided before a byte is written: types, metadata, output path, exact size."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phiquant import hub, quants
from phiquant.convert.entries import Entry, string
from phiquant.convert.filetypes import Target, parse_file_type
from phiquant.convert.overrides import apply_overrides
from phiquant.convert.prune import Pruning
from phiquant.convert.recipes import (
    Options,
    PlannedTensor,
    Tensor,
    check_options,
    check_requantization,
    plan_conversion,
    plan_quantization,
)
from phiquant.convert.source import CheckpointSource, GGUFSource, Source, model_of
from phiquant.convert.weighing import (
    Calibrated,
    Importance,
    importance_entries,
    mark_calibrated,
    missing_importance,
    weigh,
)
from phiquant.errors import UnsupportedError, WeightsError
from phiquant.gguf import FileType, GGMLType, ValueType, keys
from phiquant.gguf.checksum import DIGITS
from phiquant.gguf.quality import Quality, is_quality_key
from phiquant.gguf.split import part_path, split_name

__all__ = [
    "Part",
    "Plan",
    "checksum_entries",
    "output_folder",
    "padded",
    "plan_convert",
    "plan_quantize",
    "quality_entries",
]

_ALIGNMENT = 32
_CONVERTER_TYPES = ("f32", "f16", "bf16", "q8_0")
_SCALAR_BYTES = {
    ValueType.UINT8: 1,
    ValueType.INT8: 1,
    ValueType.BOOL: 1,
    ValueType.UINT16: 2,
    ValueType.INT16: 2,
    ValueType.UINT32: 4,
    ValueType.INT32: 4,
    ValueType.FLOAT32: 4,
    ValueType.UINT64: 8,
    ValueType.INT64: 8,
    ValueType.FLOAT64: 8,
}


_CHECKSUM_KEYS = (keys.CHECKSUM, keys.TENSOR_CHECKSUMS)
_SPLIT_KEYS = (keys.SPLIT_NO, keys.SPLIT_TENSORS_COUNT, keys.SPLIT_COUNT)


@dataclass(frozen=True)
class Part:
    """One file of an output."""

    path: Path
    tensors: Sequence[PlannedTensor]
    entries: Sequence[Entry]

    @property
    def size(self) -> int:
        """Bytes of the file: header, tensors, padding."""
        header = 24 + sum(_entry_bytes(entry) for entry in self.entries)
        header += sum(24 + len(t.name.encode()) + 8 * len(t.shape) for t in self.tensors)
        if not self.tensors:
            return header
        return padded(header) + sum(padded(tensor.nbytes) for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """An output in every detail; `tensors` in the file's order.

    `part_sizes`: how many tensors each part of a split output holds, and `path` is the first part; `copied`: tensors
    and metadata are the source's, to the byte; `remarks`: what the user should know; `quality`: that there will be such
    figures, or with `copied` these figures; `in_place`: the output may take the source's place.
    """

    source: Source
    target: Target
    path: Path
    tensors: Sequence[PlannedTensor]
    entries: Sequence[Entry]
    remarks: Sequence[str] = ()
    part_sizes: tuple[int, ...] = ()
    copied: bool = False
    quality: Quality | None = None
    in_place: bool = False

    @property
    def parts(self) -> list[Part]:
        """The files to be written; checksum and quality are not known yet, and as long as they will be."""
        entries = list(self.entries)
        if not self.copied:
            entries = [entry for entry in entries if entry.key not in (*_CHECKSUM_KEYS, *_SPLIT_KEYS)]
        if self.quality is not None or not self.copied:
            entries = [entry for entry in entries if not is_quality_key(entry.key)]
        if self.quality is not None:
            entries += quality_entries(self.quality)
        if not self.copied:
            entries += checksum_entries("0" * DIGITS, np.zeros(len(self.tensors), np.uint64))
        if not self.part_sizes:
            return [Part(self.path, self.tensors, entries)]
        named = split_name(self.path)
        assert named is not None
        parts, first, count = [], 0, len(self.part_sizes)
        for index, size in enumerate(self.part_sizes):
            split = [
                Entry(keys.SPLIT_NO, ValueType.UINT16, index),
                Entry(keys.SPLIT_TENSORS_COUNT, ValueType.INT32, len(self.tensors)),
                Entry(keys.SPLIT_COUNT, ValueType.UINT16, count),
            ]
            path = part_path(named[0], index, count)
            parts.append(Part(path, self.tensors[first : first + size], split if index else [*entries, *split]))
            first += size
        return parts

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(part.size for part in self.parts)

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors that are read."""
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data for each parameter."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors) / sum(t.rows * t.shape[-1] for t in self.tensors)

    @property
    def notes(self) -> list[str]:
        """What the user should know: types that shapes forced, and `remarks`."""
        return [*(f"{tensor.name}: {tensor.fallback}" for tensor in self.tensors if tensor.fallback), *self.remarks]

    @property
    def inventory(self) -> dict[GGMLType, int]:
        """How many tensors have each type, most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors).most_common())


def checksum_entries(text: str, parts: npt.NDArray[np.uint64]) -> list[Entry]:
    """The two keys of a checksum."""
    return [string(keys.CHECKSUM, text), Entry(keys.TENSOR_CHECKSUMS, ValueType.ARRAY, parts, ValueType.UINT64)]


def quality_entries(quality: Quality, weights: str = "0" * DIGITS) -> list[Entry]:
    """The keys of a quality; `weights`: the checksum of what was measured."""
    return [Entry(*pair) for pair in quality.pairs(weights)]


def plan_convert(source: CheckpointSource, outtype: str, path: Path | None) -> Plan:
    """Plan `phiquant convert`: auto, f32, f16, bf16, q8_0 by the converter's rules, other types by llama-quantize's."""
    name = outtype.strip().lower()
    if name == "auto":
        name = _usual_type(source.tensors)
    if name not in _CONVERTER_TYPES:
        return plan_quantize(source, parse_file_type(outtype), path, Options())
    target = Target(FileType[name.upper()])
    planned = plan_conversion(source.tensors, GGMLType[name.upper()])
    return Plan(source, target, _output(source, target, path), planned, source.entries(target.file_type))


def plan_quantize(
    source: Source,
    target: Target,
    path: Path | None,
    options: Options,
    *,
    overrides: Iterable[Entry] = (),
    allow_requantize: bool = False,
    importance: Importance | None = None,
    calibrated: Calibrated | None = None,
    prune: Sequence[int] = (),
    dry_run: bool = False,
) -> Plan:
    """Plan `phiquant quantize`. A checkpoint is planned as if it had been converted without loss first.

    `prune`: layers to leave out; `calibrated`: instead of `importance`, that a `Maker` makes the weights. What
    `execute` could not do well is refused (RequestError for weights that need importance and have none, WeightsError
    for those that are quantized already, ImportanceError for a matrix that does not fit); with `dry_run` the first
    becomes a remark.
    """
    origin = str(source.files[0])
    check_options(target, options)
    entries = apply_overrides(source.entries(target.file_type), overrides)
    model = model_of(entries, origin)
    names = {tensor.name: tensor.name for tensor in source.tensors}
    if prune:
        pruning = Pruning(tuple(prune), model.blocks)
        names = pruning.names(names)
        entries = pruning.entries(entries, model.architecture)
    stored = {names[t.name]: t for t in source.tensors if t.name in names}
    tensors = [Tensor(name, t.shape, t.type) for name, t in stored.items()]
    if isinstance(source, CheckpointSource):
        tensors = [Tensor(t.name, t.shape, _lossless(t)) for t in tensors]
    with_statistics = importance is not None or calibrated is not None
    planned = plan_quantization(tensors, target, model, options, importance=with_statistics)
    if not any(tensor.nbytes for tensor in planned):
        raise WeightsError(f"{origin} holds no weights.")
    if not allow_requantize:
        check_requantization(planned)
    planned = [replace(t, source=stored[t.name].type, origin=stored[t.name].name) for t in planned]
    remarks: list[str] = []
    if importance is not None:
        planned, remarks = weigh(planned, importance, (tensor.name for tensor in source.tensors))
        entries = apply_overrides(entries, importance_entries(importance))
    if calibrated is not None:
        planned, remarks = mark_calibrated(planned, calibrated)
        remarks = [*calibrated.remarks, *remarks]
        entries = apply_overrides(entries, calibrated.entries)
    with_matrix = calibrated.origin if calibrated else importance.origin if importance else None
    refusal = missing_importance(planned, target, _model_for_imatrix(source), with_matrix)
    if refusal is not None:
        if not dry_run:
            raise refusal
        remarks.append(str(refusal))
    _check_possible(planned)
    return Plan(source, target, _output(source, target, path), planned, entries, remarks)


def _model_for_imatrix(source: Source) -> str:
    return str(source.files[0]) if isinstance(source, GGUFSource) else f"{source.name}.gguf"


def _check_possible(planned: Iterable[PlannedTensor]) -> None:
    for tensor in planned:
        if tensor.type is tensor.source:
            continue
        if tensor.type not in quants.QUANTIZABLE:
            raise UnsupportedError(
                f"Tensor {tensor.name} would become {tensor.type.name}, which is not made by this version; "
                "choose another type."
            )
        if tensor.source is not GGMLType.F64 and tensor.source not in quants.READABLE:
            raise UnsupportedError(
                f"Tensor {tensor.source_name} is {tensor.source.name}, which is not read by this version; "
                "start from another file."
            )


def _lossless(tensor: Tensor) -> GGMLType:
    """The type in which a converter keeps a checkpoint's tensor: vectors in F32, others as stored."""
    stored = GGMLType.F32 if tensor.type is GGMLType.F64 else tensor.type
    return plan_conversion([tensor], stored)[0].type


def _usual_type(tensors: Iterable[Tensor]) -> str:
    """`auto`: the type of the first matrix in 16 bits, else f16."""
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.type in (GGMLType.BF16, GGMLType.F16):
            return tensor.type.name.lower()
    return "f16"


def output_folder(source: Source, path: Path | None) -> Path:
    """Where an output goes whose path is given: itself if that is a directory. Else beside a GGUF source, or here.

    Not beside a source in the Hub's cache, which belongs to other programs, too.
    """
    if path is not None:
        return path if path.is_dir() else path.parent
    beside = isinstance(source, GGUFSource) and not hub.is_cached(source.files[0])
    return source.files[0].parent if beside else Path()


def _output(source: Source, target: Target, path: Path | None) -> Path:
    """The given path, or NAME-TYPE.gguf in `output_folder`."""
    if path is not None and not path.is_dir():
        return path
    name = source.name
    stem, hyphen, last = name.rpartition("-")
    if isinstance(source, GGUFSource) and hyphen and last.upper() in FileType.__members__:
        name = stem  # model-F16.gguf becomes model-Q4_K_M.gguf
    return output_folder(source, path) / f"{name}-{target.name}.gguf"


def padded(count: int) -> int:
    """Bytes with the zeros that follow a tensor."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _entry_bytes(entry: Entry) -> int:
    """Bytes of a key in the header: length and text of the key, type, value."""
    return 8 + len(entry.key.encode()) + 4 + _value_bytes(entry)


def _value_bytes(entry: Entry) -> int:
    if entry.type is ValueType.STRING:
        return 8 + len(entry.value.encode())
    if entry.type is not ValueType.ARRAY:
        return _SCALAR_BYTES[entry.type]
    if entry.item_type is ValueType.STRING:
        return 12 + sum(8 + len(item.encode()) for item in entry.value)
    assert entry.item_type is not None
    return 12 + _SCALAR_BYTES[entry.item_type] * len(entry.value)
