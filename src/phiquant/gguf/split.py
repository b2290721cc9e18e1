"""Models in several files: how the parts are named, how tensors are divided among them, and all parts opened as one.

    phi-00001-of-00003.gguf     all metadata, and the first tensors (or none)
    phi-00002-of-00003.gguf     nothing but the keys of the split, and the next tensors
    phi-00003-of-00003.gguf

Every part has `split.no` (from 0), `split.count` and `split.tensors.count` (of all parts together). The parts are found
by their names, so reading starts at the first.
"""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from numpy import uint8
from numpy.typing import NDArray

from phiquant.errors import GGUFError
from phiquant.gguf import keys
from phiquant.gguf.header import MAX_TENSORS, TensorInfo
from phiquant.gguf.reader import GGUFFile

__all__ = ["MAX_PARTS", "GGUFModel", "divide", "open_model", "part_path", "split_name"]

MAX_PARTS: Final = (1 << 16) - 1  # split.count has 16 bits
_NAME: Final = re.compile(r"(?s)(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})[.]gguf")


def part_path(prefix: str | Path, index: int, count: int) -> Path:
    """The file of part `index` (from 0) of `count`, all beginning with `prefix`."""
    return Path(f"{prefix}-{index + 1:05}-of-{count:05}.gguf")


def split_name(path: str | Path) -> tuple[Path, int, int] | None:
    """Prefix, index (from 0) and number of parts that a part's name states; None for any other name."""
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if match is None or not match["prefix"] or not 1 <= int(match["number"]) <= int(match["count"]):
        return None
    return path.with_name(match["prefix"]), int(match["number"]) - 1, int(match["count"])


def divide(
    sizes: Sequence[int],
    *,
    max_tensors: int | None = None,
    max_bytes: int | None = None,
    first_empty: bool = False,
) -> list[int]:
    """How many tensors each part gets, of tensors of the given sizes (bytes, padded), as llama-gguf-split divides them.

    By `max_tensors` in each, or by `max_bytes` of tensor data in each, where a tensor larger than that has a part for
    itself. `first_empty`: the first part holds metadata only.
    """
    if (max_tensors is None) == (max_bytes is None) or (max_tensors or max_bytes or 0) <= 0:
        raise ValueError("parts are limited either by tensors or by bytes, to at least one")
    counts = [0]
    filled = 0
    for size in sizes:
        full = counts[-1] == max_tensors if max_bytes is None else filled + size > max_bytes
        if full and counts[-1]:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return [0, *counts] if first_empty else counts


class GGUFModel(GGUFFile):
    """All parts of a split model as one file: metadata of the first, tensors of all; `open_model` makes one.

    `size` counts the bytes of all parts; offsets in `tensors` are within the part that `locate` tells.
    """

    def __init__(self, parts: Sequence[GGUFFile]) -> None:
        """Take parts whose split keys agree; GGUFError if a tensor is in two of them."""
        first = parts[0]
        self.path, self.version, self.alignment = first.path, first.version, first.alignment
        self.data_offset, self.fields, self.metadata = first.data_offset, first.fields, first.metadata
        self.size = sum(part.size for part in parts)
        self._parts = tuple(parts)
        self._holders: dict[str, GGUFFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in self._holders:
                    raise GGUFError(
                        f"The tensor {name!r:.80} is in {self._holders[name].path.name} and again in {part.path}; "
                        "these parts are not of one model."
                    )
                self._holders[name] = part
                self.tensors[name] = info

    @property
    def parts(self) -> tuple[GGUFFile, ...]:
        """See `GGUFFile`."""
        return self._parts

    def locate(self, name: str) -> tuple[GGUFFile, int]:
        """See `GGUFFile`."""
        self._info(name)
        return self._holders[name].locate(name)

    def data(self, name: str) -> NDArray[uint8]:
        """See `GGUFFile`."""
        self._info(name)
        return self._holders[name].data(name)

    def close(self) -> None:
        """See `GGUFFile`."""
        for part in self._parts:
            part.close()


def open_model(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a model, whole or split; of a split one `path` is the first part. GGUFError says what does not fit."""
    first = GGUFFile.open(path)
    parts = [first]
    try:
        count = first.get(keys.SPLIT_COUNT, int, 0)
        if count <= 1:
            return first
        prefix = _prefix(first, count)
        total = first.get(keys.SPLIT_TENSORS_COUNT, int, None)
        for index in range(1, count):
            parts.append(_open_part(part_path(prefix, index, count), index, count, total))
            if sum(len(part.tensors) for part in parts) > MAX_TENSORS:
                raise GGUFError(f"The parts of {first.path} hold more than {MAX_TENSORS} tensors, which is refused.")
        model = GGUFModel(parts)
        if total is not None and total != len(model.tensors):
            raise GGUFError(
                f"The {count} parts of {first.path} hold {len(model.tensors)} tensors and should hold {total}; fetch "
                "them again."
            )
        return model
    except BaseException:
        for part in parts:
            with contextlib.suppress(BufferError):
                part.close()
        raise


def _prefix(first: GGUFFile, count: int) -> Path:
    """What the names of all parts begin with; GGUFError if this is not the first part, or does not have its name."""
    index = first.require(keys.SPLIT_NO, int)
    if count > MAX_PARTS or not 0 <= index < count:
        raise GGUFError(f"{first.path} says that it is part {index + 1} of {count}, which cannot be; fetch it again.")
    named = split_name(first.path)
    if index:
        where = part_path(named[0], 0, count).name if named else f"...-00001-of-{count:05}.gguf"
        raise GGUFError(
            f"{first.path} is part {index + 1} of a model in {count} files; give the first one, {where}, instead."
        )
    if named is None or named[1:] != (0, count):
        raise GGUFError(
            f"{first.path} is the first of {count} parts, which are found by name; give it back its name, "
            f"...-00001-of-{count:05}.gguf."
        )
    return named[0]


def _open_part(path: Path, index: int, count: int, total: int | None) -> GGUFFile:
    if not path.exists():
        raise GGUFError(f"{path} is missing, part {index + 1} of {count} of the model; put it beside the first part.")
    part = GGUFFile.open(path)
    try:
        stated = part.get(keys.SPLIT_NO, int, -1), part.get(keys.SPLIT_COUNT, int, -1)
        if stated != (index, count):
            said = "no part of a model" if -1 in stated else f"part {stated[0] + 1} of {stated[1]}"
            raise GGUFError(
                f"{path} should be part {index + 1} of {count} by its name and is {said} by its keys; fetch it again."
            )
        theirs = part.get(keys.SPLIT_TENSORS_COUNT, int, total)
        if theirs != total:
            raise GGUFError(
                f"{path} is a part of a model with {theirs} tensors and the first part's model has {total}; they are "
                "not of one model."
            )
    except BaseException:
        with contextlib.suppress(BufferError):
            part.close()
        raise
    return part
