"""`phiquant inspect`: what a GGUF file says about itself, as tables or as JSON."""

import contextlib
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phiquant import arch
from phiquant.cli.quality import quality_rows
from phiquant.errors import GGUFError, PhiquantError
from phiquant.gguf import Field, GGMLType, GGUFFile, TensorInfo, open_model, parameter_count
from phiquant.gguf.describe import file_type_name
from phiquant.gguf.quality import Quality, standing
from phiquant.text import Tokenizer

__all__ = ["inspect", "printable"]

SHOWN_ITEMS: Final = 8  # of an array
SHOWN_TEXT: Final = 120  # characters of a string, in the table
_UNSEEN_WIDTH: Final = 200  # columns when the output goes to a file or a pipe


def inspect(path: Path, as_json: bool) -> None:
    """Print header, metadata, tensor table and totals of a GGUF file to standard output; GGUFError if it is not one.

    And, of a model that is supported, what the file does not say and is assumed when it runs.

    Tensor shapes are in GGUF's order (the contiguous extent first) and offsets count from the start of the file. JSON
    holds the same, with strings in full and the first items of each array beside their count. The first part of a split
    model stands for all parts, each of which is then named.
    """
    with open_model(path) as gguf:
        if as_json:
            json.dump(_document(gguf), sys.stdout, indent=2, allow_nan=False)
            sys.stdout.write("\n")
        else:
            _print(gguf)


def _document(gguf: GGUFFile) -> dict[str, Any]:
    return {
        "path": str(gguf.path),
        "size": gguf.size,
        "version": gguf.version,
        "byte_order": gguf.byte_order,
        "alignment": gguf.alignment,
        "data_offset": gguf.data_offset,
        "parts": [{"path": str(part.path), "size": part.size, "tensors": len(part.tensors)} for part in gguf.parts],
        "file_type": file_type_name(gguf),
        "assumptions": _assumptions(gguf),
        "quality": _quality_document(gguf),
        "metadata": {key: _field(field) for key, field in gguf.fields.items()},
        "tensors": [
            {
                "name": info.name,
                "shape": info.shape[::-1],
                "type": info.type.name,
                "size": info.nbytes,
                "offset": gguf.locate(info.name)[1],
                "part": gguf.parts.index(gguf.locate(info.name)[0]),
            }
            for info in gguf.tensors.values()
        ],
        "totals": {
            "tensors": len(gguf.tensors),
            **_cost(gguf.tensors.values()),
            "types": {kind.name: {"tensors": len(infos), **_cost(infos)} for kind, infos in _by_type(gguf)},
        },
    }


def _field(field: Field) -> dict[str, Any]:
    if field.item_type is None:
        return {"type": field.type.name, "value": _plain(field.value)}
    items = [_plain(item) for item in field.head(SHOWN_ITEMS)]
    shown = {"items": items} if field.count <= SHOWN_ITEMS else {"first_items": items}
    return {"type": field.type.name, "item_type": field.item_type.name, "count": field.count, **shown}


