"""Feature injection: what a model reads in one picture, put into the rows that paint another.

Source: Ditail (Diffusion Cocktail, arXiv 2312.08873, content injection), after Plug-and-Play (arXiv 2211.12572): the
queries and keys of self-attention, and the features of a residual block before its skip is added, are those of the
source row. Values stay the target's own. `to_q` and `to_k` are linear, so that what they read is exchanged in their
place: the same queries and keys, at any mask, without computing attention anew.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from .masks import LayerMasks
from .rows import chain_override, check_part, check_rows, split_evenly, token_axis
from .sequence import RunningBlock, TokenSequence, turn

NODE = "Feature Injection"
Attention = Callable[..., Tensor]
Point = tuple[Hashable, ...]  # a place in a network
FEATURES: Point = ("features",)


SKIPPED = (
    f"{NODE} expected the model to read the trajectory at every step, got one of which another node skips parts; "
    f"remove the node that caches steps or skips blocks.")


class SourceTensors(dict[Point, tuple[Tensor, ...]]):
    """What was read in one source row: tensors [1 or images, ...] by place.

    Attributes:
        first: the picture's first token in the sequence, where positions follow it.
    """

    first: int = 0


class SourceRead(Exception):
    """Ends a source reading in which all points were met."""


@dataclass(frozen=True)
class Part:
    """What the rows of one conditioning are to see in a call.

    Attributes:
        picture, area: see `LayerMasks.weights`.
        images: rows; None if that is not known.
        cell: see `format_picture`, for messages.
    """

    picture: tuple[int, int]
    area: tuple[int, ...] | None
    images: int | None
    cell: int | None = None


@dataclass(frozen=True)
class Chunk:
    """How one conditioning's rows of a call are injected.

    Attributes:
        reading: of the source, on the same part of the picture.
        mask: injected inside it only; None for everywhere.
        picture, area, images, cell: see `Part`.
    """

    reading: SourceTensors
    mask: LayerMasks | None
    picture: tuple[int, int]
    area: tuple[int, ...] | None
    images: int | None = None
    cell: int | None = None


def check_call(shape: Sequence[int], parts: Sequence[Part | Chunk | None]) -> None:
    """Raises ValueError unless a call's rows are as many as its parts want, and see what they are to see.

    Args:
        shape: of the call's latent, [rows, channels, ..., height, width]; parts: in the order of the batch.
    """
    for part in parts:
        if part is not None and part.images is not None:
            check_rows(shape[0], len(parts), part.images, NODE)
            check_part((shape[-2], shape[-1]), part.picture, part.area, node=NODE, cell=part.cell)


def keep(readings: Sequence[SourceTensors], point: Point, *tensors: Tensor) -> None:
    """Hands each reading its rows of a call's tensors, [readings * images, ...]."""
    for reading, *parts in zip(readings, *(tensor.chunk(len(readings)) for tensor in tensors), strict=True):
        reading[point] = tuple(parts)


