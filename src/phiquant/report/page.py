"""The report as one page: HTML with its style and its plots within, no script, nothing from elsewhere.

Its content security policy forbids scripts and all that is loaded, should anything ever slip through `markup`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .figures import FileFigures, Report, pareto
from .markup import Child, Markup, element
from .plots import Series, key, lines, maker_key, size_quality
from .samples import samples
from .scales import short
from .types import types_table

__all__ = ["BINS", "binned", "page"]

BINS: Final = 32
"""Points of the curve by position."""

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(report: Report) -> str:
    """The whole page."""
    title = report.reference.title or report.reference.path.stem
    style = Markup(Path(__file__).with_name("page.css").read_text("utf-8"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title}: size and quality"),
        element("style", style),
    )
    body = element(
        "body",
        element(
            "main",
            _opening(report, title),
            _quality(report.files),
            _layers(report),
            _positions(report),
            _types(report.files),
            _section("Continuations", "Each is the likeliest token at every step.", samples(report)),
        ),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def binned(report: Report, file: FileFigures) -> list[tuple[float, float]]:
    """The middle of some neighbouring positions, and their mean divergence."""
    values, width = file.by_position, _width(file)
    parts = [values[start : start + width] for start in range(0, len(values), width)]
    return [
        (report.first + start * width + (len(part) - 1) / 2, sum(part) / len(part)) for start, part in enumerate(parts)
    ]


def _opening(report: Report, title: str) -> Markup:
    reference = report.reference
    told = (
        f"{len(report.files)} files beside {reference.path.name} ({reference.file_type or 'no type stated'}, "
        f"{reference.size / 1e6:,.1f} MB), whose perplexity is {reference.perplexity.value:.4f} ± "
        f"{reference.perplexity.error:.4f}. Read was {report.text} in {report.windows} windows of {report.size} "
        f"tokens; the second half of each is scored, {reference.perplexity.tokens:,} positions in all."
    )
    kept = (
        "The reference's log-probabilities were kept in 16 bits, as llama-perplexity keeps them: a divergence is right "
        "to a few millionths."
    )
    parts: list[Child] = [
        element("h1", f"{title}: size and quality"),
        element("p", told),
        element("p", kept, class_="soft"),
        element("p", "SHA-256 of the text: ", element("span", report.text_sha256, class_="hash"), class_="soft"),
    ]
    if report.remarks:
        parts.append(element("ul", *(element("li", remark) for remark in report.remarks), class_="soft"))
    return element("header", *parts)


def _quality(files: Sequence[FileFigures]) -> Markup:
    front = {file.path for file in pareto(files)}
    rows = []
    for file in files:
        divergence = file.comparison.divergence
        rows.append(
            [
                file.label,
                file.file_type or "–",
                "phiquant" if file.made_here else "other",
                f"{file.size / 1e6:,.1f}",
                f"{file.bits:.2f}",
                f"{short(divergence.mean)} ± {short(divergence.error)}",
                short(divergence.percentiles[99.9]),
                f"{100 * divergence.top1:.2f} %",
                f"{file.comparison.perplexity.value:.4f}",
                "yes" if file.path in front else "no",
            ]
        )
    head = ["file", "type", "made by", "MB", "bits per weight", "mean KL", "99.9 % below", "same top token"]
    table = _table("All files", [*head, "perplexity", "on the front"], rows)
    told = (
        "KL divergence of each file's next-token distributions from the reference's, in nats per token. Who made a "
        "file is told by its checksum."
    )
    return _section("Size against quality", told, element("figure", size_quality(files), maker_key()), table)


def _layers(report: Report) -> Markup:
    names: list[str] = []
    for file in report.files:
        names += [layer.layer for layer in file.layers if layer.layer not in names]
    names.sort(key=lambda layer: (layer != "embedding", layer == "output", layer.zfill(4)))
    found = [{layer.layer: layer.relative for layer in file.layers} for file in report.files]
    series = [
        Series(file.label, [(float(i), layers.get(name)) for i, name in enumerate(names)])
        for file, layers in zip(report.files, found, strict=True)
    ]
    weighed = (
        "every square is weighted by the importance of its column, the mean square of what it is multiplied by "
        f"({report.weighted_by})"
        if report.weighted_by is not None
        else "all weights count alike, whatever they are multiplied by; with an importance matrix they would not"
    )
    told = (
        "Sum of squared differences between the weights of a file and the reference's, relative to the sum of the "
        f"reference's squares, over all matrices of a layer; {weighed}. It says how much rounding took away, not what "
        "that costs: errors of some layers matter more than those of others. Zero, of weights left as they were, has "
        "no place on the axis."
    )
    rows = [[name, *(_figure(layers.get(name)) for layers in found)] for name in names]
    labels = [file.label for file in report.files]
    drawing = lines(
        "layer-error",
        "Relative squared error of weights by layer",
        f"A line for each of {len(series)} files over the layers from the embedding to the output; the table has the "
        "figures.",
        series,
        "layer",
        "relative squared error (logarithmic)",
        names,
    )
    table = _table("Relative squared error by layer", ["layer", *labels], rows)
    return _section("Error of weights by layer", told, _beside(element("figure", drawing, key(labels)), table))


def _positions(report: Report) -> Markup:
    curves = [binned(report, file) for file in report.files]
    labels = [file.label for file in report.files]
    series = [Series(label, curve) for label, curve in zip(labels, curves, strict=True)]
    width, last = _width(report.files[0]), report.size - 2
    rows = []
    for i in range(len(curves[0])):
        start = report.first + i * width
        end = min(start + width - 1, last)
        place = str(start) if start == end else f"{start}–{end}"
        rows.append([place, *(short(curve[i][1]) for curve in curves)])
    told = (
        f"Mean KL divergence by the place in the window, over {report.windows} windows"
        f"{f' and {width} neighbouring positions' if width > 1 else ''}. A curve that climbs is an error that builds "
        "up along the context."
    )
    drawing = lines(
        "position-error",
        "KL divergence by position",
        f"A line for each of {len(series)} files over the positions {report.first} to {report.size - 2} of a window; "
        "the table has the figures.",
        series,
        "position in the context, tokens",
        "mean KL divergence (logarithmic)",
    )
    table = _table("Mean KL divergence by position", ["position", *labels], rows)
    return _section("Divergence by position", told, _beside(element("figure", drawing, key(labels)), table))


def _types(files: Sequence[FileFigures]) -> Markup:
    told = "Every matrix with its type and, below, its relative squared error, weighted as above."
    parts = [
        element("details", element("summary", _named(file)), types_table(file), open="open" if not index else None)
        for index, file in enumerate(files)
    ]
    return _section("Types of tensors", told, *parts)


def _named(file: FileFigures) -> str:
    """The label, and what the file calls itself."""
    return f"{file.label} ({file.title})" if file.title else file.label


def _width(file: FileFigures) -> int:
    """How many positions are taken together."""
    return max(1, -(-len(file.by_position) // BINS))


def _section(title: str, told: str, *children: Child) -> Markup:
    return element("section", element("h2", title), element("p", told, class_="soft"), *children)


def _beside(figure: Markup, table: Markup) -> Markup:
    return element("div", figure, table, class_="both")


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column names the rows, in a box that scrolls, by keyboard too."""
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    table = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *(element("th", name, scope="col") for name in head))),
        element("tbody", *body),
    )
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _figure(value: float | None) -> str:
    return "–" if value is None else short(value)
