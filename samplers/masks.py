"""Masks as users wire them, by one rule for every node: finite, 0 to 1, one for all images or one for each."""
from __future__ import annotations

import torch


def check_mask(mask: torch.Tensor, name: str = "mask") -> torch.Tensor:
    """A MASK made fit for arithmetic: [N, H, W] in float32 from 0 to 1, of any type of number or bool.

    Args:
        mask: [N, H, W], [H, W] or [N, 1, H, W], as nodes of other packs hand them out.
        name: the input, for the message.

    Raises:
        ValueError: for another shape, an empty one, or values that are no numbers.
    """
    shape = tuple(mask.shape)
    if len(shape) == 2:
        mask = mask.unsqueeze(0)
    elif len(shape) == 4 and shape[1] == 1:
        mask = mask.squeeze(1)
    if mask.ndim != 3 or mask.numel() == 0:
        raise ValueError(
            f"{name} expects pictures of height x width, one or a batch, got the shape "
            f"{'x'.join(map(str, shape)) or 'of a single number'}; connect a MASK output.")
    mask = mask.float()
    if not bool(mask.isfinite().all()):
        raise ValueError(
            f"{name} expects values from 0 to 1, got some that are no numbers (NaN or infinite); look at the node that "
            f"made the mask, or paint it anew.")
    return mask.clamp(0.0, 1.0)


def check_mask_count(mask: torch.Tensor, images: int, name: str = "mask") -> None:
    """Raises ValueError unless a batch of masks [N, H, W] has one for all images or one for each."""
    if len(mask) not in (1, images):
        raise ValueError(
            f"{name} expects one mask for all images or one for each of the {images}, got {len(mask)}; connect a "
            f"single mask, or a batch of as many.")
