"""How alike two pictures are, how smooth one is, and how well it fits a text.

Definitions follow the dual-style page's code, so that figures compare with its tables. Pictures are [B, H, W, C] in
0..1; a reference of one picture serves a whole batch. All results are [B] in float64.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce

from ..samplers.wording import format_size

WINDOW, WINDOW_SIGMA = 11, 1.5
C1, C2 = 0.01 ** 2, 0.03 ** 2
LARGEST_STRIP = 2 ** 22  # numbers of a layer's map at a time
SEAM_FLOOR = 1e-3  # a quarter of an 8-bit step: keeps the ratio of two flat pictures at 1


def check_pictures(images: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float64 of one shape.

    Raises:
        ValueError: if shapes do not fit.
    """
    if images.ndim != 4 or reference.ndim != 4 or images.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"The metrics expect pictures of one size (height x width x channels), got "
            f"{format_size(images.shape[1:])} and {format_size(reference.shape[1:])}; resize one of them to the other."
        )
    if len(reference) not in (1, len(images)):
        raise ValueError(
            f"The metrics expect one reference picture, or one for each of the {len(images)} pictures, got "
            f"{len(reference)}; make the two batches equally long."
        )
    return images.double(), reference.double().expand(images.shape)


def l2(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Euclidean distance, sqrt of the summed squared differences."""
    images, reference = check_pictures(images, reference)
    return (images - reference).square().flatten(1).sum(1).sqrt()


def psnr(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """10 log10(1 / mean squared error) in dB; infinite for equal pictures."""
    images, reference = check_pictures(images, reference)
    return -10 * torch.log10((images - reference).square().flatten(1).mean(1))


def ssim(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004), averaged over channels and windows; 1 for equal pictures.

    Gaussian window 11x11 with sigma 1.5, inside the picture only, K1 0.01, K2 0.03.

    Raises:
        ValueError: if a side is shorter than the window.
    """
    images, reference = check_pictures(images, reference)
    if min(images.shape[1:3]) < WINDOW:
        raise ValueError(
            f"SSIM expects pictures of at least {WINDOW}x{WINDOW} pixels, got {images.shape[2]}x{images.shape[1]}; "
            f"use larger pictures."
        )
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * WINDOW_SIGMA ** 2))
    shares: list[float] = (kernel / kernel.sum()).tolist()

    def average(maps: torch.Tensor) -> torch.Tensor:
        for dim in (2, 3):
            inside = maps.shape[dim] - WINDOW + 1
            total = torch.zeros_like(maps.narrow(dim, 0, inside))
            for place, share in enumerate(shares):  # in float64 many times as fast as a convolution
                total.add_(maps.narrow(dim, place, inside), alpha=share)
            maps = total
        return maps

    x, y = (rearrange(pictures, "b h w c -> (b c) 1 h w") for pictures in (images, reference))
    mean_x, mean_y = average(x), average(y)
    var_x, var_y = average(x * x) - mean_x.square(), average(y * y) - mean_y.square()
    cov = average(x * y) - mean_x * mean_y
    score = (2 * mean_x * mean_y + C1) * (2 * cov + C2)
    score = score / ((mean_x.square() + mean_y.square() + C1) * (var_x + var_y + C2))
    return reduce(score, "(b c) 1 h w -> b", "mean", b=len(images))


def total_variation(images: torch.Tensor, share: float = 0.2) -> torch.Tensor:
    """Sum of sqrt(dx^2 + 1e-6) and sqrt(dy^2 + 1e-6) over the central `share` of the width."""
    width = images.shape[2]
    begin, end = int(width * (1 - share) / 2 + 1e-6), int(width * (1 + share) / 2 + 1e-6)
    centre = images[:, :, begin:end].double()
    return sum(((centre.diff(dim=dim).square() + 1e-6).sqrt().flatten(1).sum(1) for dim in (1, 2)),
               start=torch.zeros(len(images), dtype=torch.float64, device=images.device))


def smoothness(images: torch.Tensor, reference: torch.Tensor, share: float = 0.2) -> torch.Tensor:
    """|TV - TV_reference| / TV_reference over the central `share` of the width, where two styles meet.

    Lower is closer to the reference's own smoothness.
    """
    images, reference = check_pictures(images, reference)
    base = total_variation(reference, share)
    return (total_variation(images, share) - base).abs() / base


