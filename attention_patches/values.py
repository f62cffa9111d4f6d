"""Text values times a factor for each token: what token attention scale does inside a network.

Source: MagicMix (arXiv 2210.16056), content strength and concept removal. With A = softmax(Q K^T / sqrt d),
(A diag(f)) V = A (diag(f) V): scaling the value rows of the tokens is the paper's re-weighting, exactly, without
materialising A. Nothing is normalised again.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from .rows import Attention, chain_override, split_evenly, token_axis
from .sequence import RunningBlock, TokenSequence

NODE = "Token Attention Scale"
SCALED = "mixology_scaled"  # in transformer_options: what scales the rows' own text in this call


def extend_factors(factors: Tensor, tokens: int, before: int = 0) -> Tensor:
    """Factors [values, own tokens] for a longer text: 1 for what a model put in front and for what was appended.

    Args:
        tokens: of the whole text; before: of what is in front of the prompt's.

    Raises:
        ValueError: if the conditioning has become shorter.
    """
    values, own = factors.shape
    if tokens < before + own:
        raise ValueError(
            f"{NODE} expected the {own} tokens of its own conditioning, got {tokens - before}; place "
            f"nodes that shorten a conditioning before it, or keep this one as conditioning_to.")
    ones = factors.new_ones(values, tokens - own)
    return torch.cat([ones[:, :before], factors, ones[:, before:]], dim=1)


def join_factors(chunks: list[Tensor | None], rows: int, tokens: int) -> Tensor:
    """Factors of a whole call, [rows, tokens].

    Args:
        chunks: one entry per chunk of the batch, in order: factors [1 or rows of a chunk, tokens of its conditioning],
            all on one device, or None for a chunk that is not scaled; not all None.
        rows: batch size of the call, a multiple of the number of chunks.
        tokens: text length of the call: a multiple of each conditioning's, since the host repeats contexts of unequal
            length to a common one. Attention over repeated tokens is that over the tokens themselves.

    Raises:
        ValueError: if another node changed rows or text in between.
    """
    share = split_evenly(rows, len(chunks), NODE)
    device = next(factors.device for factors in chunks if factors is not None)
    parts = []
    for factors in chunks:
        if factors is None:
            parts.append(torch.ones(share, tokens, device=device))
            continue
        values, own = factors.shape
        if not tokens or tokens % own or values not in (1, share):
            raise ValueError(
                f"{NODE} expected {values} rows of {own} tokens, got {share} of {tokens}; remove the "
                f"node that changes the model's batch or its text.")
        parts.append(repeat(factors, "values own -> values (times own)", times=tokens // own).expand(share, tokens))
    return torch.cat(parts)


def make_value_patch(factors: Tensor, first_attention: bool = False) -> ScaleValues:
    """Text attention of a UNet: an `attn2_patch` that scales the value rows and leaves queries and keys alone.

    `to_v` has no bias, so that scaling its input scales its output.

    Args:
        factors: [rows, tokens], for the whole call.
        first_attention: for an `attn1_patch`, the first of its list, that lets the picture's attention to itself pass.
    """
    return ScaleValues(factors, first_attention)


class ScaleValues:
    """What `make_value_patch` makes; a class, so that others can tell it."""

    def __init__(self, factors: Tensor, first_attention: bool):
        self.factors, self.first_attention = factors, first_attention

    def __call__(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any],
                 ) -> tuple[Tensor, Tensor, Tensor]:
        if self.first_attention and context is n:
            return n, context, value
        if value.shape[:2] != self.factors.shape:
            raise ValueError(
                f"{NODE} expected text of {tuple(self.factors.shape)} rows and tokens, got "
                f"{tuple(value.shape[:2])}; place the node that changes the text inside the model after it.")
        return n, context, value * self.factors.to(value).unsqueeze(-1)


class ScaledSequence:
    """Joint attention of a diffusion transformer: pictures see scaled text values, all else the original ones.

    The queries are split in two calls of the host's own kernel, which together cost what one does.

    Args:
        factors: [rows, text tokens].
        sequence: where text and pictures stand; running: which of the network's joint blocks runs.
        inner: an override found in the host's slot, called in place of the kernel.
    """

    def __init__(self, factors: Tensor, sequence: TokenSequence, running: RunningBlock, inner: Attention | None):
        self.factors, self.sequence, self.running, self.inner = factors, sequence, running, inner
        self.acted = False
        self.paused = False  # while a text is read that is not the rows' own

    def attend(self, func: Attention, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        """The override.

        Raises:
            ValueError: if a joint block attends among other tokens than it was called with.
        """
        chained, axis = chain_override(func, self.inner), token_axis(kwargs)
        tokens, pictures = k.shape[axis], (self.sequence.picture[1], self.sequence.pictures[1])
        joint = self.sequence.holds(tokens)
        if self.paused or self.running.index is None or (not joint and tokens in pictures):
            return chained(q, k, v, heads, *args, **kwargs)
        if not joint or q.shape[axis] != tokens:
            raise ValueError(
                f"{NODE} expected {self.sequence.describe()} in the model's attention, got {tokens} tokens in all; "
                f"remove the node that adds tokens to the model.")
        self.acted = True
        first = self.sequence.pictures[0]
        last = min(first + self.sequence.pictures[1], tokens)
        inside, outside = [slice(first, last)], [slice(0, first), slice(last, tokens)]

        def attend(v: Tensor, parts: list[slice]) -> Tensor:
            more, named = cut_mask(args, kwargs, parts, tokens)
            return chained(take(q, parts, axis), k, v, heads, *more, **named)

        picture, own = attend(self.scale(v, axis), inside), attend(v, outside)
        axis = 2 if kwargs.get("skip_output_reshape", False) else 1
        before, after = own.split([first, tokens - last], dim=axis)
        return torch.cat([before, picture, after], dim=axis)

    def scale(self, v: Tensor, axis: int) -> Tensor:
        """Values with those of the text scaled."""
        first, text = self.sequence.text
        weights = self.factors.to(v)
        weights = weights.reshape(len(weights), *[1] * (axis - 1), text, *[1] * (v.ndim - 1 - axis))
        last = first + text
        return torch.cat([
            v.narrow(axis, 0, first), v.narrow(axis, first, text) * weights,
            v.narrow(axis, last, v.shape[axis] - last)], dim=axis)

    def check_acted(self) -> None:
        """Raises ValueError if blocks ran and no attention of theirs came here."""
        if self.running.entered and not self.acted:
            raise ValueError(
                f"{NODE} expected to compute the model's joint attention, got a node that replaces it; remove that "
                f"node.")


def take(tensor: Tensor, parts: list[slice], axis: int) -> Tensor:
    """Some of the tokens of a tensor, in order."""
    found = [tensor.narrow(axis, part.start, part.stop - part.start) for part in parts if part.stop > part.start]
    return found[0] if len(found) == 1 else torch.cat(found, dim=axis)


def cut_mask(args: tuple[Any, ...], kwargs: dict[str, Any], parts: list[slice], tokens: int,
             ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments after `heads` with the mask cut to some of the queries.

    A mask is [..., queries or 1, keys], given by position or by name.
    """
    mask = args[0] if args else kwargs.get("mask")
    if mask is None or mask.ndim < 2 or mask.shape[-2] != tokens:
        return args, kwargs
    cut = take(mask, parts, mask.ndim - 2)
    return ((cut, *args[1:]), kwargs) if args else (args, {**kwargs, "mask": cut})


