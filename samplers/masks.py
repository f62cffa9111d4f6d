"""Masks: as users wire them, by one rule for every node, and at the size of a latent or a layer."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from .wording import format_size

MAX_MASKS = 16  # styles of a picture


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
            f"{format_size(shape) or 'of a single number'}; connect a MASK output.")
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


def make_resize_matrix(size: int, target: int) -> torch.Tensor:
    """Weights that resize one axis: means over the covered stretch where it shrinks, linear where it grows.

    Returns:
        [target, size] in float64, each row summing to 1, so that a partition of unity stays one.
    """
    pixel = torch.arange(size, dtype=torch.float64)
    step = size / target
    place = torch.arange(target, dtype=torch.float64)[:, None]
    if target <= size:
        covered = torch.minimum(pixel + 1, (place + 1) * step) - torch.maximum(pixel, place * step)
        weights = covered.clamp_min(0)
    else:
        centre = ((place + 0.5) * step - 0.5).clamp(0, size - 1)
        weights = (1 - (centre - pixel).abs()).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def normalise_masks(masks: torch.Tensor) -> torch.Tensor:
    """Masks [N, ...] scaled to sum 1; where all are zero the first takes the place."""
    total = masks.sum(0)
    first = torch.zeros_like(masks)
    first[0] = 1
    return torch.where(total > 0, masks / total.clamp_min(torch.finfo(masks.dtype).tiny), first)


def resize_area(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks [N, (frames,) H, W] at another size, [..., height, width]: the mean over each cell's area, at any ratio."""
    rows = make_resize_matrix(masks.shape[-2], height).to(masks)
    return rows @ masks @ make_resize_matrix(masks.shape[-1], width).to(masks).T


def resize_masks(masks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Masks at a latent's or a layer's size: the mean over each cell's area, at any ratio, then normalised.

    Args:
        masks: [N, (frames,) H, W], none negative.

    Returns:
        [N, (frames,) height, width] in float32, summing to 1; where all are zero the first style fills in.
    """
    return normalise_masks(resize_area(masks, height, width))


def blend_styles(values: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """sum_i M_i v_i / sum_i M_i, exact where all values agree and where one style has the place to itself.

    Blends one style after another, each by its share among those so far: a plain weighted sum would round even where
    the values are equal.

    Args:
        values: N tensors [B, C, ..., H, W].
        weights: [N, H, W] or [N, B, 1, ..., H, W], none negative; where all are zero the first value stands.
    """
    weights = weights.to(values[0])
    shares = weights / weights.cumsum(0).clamp_min(torch.finfo(weights.dtype).tiny)
    result = values[0]
    for value, share in zip(values[1:], shares[1:]):
        result = torch.lerp(result, value, share.expand_as(value))
    return result


def check_style_masks(masks: torch.Tensor, styles: int) -> torch.Tensor:
    """One mask per style from what a user wired.

    Args:
        masks: [N, H, W], [N-1, H, W] (the last style takes the rest), or [H, W] for a single one.
        styles: N.

    Returns:
        [N, H, W] in float32, not yet summing to 1. A style's own mask may be empty: that style is not shown.

    Raises:
        ValueError: on another shape or count, on negative or non-finite values, and if all masks are empty.
    """
    masks = masks.unsqueeze(0) if masks.ndim == 2 else masks
    if masks.ndim != 3 or masks.numel() == 0:
        raise ValueError(
            f"The masks are expected as a batch of pictures (count x height x width), got the shape "
            f"{format_size(masks.shape)}; use Gradient Masks, or join painted masks with Batch "
            f"Masks."
        )
    if len(masks) not in (styles, styles - 1):
        raise ValueError(
            f"{styles} styles expect {styles} masks, or {styles - 1} where the last style takes the rest, got "
            f"{len(masks)}; connect as many prompts as there are masks."
        )
    masks = masks.float()
    if not bool((masks.isfinite() & (masks >= 0)).all()):
        raise ValueError(
            "The masks expect values from 0 to 1, got negative or undefined ones; clamp the masks or paint them anew."
        )
    if not bool(masks.any()):
        raise ValueError(
            "The masks expect at least one painted area, got empty masks only; paint them or use Gradient Masks."
        )
    if len(masks) == styles:
        return masks
    return torch.cat([masks, (1 - masks.sum(0, keepdim=True)).clamp_min(0)])
