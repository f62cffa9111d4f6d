"""Text values times a factor for each token: what token attention scale does inside a network.

Source: MagicMix (arXiv 2210.16056), content strength and concept removal. With A = softmax(Q K^T / sqrt d),
(A diag(f)) V = A (diag(f) V): scaling the value rows of the tokens is the paper's re-weighting, exactly, without
materialising A. Nothing is normalised again.
"""
from __future__ import annotations

from typing import Any

import torch
from einops import repeat
from torch import Tensor

from .rows import Attention, chain_override, split_evenly, token_axis

NODE = "Token Attention Scale"


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


def make_joint_override(factors: Tensor, image_tokens: int, inner: Attention | None) -> Attention:
    """Joint attention of a diffusion transformer: image queries see scaled text values, text queries the original ones.

    The queries are split in two calls of the host's own kernel, which together cost what one does.

    Args:
        factors: [rows, text tokens]. The text comes first in the joint sequence.
        image_tokens: tokens of the picture alone, to pass image-only attention through.
        inner: an override found in the host's slot, called in place of the kernel.
    """
    text = factors.shape[1]

    def attend_scaled(func: Attention, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any,
                      ) -> Tensor:
        def attend(q: Tensor, v: Tensor, part: slice) -> Tensor:
            more, named = slice_mask(args, kwargs, part, tokens)
            return chained(q, k, v, heads, *more, **named)

        chained, axis = chain_override(func, inner), token_axis(kwargs)
        tokens = q.shape[axis]
        if tokens == image_tokens:
            return attend(q, v, slice(None))
        weights = factors.to(v)
        weights = weights.reshape(len(weights), *[1] * (axis - 1), text, *[1] * (v.ndim - 1 - axis))
        scaled = torch.cat([v.narrow(axis, 0, text) * weights, v.narrow(axis, text, tokens - text)], dim=axis)
        own = attend(q.narrow(axis, 0, text), v, slice(0, text))
        image = attend(q.narrow(axis, text, tokens - text), scaled, slice(text, None))
        return torch.cat([own, image], dim=2 if kwargs.get("skip_output_reshape", False) else 1)

    return attend_scaled


def slice_mask(args: tuple[Any, ...], kwargs: dict[str, Any], part: slice, tokens: int,
               ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments after `heads` with the mask cut to some of the queries.

    A mask is [..., queries or 1, keys], given by position or by name.
    """
    mask = args[0] if args else kwargs.get("mask")
    if mask is None or mask.shape[-2] != tokens:
        return args, kwargs
    cut = mask[..., part, :]
    return ((cut, *args[1:]), kwargs) if args else (args, {**kwargs, "mask": cut})
