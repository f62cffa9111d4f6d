"""Cross-attention merge in transformers that read text through cross-attention, of pictures and of videos.

The same sum as in UNets, out = sum_i M_i Attn(Q, K_i, V_i) before the output projection. The texts stand behind the
rows' own where the network takes its text in, so that each of its layers works on all of them at once; they are told
apart again where attention is computed.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..samplers.masks import check_style_masks
from .attention_merge import StyleBlend, StyleTexts
from .masks import StyleMasks
from .rows import Attention, chain_override, token_axis

NODE = "Cross-Attention Merge"


@dataclass
class FrameMasks(StyleMasks):
    """Masks for every frame of a video as a user wires them, all those of one style behind one another.

    Attributes:
        mask: [styles * given, H, W], or of one style less; styles: of how many.
    """

    styles: int = 0

    def at_frames(self, frames: int, ratio: int) -> StyleMasks:
        """Masks [styles, frames, H, W] of a latent; one of several pictures is the mean of their masks.

        Args:
            frames: of the latent; ratio: pictures of the video in each but the first, which holds one.

        Raises:
            ValueError: if there are not as many for each style as the latent or the video has frames.
        """
        pictures = 1 + (frames - 1) * ratio
        fits = [(styles, given) for styles in (self.styles, self.styles - 1) for given in (frames, pictures)
                if len(self.mask) == styles * given]
        if not fits:
            raise ValueError(
                f"{NODE} expected {self.styles} masks, or that many for each of {frames} latent or {pictures} video "
                f"frames, all of one style behind one another (the last style may take the rest), got "
                f"{len(self.mask)}; join whole mask videos with Batch Masks, as long as the latent.")
        styles, given = fits[0]
        masks = self.mask.unflatten(0, (styles, given))
        if given != frames:
            later = masks[:, 1:].unflatten(1, (frames - 1, ratio)).mean(2)
            masks = torch.cat([masks[:, :1], later], dim=1)
        return StyleMasks(check_style_masks(masks.flatten(1, 2), self.styles).unflatten(1, masks.shape[1:3]))


@dataclass(frozen=True)
class VideoTexts(StyleTexts):
    """As `StyleTexts`, for rows of a picture or a video.

    Attributes:
        hidden: what is added to the scores of each text's tokens, [1, 1, 1, tokens], or None.
        frames: of the whole video, those that the rows show.
    """

    hidden: Sequence[Tensor | None] = ()
    frames: Sequence[int] = (0,)

    def to(self, device: torch.device, dtype: torch.dtype) -> VideoTexts:
        hidden = [part if part is None else part.to(device, dtype) for part in self.hidden]
        placed = super().to(device, dtype)
        return replace(self, texts=placed.texts, factors=placed.factors, hidden=hidden)

    def shares(self, grid: tuple[int, int], side: int, before: int, *, tokens: int) -> Tensor:
        """Shares of the styles after the first, [styles - 1, tokens, 1].

        Tokens of reference pictures, in front of the frames and behind them, read the texts in the shares of the whole.

        Args:
            grid: tokens of a frame down and across; side: of one in latent pixels; before: in front.
            tokens: all that read the text.
        """
        frames = self.masks.weights(self.picture, self.area, grid, side).unflatten(1, (-1, grid[0] * grid[1]))
        whole = self.masks.weights(self.picture, self.area, (1, 1)).unsqueeze(-1)
        shown = list(self.frames) if frames.shape[1] > 1 else [0] * len(self.frames)
        inside, rest = frames[:, shown].flatten(1, 2), whole[:, shown].mean(1)
        behind = tokens - before - inside.shape[1]
        return torch.cat([rest.expand(-1, before, -1), inside, rest.expand(-1, behind, -1)], dim=1)


class CrossMerge(StyleBlend):
    """What one model call does with several texts: joins them, watches the layers that read them, attends to each.

    Args:
        merges: see `StyleBlend`; their texts are `VideoTexts`.
        grid: tokens of a frame down and across; side: of one in latent pixels.
    """

    def __init__(self, merges: Sequence[tuple[slice, VideoTexts]], batch: int, inner: Attention | None, *,
                 grid: tuple[int, int], side: int):
        super().__init__(merges, batch, inner)
        self.video = [styles for _, styles in merges]
        self.factors = [factors for styles in self.video for factors in styles.factors]
        self.hidden = [hidden for styles in self.video for hidden in styles.hidden]
        self.grid, self.side = grid, side
        self.before = 0  # tokens of reference pictures in front of the frames
        self.lengths: list[int] = []  # tokens of every text, the rows' own first
        self.pictures: int | None = None  # tokens in front of the texts in the layer that runs; None between layers
        self.calls = self.merged = 0  # attentions in it, and those to texts among them
        self.placed: dict[tuple[int, int], Tensor] = {}  # shares on the call's device, by merge and tokens

    def join_texts(self, context: Tensor) -> Tensor:
        """The network's text [batch, tokens, width] with those of all styles behind it."""
        if len(context) != self.batch:
            raise ValueError(
                f"{NODE} expected {self.batch} rows of text inside the model, got {len(context)}; remove the node that "
                f"changes the model's batch.")
        self.lengths = [context.shape[1], *(text.shape[1] for text in self.texts)]
        return torch.cat([context, *self.texts], dim=1)

    @contextmanager
    def watch(self, layers: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Knows when one of the layers that read text runs, for as long as the context lasts."""
        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(self.enter, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(self.leave).remove)
            yield

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = kwargs["context"] if "context" in kwargs else args[1]
        self.pictures = context.shape[1] - sum(self.lengths)
        self.calls = self.merged = 0

    def leave(self, module: Any, args: Any, output: Any) -> None:
        self.pictures = None
        if not self.merged:
            raise ValueError(
                f"{NODE} expected to compute the model's text attention, got a node that replaces it; remove that "
                f"node, or use the Epsilon Merge Guider.")

    def attend_each(self, func: Attention, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any,
                    ) -> Tensor:
        """The override: where a layer reads text, attention to the rows' own, and in a merge's to each style's.

        Raises:
            ValueError: if another node changed the texts or the picture's tokens in between.
        """
        chained, axis = chain_override(func, self.inner), token_axis(kwargs)
        if self.pictures is None or not self.holds_text(k.shape[axis]):
            return chained(q, k, v, heads, *args, **kwargs)
        self.merged += 1
        keys, values = k.split(self.lengths, dim=axis), v.split(self.lengths, dim=axis)

        def attend(number: int, rows: slice) -> Tensor:
            value, hidden = values[number + 1][rows], self.hidden[number]
            more, named = replace_mask(args, kwargs, hidden)
            return chained(q[rows], keys[number + 1][rows], self.scale(number, value, axis), heads, *more, **named)

        return self.blend(chained(q, keys[0], values[0], heads, *args, **kwargs), attend)

    def holds_text(self, tokens: int) -> bool:
        """Whether an attention of the layer that runs reads the texts: a picture's comes first, where there is one."""
        self.calls += 1
        is_picture = bool(self.pictures) and self.calls == 1
        expected = self.pictures if is_picture else sum(self.lengths)
        if tokens != expected:
            raise ValueError(
                f"{NODE} expected {expected} tokens in a layer's {'picture' if is_picture else 'text'}, got {tokens}; "
                f"remove the node that changes them inside the model.")
        return not is_picture

    def scale(self, number: int, value: Tensor, axis: int) -> Tensor:
        """Values of a style with those of its scaled words multiplied."""
        factors = self.factors[number]
        if factors is None:
            return value
        shape = len(factors), *[1] * (axis - 1), factors.shape[1], *[1] * (value.ndim - 1 - axis)
        return value * factors.to(value).reshape(shape)

    def shares_of(self, index: int, like: Tensor) -> Tensor:
        """Shares of the styles at every token, [styles, tokens, 1].

        Raises:
            ValueError: if there are fewer tokens than the picture has.
        """
        styles, tokens = self.video[index], like.shape[1]
        least = self.before + len(styles.frames) * self.grid[0] * self.grid[1]
        if tokens < least:
            raise ValueError(
                f"{NODE} expected {least} picture tokens in a layer, got {tokens}; remove the node that takes some "
                f"out, such as guides in a video.")
        key = index, tokens
        if key not in self.placed:
            self.placed[key] = styles.shares(self.grid, self.side, self.before, tokens=tokens).to(like)
        return self.placed[key]


def replace_mask(args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None,
                 ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments after `heads` with another mask, which is given by position or by name."""
    if args:
        return (mask, *args[1:]), kwargs
    return args, {**kwargs, "mask": mask} if "mask" in kwargs or mask is not None else kwargs
