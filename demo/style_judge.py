"""Reads the style of a demo picture: flat, sketch (lines on white paper) or neon (lines in the dark).

The judge of flat pictures tells a shape by its colour. Drawn in lines, it looks like the background inside, so here the
silhouette is what the background, spreading from the border, does not reach; a ring is read with its hole.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .judge import PRESENCE_THRESHOLD, fit_backdrop, largest_part, resize_to_reference, ring_of, shape_scores, smooth
from .world import OUTLINE, SHAPES, STYLES

LUMA = torch.tensor([0.299, 0.587, 0.114])
ALIKE = 0.3  # distance in RGB below which a pixel inside counts as background
HOLLOW = (0.2, 0.04)  # share of such pixels that a shape drawn in lines has, and its softness
DRAWN = (0.75, 0.03)  # share of the edge that a line must cover, and its softness
MARGIN = 3  # pixels that the silhouette reaches beyond the middle of the line
REACH = 400  # steps of two pixels for the background to spread


@dataclass(frozen=True)
class StyleVerdict:
    """What a batch of pictures shows, in any style.

    Attributes:
        styles: scores [B, style] in 0..1 in the order of `world.STYLES`; what is missing to one says "none of these".
        shapes: scores [B, shape] in the order of `world.SHAPES`; zero without a shape.
        mask: the silhouette to the middle of its line [B, H, W], 0 or 1, at 128 pixels on the short side.
    """

    styles: torch.Tensor
    shapes: torch.Tensor
    mask: torch.Tensor

    def style(self, name: str) -> torch.Tensor:
        """The score [B] of one style."""
        return self.styles[:, STYLES.index(name)]

    def shows_style(self, name: str) -> torch.Tensor:
        """Boolean [B]."""
        return self.style(name) > 0.5

    def shows_shapes(self, names: list[str]) -> torch.Tensor:
        """Boolean [B]: does picture i show the shape names[i]?"""
        wanted = torch.tensor([SHAPES.index(name) for name in names])
        return (self.shapes.argmax(dim=1) == wanted) & (self.shapes.sum(dim=1) > 0.5)


def judge_styles(images: torch.Tensor) -> StyleVerdict:
    """Judge pictures [B, H, W, C] in 0..1, of any size; they are read at 128 pixels on the short side."""
    picture = resize_to_reference(images[..., :3].detach().float().cpu().permute(0, 3, 1, 2).clamp(0, 1))
    picture = smooth(picture, 0.8)
    backdrop = fit_backdrop(picture)
    off = (picture - backdrop).norm(dim=1)
    mask = find_silhouette(off)
    inner = _shrink(mask, round(OUTLINE) + MARGIN)
    edge = _shrink(mask, 1) - _shrink(mask, round(OUTLINE) - 1)
    hollow, drawn = _share(off < ALIKE, inner), _share(off > ALIKE, edge)
    lines = torch.sigmoid((hollow - HOLLOW[0]) / HOLLOW[1]) * torch.sigmoid((drawn - DRAWN[0]) / DRAWN[1])
    light = torch.einsum("bchw,c->bhw", backdrop, LUMA).flatten(1).median(dim=1).values
    paper, dark = torch.sigmoid((light - 0.85) / 0.03), torch.sigmoid((0.2 - light) / 0.03)
    scores = {"flat": 1 - lines, "sketch": lines * paper, "neon": lines * dark}
    mask = torch.where((lines > 0.5)[:, None, None], _shrink(mask, MARGIN), mask)
    present = (mask.mean(dim=(1, 2)) >= PRESENCE_THRESHOLD).float()[:, None]
    styles = torch.stack([scores[name] for name in STYLES], dim=1)
    return StyleVerdict(styles * present, shape_scores(mask) * present, mask)


def find_silhouette(off: torch.Tensor) -> torch.Tensor:
    """Silhouettes [B, H, W], 0 or 1, from the distance [B, H, W] of every pixel to the background."""
    noise = (3.5 * ring_of(off).median(dim=1).values).clamp(0.08, 0.16)
    bold = off.flatten(1).kthvalue(round(0.95 * off[0].numel()), dim=1).values
    far = (off > torch.maximum(noise, 0.2 * bold)[:, None, None]).float()
    outside = _spread_from_border(1 - F.max_pool2d(far[:, None], 2, ceil_mode=True))
    outside = F.interpolate(outside, scale_factor=2.0)[:, 0, : far.shape[1], : far.shape[2]]
    shape = (1 - outside) * (1 - (1 - far) * _grow(outside, MARGIN))
    return largest_part(smooth(shape, 1.2) > 0.5).float()


def _spread_from_border(free: torch.Tensor) -> torch.Tensor:
    """The free places [B, 1, h, w] that a path of free places joins to the border."""
    reached = free.clone()
    reached[..., 1:-1, 1:-1] = 0
    for _ in range(REACH):
        wider = F.max_pool2d(reached, 3, 1, 1) * free
        if torch.equal(wider, reached):
            break
        reached = wider
    return reached


def _grow(mask: torch.Tensor, reach: int) -> torch.Tensor:
    """A mask [B, H, W] that reaches `reach` pixels further."""
    return F.max_pool2d(mask[:, None], 2 * reach + 1, 1, reach)[:, 0]


def _shrink(mask: torch.Tensor, reach: int) -> torch.Tensor:
    return 1 - _grow(1 - mask, reach)


def _share(pixels: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """How much [B] of a place [B, H, W] these pixels cover."""
    return (pixels * place).sum(dim=(1, 2)) / place.sum(dim=(1, 2)).clamp(min=1)
