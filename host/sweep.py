"""Sweep: lists for the host, which runs what is connected to a list once for each of its entries."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..samplers.sweep import Axis, Value, combine, parse_axis


class Runs(NamedTuple):
    """A sweep's lists: one entry a run, but for `across` and `down`, which label a grid's columns and rows.

    Attributes:
        labels: what each run's settings are; columns: of a grid in which the first list runs from left to right.
    """

    values: list[Value]
    labels: list[str]
    columns: int
    values_2: list[Value]
    values_3: list[Value]
    across: list[str]
    down: list[str]


def make_sweep(values: str, values_2: str = "", values_3: str = "") -> Runs:
    """All combinations of up to three lists, the first changing fastest.

    An empty list beside the first is left out; its output then repeats an empty text, which no input takes by mistake.

    Raises:
        ValueError: on a list that cannot be read, or too many combinations.
    """
    texts = {"values": values, "values_2": values_2, "values_3": values_3}
    axes = [parse_axis(text, name) if text.strip() or name == "values" else Axis(("",))
            for name, text in texts.items()]
    words = [Axis(tuple(axis.labels)) for axis in axes]
    first, second, third = (list(own) for own in zip(*combine(axes)))
    return Runs(
        first, labels=[join(own) for own in combine(words)], columns=len(axes[0].values),
        values_2=second, values_3=third, across=axes[0].labels, down=[join(own) for own in combine(words[1:])])


def join(labels: Sequence[Value]) -> str:
    return ", ".join(str(label) for label in labels if label)