class Injector:
    """Lays readings over the rows of one call.

    Args:
        chunks: one for each part of the batch, in order; None for a part that stays as it is.
    """

    def __init__(self, chunks: Sequence[Chunk | None]):
        self.chunks = chunks
        self.placed: dict[tuple[Any, ...], Tensor] = {}  # weights on the call's device
        self.met: set[Point] = set()  # what was laid over in this call

    def check_met(self) -> None:
        """Raises ValueError if the call is over and left out a place that was to be injected."""
        if any(point not in self.met for chunk in self.chunks if chunk is not None for point in chunk.reading):
            raise ValueError(SKIPPED)

    def holds(self, point: Point) -> bool:
        return any(chunk is not None and point in chunk.reading for chunk in self.chunks)

    def exchange(
        self, own: Tensor, point: Point, part: int, layer: tuple[int, int], pattern: str,
        position: tuple[int, Tensor | None] = (0, None), **sizes: int,
    ) -> Tensor:
        """A new tensor like `own`, with the source's rows in place of the chunks' own as far as their masks say.

        Args:
            own: [chunks * images, ...]; point, part: what to lay over it.
            layer: cells of this layer down and across.
            pattern: how weights [1 or images, *layer] lie in the dimensions of `own`, in einops' words, and `sizes` of
                names in it.
            position: of the first token, and its rotation [pairs, 2, 2], or None; the source's is turned to it.

        Raises:
            ValueError: if the rows do not fit the source's.
        """
        split_evenly(len(own), len(self.chunks), NODE)
        self.met.add(point)
        parts = []
        for mine, chunk in zip(own.chunk(len(self.chunks)), self.chunks):
            source = None if chunk is None else chunk.reading.get(point)
            if chunk is None or source is None:
                parts.append(mine)
                continue
            theirs = source[part]
            if theirs.shape[1:] != mine.shape[1:] or len(theirs) not in (1, len(mine)):
                raise ValueError(
                    f"Feature Injection expected features of the shape {tuple(theirs.shape)} as in the source, got "
                    f"{tuple(mine.shape)}; remove the node that changes the model's batch or its tokens.")
            first, rotation = position
            if rotation is not None and chunk.reading.first != first:
                theirs = turn(theirs.to(own.device), source[2][0].to(own.device), rotation)  # read on another card
            theirs = theirs.to(mine).expand_as(mine)
            if chunk.mask is not None:
                key = chunk.area, layer
                if key not in self.placed:
                    self.placed[key] = chunk.mask.weights(chunk.picture, chunk.area, layer).to(mine)
                theirs = torch.lerp(mine, theirs, repeat(self.placed[key], pattern, **sizes))
            parts.append(theirs)
        return torch.cat(parts)


# ----------------------------------------------------------------------------------------------------------- UNets


def attention_point(extra_options: dict[str, Any]) -> Point:
    """Place of the self-attention that runs: block, its number, and the transformer's depth in it."""
    return (*extra_options["block"], extra_options["block_index"])


class UNetReader:
    """The patches of a source call of a UNet.

    Args:
        readings: one for each chunk of the call; filled as the call runs.
        points: what to read, in the network's order. The call ends at the last.
    """

    def __init__(self, readings: Sequence[SourceTensors], points: Sequence[Point]):
        self.readings, self.points = readings, frozenset(points)
        self.last = points[-1]

    def read(self, point: Point, *tensors: Tensor) -> None:
        keep(self.readings, point, *tensors)
        if point == self.last:
            raise SourceRead

    def read_attention(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any],
                       ) -> tuple[Tensor, Tensor, Tensor]:
        """The `attn1_patch`: keeps what queries and keys are made of, [rows, tokens, channels]."""
        if (point := attention_point(extra_options)) in self.points:
            self.read(point, n, context)
        return n, context, value

    def read_features(self, module: Any, args: Any, output: Tensor) -> None:
        """The forward hook of `out_layers`: keeps its output, [rows, channels, height, width]."""
        self.read(FEATURES, output)


class UNetInjector(Injector):
    """The patches of a target call of a UNet."""

    def inject_attention(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any],
                         ) -> tuple[Tensor, Tensor, Tensor]:
        """The `attn1_patch`: queries and keys are made of the source's hidden states, values of the own."""
        point = attention_point(extra_options)
        if not self.holds(point):
            return n, context, value
        height, width = extra_options["activations_shape"][-2:]

        def exchange(own: Tensor, part: int) -> Tensor:
            return self.exchange(own, point, part, (height, width), pattern="m h w -> m (h w) 1")

        laid = exchange(n, 0)
        return laid, laid if context is n else exchange(context, 1), value

    def inject_features(self, module: Any, args: Any, output: Tensor) -> Tensor:
        """The forward hook of `out_layers`."""
        if not self.holds(FEATURES):
            return output
        height, width = output.shape[-2:]
        return self.exchange(output, FEATURES, 0, (height, width), pattern="m h w -> m 1 h w")