def _plain(value: Any) -> Any:
    """A value that JSON has: NaN and infinities become their names."""
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cost(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    infos = list(infos)
    elements = parameter_count(infos)
    size = sum(info.nbytes for info in infos)
    return {"elements": elements, "size": size, "bits_per_weight": round(8 * size / elements, 4) if elements else None}


def _by_type(gguf: GGUFFile) -> list[tuple[GGMLType, list[TensorInfo]]]:
    """The tensors of each type, the types that take the most bytes first."""
    bytes_of: Counter[GGMLType] = Counter()
    for info in gguf.tensors.values():
        bytes_of[info.type] += info.nbytes
    return [(kind, [i for i in gguf.tensors.values() if i.type is kind]) for kind, _ in bytes_of.most_common()]


def _assumptions(gguf: GGUFFile) -> list[str]:
    """Of model and vocabulary; nothing of what does not run here, which is no reason not to show the file."""
    found: list[str] = []
    with contextlib.suppress(PhiquantError):
        found += arch.load(gguf).assumptions
    with contextlib.suppress(PhiquantError):
        found += Tokenizer.from_gguf(gguf).notes
    return found


def _print(gguf: GGUFFile) -> None:
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _UNSEEN_WIDTH)
    header = Table.grid(padding=(0, 2))
    header.add_row("file", _safe(str(gguf.path)))
    header.add_row("size", f"{gguf.size:,} bytes")
    header.add_row("format", f"GGUF {gguf.version}, {gguf.byte_order}-endian, aligned to {gguf.alignment}")
    if len(gguf.parts) > 1:
        shown = [f"{part.path.name}: {len(part.tensors)} tensors, {part.size:,} bytes" for part in gguf.parts]
        header.add_row("parts", _safe("\n".join(shown), keep="\n"))
    header.add_row("file type", file_type_name(gguf) or "not stated")
    for assumption in _assumptions(gguf):
        header.add_row("assumed", _safe(assumption))
    console.print(header)

    _print_quality(gguf, console)

    metadata = _table("key", "type", "value", title=f"Metadata: {len(gguf.fields)} keys")
    for key, field in gguf.fields.items():
        kind = field.type.name if field.item_type is None else f"{field.item_type.name} [{field.count:,}]"
        metadata.add_row(_safe(key), kind, _shown(field))
    console.print(metadata)

    tensors = _table("name", "shape", "type", "size", "offset", title=f"Tensors: {len(gguf.tensors)}", right=(3, 4))
    for info in gguf.tensors.values():
        shape = " x ".join(map(str, info.shape[::-1])) or "1"
        offset = gguf.locate(info.name)[1]
        tensors.add_row(_safe(info.name), shape, info.type.name, f"{info.nbytes:,}", f"{offset:,}")
    console.print(tensors)

    totals = _table("type", "tensors", "elements", "bytes", "bits per weight", title="Totals", right=(1, 2, 3, 4))
    rows = [(kind.name, infos) for kind, infos in _by_type(gguf)]
    for name, infos in [*rows, ("all", list(gguf.tensors.values()))]:
        cost = _cost(infos)
        bits = "" if cost["bits_per_weight"] is None else f"{cost['bits_per_weight']:.3f}"
        totals.add_row(name, f"{len(infos):,}", f"{cost['elements']:,}", f"{cost['size']:,}", bits)
    console.print(totals)


def _quality_document(gguf: GGUFFile) -> dict[str, Any] | None:
    """What the file records of its quality; None if nothing, or nothing that can be read."""
    try:
        found = Quality.recorded(gguf)
        return None if found is None else {**dataclasses.asdict(found), "standing": standing(gguf)}
    except GGUFError:
        return None


def _print_quality(gguf: GGUFFile, console: Console) -> None:
    try:
        found = Quality.recorded(gguf)
        whose = None if found is None else standing(gguf)
    except GGUFError as error:
        console.print(_safe(f"The quality that the file records cannot be read: {error}"))
        return
    if found is None:
        return
    title = "Quality, measured beside the model that the file was made from"
    if whose != "of this file":
        title = "Quality of another file: a program that does not know these keys copied them; measure this one"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    for name, value in quality_rows(found):
        table.add_row(name, _safe(value))
    console.print(table)


def _table(*columns: str, title: str, right: tuple[int, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


def _shown(field: Field) -> Text:
    if field.item_type is None:
        value = field.value
        return _safe(_shortened(value) if isinstance(value, str) else str(value))
    items = [json.dumps(_shortened(i, 24), ensure_ascii=False) if isinstance(i, str) else str(i) for i in _head(field)]
    return _safe(", ".join(items) + (", …" if field.count > SHOWN_ITEMS else ""))


def _head(field: Field) -> list[Any]:
    return list(field.head(SHOWN_ITEMS))


def _shortened(text: str, limit: int = SHOWN_TEXT) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _safe(text: str, keep: str = "") -> Text:
    """Text from a file for a terminal: what is not printable is escaped, so that it cannot steer the terminal."""
    return Text(printable(text, keep))


def printable(text: str, keep: str = "") -> str:
    """Text with what is not printable escaped, but for the characters in `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
