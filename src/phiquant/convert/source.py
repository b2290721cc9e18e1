"""One view of all that can be quantized: tensors under GGUF names and metadata, from a checkpoint or a GGUF file."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

import phiquant
from phiquant import hub
from phiquant.convert.architectures import settings_of
from phiquant.convert.checkpoint import Checkpoint
from phiquant.convert.entries import Entry, check_entries, string, uint32
from phiquant.convert.metadata import general_metadata, model_name, read_model_card, size_label
from phiquant.convert.positioned import PositionedFile
from phiquant.convert.recipes import Model, Tensor
from phiquant.convert.safetensors import StoredTensor
from phiquant.convert.vocabulary import TokenizerFiles, strips_whitespace, tokenizer_keys
from phiquant.errors import ArchitectureError, CheckpointError, GGUFError, UnsupportedError
from phiquant.gguf import GGMLType, keys, open_model, parameter_count
from phiquant.gguf.split import split_name

__all__ = ["CheckpointSource", "GGUFSource", "Source", "model_of", "open_source"]

QUANTIZATION_VERSION = 2
VERSION_KEY = "phiquant.version"
_SPLIT_KEYS = (keys.SPLIT_NO, keys.SPLIT_COUNT, keys.SPLIT_TENSORS_COUNT)

_RULES_OF_THEIR_OWN = ("falcon", "glm5-next", "bailingmoe3")
_DTYPES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16, "F64": GGMLType.F64}
_Bytes = npt.NDArray[np.uint8]


class Source(Protocol):
    """Tensors and metadata to read from. `tensors` are in the source's order, types as stored."""

    name: str  # of the model, for the name of the output
    files: Sequence[Path]  # what is read, and so may not be written
    tensors: Sequence[Tensor]

    def entries(self, file_type: int | None) -> list[Entry]:
        """Return the metadata of an output of that file type; None keeps the source's own."""

    def read_into(self, tensor: str, begin: int, target: _Bytes) -> None:
        """Fill `target` with a tensor's bytes as stored, from byte `begin` on; safe from several threads."""

    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(model: str | Path, *, quiet: bool = False) -> "Source":
    """Open a GGUF file, a checkpoint directory, or a repository id of the Hub (fetched first)."""
    path = hub.local(model)
    if path is not None and path.is_file():
        return GGUFSource(path)
    resolved = hub.resolve(model, quiet=quiet)
    return GGUFSource(resolved) if resolved.is_file() else CheckpointSource(resolved)


def model_of(entries: Sequence[Entry], origin: str) -> Model:
    """What the mixing rules ask of a model of any architecture, from its metadata.

    GGUFError if a key is missing or no positive number; ArchitectureError if there is no architecture, or one for which
    llama-quantize has rules that are not here.
    """
    values = {entry.key: entry for entry in entries}
    architecture = values[keys.ARCHITECTURE].value if keys.ARCHITECTURE in values else None
    if not isinstance(architecture, str) or not architecture or architecture in _RULES_OF_THEIR_OWN:
        raise ArchitectureError(
            f"{origin} has the architecture {str(architecture)[:60]!r}, whose mixtures this version does not know; "
            "quantize it with llama.cpp."
        )
    names = keys.ArchitectureKeys(architecture)

    def count(key: str, default: int | None = None, least: int = 1) -> int:
        entry = values.get(key)
        value = default if entry is None else entry.value
        if isinstance(value, np.ndarray) and value.size:  # one for each layer: the first counts
            value = value[0].item()
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise GGUFError(f"{origin} lacks a positive whole number {key}; it is damaged, so convert the model again.")
        return value

    heads = count(names.head_count)
    return Model(
        count(names.block_count),
        heads,
        count(names.head_count_kv, heads, least=0),
        count(names.expert_count, 0, least=0),
        architecture,
    )