# -------------------------------------------------------------------------------------------- diffusion transformers


@dataclass(frozen=True)
class JointCall:
    """Tells the attentions of one call of a diffusion transformer apart.

    Attributes:
        sequence: where the picture stands in a joint one; running: which block runs.
    """

    sequence: TokenSequence
    running: RunningBlock

    @property
    def picture(self) -> int:
        return self.sequence.picture[1]

    def place(self, q: Tensor, k: Tensor, axis: int) -> tuple[Point, int] | None:
        """The place of this attention and its first picture token; None if it is not one among a picture's tokens.

        Raises:
            ValueError: if it holds other tokens than those of the call.
        """
        tokens, index = q.shape[axis], self.running.index
        if index is None or k.shape[axis] != tokens:
            return None
        first, pictures = self.sequence.picture[0], self.sequence.pictures
        if self.sequence.holds(tokens):
            return ("joint", index), first
        if tokens == pictures[1]:
            return ("picture", index), first - pictures[0]
        if tokens == self.picture:
            return ("picture", index), 0
        raise ValueError(
            f"{NODE} expected {self.sequence.describe()}, got {tokens} in all; remove the node that adds tokens to the "
            f"model.")


def make_joint_reader(call: JointCall, readings: Sequence[SourceTensors], points: Sequence[Point],
                      inner: Attention | None) -> Attention:
    """An attention override that keeps the picture's queries and keys at `points`, after positions were put in.

    Args:
        readings: one for each chunk of the call; inner: an override found in the host's slot.
    """
    wanted = frozenset(index for _, index in points)

    def attend(func: Attention, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        axis = token_axis(kwargs)
        placed = call.place(q, k, axis)
        if placed is not None and placed[0][1] in wanted:
            point, first = placed
            # copies: a narrow view would keep text and values in memory as well
            kept = [t.narrow(axis, first, call.picture).clone() for t in (q, k)]
            rotation = call.running.rotation(call.sequence.picture[0])
            if rotation is not None:
                kept.append(rotation.expand(len(q), *rotation.shape))
                for reading in readings:
                    reading.first = call.sequence.picture[0]
            keep(readings, point, *kept)
        return chain_override(func, inner)(q, k, v, heads, *args, **kwargs)

    return attend


def make_joint_injector(call: JointCall, injectors: Sequence[Injector], inner: Attention | None) -> Attention:
    """An attention override that lays the source's queries and keys over the picture's, one injector after another."""
    def attend(func: Attention, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        axis = token_axis(kwargs)
        placed = call.place(q, k, axis)
        for injector in injectors:
            if placed is not None and injector.holds(placed[0]):
                q, k = (exchange_picture(t, injector, placed, part=part, call=call, axis=axis)
                        for part, t in enumerate((q, k)))
        return chain_override(func, inner)(q, k, v, heads, *args, **kwargs)

    return attend


def exchange_picture(own: Tensor, injector: Injector, placed: tuple[Point, int], *, part: int, call: JointCall,
                     axis: int) -> Tensor:
    """Queries or keys with the source's at the picture's tokens; all frames share a mask.

    Args:
        placed: the point, and where the picture's tokens start.
    """
    point, first = placed
    last = first + call.picture
    pattern = "m h w -> m 1 (frames h w) 1" if axis == 2 else "m h w -> m (frames h w) 1"
    position = call.sequence.picture[0], call.running.rotation(call.sequence.picture[0])
    picture = injector.exchange(
        own.narrow(axis, first, call.picture), point, part, call.sequence.grid, pattern=pattern, position=position,
        frames=call.sequence.frames)
    return torch.cat([own.narrow(axis, 0, first), picture, own.narrow(axis, last, own.shape[axis] - last)], dim=axis)
