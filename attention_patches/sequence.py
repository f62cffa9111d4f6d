"""Where text and picture stand in an attention's tokens, and which block of a network runs."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Span = tuple[int, int]  # first token, tokens


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of one joint attention, in one row of a batch.

    Attributes:
        text: those of the prompt, in the order of its factors; picture: those of what is sampled, frame after frame.
        pictures: picture and reference pictures together, which all read the text.
        total: all of them, padding included; references: of these, in pictures that a network may leave out.
        grid: tokens of one frame down and across; frames: of the picture.
    """

    text: Span
    picture: Span
    pictures: Span
    total: int
    grid: tuple[int, int]
    frames: int = 1
    references: int = 0

    def holds(self, tokens: int) -> bool:
        """Whether an attention among so many tokens is the joint one."""
        return tokens in (self.total, self.total - self.references)

    def describe(self) -> str:
        """What it consists of, for a message."""
        rest = self.total - self.text[1] - self.picture[1] - self.references
        parts = [(self.text[1], "text"), (self.references, "reference"), (rest, "other")]
        named = [f"{count} {name}" for count, name in parts if count]
        return f"{', '.join(named)} and {self.picture[1]} picture tokens"


@dataclass
class RunningBlock:
    """Which of the watched blocks runs now: its number, None between them; and whether any ran."""

    index: int | None = None
    entered: bool = False


@contextmanager
def watch_blocks(blocks: Sequence[torch.nn.Module]) -> Iterator[RunningBlock]:
    """Tells which block of a network runs, for as long as the context lasts.

    Lengths alone do not tell a joint attention from a refiner's: a text and a picture may have as many tokens.
    """
    running = RunningBlock()
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_pre_hook(partial(_enter, running, index)).remove)
            stack.callback(block.register_forward_hook(partial(_leave, running)).remove)
        yield running


def _enter(running: RunningBlock, index: int, module: Any, args: Any) -> None:
    running.index, running.entered = index, True


def _leave(running: RunningBlock, module: Any, args: Any, output: Any) -> None:
    running.index = None
