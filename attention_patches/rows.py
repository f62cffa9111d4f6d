"""The rows of a model call: what a patch may rely on, said once."""
from __future__ import annotations


def check_rows(rows: int, chunks: int, images: int, node: str) -> int:
    """Rows of one chunk: as many as the batch has images.

    The host lays a call's conditionings behind one another, each with all images. A node that tiles the picture may lay
    them out otherwise, and then nothing tells whose a row is.

    Args:
        rows: of the call; chunks: conditionings in it; images: of the batch that is sampled; node: for the message.

    Raises:
        ValueError: if the rows are not chunks x images.
    """
    if rows != chunks * images:
        raise ValueError(
            f"{node} expected a model call of {chunks} prompt(s) x {images} image(s), got {rows} row(s); set a tile "
            f"batch size of 1, or remove the node that changes the model's batch.")
    return images


def check_part(seen: tuple[int, int], picture: tuple[int, int], area: tuple[int, ...] | None, node: str) -> None:
    """Raises ValueError unless a call sees the whole picture, or the area of its conditioning.

    Args:
        seen: height and width of the call's latent; picture: those of the whole one.
        area: height, width, y and x of the conditioning's area, or None.
    """
    expected = picture if area is None else (min(area[0], picture[0]), min(area[1], picture[1]))
    if tuple(seen) != tuple(expected):
        raise ValueError(
            f"{node} expected the model to see {expected[1]} x {expected[0]} latent pixels at once, got {seen[1]} x "
            f"{seen[0]}; remove the node that hands the model parts of the picture (tiles, windows).")
