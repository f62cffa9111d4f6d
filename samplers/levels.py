"""Noise levels: a schedule's sigmas, and how much picture and noise a state at one of them holds."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST_STEPS = 10000  # that the host's nodes take
SIGMA_TOLERANCE = 1e-5  # float32 grids meet thresholds computed in float64


@dataclass(frozen=True)
class Level:
    """A noise level: the state is signal * x0 + noise * n."""

    signal: float
    noise: float


def check_falling(sigmas: Sequence[float], node: str, repeats: bool = False) -> None:
    """Raises ValueError unless a schedule falls from step to step, is finite, has a step and ends at 0 or above.

    Args:
        sigmas: noise levels, one more than steps.
        node: who reads them, for the message.
        repeats: whether a step may stay where it is.
    """
    if len(sigmas) < 2:
        raise ValueError(
            f"{node} expects a schedule of at least one step, got {len(sigmas)} sigma(s); raise the steps, or look at "
            f"the node that splits the sigmas.")
    if not all(math.isfinite(sigma) and sigma >= 0 for sigma in sigmas):
        raise ValueError(
            f"{node} expects sigmas that are numbers from 0 up, got others among them; connect a scheduler node.")
    for before, after in zip(sigmas, sigmas[1:]):
        if after > before:
            raise ValueError(
                f"{node} expects sigmas that fall from noise to picture, got {before:.4g} followed by {after:.4g}; "
                f"take Flip Sigmas out, or connect a scheduler node.")
        if after == before and not repeats:
            raise ValueError(
                f"{node} expects sigmas that fall at every step, got {before:.4g} twice in a row; use fewer steps or "
                f"another scheduler.")


def solve_noise(state: torch.Tensor, picture: torch.Tensor, level: Level) -> torch.Tensor:
    """The noise that a sampler must be given to start at `state`: signal * picture + noise * n = state.

    Args:
        state, picture: [B, ...]; worked out in float64, returned in the state's type.
    """
    return ((state.double() - level.signal * picture.double()) / level.noise).to(state)
