"""A Hugging Face checkpoint on disk: its configuration files and its tensors in safetensors shards."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from phiquant.convert.positioned import PositionedFile
from phiquant.convert.safetensors import StoredTensor, read_header
from phiquant.errors import CheckpointError
from phiquant.gguf.closing import Closing

__all__ = ["Checkpoint", "StoredTensor", "read_json", "read_text"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_TEXT_BYTES = 64_000_000  # tokenizer.json of a 200,000-token vocabulary has some 20 MB


class Checkpoint(Closing):
    """An opened checkpoint directory; a context manager.

    `directory`; `config`: config.json as it is; `tensors`: name -> StoredTensor, by shard, then by name.
    """

    def __init__(self, directory: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        self.directory = directory
        self.config = config
        self.tensors: Mapping[str, StoredTensor] = tensors
        self._files: dict[Path, PositionedFile] = {}
        for stored in tensors.values():
            if stored.file not in self._files:
                self._files[stored.file] = PositionedFile(stored.file, CheckpointError)

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Read the configuration and every shard's header; CheckpointError names what is missing or wrong."""
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; give a checkpoint's directory or a repository id.")
        config = read_json(directory / "config.json")
        if config is None:
            raise CheckpointError(f"{directory} has no config.json; is it the directory of a Hugging Face checkpoint?")
        return cls(directory, config, _index_tensors(directory))

    def json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object file of the checkpoint, None if there is no such file."""
        return read_json(self.directory / name)

    def text(self, name: str) -> str | None:
        """Return a UTF-8 text file of the checkpoint, None if there is no such file."""
        return read_text(self.directory / name)

    def read(self, name: str, row0: int, row1: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of rows `row0` up to `row1` of a tensor; a row is all but the first dimension."""
        stored = self.tensors[name]
        rows = stored.shape[0] if stored.shape else 1
        if not 0 <= row0 <= row1 <= rows:
            raise ValueError(f"rows {row0} to {row1} of {name}, which has {rows}")
        row_bytes = stored.nbytes // rows if rows else 0
        target = np.empty((row1 - row0) * row_bytes, np.uint8)
        self.read_into(stored, row0 * row_bytes, target)
        return target

    def read_into(self, stored: StoredTensor, begin: int, target: npt.NDArray[np.uint8]) -> None:
        """Fill `target` with the tensor's bytes from `begin` on."""
        if begin + target.size > stored.nbytes:
            raise ValueError(f"bytes {begin} to {begin + target.size} of {stored.name}, which has {stored.nbytes}")
        self._files[stored.file].read_into(stored.offset + begin, target)

    def close(self) -> None:
        """Close every shard."""
        for file in self._files.values():
            file.close()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON object; None if there is no such file, CheckpointError if it holds anything else."""
    text = read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is not valid JSON: {exc}.") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return value


def read_text(path: Path) -> str | None:
    """Return a file's UTF-8 text; None if there is no such file, CheckpointError if it cannot be read."""
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_TEXT_BYTES:,} bytes.")
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as exc:
        raise CheckpointError(f"{path} is not valid UTF-8.") from exc
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}.") from exc


def _index_tensors(directory: Path) -> dict[str, StoredTensor]:
    index = read_json(directory / _INDEX)
    if index is not None:
        return _read_shards(directory, index)
    single = directory / _SINGLE
    if single.is_file():
        return read_header(single)
    loose = sorted(path.name for path in directory.glob("model*.safetensors"))
    if loose:
        raise CheckpointError(
            f"{directory} has {loose[0]} but no {_INDEX}, which says where each tensor is; "
            "download it from the same repository."
        )
    if any(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory} holds weights as pytorch_model*.bin only, which can run code when read; "
            "convert them to safetensors first (in transformers: model.save_pretrained(directory))."
        )
    raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}; download the weights too.")


def _read_shards(directory: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    where = index.get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise CheckpointError(f"{directory / _INDEX} has no weight_map from tensor names to file names.")
    shards = sorted(set(where.values()))
    for shard in shards:
        if PurePosixPath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{directory / _INDEX} names {shard!r}, which is not a safetensors file beside it.")
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {_several(missing)}, named by {_INDEX}; download what is missing there."
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, stored in read_header(directory / shard).items():
            if where.get(name) != shard:
                continue  # a name that the index finds elsewhere, or nowhere, is not part of the model
            tensors[name] = stored
    absent = sorted(set(where) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{_several(absent)} should be in {where[absent[0]]} by {_INDEX} but is not; download that file again."
        )
    return tensors


def _several(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
