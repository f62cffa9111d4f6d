"""Lists of settings as a person writes them, and all combinations of several."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .wording import legible

MOST = 1000  # runs of a sweep
EXAMPLE = "'0.1, 0.3', '0:1:5' for five from 0 to 1, 'cfg = 2, 4' with a name, or words such as 'euler, ddim'"

Value = int | float | str


@dataclass(frozen=True)
class Axis:
    """What one setting runs through: whole numbers as `int` where all are whole, and the name that was written."""

    values: tuple[Value, ...]
    name: str = ""

    @property
    def labels(self) -> list[str]:
        """What stands beside a picture: the name and the value."""
        return [f"{self.name} {format_value(value)}".strip() for value in self.values]


def format_value(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def parse_axis(text: str, field: str) -> Axis:
    """Read a list of numbers, ranges start:end:count (both ends included) or words, with an optional "name =".

    Args:
        field: the input's name, for messages.

    Raises:
        ValueError: on a list that holds nothing, an entry that is neither, numbers beside words, or too many.
    """
    name, equals, rest = text.partition("=")
    body = rest if equals else name
    entries = [entry.strip() for entry in body.replace("\n", ",").replace(";", ",").split(",")]
    entries = [entry for entry in entries if entry]
    if not entries:
        raise ValueError(f"{field} expects a list such as {EXAMPLE}, got nothing; write at least one value.")
    values: list[Value] = []
    for place, entry in enumerate(entries, 1):
        found = read_entry(entry, place, field)
        if values and isinstance(values[0], str) != isinstance(found[0], str):
            raise ValueError(
                f"{field} expects numbers or words, got both: '{legible(entry)}' at place {place} is none like those "
                f"before; correct that entry.")
        values += found
        check_count(len(values), field)
    if all(isinstance(value, int) or (isinstance(value, float) and value.is_integer()) for value in values) and (
            "." not in body):
        values = [int(value) for value in values]
    return Axis(tuple(values), name.strip() if equals else "")


def read_entry(entry: str, place: int, field: str) -> list[Value]:
    """The values of one entry. Raises ValueError for a range that is none."""
    if ":" not in entry:
        number = read_number(entry)
        if number is None and entry.lower().lstrip("+-") in ("nan", "inf", "infinity"):
            raise ValueError(
                f"{field} expects finite numbers, got '{legible(entry)}' at place {place}; correct that entry.")
        return [entry if number is None else number]
    parts = entry.split(":")
    ends, count = [read_number(part) for part in parts[:2]], parts[-1].strip()
    low, high = ends if len(ends) == 2 else (None, None)
    if len(parts) != 3 or low is None or high is None or not count.isdecimal() or int(count) < 1:
        raise ValueError(
            f"{field} expects a range as start:end:count, such as 0:1:5, got '{legible(entry)}' at place {place}; "
            f"correct that entry.")
    check_count(int(count), field)
    steps = max(int(count) - 1, 1)
    return [float(f"{low + (high - low) * step / steps:.10g}") for step in range(int(count))]


def read_number(text: str) -> float | None:
    """A finite number; None of anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def check_count(count: int, field: str) -> None:
    """Raises ValueError for more runs than anyone wants."""
    if count > MOST:
        raise ValueError(f"{field} expects at most {MOST} values, got {count} or more; take fewer.")


def combine(axes: Sequence[Axis]) -> list[tuple[Value, ...]]:
    """Every combination, the first axis changing fastest: as a grid is read.

    Raises:
        ValueError: on too many.
    """
    count = 1
    for axis in axes:
        count *= len(axis.values)
    check_count(count, "The sweep")
    runs: list[tuple[Value, ...]] = [()]
    for axis in axes:
        runs = [(*run, value) for value in axis.values for run in runs]
    return runs
