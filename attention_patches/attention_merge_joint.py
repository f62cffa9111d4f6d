"""Cross-attention merge where text and picture share one sequence: one picture, several texts, each read in its place.

Every text is a stream of its own, rewritten layer by layer from itself and the picture as if it stood there alone. The
picture is one stream: its queries get sum_i M_i Attn(q, [t_i ; picture]). One softmax over all texts would not be the
same: the longer text would take over.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from .attention_merge import StyleTexts
from .rows import Attention, chain_override, token_axis
from .sequence import RunningBlock, Span
from .together import NOWHERE, SharedSequence, pick, take
from .values import ScaledSequence

NODE = "Cross-Attention Merge"


def share_pictures(shares: Tensor, sequence: SharedSequence) -> Tensor:
    """Shares of the styles for all pictures, [styles, tokens, 1]: every frame's alike, a reference's their means.

    Args:
        shares: for one frame of the picture, [styles, tokens, 1]; see `StyleMasks`.
    """
    own = repeat(shares, "styles tokens 1 -> styles (frames tokens) 1", frames=sequence.frames)
    others = sequence.pictures[1] - sequence.picture[1]
    if not others:
        return own
    left = torch.cat([1 - shares, torch.ones_like(shares[:1])]).flip(0).cumprod(0).flip(0)  # by those that follow
    means = torch.cat([left[:1], shares * left[1:]]).mean(dim=1, keepdim=True)
    rest = (means[1:] / means.cumsum(0)[1:].clamp_min(torch.finfo(means.dtype).tiny)).expand(-1, others, -1)
    first = sequence.picture[0] - sequence.pictures[0]
    return torch.cat([rest[:, :first], own, rest[:, first:]], dim=1)


@dataclass(frozen=True)
class Reader:
    """The pictures' tokens that read a style: what share of theirs, [tokens, 1], and which of them, None for all."""

    share: Tensor
    picked: Tensor | None

    def to(self, device: torch.device) -> Reader:
        return Reader(self.share.to(device), None if self.picked is None else self.picked.to(device))


def find_readers(share: Tensor, whole: bool) -> Reader:
    """Those with a share [tokens, 1] above 0; all of them if asked for."""
    if whole or bool(share.all()):
        return Reader(share, None)
    picked = share.squeeze(-1).nonzero().squeeze(-1)
    return Reader(share[picked], picked)


