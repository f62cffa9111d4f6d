"""Numbers that users write, and the range that an input takes."""
from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from .wording import legible


def parse_numbers(text: str, name: str, high: float, example: str, fallback: str) -> list[float]:
    """Read "0.1, 0.3 0.5" as numbers in 0..high.

    Args:
        name: the field, example: what it may hold, fallback: what an empty field means, for the message.

    Raises:
        ValueError: on an unreadable entry or one outside 0..high.
    """
    values = []
    for word in text.replace(",", " ").replace(";", " ").split():
        try:
            value = float(word)
        except ValueError:
            value = float("nan")
        if not 0.0 <= value <= high:
            raise ValueError(
                f"{name} expects numbers between 0 and {high:g} such as '{example}', got '{legible(word)}'; correct "
                f"that entry or leave the field empty to use {fallback}."
            )
        values.append(value)
    return values


def check_number(value: Any, name: str, low: float, high: float, whole: bool) -> Any:
    """The value of an input, a number of NumPy's as one of Python's.

    Args:
        name: the input, for the message; whole: whether it takes whole numbers only.

    Raises:
        ValueError: unless it is a number of its range: NaN is in none.
    """
    kind: Any = Integral if whole else Real  # NumPy's as well
    if isinstance(value, kind) and low <= value <= high:
        return value if isinstance(value, int | float) else int(value) if whole else float(value)
    ends = [f"{end}" if whole else f"{end:g}" for end in (low, high)]
    raise ValueError(
        f"{name} expects a {'whole ' if whole else ''}number from {ends[0]} to {ends[1]}, got {legible(value)}; set it "
        f"within that range, or mend what is connected to it.")
