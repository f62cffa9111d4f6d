"""Reads drawn pictures back: which thing, in which style, on which background, and where?

Thing, style and silhouette come from a small convolutional network (`demo/train_judge.py`) that learned from the drawn
pictures alone, turned, scaled, tinted, blurred and noised; it shares nothing with the demo checkpoints. The background
is measured at the border.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .drawings import BACKGROUNDS, THINGS
from .drawings import STYLES as DRAWN_STYLES

STYLES = (*DRAWN_STYLES, "chalk")  # the last one is only known to a LoRA
SIDE = 128
CHUNK = 64  # pictures judged at once, to bound memory
RING = 5  # width of the border ring in pixels
FARTHEST = 0.25  # distance in RGB of a border from the nearest background that still counts


class Block(nn.Module):
    """Two convolutions beside a way past them; the first may halve the picture."""

    def __init__(self, width: int, out: int, stride: int = 1):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.norm, self.last = nn.GroupNorm(8, out), nn.GroupNorm(8, out)
        self.past = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.last(self.second(F.relu(self.norm(self.first(x)))))
        return F.relu(inner + self.past(F.avg_pool2d(x, self.stride) if self.stride > 1 else x))


class Network(nn.Module):
    """Pictures [B, 3, 64, 64] in 0..1 to logits of things (the last is none), styles, and silhouettes [B, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 128, 160)
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1)
        self.blocks = nn.ModuleList([
            Block(widths[max(i - 1, 0)], width, 1 + (i > 0)) for i, width in enumerate(widths)])
        self.heads = nn.Linear(widths[-1], len(THINGS) + 1 + len(STYLES))
        self.sides = nn.ModuleList([nn.Conv2d(width, 32, 1) for width in widths])
        self.inside = nn.Conv2d(32, 4, 3, 1, 1)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = F.relu(self.stem(pictures * 2 - 1))
        levels = []
        for block in self.blocks:
            x = block(x)
            levels.append(x)
        things, styles = self.heads(x.mean(dim=(2, 3))).split([len(THINGS) + 1, len(STYLES)], dim=1)
        seen = self.sides[-1](levels[-1])
        for side, level in zip(list(self.sides)[-2::-1], levels[-2::-1]):
            seen = F.relu(F.interpolate(seen, scale_factor=2.0) + side(level))
        return things, styles, F.pixel_shuffle(self.inside(seen), 2)[:, 0]


@dataclass(frozen=True)
class Verdict:
    """What a batch of pictures shows.

    Attributes:
        things: scores [B, thing] in the order of `drawings.THINGS`; what is missing to one says that there is none.
        styles: scores [B, style] in the order of `STYLES`.
        backgrounds: distances in RGB [B, background] of the border in the order of `drawings.BACKGROUNDS`.
        mask: the silhouette [B, H, W] in 0..1, at 128 pixels.
    """

    things: torch.Tensor
    styles: torch.Tensor
    backgrounds: torch.Tensor
    mask: torch.Tensor

    def shows(self, things: list[str], top: int = 1) -> torch.Tensor:
        """Boolean [B]: is things[i] among the `top` most likely things of picture i?"""
        wanted = torch.tensor([THINGS.index(name) for name in things])
        found = (self.things.topk(top, dim=1).indices == wanted[:, None]).any(dim=1)
        return found & (self.things.sum(dim=1) > 0.5)

    def shows_styles(self, styles: list[str]) -> torch.Tensor:
        """Boolean [B]: is picture i drawn in styles[i]?"""
        return self.styles.argmax(dim=1) == torch.tensor([STYLES.index(name) for name in styles])

    def shows_backgrounds(self, names: list[str]) -> torch.Tensor:
        """Boolean [B]: does picture i stand on the background names[i]?"""
        wanted = torch.tensor([list(BACKGROUNDS).index(name) for name in names])
        return (self.backgrounds.argmin(dim=1) == wanted) & (self.backgrounds.amin(dim=1) < FARTHEST)


@lru_cache(maxsize=1)
def load_network() -> Network:
    from safetensors.torch import load_file

    network = Network()
    state = load_file(Path(__file__).resolve().parent / "drawn" / "judge.safetensors")
    network.load_state_dict({name: value.float() for name, value in state.items()})
    return network.train(False).requires_grad_(False)


def border_distances(pictures: torch.Tensor) -> torch.Tensor:
    """Distances [B, background] of the border's median colour from each background; pictures [B, 3, H, W]."""
    inner = torch.ones(pictures.shape[-2:], dtype=torch.bool)
    inner[RING:-RING, RING:-RING] = False
    colour = pictures[..., inner].median(dim=-1).values
    return torch.cdist(colour, torch.tensor(list(BACKGROUNDS.values())) / 255)


@torch.no_grad()
def judge_drawings(images: torch.Tensor, network: Network | None = None) -> Verdict:
    """Judge pictures [B, H, W, C] in 0..1, of any size; they are read at 128 x 128."""
    network = load_network() if network is None else network
    pictures = images[..., :3].detach().float().cpu().permute(0, 3, 1, 2).clamp(0, 1)
    if pictures.shape[-2:] != (SIDE, SIDE):
        pictures = F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=True)
    parts = [network(F.avg_pool2d(chunk, 2)) for chunk in pictures.split(CHUNK)]
    things, styles, inside = (torch.cat(part) for part in zip(*parts))
    mask = F.interpolate(inside.sigmoid()[:, None], (SIDE, SIDE), mode="bilinear")[:, 0]
    return Verdict(things.softmax(dim=1)[:, :-1], styles.softmax(dim=1), border_distances(pictures), mask)
