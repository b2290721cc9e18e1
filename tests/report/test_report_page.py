"""The page: well-formed, alone, and with the right figures, whatever names say."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import struct
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from small_report import HOSTILE, Made

from phiquant.cli.app import run
from phiquant.report import Report, page
from phiquant.report.markup import element, joined
from phiquant.report.page import binned
from phiquant.report.png import png
from phiquant.report.scales import short

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta", "link", "br", "hr", "img"}


class Document(HTMLParser):
    """Elements with their attributes, tables by caption, and whether all elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text: list[str] = []
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        inside = set(self._open)
        if "caption" in inside:
            self._caption += data
        elif inside & {"td", "th"}:
            self._rows[-1][-1] += ("/" if "small" in inside else "") + data


@pytest.fixture(scope="module")
def text(made: Made) -> str:
    return page(made.report)


@pytest.fixture(scope="module")
def document(text: str) -> Document:
    return Document(text)


def drawings(text: str) -> dict[str, ET.Element]:
    """The plots, read as XML, by title."""
    found = {}
    for source in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        svg = ET.fromstring(source)
        if svg.get("role") == "img":
            title = svg.find(f"{SVG}title")
            assert title is not None
            assert title.text
            found[title.text] = svg
    return found


def test_the_page_needs_nothing_and_runs_nothing(text: str, document: Document) -> None:
    tags = {tag for tag, _ in document.elements}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "audio",
        "video",
        "foreignobject",
    }
    for tag, attributes in document.elements:
        assert not any(name.startswith("on") or name in ("src", "href", "srcset", "action") for name in attributes), tag
        assert "url(" not in (attributes.get("style") or "")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    addresses = set(re.findall(r"https?://[^\"'\s<]*", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    policy = next(a["content"] for tag, a in document.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy
    assert text.startswith("<!doctype html>")
    assert ("html", {"lang": "en"}) in document.elements


def test_hostile_names_are_text(text: str, document: Document) -> None:
    assert "<script" not in text
    assert "onerror=alert" in text, "it is shown, as text"
    assert "<img" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    shown = "".join(document.text)
    assert HOSTILE[:30] in shown
    assert "same-<b>" in shown
    assert "<i>The</i> old man" in shown


def test_everything_may_be_hostile(made: Made) -> None:
    bad = HOSTILE
    report = made.report
    file = report.files[0]
    sample = dataclasses.replace(
        file.samples[0],
        pieces=tuple(bad for _ in file.samples[0].pieces),
        names=dict.fromkeys(file.samples[0].names, bad),
    )
    weights = tuple(dataclasses.replace(w, name=f"blk.0.{bad}{i}") for i, w in enumerate(file.weights))
    worse = dataclasses.replace(
        file, label=bad, title=bad, file_type=bad, samples=(sample, *file.samples[1:]), weights=weights
    )
    reference = dataclasses.replace(report.reference, path=Path(bad), title=bad, file_type=bad)
    made_of = dataclasses.replace(
        report, reference=reference, files=(worse,), text=bad, text_sha256=bad, weighted_by=bad, prompts=(bad, bad),
        remarks=(bad,),
    )  # fmt: skip
    text = page(made_of)
    document = Document(text)
    tags = {tag for tag, _ in document.elements}
    assert not tags & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in document.elements for name in attributes)
    assert len(drawings(text)) == 3
    assert "\u202e" not in text


def test_plots_are_xml_with_words_for_those_who_do_not_see_them(made: Made, text: str, document: Document) -> None:
    found = drawings(text)
    assert list(found) == [
        "Size against quality", "Relative squared error of weights by layer", "KL divergence by position",
    ]  # fmt: skip
    ids = [a["id"] for _, a in document.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for svg in found.values():
        named = (svg.get("aria-labelledby") or "").split()
        assert len(named) == 2
        assert set(named) <= set(ids)
        told = svg.find(f"{SVG}desc")
        assert told is not None
        assert told.text
        for node in svg.iter():
            for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2"):
                assert 0 <= float(node.get(name, "0")) <= 720
    told = found["Size against quality"].find(f"{SVG}desc")
    assert told is not None
    assert "in order of size: Q2_K, Q4_K_M, same-<b>." in (told.text or "")


def test_points_are_where_their_figures_are(made: Made, text: str) -> None:
    svg = drawings(text)["Size against quality"]
    circles = svg.findall(f".//{SVG}circle")
    squares = svg.findall(f".//{SVG}rect")
    assert (len(circles), len(squares)) == (2, 1), "circles are ours"
    ours, theirs, same = made.report.files
    at = {  # by title
        (group.findtext(f"{SVG}title") or "").split(" (")[0]: group
        for group in svg.findall(f"{SVG}g")
        if group.find(f"{SVG}title") is not None
    }
    circle, square = at["Q4_K_M"].find(f"{SVG}circle"), at["Q2_K"].find(f"{SVG}rect")
    assert circle is not None
    assert square is not None
    x = float(square.get("x", "0")) + float(square.get("width", "0")) / 2
    y = float(square.get("y", "0")) + float(square.get("height", "0")) / 2
    assert x < float(circle.get("cx", "0")) < float(circles[-1].get("cx", "0"))
    assert y < float(circle.get("cy", "0")), "farther off is higher"
    # Both axes are what they say: even for sizes.
    right = next(c for c in circles if c is not circle)
    share = (float(circle.get("cx", "0")) - x) / (float(right.get("cx", "0")) - x)
    assert share == pytest.approx((ours.size - theirs.size) / (same.size - theirs.size), abs=0.01)


def test_tables_have_the_figures_of_the_plots(made: Made, document: Document) -> None:
    files = made.report.files
    rows = {row[0]: row for row in document.tables["All files"][1:]}
    head = document.tables["All files"][0]
    for file in files:
        row = dict(zip(head, rows[file.label], strict=True))
        divergence = file.comparison.divergence
        assert row["mean KL"] == f"{short(divergence.mean)} ± {short(divergence.error)}"
        assert float(row["mean KL"].split(" ± ")[0]) == pytest.approx(divergence.mean, rel=0.06)
        assert row["99.9 % below"] == short(divergence.percentiles[99.9])
        assert row["same top token"] == f"{100 * divergence.top1:.2f} %"
        assert row["perplexity"] == f"{file.comparison.perplexity.value:.4f}"
        assert row["MB"] == f"{file.size / 1e6:,.1f}"
        assert row["made by"] == ("phiquant" if file.made_here else "other")
    layers = document.tables["Relative squared error by layer"]
    assert layers[0] == ["layer", *(file.label for file in files)]
    for i, row in enumerate(layers[1:]):
        assert row == [files[0].layers[i].layer, *(short(file.layers[i].relative or 0) for file in files)]
    positions = document.tables["Mean KL divergence by position"]
    curves = [binned(made.report, file) for file in files]
    assert [row[1:] for row in positions[1:]] == [
        [short(curve[i][1]) for curve in curves] for i in range(len(curves[0]))
    ]
    assert positions[1][0] == "32"
    assert positions[-1][0] == "62"
    types = document.tables["Q4_K_M: type of each matrix by layer, with its relative squared error"]
    assert types[0] == ["tensor", *map(str, range(8))]
    cells = {row[0]: row[1:] for row in types[1:]}
    weights = {w.name: w for w in files[0].weights}
    for layer in range(8):
        weight = weights[f"blk.{layer}.ffn_down.weight"]
        assert cells["ffn_down"][layer] == f"{weight.type}/{short(weight.relative or 0)}"


def test_binned_positions_keep_the_mean(made: Made) -> None:
    file = made.report.files[0]
    long = dataclasses.replace(file, by_position=tuple(float(i) for i in range(100)))
    report = dataclasses.replace(made.report, first=10)
    points = binned(report, long)
    assert points[0] == (11.5, 1.5)
    assert points[1] == (15.5, 5.5)
    assert len(points) == 25


def test_marks_are_where_texts_part(made: Made, text: str) -> None:
    parts = re.findall(r'<section class="sample">(.*?)</section>', text, re.DOTALL)
    assert len(parts) == 2 * 3
    for part, (prompt, file) in zip(parts, [(p, f) for p in range(2) for f in made.report.files], strict=True):
        own, other = made.report.reference.samples[prompt], file.samples[prompt]
        same = sum(1 for _ in zip(own.ids, other.ids, strict=False))
        same = next((i for i, (a, b) in enumerate(zip(own.ids, other.ids, strict=False)) if a != b), same)
        if own.ids == other.ids:
            assert "<mark>" not in part
            assert "Both say the same" in part
        else:
            assert part.count("<mark>") == 2
            assert f"The first {same} tokens are the same" in part


def test_the_same_report_is_the_same_page(made: Made, text: str) -> None:
    assert page(made.report) == text


def test_one_file_and_no_loss_at_all(made: Made) -> None:
    alone = dataclasses.replace(made.report, files=made.report.files[2:])
    assert len(drawings(page(alone))) == 3


def test_markup_escapes_whatever_is_not_markup() -> None:
    inner = element("b", "<&>\"'")
    assert inner == "<b>&lt;&amp;&gt;&quot;&#x27;</b>"
    assert element("p", inner, "<", None, 3, class_='a"b', aria_label="x", width=1.50) == (
        '<p class="a&quot;b" aria-label="x" width="1.5"><b>&lt;&amp;&gt;&quot;&#x27;</b>&lt;3</p>'
    )
    assert joined(str(inner)) != inner or type(inner) is not str
    assert (
        element("p", "\x00\ud800\u2028")
        == "<p>\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}</p>"
    )


def test_a_picture(made: Made) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; the extra `plot` has it")
    found = png(dataclasses.replace(made.report, reference=dataclasses.replace(made.report.reference, title="$x_$")))
    assert found.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", found[16:24]) == (2400, 1800)


@pytest.mark.cpu
def test_the_command_writes_the_page(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page_txt = tmp_path / "report.html", tmp_path / "page.txt"
    page_txt.write_text(made.wanted.text, "utf-8")
    command = ["report", str(made.ours), str(made.theirs), "--reference", str(made.reference), "-f", str(page_txt)]
    assert run([*command, "-c", "64", "-n", "8", "-p", "Once", "-o", str(out)]) == 0
    document = Document(out.read_text("utf-8"))
    rows = {row[0]: row for row in document.tables["All files"][1:]}
    for file in made.report.files[:2]:
        assert short(file.divergence) in " ".join(rows[file.label])
    assert "2 files, the nearest is Q4_K_M" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.txt", "report.html"]


@pytest.mark.cpu
def test_what_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page_txt = tmp_path / "page.txt"
    page_txt.write_text(made.wanted.text, "utf-8")
    monkeypatch.chdir(tmp_path)
    whole = [str(made.ours), "--reference", str(made.reference), "-f", str(page_txt)]
    found = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "matplotlib" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for arguments, status, sentence in (
        ([str(made.ours), "-f", str(page_txt)], 2, "--reference"),
        ([*whole, "-o", "report.pdf"], 2, ".html or .png"),
        ([*whole, "-o", "report.png"], 1, "phiquant[plot]"),
        ([*whole, "-n", "0"], 2, "at least one token"),
        ([*whole, "-o", "nowhere/report.html"], 1, "is not a directory"),
        ([*whole], 1, "must have at least 1024"),
    ):
        assert run(["report", *arguments]) == status
        assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["page.txt"]


def test_reports_are_values(made: Made) -> None:
    assert isinstance(made.report, Report)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.report.text = "x"  # type: ignore[misc]
