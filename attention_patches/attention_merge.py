"""Cross-attention merge: one prediction whose text attention is several texts', each in its place.

Source: dual style (Goldszal and Mercier, "Seamless Dual-Style Image Generation with Diffusion Models", cross-attention
merging): out = sum_i M_i Attn(Q, K_i, V_i) before `to_out`, in every cross-attention layer. Queries are computed once;
the texts go through `to_k` and `to_v` side by side and are told apart again where attention is computed. One softmax
over all texts would not be the same.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .masks import Area, StyleMasks
from .rows import Attention, chain_override
from .values import ScaleValues

Patch = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class StyleTexts:
    """What the rows of one prompt read at one step besides their own text.

    Attributes:
        texts: of the styles after the first, [1 or rows, tokens, width]; the first is the rows' own.
        factors: a factor for every token's value, [1 or rows, tokens] or None, for each of `texts`.
        masks, picture, area: where each style shows; see `LayerMasks.weights`.
    """

    texts: Sequence[Tensor]
    factors: Sequence[Tensor | None]
    masks: StyleMasks
    picture: tuple[int, int]
    area: Area | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> StyleTexts:
        """The same on another device; masks follow when a layer asks for them."""
        return replace(
            self, texts=[text.to(device, dtype) for text in self.texts],
            factors=[factors if factors is None else factors.to(device, dtype) for factors in self.factors])


class StyleBlend:
    """Attention to several texts, blended in the rows of each merge.

    Args:
        merges: rows of the batch and what they read; rows that do not overlap, in the order of the batch.
        batch: rows of the call.
        inner: an override found in the host's slot, called in place of the kernel.
    """

    def __init__(self, merges: Sequence[tuple[slice, StyleTexts]], batch: int, inner: Attention | None):
        self.merges, self.batch, self.inner = merges, batch, inner
        # rows of other conditionings carry the texts too, unread: one projection for all
        self.texts = [expand_rows(text, rows, batch) for rows, styles in merges for text in styles.texts]

    def shares_of(self, index: int, like: Tensor) -> Tensor:
        """Shares of the styles of a merge at the layer that runs, [styles, tokens, 1], on the device of `like`."""
        raise NotImplementedError

    def blend(self, out: Tensor, attend: Callable[[int, slice], Tensor]) -> Tensor:
        """All rows' attention, [batch, tokens, channels].

        Args:
            out: to the rows' own text; attend: of some rows to one of `texts`, by its number.
        """
        parts, done, first = [], 0, 0
        for index, (rows, styles) in enumerate(self.merges):
            merged = out[rows]
            for number, share in enumerate(self.shares_of(index, merged), first):
                merged = torch.lerp(merged, attend(number, rows), share)
            parts += [out[done:rows.start], merged]
            done, first = rows.stop, first + len(styles.texts)
        return torch.cat([*parts, out[done:]])


class MergedAttention(StyleBlend):
    """The two patches of one model call: the one puts all texts into one context, the other attends to each.

    The host calls them in turn in every block, so that the first tells the second what the next attention reads.

    Args:
        edits: patches of other nodes before these, which may change the rows' own text.
        given: tokens of the rows' own text before them. Where they leave less, the text was made for them (NegPip lays
            keys and values of each word behind one another), and they read the texts of the styles as well.
    """

    def __init__(self, merges: Sequence[tuple[slice, StyleTexts]], batch: int, inner: Attention | None,
                 edits: Sequence[Patch] = (), given: int = 0):
        super().__init__(merges, batch, inner)
        self.edits = [patch for patch in edits if not isinstance(patch, ScaleValues)]  # the rows' own
        self.given = given
        factors = [factor if factor is None else rearrange(expand_rows(factor, rows, batch), "b tokens -> b tokens 1")
                   for rows, styles in merges for factor in styles.factors]
        self.values = [text if factor is None else text * factor for text, factor in zip(self.texts, factors)]
        # tokens of every text in the attention that comes next, the rows' own first; none in self-attention
        self.lengths: list[int] = []
        self.layer = (0, 0)  # its picture tokens, down and across
        self.reads_text = False  # whether the first attention that comes next does
        self.placed: dict[tuple[int, tuple[int, int]], Tensor] = {}  # shares on the call's device, by merge and layer
        self.joined = torch.cat(self.texts, dim=1)
        scaled = any(factor is not None for factor in factors)
        self.joined_values = torch.cat(self.values, dim=1) if scaled else self.joined

    def note_text(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any],
                  ) -> tuple[Tensor, Tensor, Tensor]:
        """An `attn1_patch`, the first of its list: notes whether this attention reads text in place of the picture."""
        self.reads_text = context is not n
        return n, context, value

    def join_noted_text(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any],
                        ) -> tuple[Tensor, Tensor, Tensor]:
        """The last `attn1_patch`, for blocks whose first attention reads text."""
        return self.join_texts(n, context, value, extra_options) if self.reads_text else (n, context, value)

    def join_texts(self, n: Tensor, context: Tensor, value: Tensor, extra_options: dict[str, Any],
                   ) -> tuple[Tensor, Tensor, Tensor]:
        """The `attn2_patch`: contexts [B, tokens, width] with the texts of all styles after the rows' own.

        Raises:
            ValueError: if the override was not asked after the last call, or another node added rows.
        """
        if self.lengths:
            raise ValueError(
                "Cross-Attention Merge expected to compute the model's text attention, got a node that replaces it; "
                "remove that node, or use the Epsilon Merge Guider.")
        if len(context) != self.batch:
            raise ValueError(
                f"Cross-Attention Merge expected {self.batch} rows of text inside the model, got {len(context)}; "
                f"remove the node that couples prompts inside attention.")
        height, width = extra_options["activations_shape"][-2:]
        self.layer = height, width
        texts, joined, values = self.texts, self.joined, self.joined_values
        if context.shape[1] < self.given:
            edited = [self.edit(n, *pair, extra_options) for pair in zip(self.texts, self.values)]
            texts = [text for text, _ in edited]
            joined, values = torch.cat(texts, dim=1), torch.cat([own for _, own in edited], dim=1)
        self.lengths = [context.shape[1], *(text.shape[1] for text in texts)]
        contexts = torch.cat([context, joined], dim=1)
        if value is context and values is joined:
            return n, contexts, contexts
        return n, contexts, torch.cat([value, values], dim=1)

    def edit(self, n: Tensor, text: Tensor, value: Tensor, extra_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A style's text and values as other nodes' patches make them."""
        for patch in self.edits:
            n, text, value = patch(n, text, value, extra_options)
        return text, value

    def attend_each(self, func: Attention, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any,
                    ) -> Tensor:
        """The override: attention to the rows' own text, and in the rows of a merge to each style's, blended.

        Raises:
            ValueError: if another node changed the texts or the picture's tokens in between.
        """
        chained = chain_override(func, self.inner)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return chained(q, k, v, heads, *args, **kwargs)

        if not self.lengths:
            return attend(q, k, v)
        lengths, self.lengths = self.lengths, []
        expected, got = (self.layer[0] * self.layer[1], sum(lengths)), (q.shape[1], k.shape[1])
        if got != expected:
            raise ValueError(
                f"Cross-Attention Merge expected {expected[0]} picture and {expected[1]} text tokens in a layer, got "
                f"{got[0]} and {got[1]}; remove the node that changes them inside the model.")
        keys, values = k.split(lengths, dim=1), v.split(lengths, dim=1)
        return self.blend(attend(q, keys[0], values[0]), lambda number, rows: attend(
            q[rows], keys[number + 1][rows], values[number + 1][rows]))

    def shares_of(self, index: int, like: Tensor) -> Tensor:
        """Shares of the styles of a merge at this layer, [styles, tokens, 1], on the device of `like`."""
        key = index, self.layer
        if key not in self.placed:
            _, styles = self.merges[index]
            self.placed[key] = styles.masks.weights(styles.picture, styles.area, self.layer).to(like)
        return self.placed[key]


def expand_rows(part: Tensor, rows: slice, batch: int) -> Tensor:
    """[1 or rows, ...] as [batch, ...]: in its rows as given, elsewhere its first."""
    expanded = part[:1].expand(batch, *part.shape[1:])
    if len(part) > 1:
        expanded = expanded.clone()
        expanded[rows] = part
    return expanded
