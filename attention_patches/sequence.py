"""Where text and picture stand in an attention's tokens, and which block of a network runs."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

Span = tuple[int, int]  # first token, tokens


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of one joint attention, in one row of a batch.

    Attributes:
        text: those of the prompt, in the order of its factors; picture: those of what is sampled, frame after frame.
        pictures: picture and reference pictures together, which all read the text.
        total: all of them, padding included; references: of these, in pictures that are shown beside.
        optional: whether the network may leave references out.
        grid: tokens of one frame down and across; frames: of the picture.
    """

    text: Span
    picture: Span
    pictures: Span
    total: int
    grid: tuple[int, int]
    frames: int = 1
    references: int = 0
    optional: bool = False

    def holds(self, tokens: int) -> bool:
        """Whether an attention among so many tokens is the joint one."""
        return tokens == self.total or (self.optional and tokens == self.total - self.references)

    def describe(self) -> str:
        """What it consists of, for a message."""
        rest = self.total - self.text[1] - self.picture[1] - self.references
        parts = [(self.text[1], "text"), (self.references, "reference"), (rest, "other")]
        named = [f"{count} {name}" for count, name in parts if count]
        return f"{', '.join(named)} and {self.picture[1]} picture tokens"


@dataclass
class RunningBlock:
    """Which of the watched blocks runs now.

    Attributes:
        index: its number, None between them; entered: whether any ran.
        positions: rotations of the positions that it was called with, as the network holds them.
    """

    index: int | None = None
    entered: bool = False
    positions: Tensor | None = None

    def rotation(self, token: int) -> Tensor | None:
        """That of one token, [pairs, 2, 2]; None where none is known."""
        if self.positions is None:
            return None
        *_, pairs, rows, columns = self.positions.shape
        return self.positions[:1].reshape(-1, pairs, rows, columns)[token]


@contextmanager
def watch_blocks(blocks: Sequence[torch.nn.Module], positions: tuple[int, str] | None = None,
                 ) -> Iterator[RunningBlock]:
    """Tells which block of a network runs, for as long as the context lasts.

    Lengths alone do not tell a joint attention from a refiner's: a text and a picture may have as many tokens.

    Args:
        positions: which argument of a block holds rotations, by place and by name; None where that is not asked.
    """
    running = RunningBlock()

    def enter(index: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.index, running.entered = index, True
        if positions is not None:
            place, name = positions
            running.positions = kwargs[name] if name in kwargs else args[place]

    def leave(module: Any, args: Any, output: Any) -> None:
        running.index = None

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(partial(enter, index), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        yield running


def turn(tensor: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Queries or keys [..., 2 * pairs] of one position at another.

    Rotary positions (RoFormer, arXiv 2104.09864) turn neighbouring channels; turned back by `before`, then by `after`.

    Args:
        before, after: rotations of the two positions, [pairs, 2, 2].
    """
    rotation = after.float() @ before.float().transpose(-1, -2)
    pairs = rearrange(tensor.float(), "... (pairs two) -> ... pairs two", two=2)
    turned = torch.einsum("p i j, ... p j -> ... p i", rotation.to(tensor.device), pairs)
    return rearrange(turned, "... pairs two -> ... (pairs two)").to(tensor.dtype)
