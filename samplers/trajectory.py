"""Trajectories: what their grid, levels and stored numbers must be, and where a sigma lies on them."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .levels import SIGMA_TOLERANCE, Level

SAME_LEVEL = 1e-4  # relative to the larger of a level and 1
LARGEST_INDEX = (1 << 16) - 1  # the host draws noise for every index up to a batch's last


def check_noise_mask(mask: torch.Tensor | None) -> None:
    """Raises ValueError unless a noise mask, of any type of number, lies in 0..1."""
    if mask is not None and not bool(((mask >= 0) & (mask <= 1)).all()):  # NaN is neither
        raise ValueError("its noise mask holds values outside 0 to 1")


def check_grid(sigmas: Sequence[float]) -> None:
    """Raises ValueError unless the grid rises from 0."""
    if len(sigmas) < 2 or sigmas[0] != 0 or not all(a < b < math.inf for a, b in zip(sigmas, sigmas[1:])):
        raise ValueError(
            f"The inversion expects a schedule that reaches 0 at its end and repeats no sigma, got "
            f"{len(sigmas)} sigma(s) down to {min(sigmas, default=0.0):.4g}; choose another scheduler or fewer steps.")


def check_levels(levels: Sequence[Level]) -> None:
    """Raises ValueError if the model mixes no noise into a picture."""
    if any(level.noise <= 0 for level in levels[1:]):
        raise ValueError(
            "The inversion expects a model that samples from noise, got one that starts from a picture; "
            "use a text to image model.")


def check_path(sigmas: Sequence[float], levels: Sequence[Level], start: Level) -> None:
    """Raises ValueError unless these are levels of a path that the host's solvers can follow.

    The solvers' slope (x - x0) / sigma is the path's own only where signal = 1 - k sigma and noise = c sigma: k is 0
    for eps and v models and 1 for flow models, and c is 1 save for flow models that scale their noise. They start at
    the last level, or where that is the first sigma of an eps or v model, with noise of sqrt(1 + sigma^2).
    """
    top, last = sigmas[-1], levels[-1]
    k, c = (1.0 - last.signal) / top, last.noise / top
    flat = abs(k) <= SAME_LEVEL
    fits = (is_near(c, 1.0) if flat else is_near(k, 1.0) and c > 0) and all(
        is_near(level.signal, 1.0 - k * sigma) and is_near(level.noise, c * sigma)
        for sigma, level in zip(sigmas, levels))
    starts = [last.noise, math.hypot(1.0, top)] if flat else [last.noise]
    if not fits or not is_near(start.signal, last.signal) or not any(is_near(start.noise, noise) for noise in starts):
        raise ValueError(
            "The trajectory expects sigmas and noise levels that belong together, got some that no eps, v or flow "
            "model has; invert the picture again.")


def is_near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=SAME_LEVEL, abs_tol=SAME_LEVEL)


def describe_path(levels: Sequence[Level]) -> str:
    """A model's kind as people know it, by its levels at rising sigmas."""
    if is_near(levels[-1].signal, 1.0):
        return "an eps or v model (SD1.x, SD2.x, SDXL)"
    return "a flow model (SD3, Flux, Qwen-Image, Wan)"


def find_span(sigmas: Sequence[float], sigma: float) -> tuple[int, float]:
    """Where a sigma lies on a rising grid: index i and weight w, between states i and i + 1 as lerp(i, i + 1, w).

    Raises:
        ValueError: if it lies outside.
    """
    end = sigmas[-1]
    if not 0.0 <= sigma <= end * (1 + SIGMA_TOLERANCE):
        raise ValueError(
            f"The trajectory reaches from sigma 0 to {end:.4g} and has no state at {sigma:.4g}; sample with the "
            f"sigmas of Start from Trajectory, or invert with the scheduler and steps that you sample with.")
    above = next((i for i, recorded in enumerate(sigmas) if recorded >= sigma), len(sigmas) - 1)
    for i in (above, max(above - 1, 0)):
        if math.isclose(sigmas[i], sigma, rel_tol=SIGMA_TOLERANCE):
            return i, 0.0
    return above - 1, (sigma - sigmas[above - 1]) / (sigmas[above] - sigmas[above - 1])
