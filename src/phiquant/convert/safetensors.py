"""The header of a safetensors file, read with distrust.

A file is an unsigned 64-bit little-endian length, that many bytes of JSON, then the tensors' bytes. The JSON maps names
to `{"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}`, offsets counted from the end of the
header; the ranges cover the rest of the file without gap or overlap. `__metadata__` is skipped.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phiquant.convert.positioned import PositionedFile
from phiquant.errors import CheckpointError

__all__ = ["StoredTensor", "read_header"]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**62

# bits of one element of each type the format names
_DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: `nbytes` at `offset` from the start of `file`, C order, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, sorted by name; CheckpointError if any field is not as promised."""
    with PositionedFile(path, CheckpointError) as file:
        if file.size < 8:
            raise CheckpointError(f"{path} has only {file.size} bytes and is no safetensors file; download it again.")
        prefix = np.empty(8, np.uint8)
        file.read_into(0, prefix)
        length = int.from_bytes(prefix.tobytes(), "little")
        if length > MAX_HEADER_BYTES or 8 + length > file.size:
            raise CheckpointError(
                f"{path} is no safetensors file or is truncated: its header claims {length:,} bytes, "
                f"the file has {file.size:,}; download it again."
            )
        raw = np.empty(length, np.uint8)
        file.read_into(8, raw)
        size = file.size
    entries = _parse_json(path, raw.tobytes())
    tensors = [
        _tensor(path, name, entry, 8 + length, size) for name, entry in entries.items() if name != "__metadata__"
    ]
    _check_coverage(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: tensor.name)}


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path} names {_short(twice)} twice in its header.")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} has a header that is not valid JSON; download it again.") from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object; download it again.")
    return header


def _tensor(path: Path, name: str, entry: object, data: int, size: int) -> StoredTensor:
    what = f"tensor {_short(name)} of {path}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"The entry for {what} is not a JSON object.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CheckpointError(
            f"The data type {_short(dtype)} of {what} is not known; known are {', '.join(_DTYPE_BITS)}."
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_count(n) for n in shape):
        raise CheckpointError(f"The shape of {what} is not a list of at most {_MAX_DIMENSIONS} counts.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise CheckpointError(f"The data_offsets of {what} are not two counts.")
    elements = math.prod(shape)
    if elements > _MAX_ELEMENTS:
        raise CheckpointError(f"The shape of {what} has more elements than any file.")
    begin, end = offsets
    nbytes = elements * _DTYPE_BITS[dtype] // 8
    if begin > end or data + end > size:
        raise CheckpointError(
            f"The bytes {begin:,} to {end:,} of {what} lie outside the file of {size:,} bytes; download it again."
        )
    if end - begin != nbytes:
        raise CheckpointError(f"The shape of {what} needs {nbytes:,} bytes, its data_offsets span {end - begin:,}.")
    return StoredTensor(name, dtype, tuple(shape), path, data + begin, nbytes)


def _check_coverage(path: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    position = data
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            problem = "overlaps another tensor" if tensor.offset < position else "leaves a gap before it"
            raise CheckpointError(f"Tensor {_short(tensor.name)} of {path} {problem}.")
        position += tensor.nbytes
    if position != size:
        raise CheckpointError(f"{path} has {size - position:,} bytes after its last tensor.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
