"""What users wrote, made fit for an error message."""
from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

LONGEST = 80  # characters


def legible(text: object, longest: int = LONGEST) -> str:
    """A text or name as a message may quote it: on one line, cut where it is long, escaped where it cannot be shown.

    The host writes every message to its log. A character that the log's streams cannot encode (a lone surrogate
    anywhere, most of Unicode on a piped Windows console) would raise there and end the host's worker for good.
    """
    try:
        words = str(text)
    except ValueError:  # Python writes out no integer of thousands of digits
        words = f"a {type(text).__name__} too long to show"
    words = words if len(words) <= longest else f"{words[:longest - 3]}..."
    words = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in words)
    for stream in (sys.stdout, sys.stderr):
        encoding = getattr(stream, "encoding", None) or "ascii"
        words = words.encode(encoding, "backslashreplace").decode(encoding)
    return words


def check_text(text: object, name: str) -> None:
    """Raises ValueError unless the value of a text input is a text that a tokenizer and a file can take.

    Args:
        name: the input, for the message.
    """
    if not isinstance(text, str):
        raise ValueError(
            f"{name} expects a text, got {legible(text)}; type it in, or connect a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = error.start
    else:
        return
    raise ValueError(
        f"{name} expects a text, got half a character ({legible(text[start])}) at letter {start + 1}; type that part "
        f"anew.")


def format_size(sides: Iterable[int]) -> str:
    """Sides of something as people write them: 64x48."""
    return "x".join(map(str, sides))


def format_picture(shape: Sequence[int], cell: int | None) -> str:
    """The size of the picture behind a latent as people know it: 512x384 pixels; with its frames, if it has any.

    Args:
        shape: [B, C, H, W], [B, C, T, H, W] or [B, C, length].
        cell: pixels along each side of a latent cell; None where that is not known, for a size in cells.
    """
    if len(shape) < 4:
        return f"length {format_size(shape[2:])}"
    *frames, height, width = shape[2:]
    size = f"{format_size(side * (cell or 1) for side in (width, height))} {'pixels' if cell else 'latent cells'}"
    return f"{size} in {format_size(frames)} latent frame(s)" if frames else size
