"""What Saliency Maps shows of a run: its maps in the picture, and one strip of them with step numbers and a legend."""
from __future__ import annotations

import math
from typing import Any

import torch

from ..samplers.fusion import expert_colours, lay_over
from ..samplers.wording import format_size
from .sheet import draw_sheet

MOST_STEPS, COLUMNS, MOST_IMAGES = 8, 4, 4  # of a strip; of several images only as many steps as there are columns
MOST_NAMED = 12  # experts in the legend


def count_images(samples: torch.Tensor) -> tuple[int, int]:
    """Images of a latent [B, C, ..., h, w], and frames of each."""
    return len(samples), math.prod(samples.shape[2:-2])


def overlay_maps(maps: torch.Tensor, pictures: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Maps [steps * B * frames, H, W, 3] over an IMAGE of what they are of.

    Args:
        samples: the latent, [B, C, ..., h, w].

    Raises:
        ValueError: if the pictures' number or proportions are others than the latent's.
    """
    laid, size, cells = lay_over(maps, pictures, *count_images(samples)), maps.shape[1:3], samples.shape[-2:]
    given = pictures.shape[1:3]
    # encoders cut or pad what is less than a latent pixel
    lowest = max(side / (cell + 1) for side, cell in zip(given, cells))
    highest = min(side / max(cell - 1, 1e-6) for side, cell in zip(given, cells))
    if lowest > highest:
        raise ValueError(
            f"Saliency Maps expects a picture in the proportions of the latent's {format_size(reversed(size))} pixels, "
            f"got {format_size(reversed(given))}; connect what the latent was decoded to.")
    return laid


def draw_strip(maps: torch.Tensor, masks: torch.Tensor, latent: dict[str, Any]) -> torch.Tensor:
    """The maps of a run in one picture, IMAGE [1, H, W, 3].

    Args:
        maps: [steps * B * frames, H, W, 3]; masks: [experts * steps * B * frames, h, w]; as Saliency Maps gives them.
        latent: what was sampled.
    """
    items, frames = count_images(latent["samples"])
    images = items * frames
    steps, experts = len(maps) // images, len(masks) // len(maps)
    shown_images = spread(images, MOST_IMAGES)
    shown_steps = spread(steps, MOST_STEPS if images == 1 else COLUMNS)
    kind = "image" if frames == 1 else "frame"
    places = [(image, step) for image in shown_images for step in shown_steps]
    captions = [f"step {step + 1}/{steps}" if images == 1 else f"{kind} {image + 1}, step {step + 1}"
                for image, step in places]
    shares = masks.unflatten(0, (experts, -1)).mean((1, 2, 3)).tolist()
    legend = [(colour, f"expert {n}: {share:.0%}") for n, (colour, share) in enumerate(
        zip(expert_colours(experts), shares))]
    return draw_sheet([maps[step * images + image] for image, step in places], captions,
                      min(COLUMNS, len(shown_steps)), legend[:MOST_NAMED])


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
