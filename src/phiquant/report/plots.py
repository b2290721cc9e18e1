"""The plots of a report as SVG: no script, no font, colours from the page's style.

Series differ by colour, by shape of their points and by dashes, so that no one has to tell colours apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from .figures import FileFigures, pareto
from .markup import Markup, element, joined
from .scales import Scale, linear, logarithmic, short

__all__ = ["COLOURS", "Series", "key", "lines", "maker_key", "size_quality"]

COLOURS: Final = 8
"""Colours of the page's style, c0 to c7; further series have them again, with other dashes."""

_WIDTH, _HEIGHT = 720.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 72.0, 16.0, 16.0, 52.0
_DASHES: Final = ("", "6 3", "2 3", "8 3 2 3")
_LETTER: Final = 7.4  # units of a letter's width, at 13 units of height
_POINTS: Final = 40  # a line with more points than this has no marks on them


@dataclass(frozen=True)
class Series:
    """A line: its name and its points; y None is a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]


def size_quality(files: Sequence[FileFigures]) -> Markup:
    """Size against mean divergence, logarithmic, with the Pareto front and a label at every point."""
    x = linear((file.size / 1e6 for file in files), room=0.1)
    y = logarithmic(file.divergence for file in files)
    front = pareto(files)
    inner = [_axes(x, y, "size, MB", "mean KL divergence, nats per token (logarithmic)")]
    if len(front) > 1:
        places = " ".join(_place(x, y, file.size / 1e6, file.divergence) for file in front)
        inner.append(element("polyline", points=places, class_="front"))
    boxes: list[tuple[float, float, float, float]] = []
    marks = [(_x(x, file.size / 1e6), _y(y, file.divergence), file) for file in files]
    boxes += [(px - 6, py - 6, px + 6, py + 6) for px, py, _ in marks]
    # What others made first and larger, so that it can be seen around a circle at the same place.
    for px, py, file in sorted(marks, key=lambda mark: mark[2].made_here):
        maker = "phiquant" if file.made_here else "another program"
        told = f"{file.label} ({maker}): {file.size / 1e6:,.1f} MB, KL divergence {short(file.divergence)}"
        shape = _mark(px, py, 0, "point c0", 4.5) if file.made_here else _mark(px, py, 1, "point c1", 6.0)
        inner.append(element("g", element("title", told), shape))
        lx, ly, anchor = _free(px, py, len(file.label) * _LETTER, boxes)
        inner.append(element("text", file.label, x=lx, y=ly, text_anchor=anchor, class_="label"))
    best = ", ".join(file.label for file in front)
    return _drawing(
        "size-quality",
        "Size against quality",
        f"{len(files)} files by size in megabytes and mean KL divergence from the reference; lower and further left "
        "is better. Circles were made by phiquant, squares by another program. On the Pareto front, in order of size: "
        f"{best}.",
        joined(*inner),
    )


def lines(
    name: str,
    title: str,
    told: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    names: Sequence[str] | None = None,
) -> Markup:
    """Lines on a logarithmic axis, on which zero has no place: it is a gap. `names`: of x = 0, 1, 2 ...

    `name` is the drawing's own in the page, `told` what it says to who does not see it.
    """
    xs = [x for one in series for x, _ in one.points]
    x = linear(xs, room=0.02)
    if names is not None:
        every = -(-len(names) // 16)
        ticks = tuple((float(i), name) for i, name in enumerate(names) if i % every == 0 or not name.isdigit())
        x = Scale(-0.5, len(names) - 0.5, False, ticks)
    y = logarithmic(value for one in series for _, value in one.points if value is not None)
    inner = [_axes(x, y, x_label, y_label)]
    for index, one in enumerate(series):
        for run in _runs(one.points):
            places = " ".join(_place(x, y, px, py) for px, py in run)
            inner.append(element("polyline", points=places, class_=_line_class(index), stroke_dasharray=_dash(index)))
        if len(one.points) <= _POINTS:
            for px, py in one.points:
                if py is not None and py > 0:
                    mark = _mark(_x(x, px), _y(y, py), index, f"point c{index % COLOURS}", 3.5)
                    where = names[int(px)] if names is not None else short(px)
                    inner.append(element("g", element("title", f"{one.name}, {where}: {short(py)}"), mark))
    return _drawing(name, title, told, joined(*inner))


def key(names: Sequence[str]) -> Markup:
    """What the lines of `lines` stand for: a sample of each beside its name."""
    items = []
    for index, name in enumerate(names):
        line = element("line", x1=0, y1=8, x2=36, y2=8, class_=_line_class(index), stroke_dasharray=_dash(index))
        mark = _mark(18.0, 8.0, index, f"point c{index % COLOURS}", 3.5)
        items.append(element("li", _small(joined(line, mark), 36), " ", name))
    return element("ul", *items, class_="key")


def maker_key() -> Markup:
    """What points and line of `size_quality` stand for."""
    says = ("made by phiquant", "made by another program, such as llama.cpp")
    items = [
        element("li", _small(_mark(8.0, 8.0, i, f"point c{i}", 5.0), 16), " ", told) for i, told in enumerate(says)
    ]
    front = element("line", x1=0, y1=8, x2=36, y2=8, class_="front")
    told = "Pareto front: no other file is both smaller and nearer to the reference"
    return element("ul", *items, element("li", _small(front, 36), " ", told), class_="key")


def _small(inner: Markup, width: int) -> Markup:
    return element("svg", inner, viewBox=f"0 0 {width} 16", width=width, height=16, aria_hidden="true")


def _drawing(name: str, title: str, told: str, inner: Markup) -> Markup:
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", told, id=f"{name}-desc"),
        inner,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        class_="plot",
    )


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value, label in y.ticks:
        at = _y(y, value)
        parts.append(element("line", x1=_LEFT, y1=at, x2=right, y2=at, class_="grid"))
        parts.append(element("text", label, x=_LEFT - 8, y=at + 4, text_anchor="end", class_="tick"))
    for value, label in x.ticks:
        at = _x(x, value)
        parts.append(element("line", x1=at, y1=bottom, x2=at, y2=bottom + 4, class_="axis"))
        parts.append(element("text", label, x=at, y=bottom + 18, text_anchor="middle", class_="tick"))
    parts.append(element("line", x1=_LEFT, y1=bottom, x2=right, y2=bottom, class_="axis"))
    parts.append(element("line", x1=_LEFT, y1=_TOP, x2=_LEFT, y2=bottom, class_="axis"))
    middle = (_LEFT + right) / 2
    parts.append(element("text", x_label, x=middle, y=_HEIGHT - 10, text_anchor="middle", class_="name"))
    up = (_TOP + bottom) / 2
    turned = f"rotate(-90 16 {up:.1f})"
    parts.append(element("text", y_label, x=16, y=up, text_anchor="middle", transform=turned, class_="name"))
    return element("g", *parts, aria_hidden="true")


def _mark(x: float, y: float, index: int, class_: str, size: float) -> Markup:
    """A circle, a square, a diamond or a triangle around a place."""
    shape = index % 4
    if shape == 0:
        return element("circle", cx=x, cy=y, r=size, class_=class_)
    if shape == 1:
        return element("rect", x=x - size, y=y - size, width=2 * size, height=2 * size, class_=class_)
    if shape == 2:
        corners = [(x, y - 1.3 * size), (x + 1.3 * size, y), (x, y + 1.3 * size), (x - 1.3 * size, y)]
    else:
        corners = [(x, y - 1.3 * size), (x + 1.2 * size, y + size), (x - 1.2 * size, y + size)]
    return element("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners), class_=class_)


def _free(x: float, y: float, width: float, boxes: list[tuple[float, float, float, float]]) -> tuple[float, float, str]:
    """A place for a label at a point where it covers nothing of `boxes`, to which it is added; else to its right."""
    offers = [
        (x + 8, y - 8, "start", x + 8),
        (x + 9, y + 4, "start", x + 9),
        (x - 9, y + 4, "end", x - 9 - width),
        (x, y - 10, "middle", x - width / 2),
        (x, y + 19, "middle", x - width / 2),
        (x + 9, y + 18, "start", x + 9),
        (x - 9, y - 10, "end", x - 9 - width),
        (x - 9, y + 18, "end", x - 9 - width),
        (x + 9, y - 24, "start", x + 9),
        (x + 9, y + 32, "start", x + 9),
    ]
    for lx, ly, anchor, left in offers:
        box = (left, ly - 11, left + width, ly + 3)
        inside = box[0] >= _LEFT and box[2] <= _WIDTH and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
        if inside and not any(_overlap(box, other) for other in boxes):
            boxes.append(box)
            return lx, ly, anchor
    return offers[0][:3]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _runs(points: Sequence[tuple[float, float | None]]) -> Iterator[list[tuple[float, float]]]:
    """Neighbouring points that have a place on a logarithmic axis, two at least."""
    run: list[tuple[float, float]] = []
    for x, y in [*points, (0.0, None)]:
        if y is not None and y > 0:
            run.append((x, y))
            continue
        if len(run) > 1:
            yield run
        run = []


def _line_class(index: int) -> str:
    return f"line c{index % COLOURS}"


def _dash(index: int) -> str | None:
    return _DASHES[index // COLOURS % len(_DASHES)] or None


def _x(scale: Scale, value: float) -> float:
    return _LEFT + scale.at(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(scale: Scale, value: float) -> float:
    return _HEIGHT - _BOTTOM - scale.at(value) * (_HEIGHT - _TOP - _BOTTOM)


def _place(x: Scale, y: Scale, px: float, py: float) -> str:
    return f"{_x(x, px):.1f},{_y(y, py):.1f}"
