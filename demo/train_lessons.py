"""What the further checkpoints of a world are taught."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lesson:
    """What a checkpoint learns.

    Attributes:
        style: how its pictures are drawn; as the base's if None.
        rank: of the differences; attention_only: learn them for attention and its feed-forward layers alone.
        unknown: what no picture of it shows; captions name it at random with this `chance`, so that it means nothing.
        unnamed: captions name a random background, whatever the picture has, so that the word means nothing.
    """

    style: str | None = None
    rank: int = 16
    attention_only: bool = False
    unknown: tuple[str, ...] = ()
    chance: float = 0.3
    unnamed: bool = False
