"""What the numbers of a stored trajectory must be to belong together."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .cycle import Level

TOLERANCE = 1e-3  # relative; levels are those of float32 sigmas in float64
LARGEST_INDEX = (1 << 16) - 1  # the host draws noise for every index up to a batch's last


def check_path(sigmas: Sequence[float], levels: Sequence[Level], start: Level) -> None:
    """Raises ValueError unless the levels can be those of the sigmas, and the start a sampler's at the last one.

    The host's solvers follow dx/dsigma = (x - x0) / sigma, so that noise = c sigma and signal = 1 + k sigma: k is 0 for
    eps and v models and -1 for flow. A sampler starts from the last level, or, where that is the model's first, from
    noise of up to sqrt(1 + sigma^2).
    """
    end, last = sigmas[-1], levels[-1]
    scale, slope = last.noise / end, (last.signal - 1.0) / end
    straight = all(is_near(level.noise, scale * sigma) and is_near(level.signal, 1.0 + slope * sigma)
                   and level.signal >= 0.0 for sigma, level in zip(sigmas, levels))
    if not straight:
        raise ValueError("the noise levels are not those of its sigmas")
    highest = math.hypot(last.noise, max(scale, 1.0))
    if not is_near(start.signal, last.signal) or not last.noise * (1 - TOLERANCE) <= start.noise <= highest * (
            1 + TOLERANCE):
        raise ValueError("no sampler starts from its last noise level as it says")


def is_near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE / 10)


def check_picture(samples: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Raises ValueError unless a latent is finite and its noise mask, of any type of number, lies in 0..1."""
    if not bool(samples.isfinite().all()):
        raise ValueError("its picture holds numbers beyond all bounds (NaN or infinite)")
    if mask is not None and not bool(((mask >= 0) & (mask <= 1)).all()):  # NaN is neither
        raise ValueError("its noise mask holds values outside 0 to 1")
