"""Types per tensor: a table of kinds and layers for each file, coloured by type, with the error of each weight."""

from ..gguf.types import GGMLType
from .figures import FileFigures, TensorError, placed
from .markup import Markup, element, joined
from .scales import short

__all__ = ["bits_of", "hue", "types_table"]


def types_table(file: FileFigures) -> Markup:
    """Rows are kinds of matrices, columns the layers; a cell has the type and the relative squared error."""
    cells: dict[str, dict[str, TensorError]] = {}
    others: list[TensorError] = []
    layers: set[int] = set()
    for weight in file.weights:
        layer, kind = placed(weight.name)
        if not weight.matrix:
            continue
        if layer.isdigit():
            cells.setdefault(kind, {})[layer] = weight
            layers.add(int(layer))
        else:
            others.append(weight)
    order = [str(layer) for layer in sorted(layers)]
    head = element("tr", element("th", "tensor", scope="col"), *(element("th", layer, scope="col") for layer in order))
    rows = [
        element(
            "tr",
            element("th", kind.removesuffix(".weight"), scope="row"),
            *(_cell(found.get(layer)) for layer in order),
        )
        for kind, found in cells.items()
    ]
    caption = f"{file.label}: type of each matrix by layer, with its relative squared error"
    parts = [
        element(
            "div",
            element(
                "table", element("caption", caption), element("thead", head), element("tbody", *rows), class_="types"
            ),
            class_="scroll",
            tabindex=0,
            role="region",
            aria_label=caption,
        )
    ]
    if others:
        row = element(
            "tr", *(joined(element("th", one.name.removesuffix(".weight"), scope="row"), _cell(one)) for one in others)
        )
        told = f"{file.label}: matrices outside the layers"
        parts.append(element("table", element("caption", told), element("tbody", row), class_="types"))
    vectors = sorted({weight.type for weight in file.weights if not weight.matrix})
    if vectors:
        count = sum(1 for weight in file.weights if not weight.matrix)
        parts.append(element("p", f"{count} vectors (norms, biases, factors) are {', '.join(vectors)}.", class_="soft"))
    return joined(*parts)


def bits_of(kind: str) -> float:
    """Bits for each weight of a type."""
    known = GGMLType[kind]
    return 8 * known.block_bytes / known.block_elements


def hue(kind: str) -> int:
    """The colour of a type, in degrees: red for few bits, over green to blue for many."""
    return round(240 * min(max((bits_of(kind) - 1.5) / (8.5 - 1.5), 0.0), 1.0)) if bits_of(kind) <= 9 else 270


def _cell(weight: TensorError | None) -> Markup:
    if weight is None:
        return element("td", "–")
    error = "" if weight.relative is None else element("small", short(weight.relative))
    return element("td", weight.type, error, class_="type", style=f"--hue:{hue(weight.type)}", title=weight.name)
