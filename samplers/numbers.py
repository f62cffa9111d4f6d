"""Lists of numbers that users write."""
from __future__ import annotations


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
                f"{name} expects numbers between 0 and {high:g} such as '{example}', got '{word}'; correct that entry "
                f"or leave the field empty to use {fallback}."
            )
        values.append(value)
    return values