class JointMerge:
    """The override of one model call: attention of each style's text and the picture, as if no other text were there.

    Args:
        merges: rows of the batch and what they read; rows that do not overlap, in the order of the batch.
        stages: which blocks run, and where tokens stand in their attention.
        layer: the picture's tokens down and across; side: of a token, in the latent's cells.
        inner: an override found in the host's slot, called in place of the kernel.
        scaled: what scales the rows' own text somewhere in `inner`.
    """

    def __init__(self, merges: Sequence[tuple[slice, StyleTexts]],
                 stages: Sequence[tuple[RunningBlock, SharedSequence]], layer: tuple[int, int], side: int,
                 inner: Attention | None, scaled: ScaledSequence | None = None):
        self.merges, self.stages = merges, stages
        self.layer, self.side = layer, side
        self.inner, self.scaled = inner, scaled
        self.placed: dict[tuple[int, Span], list[Reader]] = {}  # by merge and pictures
        self.acted = False

    def attend(self, func: Attention, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        """The override.

        Raises:
            ValueError: if blocks attend among other tokens than the call began with.
        """
        call = JointCall(q=q, k=k, v=v, heads=heads, args=args, kwargs=kwargs)
        stage = next((stage for running, stage in self.stages if running.index is not None), None)
        tokens = k.shape[call.axis]
        sequence = None if stage is None else stage.fit(tokens)
        if stage is None or (sequence is None and tokens in (stage.pictures[1], stage.picture[1])):
            chained = chain_override(func, self.inner)
            return chained(q, k, v, heads, *args, **kwargs)
        if sequence is None or q.shape[call.axis] != tokens:
            raise ValueError(
                f"{NODE} expected {stage.total} tokens in the model's attention, got {tokens}; remove the node that "
                f"adds tokens to the model.")
        self.acted = True
        return self.merge(func, call, sequence)

    def merge(self, func: Attention, call: JointCall, sequence: SharedSequence) -> Tensor:
        """What `attend` returns for an attention among the tokens of `sequence`."""
        own = chain_override(func, self.inner)

        def other(*args: Any, **kwargs: Any) -> Tensor:
            if self.scaled is None:
                return own(*args, **kwargs)
            self.scaled.paused = True  # factors of the rows' own text are no other style's
            try:
                return own(*args, **kwargs)
            finally:
                self.scaled.paused = False

        placed = [self.place(index, sequence, call.q.device) for index in range(len(self.merges))]
        first_readers = [] if call.has_own_mask(sequence) else [readers[0] for readers in placed]
        groups = self.split_rows(len(call.q), first_readers)
        read = [call.attend_style(own, sequence, rows, style=0, picked=picked, factors=None) for rows, picked in groups]
        out = call.make_output(read[0][0], sequence.total)
        for (rows, picked), parts in zip(groups, read):
            call.write(out, rows, sequence.list_spans(0), parts=parts, picked=picked)
        first = 1
        for (rows, styles), readers in zip(self.merges, placed):
            merged = out[rows].narrow(call.out_axis, *sequence.pictures)
            for style, reader in enumerate(readers[1:], first):
                if reader.picked is not None and not len(reader.picked):
                    continue  # nothing here reads this text
                before, pictures, after = call.attend_style(
                    other, sequence, rows, style=style, picked=reader.picked, factors=styles.factors[style - first])
                call.write(out, rows, (sequence.before[style], NOWHERE, sequence.after[style]),
                           parts=(before, before, after))
                merged = blend(merged, pictures, reader.share.to(pictures), picked=reader.picked, axis=call.out_axis)
            call.write(out, rows, (NOWHERE, sequence.pictures, NOWHERE), parts=(merged, merged, merged))
            first += len(styles.texts)
        return out

    def split_rows(self, batch: int, own: Sequence[Reader]) -> list[tuple[slice, Tensor | None]]:
        """Rows and which of their pictures' tokens read their own text, None for all."""
        if all(reader.picked is None for reader in own):
            return [(slice(0, batch), None)]
        found: list[tuple[slice, Tensor | None]] = []
        done = 0
        for (rows, _), reader in zip(self.merges, own):
            found += [(slice(done, rows.start), None), (rows, reader.picked)]
            done = rows.stop
        return [(rows, picked) for rows, picked in [*found, (slice(done, batch), None)] if rows.stop > rows.start]

    def place(self, index: int, sequence: SharedSequence, device: torch.device) -> list[Reader]:
        """Who reads each style of a merge, its own first.

        Tokens that a mask leaves out need no attention to its text, unless a node's override wants to see all of them.
        """
        key = index, sequence.pictures
        if key not in self.placed:
            _, styles = self.merges[index]
            shares = torch.zeros(len(styles.texts), 0, 1)
            if sequence.pictures[1]:
                shares = styles.masks.weights(styles.picture, styles.area, self.layer, self.side)
                shares = share_pictures(shares, sequence)
            shares = torch.cat([(shares < 1).all(0, keepdim=True).to(shares), shares])
            self.placed[key] = [find_readers(share, whole=self.inner is not None).to(device) for share in shares]
        return self.placed[key]

    def check_acted(self) -> None:
        """Raises ValueError if blocks ran and no attention of theirs came here."""
        if any(running.entered for running, _ in self.stages) and not self.acted:
            raise ValueError(
                f"{NODE} expected to compute the model's attention, got a node that replaces it; remove that node, or "
                f"use the Epsilon Merge Guider.")


@dataclass
class JointCall:
    """One attention of a network: what it was asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        self.axis = token_axis(self.kwargs)
        self.out_axis = 2 if self.kwargs.get("skip_output_reshape", False) else 1

    def attend_style(self, kernel: Attention, sequence: SharedSequence, rows: slice, *, style: int,
                     picked: Tensor | None, factors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of a style's own tokens and of the pictures, of which some may be picked, in order.

        Args:
            factors: of the values of the style's words, [1 or rows, tokens], as the pictures read them.
        """
        keys = sequence.list_spans(style)
        before, pictures, after = keys
        read: Tensor | Span = pictures if picked is None else picked + pictures[0]

        def ask(queries: Sequence[Tensor | Span], factors: Tensor | None = None) -> Tensor:
            mask = self.cut_mask(sequence, rows, queries=queries, style=style)
            return self.ask(kernel, rows, pick(self.q[rows], queries, self.axis), keys=keys, mask=mask, factors=factors)

        if factors is not None and before[1]:
            factors = torch.nn.functional.pad(factors, (sequence.lead, 0), value=1.0)

        count = pictures[1] if picked is None else len(picked)
        if factors is None or not count or not before[1]:
            out = ask([before, read, after])
        else:
            own, shown = ask([before, after]), ask([read], factors)
            first, last = own.split([before[1], after[1]], dim=self.out_axis)
            return first, shown, last
        first, shown, last = out.split([before[1], count, after[1]], dim=self.out_axis)
        return first, shown, last

    def ask(self, kernel: Attention, rows: slice, queries: Tensor, *, keys: Sequence[Span], mask: Tensor | None,
            factors: Tensor | None = None) -> Tensor:
        """The kernel's answer to some queries of some rows, among some of the tokens."""
        k, v = (take(part[rows], keys, self.axis) for part in (self.k, self.v))
        if factors is not None:
            v = scale_first(v, factors, self.axis)
        args, kwargs = self.args, self.kwargs
        if args:
            args = mask, *args[1:]
        elif kwargs.get("mask") is not None:
            kwargs = {**kwargs, "mask": mask}
        return kernel(queries, k, v, self.heads, *args, **kwargs)

    @property
    def mask(self) -> Tensor | None:
        return self.args[0] if self.args else self.kwargs.get("mask")

    def has_own_mask(self, sequence: SharedSequence) -> bool:
        """Whether there is a mask that was made for the rows' own text alone."""
        return self.mask is not None and self.mask.shape[-1] != sequence.total

    def cut_mask(self, sequence: SharedSequence, rows: slice, queries: Sequence[Tensor | Span], style: int,
                 ) -> Tensor | None:
        """The mask, [..., queries or 1, keys], for some of the queries and a style's keys.

        One that was made for the rows' own text alone is for these keys and all of its queries.
        """
        mask = self.mask
        if mask is None or style and self.has_own_mask(sequence):
            return None
        if mask.ndim > 2 and len(mask) == len(self.q):
            mask = mask[rows]
        if self.has_own_mask(sequence):
            return mask
        if mask.ndim > 1 and mask.shape[-2] == sequence.total:
            mask = pick(mask, queries, mask.ndim - 2)
        return take(mask, sequence.list_spans(style), mask.ndim - 1)

    def make_output(self, like: Tensor, tokens: int) -> Tensor:
        """Zeros for so many tokens; like: an output for some of them, in some rows."""
        shape = [len(self.q), *like.shape[1:]]
        shape[self.out_axis] = tokens
        return like.new_zeros(shape)

    def write(self, out: Tensor, rows: slice, spans: Sequence[Span], *, parts: Sequence[Tensor],
              picked: Tensor | None = None) -> None:
        """Puts in place what is in front of the pictures, the pictures, of which some may be picked, and the rest."""
        for span, part, chosen in zip(spans, parts, (None, picked, None)):
            if chosen is not None:
                out[rows].index_copy_(self.out_axis, chosen + span[0], part)
            elif span[1]:
                out[rows].narrow(self.out_axis, *span).copy_(part)


def blend(merged: Tensor, part: Tensor, share: Tensor, *, picked: Tensor | None, axis: int) -> Tensor:
    """Pictures [B, ..., tokens, channels] with a style's part blended in, at the tokens that were picked."""
    if picked is None:
        return torch.lerp(merged, part, share)
    return merged.index_copy(axis, picked, torch.lerp(merged.index_select(axis, picked), part, share))


def scale_first(v: Tensor, factors: Tensor, axis: int) -> Tensor:
    """Values with those of the first tokens times factors [1 or rows, tokens]."""
    tokens = factors.shape[1]
    weights = factors.to(v).reshape(len(factors), *[1] * (axis - 1), tokens, *[1] * (v.ndim - 1 - axis))
    rest = v.narrow(axis, tokens, v.shape[axis] - tokens)
    return torch.cat([v.narrow(axis, 0, tokens) * weights, rest], dim=axis)
