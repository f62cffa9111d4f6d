"""Styles by place: gradient masks, masks made ready for a latent, and the merge of several predictions.

Dual style (Goldszal and Mercier, "Seamless Dual-Style Image Generation with Diffusion Models", noise merging):
eps = sum_i M_i (u + s_i (c_i - u)) with one shared u. At one state and sigma the denoised is affine in eps and the
masks sum to 1, so merging denoised predictions is merging eps.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .masks import MAX_MASKS, blend_styles
from .numbers import parse_numbers
from .wording import legible

MAX_SIDE = 16384  # pixels
MAX_VALUES = 2 ** 28  # pixels of all masks together
PROFILES = ("linear", "logistic")


def draw_ramp(width: int, height: int, angle: float) -> torch.Tensor:
    """Position along `angle` at each pixel, 0 at the corner where it starts and 1 at the one where it ends.

    Args:
        angle: degrees; 0 runs left to right, 90 top to bottom.

    Returns:
        [H, W] in float64; at angle 0 each row is linspace(0, 1, width). 0.5 where the picture has no extent.
    """
    across, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    extent = abs(across) * (width - 1) + abs(down) * (height - 1)
    if extent < 1e-6:  # one row or column, seen along its thin side
        return torch.full((height, width), 0.5, dtype=torch.float64)
    return ((x * across + y[:, None] * down) / extent + 0.5).clamp(0, 1)


def split_ramp(t: torch.Tensor, parts: int, profile: str, sharpness: float) -> list[torch.Tensor]:
    """Weights of `parts` neighbours along a ramp, none negative, summing to 1.

    Args:
        t: ramp in 0..1, any shape.
        profile: "linear", hats at i / (parts - 1), or "logistic", differences of sigmoid(sharpness (t - j / parts)).
        sharpness: steepness of the logistic transitions; 20 takes 22% of the ramp from 10 to 90%.
    """
    if parts == 1:
        return [torch.ones_like(t)]
    if profile == "linear":
        return [(1 - (t * (parts - 1) - i).abs()).clamp_min(0) for i in range(parts)]
    passed = [torch.sigmoid(sharpness * (t - j / parts)) for j in range(1, parts)]
    edges = [torch.ones_like(t), *passed, torch.zeros_like(t)]
    return [(edges[i] - edges[i + 1]).clamp_min(0) for i in range(parts)]


def draw_gradient_masks(
    width: int, height: int, profile: str, parts: int, angle: float, sharpness: float, rows: int,
) -> torch.Tensor:
    """Masks that share a picture between styles along an angle and, with `rows`, across it.

    Returns:
        [parts * rows, H, W] in float32, row by row, summing to 1 at every pixel.

    Raises:
        ValueError: for a number out of range, more masks than a guider takes, or more than memory holds.
    """
    check_gradient(width, height, profile, parts, angle=angle, sharpness=sharpness, rows=rows)
    columns = split_ramp(draw_ramp(width, height, angle), parts, profile, sharpness)
    lines = split_ramp(draw_ramp(width, height, angle + 90), rows, profile, sharpness)
    return torch.stack([(line * column).float() for line in lines for column in columns])


def check_gradient(
    width: int, height: int, profile: str, parts: int, *, angle: float, sharpness: float, rows: int,
) -> None:
    """Raises ValueError for masks that cannot be drawn, before memory is asked for."""
    for name, value, most in (("width", width, MAX_SIDE), ("height", height, MAX_SIDE), ("parts", parts, MAX_MASKS),
                              ("rows", rows, MAX_MASKS)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} expects 1 to {most}, got {value}; correct it.")
    if profile not in PROFILES:
        raise ValueError(f"profile expects linear or logistic, got {legible(profile)}; pick one of them.")
    if not math.isfinite(angle):
        raise ValueError(f"angle expects a number of degrees, got {angle}; correct it.")
    if not 0 <= sharpness < math.inf:
        raise ValueError(f"sharpness expects 0 or more (20 is a usual one), got {sharpness}; correct it.")
    if parts * rows > MAX_MASKS:
        raise ValueError(
            f"Gradient Masks expects parts times rows to be at most {MAX_MASKS}, got {parts} x {rows} = "
            f"{parts * rows}; lower one of the two."
        )
    if width * height * parts * rows > MAX_VALUES:
        raise ValueError(
            f"Gradient Masks expects width times height times the number of masks to be at most {MAX_VALUES}, got "
            f"{width} x {height} x {parts * rows}; draw them smaller, since they are resized to the latent anyway."
        )


def blend_guidance(
    conds: Sequence[torch.Tensor], unconds: Sequence[torch.Tensor], weights: torch.Tensor, scales: Sequence[float],
) -> torch.Tensor:
    """sum_i M_i s_i (c_i - u_i): guidance of styles with scales of their own.

    Args:
        conds: predictions c_i of the styles; unconds: u_i, usually one and the same; all [B, C, ..., H, W].
        weights: [N, H, W], summing to 1.
        scales: s_i, one per style.
    """
    return blend_styles([(c - u) * scale for c, u, scale in zip(conds, unconds, scales)], weights)


def parse_cfg_list(text: str, styles: int) -> list[float]:
    """Read cfg_per_style, "5, 7.5", as one guidance scale per style, first styles first.

    Raises:
        ValueError: on an unreadable entry, one outside 0..100, or more entries than styles.
    """
    values = parse_numbers(text, "cfg_per_style", 100.0, example="5, 7.5", fallback="cfg for every style")
    if len(values) > styles:
        raise ValueError(
            f"cfg_per_style expects at most one number per style, got {len(values)} numbers for {styles} styles; "
            f"shorten the list or connect more prompts."
        )
    return values
