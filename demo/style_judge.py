"""Reads the style of a demo picture: flat, sketch (a dark line around the shape) or neon (a bright one).

The judge of flat pictures tells a shape by its colour. Here pale or dark fills may look like the background, so the
silhouette is what the background, spreading from the border, does not reach.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .judge import PRESENCE_THRESHOLD, fit_backdrop, largest_part, resize_to_reference, ring_of, shape_scores, smooth
from .world import OUTLINE, SHAPES, STYLES

LUMA = torch.tensor([0.299, 0.587, 0.114])
LINE_CONTRAST = 0.1  # how much darker or brighter than both its sides a line must be
SOFTNESS = 0.03
MARGIN = 3  # pixels left out beside the line, where it blurs into its sides
REACH = 400  # steps of two pixels for the background to spread


@dataclass(frozen=True)
class StyleVerdict:
    """What a batch of pictures shows, in any style.

    Attributes:
        styles: scores [B, style] in 0..1 in the order of `world.STYLES`, summing to one; zero without a shape.
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
        return (self.styles.argmax(dim=1) == STYLES.index(name)) & (self.styles.sum(dim=1) > 0)

    def shows_shapes(self, names: list[str]) -> torch.Tensor:
        """Boolean [B]: does picture i show the shape names[i]?"""
        wanted = torch.tensor([SHAPES.index(name) for name in names])
        return (self.shapes.argmax(dim=1) == wanted) & (self.shapes.sum(dim=1) > 0.5)


def judge_styles(images: torch.Tensor) -> StyleVerdict:
    """Judge pictures [B, H, W, C] in 0..1, of any size; they are read at 128 pixels on the short side."""
    picture = resize_to_reference(images[..., :3].detach().float().cpu().permute(0, 3, 1, 2).clamp(0, 1))
    mask = find_silhouette(picture)
    styles = _read_line(picture, mask)
    lined = (styles[:, STYLES.index("flat")] < 0.5)[:, None, None]
    mask = torch.where(lined, _shrink(mask, MARGIN), mask)
    present = (mask.mean(dim=(1, 2)) >= PRESENCE_THRESHOLD).float()[:, None]
    return StyleVerdict(styles * present, shape_scores(mask) * present, mask)


def find_silhouette(picture: torch.Tensor) -> torch.Tensor:
    """Silhouettes [B, H, W], 0 or 1, of pictures [B, C, H, W]; holes are what looks like the background inside."""
    picture = smooth(picture, 0.8)
    off = (picture - fit_backdrop(picture)).norm(dim=1)
    noise = (3.5 * ring_of(off).median(dim=1).values).clamp(0.06, 0.16)
    bold = off.flatten(1).kthvalue(round(0.95 * off[0].numel()), dim=1).values
    far = (off > torch.maximum(noise, 0.15 * bold)[:, None, None]).float()
    outside = _spread_from_border(1 - F.max_pool2d(far[:, None], 2, ceil_mode=True))
    outside = F.interpolate(outside, scale_factor=2.0)[:, 0, : far.shape[1], : far.shape[2]]
    shape = (1 - outside) * (1 - (1 - far) * _grow(outside, MARGIN))
    shape = largest_part(smooth(shape, 1.2) > 0.5).float()
    inner = _shrink(shape, round(OUTLINE))
    usual = torch.stack([
        row[place > 0].median() if bool(place.any()) else row.new_zeros(()) for row, place in zip(off, inner)])
    hole = (smooth(off, 1.5) < 0.4 * usual[:, None, None]).float() * inner * (usual > 0.06).float()[:, None, None]
    return shape * (1 - _grow(_shrink(hole, 2), 2))


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


def _read_line(picture: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Style scores [B, style] from the brightness of the silhouette's edge beside what it parts."""
    luma = torch.einsum("bchw,c->bhw", picture, LUMA)
    width = round(OUTLINE)
    deep, near = _shrink(shape, width + MARGIN), _shrink(shape, width)
    inner = torch.where(deep.any(dim=2).any(dim=1)[:, None, None], deep, near)
    sides = torch.stack([_mean(luma, inner), _mean(luma, _grow(shape, 2 * width) - _grow(shape, MARGIN))])
    line = _mean(luma, shape - _shrink(shape, width - 1))
    dark = torch.sigmoid((sides.amin(dim=0) - line - LINE_CONTRAST) / SOFTNESS)
    bright = torch.sigmoid((line - sides.amax(dim=0) - LINE_CONTRAST) / SOFTNESS)
    scores = {"flat": 1 - dark - bright, "sketch": dark, "neon": bright}
    return torch.stack([scores[name] for name in STYLES], dim=1)


def _grow(mask: torch.Tensor, reach: int) -> torch.Tensor:
    """A mask [B, H, W] that reaches `reach` pixels further."""
    return F.max_pool2d(mask[:, None], 2 * reach + 1, 1, reach)[:, 0]


def _shrink(mask: torch.Tensor, reach: int) -> torch.Tensor:
    return 1 - _grow(1 - mask, reach)


def _mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (values * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)
