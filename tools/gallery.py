"""Writes the gallery: one HTML page with pictures, curves and tables inside, no other file needed (gallery.html)."""
from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

Point = tuple[float, float]
WIDTH, HEIGHT, LEFT, RIGHT, TOP = 480, 310, 58, 466, 30  # of a chart, in its own units


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
class Line:
    """A curve as it is drawn: its points, the outline of its band, and where its name stands."""

    curve: Curve
    spots: Sequence[Point]
    band: Sequence[Point]
    key: Point


@dataclass(frozen=True)
class Box:
    """A chart's places: its frame, its ticks with their words, its lines."""

    base: float
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP

    @property
    def middle(self) -> float:
        return (self.top + self.base) / 2


@dataclass(frozen=True)
class Plot:
    """A line chart."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    y_range: tuple[float, float] | None = None

    def lay_out(self) -> Box:
        """Where everything stands: axes with round ticks, the legend below them in two columns."""
        base = HEIGHT - 48 - 18 * math.ceil(len(self.curves) / 2)
        xs, ys = ([point[axis] for curve in self.curves for point in curve.points] for axis in (0, 1))
        across = ticks(min(xs, default=0.0), max(xs, default=1.0))
        up = ticks(*(self.y_range or (min(ys, default=0.0), max(ys, default=1.0))))

        def place(x: float, y: float) -> Point:
            return (LEFT + (x - across[0]) / (across[-1] - across[0]) * (RIGHT - LEFT),
                    base - (y - up[0]) / (up[-1] - up[0]) * (base - TOP))

        lines = []
        for index, curve in enumerate(self.curves):
            sides = [[place(x, y + sign * s) for (x, y), s in zip(curve.points, curve.spread)] for sign in (1, -1)]
            key = (LEFT + index % 2 * (RIGHT - LEFT) / 2, base + 54 + 18 * (index // 2))
            lines.append(Line(curve, [place(*point) for point in curve.points], [*sides[0], *reversed(sides[1])], key))
        return Box(base, [(place(tick, up[0])[0], f"{tick:g}") for tick in across],
                   [(place(across[0], tick)[1], f"{tick:g}") for tick in up], lines)


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
    page.filters.update(data_uri=data_uri, place="{:.1f}".format,
                        spots=lambda spots: " ".join(f"{x:.1f},{y:.1f}" for x, y in spots))
    template = page.from_string(Path(__file__).with_name("gallery.html").read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(template.render(title=title, text_above=text, sections=sections), encoding="utf-8")
    fresh.replace(path)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose [low, high], four to eight of them."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def data_uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "webp" if data[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
