"""The report's plots as a picture, drawn by matplotlib, which is an extra."""

import importlib.util
import io
from typing import Any

from ..errors import RequestError
from .figures import FileFigures, Report, pareto
from .markup import visible
from .page import binned
from .types import bits_of, hue

__all__ = ["check_matplotlib", "png"]

_LIMIT = 40  # characters of a label


def check_matplotlib() -> None:
    """RequestError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(
            "a .png needs matplotlib, which is not installed: pip install 'phiquant[plot]'; or write .html"
        )


def png(report: Report) -> bytes:
    """A picture of 2400 by 1800: size against quality, errors by layer, by position, and bytes by type."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 12), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_plain(f"{report.reference.title or report.reference.path.stem}: size and quality"))
    (quality, layers), (positions, types) = figure.subplots(2, 2)
    _quality(quality, report.files)
    _layers(layers, report)
    _positions(positions, report)
    _types(types, report.files)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": "phiquant"})
    return out.getvalue()


def _quality(axes: Any, files: tuple[FileFigures, ...]) -> None:
    for made_here, marker, told in ((True, "o", "phiquant"), (False, "s", "another program")):
        of = [file for file in files if file.made_here is made_here and file.divergence > 0]
        if of:
            axes.plot([f.size / 1e6 for f in of], [f.divergence for f in of], marker, label=told)
    front = [file for file in pareto(files) if file.divergence > 0]
    axes.plot([f.size / 1e6 for f in front], [f.divergence for f in front], "--", color="gray", label="Pareto front")
    for file in files:
        if file.divergence > 0:
            place = (file.size / 1e6, file.divergence)
            axes.annotate(_plain(file.label), place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(title="Size against quality", xlabel="size, MB", ylabel="mean KL divergence, nats per token")
    _logarithmic(axes, any(file.divergence > 0 for file in files))
    axes.legend()


def _layers(axes: Any, report: Report) -> None:
    drawn = False
    for index, file in enumerate(report.files):
        names = [layer.layer for layer in file.layers]
        values = [layer.relative or float("nan") for layer in file.layers]
        drawn |= any(layer.relative for layer in file.layers)
        axes.plot(range(len(names)), values, marker="os^dv"[index % 5], ms=4, label=_plain(file.label))
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set(title="Relative squared error of weights by layer", xlabel="layer")
    _logarithmic(axes, drawn)
    axes.legend(fontsize=8)


def _positions(axes: Any, report: Report) -> None:
    drawn = False
    for file in report.files:
        points = binned(report, file)
        drawn |= any(y > 0 for _, y in points)
        axes.plot([x for x, _ in points], [y if y > 0 else float("nan") for _, y in points], label=_plain(file.label))
    axes.set(title="Divergence by position", xlabel="position in the context, tokens", ylabel="mean KL divergence")
    _logarithmic(axes, drawn)
    axes.legend(fontsize=8)


def _types(axes: Any, files: tuple[FileFigures, ...]) -> None:
    from matplotlib.colors import hsv_to_rgb

    kinds = sorted({weight.type for file in files for weight in file.weights}, key=bits_of)
    names, left = [_plain(file.label) for file in files], [0.0] * len(files)
    for kind in kinds:
        sizes = [sum(weight.nbytes for weight in file.weights if weight.type == kind) / 1e6 for file in files]
        colour = hsv_to_rgb((hue(kind) / 360, 0.45, 0.9))
        axes.barh(range(len(files)), sizes, left=left, color=colour, edgecolor="white", label=kind)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(files)), names)
    axes.set(title="Tensor data by type", xlabel="MB")
    axes.legend(fontsize=8)


def _logarithmic(axes: Any, possible: bool) -> None:
    """Where there is something above zero."""
    if possible:
        axes.set_yscale("log")
    axes.grid(visible=True, alpha=0.3)


def _plain(text: str) -> str:
    """A text that matplotlib takes for no formula, and no longer than a label."""
    text = visible(text).replace("$", r"\$")
    return text if len(text) <= _LIMIT else f"{text[: _LIMIT - 1]}…"