@contextmanager
def scaled_outputs(readers: Sequence[tuple[torch.nn.Module, Sequence[torch.nn.Module]]], factors: Tensor,
                   ) -> Iterator[None]:
    """Scales what layers make of a text's tokens, [rows, tokens, channels], for as long as the context lasts.

    Args:
        readers: what attends to the text, each with its layers that make values of it, once in a call.
        factors: [rows, tokens], of those that come first.

    Raises:
        ValueError: on a text of other rows or fewer tokens, or where a reader makes no values of a text, or several.
    """
    rows, tokens = factors.shape
    made: dict[torch.nn.Module, int] = {}  # times in the reader that runs

    def scale(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        made[module] = made.get(module, 0) + 1
        if len(output) != rows or output.shape[1] < tokens:
            raise ValueError(
                f"{NODE} expected text of {tuple(factors.shape)} rows and tokens, got {tuple(output.shape[:2])}; "
                f"remove the node that changes the text inside the model.")
        scaled = output[:, :tokens] * factors.to(output).unsqueeze(-1)
        # a merge puts the texts of other styles behind the rows' own
        return scaled if output.shape[1] == tokens else torch.cat([scaled, output[:, tokens:]], dim=1)

    def check(layers: Sequence[torch.nn.Module], module: Any, args: Any, output: Any) -> None:
        counts = [made.pop(layer, 0) for layer in layers]
        if any(count != 1 for count in counts):
            raise ValueError(
                f"{NODE} expected the model to read one text in each layer, got {max(counts)}; remove the node that "
                f"replaces the model's text attention.")

    with ExitStack() as stack:
        for reader, layers in readers:
            for layer in layers:
                stack.callback(layer.register_forward_hook(scale).remove)
            stack.callback(reader.register_forward_hook(partial(check, layers)).remove)
        yield
