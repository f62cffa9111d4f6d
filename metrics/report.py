"""Measured figures as a table that people read."""
from __future__ import annotations

import math
from collections.abc import Sequence

GAP = 2  # letters between columns


def draw_table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Lines of equal length: names to the left, figures to the right below their heads; None leaves its place empty.

    Args:
        head: of the names' column and of each column of figures.
    """
    cells = [list(head), *([name, *map(show_figure, figures)] for name, figures in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join((" " * GAP).join(
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in cells)


def show_figure(value: float | None) -> str:
    """Four decimals below 10, two below 1000, none above."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def average(values: Sequence[float]) -> float:
    """The mean; not a number of none."""
    return sum(values) / len(values) if values else math.nan