class CheckpointSource(Source):
    """A Hugging Face checkpoint under GGUF names."""

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        self._checkpoint = checkpoint = Checkpoint.open(directory)
        try:
            self.name = model_name(directory)
            self.files: Sequence[Path] = sorted({stored.file for stored in checkpoint.tensors.values()})
            self._settings = settings_of(checkpoint.config)
            self._assembled = self._settings.assemble(checkpoint.tensors)
            constants = self._settings.constants()
            self.tensors: Sequence[Tensor] = [
                *(Tensor(name, values.shape, GGMLType.F32) for name, values in constants.items()),
                *(Tensor(name, made.shape, _type_of(made.stored)) for name, made in self._assembled.items()),
            ]
            self._constants = {name: values.reshape(-1).view(np.uint8) for name, values in constants.items()}
            files = TokenizerFiles.read(directory, checkpoint.config)
            self._tokenizer = tokenizer_keys(files, self._settings.vocab_size)
            self._general = self._describe(strips=strips_whitespace(files))
            check_entries([*self._general, *self._tokenizer], str(directory))
        except BaseException:
            checkpoint.close()
            raise

    def _describe(self, strips: bool) -> list[Entry]:
        checkpoint = self._checkpoint
        entries = general_metadata(
            self._settings.architecture,
            self.name,
            read_model_card(checkpoint.text("README.md")),
            checkpoint.config,
            checkpoint.json("generation_config.json") or {},
            parameters=parameter_count(self.tensors),
            label=_size_label(self.tensors),
        )
        return [_phi3_named(entry) if strips and entry.key == keys.NAME else entry for entry in entries]

    def entries(self, file_type: int | None) -> list[Entry]:
        """Everything llama.cpp's converter writes, then our own keys. What the tokenizer says has the last word."""
        kind = self._own_file_type() if file_type is None else file_type
        said = {entry.key for entry in self._tokenizer}
        return [
            *self._general,
            *(entry for entry in self._settings.entries() if entry.key not in said),
            uint32(keys.FILE_TYPE, kind),
            uint32(keys.QUANTIZATION_VERSION, QUANTIZATION_VERSION),
            *self._tokenizer,
            string(VERSION_KEY, phiquant.__version__),
        ]

    def _own_file_type(self) -> int:
        """The file type of a plain copy: that of the embedding."""
        kind = next(tensor.type for tensor in self.tensors if tensor.name == "token_embd.weight")
        return {GGMLType.F16: 1, GGMLType.BF16: 32}.get(kind, 0)

    def read_into(self, tensor: str, begin: int, target: _Bytes) -> None:
        """See `Source`."""
        constant = self._constants.get(tensor)
        if constant is not None:
            target[:] = constant[begin : begin + target.size]
            return
        self._assembled[tensor].read_into(self._checkpoint.read_into, begin, target)

    def close(self) -> None:
        """See `Source`."""
        self._checkpoint.close()


class GGUFSource(Source):
    """A GGUF model, in one file or several parts; its metadata is carried over, but for the keys of the split.

    `part_sizes`: how many tensors each part holds.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        with open_model(path) as model:
            self.files: Sequence[Path] = [part.path for part in model.parts]
            self.part_sizes = tuple(len(part.tensors) for part in model.parts)
            named = split_name(path) if len(self.files) > 1 else None
            self.name = named[0].name if named else path.stem
            places = [model.locate(name) for name in model.tensors]
            self._places = {
                info.name: (model.parts.index(part), offset, info.nbytes)
                for info, (part, offset) in zip(model.tensors.values(), places, strict=True)
            }
            self.tensors: Sequence[Tensor] = [
                Tensor(info.name, info.shape or (1,), info.type) for info in model.tensors.values()
            ]
            self.metadata: Sequence[Entry] = [
                Entry(key, field.type, field.value, field.item_type)
                for key, field in model.fields.items()
                # What is written is aligned to 32.
                if key not in _SPLIT_KEYS and (key != keys.ALIGNMENT or model.alignment == 32)
            ]
        self._files: list[PositionedFile] = []
        try:
            for file in self.files:
                self._files.append(PositionedFile(file, GGUFError))
        except BaseException:
            self.close()
            raise

    def entries(self, file_type: int | None) -> list[Entry]:
        """The file's metadata with file type and quantization version set, in the file's order."""
        entries = {entry.key: entry for entry in self.metadata}
        if file_type is not None:
            entries[keys.FILE_TYPE] = uint32(keys.FILE_TYPE, file_type)
        entries[keys.QUANTIZATION_VERSION] = uint32(keys.QUANTIZATION_VERSION, QUANTIZATION_VERSION)
        return list(entries.values())

    def read_into(self, tensor: str, begin: int, target: _Bytes) -> None:
        """See `Source`."""
        part, offset, size = self._places[tensor]
        if begin + target.size > size:
            raise ValueError(f"bytes {begin} to {begin + target.size} of {tensor}, which has {size}")
        self._files[part].read_into(offset + begin, target)

    def close(self) -> None:
        """See `Source`."""
        for file in self._files:
            file.close()


def _size_label(tensors: Sequence[Tensor]) -> str:
    """The parameters of a model; of one with experts their number and the parameters of it if it had but one."""
    stacked = [tensor for tensor in tensors if "_exps." in tensor.name]
    shared = parameter_count(tensor for tensor in tensors if "_exps." not in tensor.name)
    if not stacked:
        return size_label(shared)
    return f"{stacked[0].matrices}x{size_label(shared + sum(math.prod(t.shape[1:]) for t in stacked))}"


def _phi3_named(name: Entry) -> Entry:
    """llama.cpp lets special tokens swallow whitespace, as Phi-3's do, only in files whose name says Phi-3."""
    lower = name.value.lower()
    return name if "phi-3" in lower or "phi3" in lower else string(name.key, f"{name.value} (phi-3)")


def _type_of(stored: StoredTensor) -> GGMLType:
    if stored.dtype not in _DTYPES:
        raise UnsupportedError(
            f"Tensor {stored.name} of {stored.file} is stored as {stored.dtype}; "
            "only F32, F16, BF16 and F64 weights can be converted."
        )
    if not stored.nbytes:
        raise CheckpointError(f"Tensor {stored.name} of {stored.file} is empty.")
    return _DTYPES[stored.dtype]
