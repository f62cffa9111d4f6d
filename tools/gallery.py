"""Writes the gallery: one HTML page with pictures, curves and tables inside, no other file needed."""
from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Point = tuple[float, float]

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --quiet: #667085; --paper: #f7f7f5; --card: #ffffff;
  --line: #e2e3e0; --s0: #c2410c; --s1: #0f6cbd; --s2: #15803d; --s3: #7e22ce; --s4: #a16207; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e9ed; --quiet: #9aa3b2; --paper: #14161b; --card: #1d2027;
  --line: #31353f; --s0: #fb923c; --s1: #60a5fa; --s2: #4ade80; --s3: #c084fc; --s4: #facc15; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 2.1rem; margin: 0 0 .2em; } h2 { font-size: 1.35rem; margin: 0 0 .4em; } p { max-width: 75ch; }
.quiet { color: var(--quiet); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 24px; margin: 24px 0; }
.strip { display: flex; gap: 10px; overflow-x: auto; padding-bottom: 8px; margin: 14px 0; }
figure { margin: 0; flex: 1 1 0; min-width: 92px; max-width: 170px; }
figure img { width: 100%; display: block; border-radius: 8px; image-rendering: auto; }
figure.source { padding-right: 10px; border-right: 2px dashed var(--line); }
figcaption { font-size: .8rem; color: var(--quiet); text-align: center; margin-top: 4px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: 12px 0; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } td { font-variant-numeric: tabular-nums; }
.plots { display: flex; flex-wrap: wrap; gap: 18px; } svg { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
dl { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: .9rem; margin: 12px 0; }
dl div { display: flex; gap: 8px; } dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
"""


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
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(render_section(section) for section in sections)
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
            f"<body><main><h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>{body}</main></body></html>\n")
    fresh = path.with_suffix(".part")
    fresh.write_text(page, encoding="utf-8")
    fresh.replace(path)


def render_section(section: Section) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"]
    parts += [_strip(strip) for strip in section.strips]
    if section.plots:
        parts.append(f'<div class="plots">{"".join(render_plot(plot) for plot in section.plots)}</div>')
    parts += [_table(table) for table in section.tables]
    if section.settings:
        rows = "".join(f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
                       for key, value in section.settings.items())
        parts.append(f"<dl>{rows}</dl>")
    parts.append(f'<p class="quiet">Made in {section.seconds:.1f} seconds.</p></section>')
    return "".join(parts)


def render_plot(plot: Plot, width: int = 480, height: int = 310) -> str:
    """The chart as inline SVG: axes with round ticks and labels, one colour a curve, a legend below."""
    left, right, top, bottom = 58, 14, 30, 48 + 18 * math.ceil(len(plot.curves) / 2)
    xs = [x for curve in plot.curves for x, _ in curve.points]
    ys = [y for curve in plot.curves for _, y in curve.points]
    x_ticks = ticks(min(xs, default=0.0), max(xs, default=1.0))
    y_ticks = ticks(*(plot.y_range or (min(ys, default=0.0), max(ys, default=1.0))))
    right_edge, base = width - right, height - bottom

    def place(x: float, y: float) -> Point:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (right_edge - left), base - up * (base - top)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
             f'aria-label="{html.escape(plot.title)}">',
             _text(left, 16, plot.title, "start", bold=True)]
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts += [_line(x, top, x, base), _text(x, base + 16, f"{tick:g}")]
    for tick in y_ticks:
        y = place(x_ticks[0], tick)[1]
        parts += [_line(left, y, right_edge, y), _text(left - 8, y + 4, f"{tick:g}", "end")]
    parts.append(_text((left + right_edge) / 2, base + 34, plot.x_label))
    middle = (top + base) / 2
    parts.append(f'<g transform="rotate(-90 14 {middle:.1f})">{_text(14, middle, plot.y_label)}</g>')
    for index, curve in enumerate(plot.curves):
        colour = f"var(--s{index % 5})"
        spots = [place(x, y) for x, y in curve.points]
        if curve.spread:
            above = [place(x, y + s) for (x, y), s in zip(curve.points, curve.spread)]
            below = [place(x, y - s) for (x, y), s in zip(curve.points, curve.spread)]
            parts.append(f'<polygon points="{_points([*above, *reversed(below)])}" fill="{colour}" opacity="0.15"/>')
        dash = ' stroke-dasharray="6 4"' if curve.dashed else ""
        parts.append(f'<polyline points="{_points(spots)}" fill="none" stroke="{colour}" stroke-width="2.2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        x, y = left + (index % 2) * (right_edge - left) / 2, base + 54 + 18 * (index // 2)
        ends = f'x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}"'
        parts.append(f'<line {ends} stroke="{colour}" stroke-width="3"{dash}/>')
        parts.append(_text(x + 28, y, curve.name, "start"))
    return "".join([*parts, "</svg>"])


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


def _strip(strip: Strip) -> str:
    figures = "".join(
        f'<figure{" class=source" if picture.source else ""}><img src="{data_uri(picture.data)}" '
        f'alt="{html.escape(picture.caption)}"><figcaption>{html.escape(picture.caption)}</figcaption></figure>'
        for picture in strip.pictures)
    title = f'<p class="quiet">{html.escape(strip.title)}</p>' if strip.title else ""
    return f'{title}<div class="strip">{figures}</div>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _text(x: float, y: float, text: str, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' style="font-weight:600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _points(spots: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