def seam(images: torch.Tensor, regions: torch.Tensor, reach: int = 1) -> torch.Tensor:
    """Mean step between neighbouring pixels at the boundary of regions, against that elsewhere; 1 is no seam.

    Steps to the right and downward are compared each with their own kind, in the boundary's proportion of them, so
    that a picture of stripes is no seam.

    Args:
        regions: labels [H, W], or masks [N, H, W] of which the strongest names the region.
        reach: pixels on either side that count as boundary; 1 is the step across it alone. A decoder spreads a hard
            edge of its latent over about 4.

    Raises:
        ValueError: on another size, or if the regions share no boundary or leave nothing but boundary.
    """
    labels = regions.argmax(0) if regions.ndim == 3 else regions
    if labels.shape != images.shape[1:3]:
        raise ValueError(
            f"The seam expects regions of the pictures' size {images.shape[2]}x{images.shape[1]}, got "
            f"{format_size(reversed(labels.shape))}; draw the masks at that size."
        )
    images, labels = images.double(), labels.to(images.device)
    across, elsewhere, count = torch.zeros(3, len(images), dtype=torch.float64, device=images.device)
    for dim in (0, 1):
        crossing = (labels.diff(dim=dim) != 0).double()[None]
        spread = (reach - 1, 0) if dim == 0 else (0, reach - 1)
        near = F.max_pool2d(crossing, (2 * spread[0] + 1, 2 * spread[1] + 1), 1, spread)[0] > 0
        if not bool(near.any()):
            continue
        if bool(near.all()):
            raise ValueError(
                "The seam expects regions with an inside to compare with, got nothing but boundary; use larger regions "
                "or a smaller reach."
            )
        steps = images.diff(dim=dim + 1).abs().mean(-1)
        across += steps[:, near].sum(1)
        elsewhere += steps[:, ~near].mean(1) * near.sum()
        count += near.sum()
    if not bool((count > 0).all()):
        raise ValueError(
            "The seam expects at least two regions that touch, got one; give it the masks of two or more styles."
        )
    return (across / count + SEAM_FLOOR) / (elsewhere / count + SEAM_FLOOR)


def lpips(
    images: torch.Tensor, reference: torch.Tensor, features: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    weights: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Learned perceptual distance (Zhang et al., arXiv 1801.03924, equation 1).

    Args:
        features: the network, from pictures [B, C, H, W] in -1..1 (float32) to one map [B, C_l, H_l, W_l] per layer.
        weights: how much each channel of each layer counts, [C_l]; all equally, at 1, without them.
    """
    x, y = (features((2 * pictures.movedim(-1, 1) - 1).float())  # BHWC -> BCHW
            for pictures in check_pictures(images, reference))
    total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    for index, pair in enumerate(zip(x, y)):
        total = total + layer_distance(*pair, None if weights is None else weights[index]).to(total)
    return total


def layer_distance(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """LPIPS of one layer's maps [B, C, H, W]: weighted squared distance of their directions, averaged over places."""
    rows = max(1, LARGEST_STRIP // max(1, x[:, :, 0].numel()))  # in float64 a whole map takes gigabytes
    total = torch.zeros(len(x), dtype=torch.float64)
    for pair in zip(x.split(rows, 2), y.split(rows, 2)):
        a, b = (strip / (strip.square().sum(1, keepdim=True).sqrt() + 1e-10)
                for strip in (part.cpu().double() for part in pair))
        distance = (a - b).square()
        if weights is not None:
            distance = distance * weights.to(distance).reshape(1, -1, 1, 1)
        total = total + distance.sum((1, 2, 3))
    return total / (x.shape[2] * x.shape[3])


def clip_similarity(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Cosine between embeddings of pictures [B, E] and of their texts [B, E] or of one text [1, E]."""
    return F.cosine_similarity(images.double(), texts.double(), dim=-1)


def directional_similarity(
    images: torch.Tensor, source_images: torch.Tensor, texts: torch.Tensor, source_texts: torch.Tensor,
) -> torch.Tensor:
    """Cosine between the change of the picture and the change of the text (Gal et al., arXiv 2108.00946).

    Args:
        images, texts: embeddings of the result and of its text, [B, E] or [1, E].
        source_images, source_texts: those of the source. The text's is usually normalised beforehand, as the
            picture's is.

    Returns:
        [B]; 0 where nothing changed.
    """
    return clip_similarity(images.double() - source_images.double(), texts.double() - source_texts.double())
