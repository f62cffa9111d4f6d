"""Where the tokens of several texts stand around one picture, each text as if it stood there alone."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .sequence import Span, TokenSequence

NOWHERE: Span = (0, 0)


@dataclass(frozen=True)
class SharedSequence:
    """Tokens of several texts around one picture.

    Attributes:
        before, after: a style's own tokens in front of the pictures and behind them, for each style.
        pictures: picture and references; picture: what is sampled; both as first token and tokens.
        total: all of them; what belongs to none is read by none.
        frames: of the picture; references: of the pictures' tokens, which a network may leave out.
        lead: tokens of each style in front of its words.
    """

    before: tuple[Span, ...]
    after: tuple[Span, ...]
    pictures: Span
    picture: Span
    total: int
    frames: int = 1
    references: int = 0
    lead: int = 0

    def fit(self, tokens: int) -> SharedSequence | None:
        """The sequence as an attention among so many tokens has it; None for another."""
        if tokens == self.total:
            return self
        if self.references and tokens == self.total - self.references:
            return replace(self, pictures=self.picture, total=tokens, references=0)
        return None

    def list_spans(self, style: int) -> tuple[Span, Span, Span]:
        """What a style's attention is among, in the order of a sequence with this style alone."""
        return self.before[style], self.pictures, self.after[style]

    def as_one(self, like: TokenSequence) -> TokenSequence:
        """The same for who asks for the picture's tokens only; like: of a call with the first text alone."""
        return replace(like, text=(0, self.pictures[0]), picture=self.picture, pictures=self.pictures, total=self.total,
                       references=self.references)

    def count_alone(self, style: int) -> int:
        """Tokens of a sequence with this style alone."""
        return sum(tokens for _, tokens in self.list_spans(style))


def place_texts(lengths: Sequence[int], pictures: Span, picture: Span, frames: int = 1, references: int = 0,
                ) -> SharedSequence:
    """Texts of these lengths one after another in front of the pictures.

    Args:
        pictures, picture: where they stand behind the first text alone.
    """
    more = sum(lengths[1:])
    before = tuple(span_each(lengths, 0))
    return SharedSequence(
        before=before, after=(NOWHERE,) * len(lengths), pictures=(pictures[0] + more, pictures[1]),
        picture=(picture[0] + more, picture[1]), total=pictures[0] + more + pictures[1], frames=frames,
        references=references)


def span_each(lengths: Iterable[int], first: int) -> list[Span]:
    """Spans of these lengths one after another."""
    spans = []
    for tokens in lengths:
        spans.append((first, tokens))
        first += tokens
    return spans


def take(tensor: Tensor, spans: Iterable[Span], axis: int) -> Tensor:
    """Some tokens of a tensor, in order."""
    parts = [tensor.narrow(axis, first, tokens) for first, tokens in spans if tokens]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def pick(tensor: Tensor, parts: Sequence[Tensor | Span], axis: int) -> Tensor:
    """Some tokens of a tensor by spans and by number, in order."""
    found = [tensor.index_select(axis, part) if isinstance(part, Tensor) else tensor.narrow(axis, *part)
             for part in parts if isinstance(part, Tensor) or part[1]]
    return found[0] if len(found) == 1 else torch.cat(found, dim=axis)
