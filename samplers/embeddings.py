"""What CLIP is given, and whether it can answer: pictures of colours, and projections that a file brought."""
from __future__ import annotations

import torch
from einops import repeat

from .wording import format_size

LARGEST_WEIGHT = 100.0  # a trained projection's entries are below one


def check_image(image: torch.Tensor, node: str) -> torch.Tensor:
    """A picture as CLIP takes it: [B, H, W, 3] of one with 3 channels, of its first three, or of its grey.

    Args:
        node: who asks, for the message.

    Raises:
        ValueError: for another shape, an empty batch, and values that are no numbers.
    """
    shape = tuple(image.shape)
    if len(shape) != 4 or 0 in shape or shape[3] == 2:
        raise ValueError(
            f"{node} expected pictures of batch x height x width x channels with 1, 3 or 4 channels, got "
            f"{format_size(shape) or 'a single number'}; connect an IMAGE output that holds a picture.")
    if not bool(image.isfinite().all()):
        raise ValueError(
            f"{node} expected pictures of values from 0 to 1, got some that are no numbers (NaN or infinite); look "
            "at the node that made the picture.")
    return repeat(image, "b h w 1 -> b h w colours", colours=3) if shape[3] == 1 else image[..., :3]


def pad_to_square(images: torch.Tensor) -> torch.Tensor:
    """Pictures [B, H, W, C] in the middle of a square of their own mean colour."""
    height, width = images.shape[1:3]
    side = max(height, width)
    square = images.mean((1, 2), keepdim=True).repeat(1, side, side, 1)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top:top + height, left:left + width] = images
    return square


def is_trained(weight: torch.Tensor | None) -> bool:
    """Whether a projection [out, in] can be one that a file brought, as far as its values tell.

    A host whose file has none leaves it at zeros, at the identity, or at whatever the memory held: zeros in parts,
    infinite or huge values.
    """
    if weight is None or weight.is_meta:
        return False
    values = weight.detach().float()
    if not bool(values.isfinite().all()) or float(values.abs().max()) > LARGEST_WEIGHT:
        return False
    if values.shape[0] == values.shape[1] and torch.equal(values, torch.eye(len(values), device=values.device)):
        return False
    return bool(values.any(dim=0).all()) and bool(values.any(dim=1).all())
