"""Writes the gallery: one HTML page with pictures, curves and tables inside, no other file needed (gallery.html)."""
from __future__ import annotations

import base64
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure

Point = tuple[float, float]
COLOURS = ("#c2410c", "#0f6cbd", "#15803d", "#7e22ce", "#a16207")  # of the curves in their order
NAMESPACES = re.compile(r' xmlns(:\w+)?="[^"]*"')  # which a drawing inside a page does without


@dataclass(frozen=True)
class Picture:
    """An image file's bytes and what stands below it; a source is set apart from the results."""

    data: bytes
    caption: str = ""
    source: bool = False


@dataclass(frozen=True)
class Strip:
    """A row of pictures with a line above."""

    pictures: Sequence[Picture]
    title: str = ""


@dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[Point]
    spread: Sequence[float] = ()  # half height of the band around each point
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """A line chart."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    y_range: tuple[float, float] | None = None

    def draw(self) -> str:
        """The chart as an SVG element."""
        figure = Figure(figsize=(5, 3.6), layout="constrained")
        axes = figure.add_subplot(title=self.title, xlabel=self.x_label, ylabel=self.y_label, ylim=self.y_range)
        for curve, colour in zip(self.curves, itertools.cycle(COLOURS)):
            xs, ys = zip(*curve.points) if curve.points else ((), ())
            axes.plot(xs, ys, "o--" if curve.dashed else "o-", label=curve.name, color=colour, markersize=4)
            if curve.spread:
                low, high = ([y + sign * half for y, half in zip(ys, curve.spread)] for sign in (-1, 1))
                axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        file = io.StringIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": self.title}):
            figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        return NAMESPACES.sub("", "<svg" + file.getvalue().partition("<svg")[2])


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Section:
    """One show: what it is, its pictures, what was measured and how long it took."""

    title: str
    text: str
    settings: Mapping[str, str] = field(default_factory=dict)
    strips: list[Strip] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    seconds: float = 0.0


def write_page(path: Path, title: str, text: str, sections: Sequence[Section]) -> None:
    """Writes the page to `path`, in one move."""
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page.filters["data_uri"] = data_uri
    template = page.from_string(Path(__file__).with_name("gallery.html").read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(template.render(title=title, text_above=text, sections=sections), encoding="utf-8")
    fresh.replace(path)


def data_uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "webp" if data[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
