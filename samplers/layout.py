"""MagicMix: mix a sampler's states with the noised states of a layout (Liew et al., arXiv 2210.16056, Algorithm 1).

The paper's state index k runs from N (noise) to 0 (picture). On a falling grid of sigmas the states between k_max and
k_min are mixed after each step, x <- nu * own + (1 - nu) * layout. Both states carry the same noise level, so the mix
is the same in the paper's VP scaling and in sigma space.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange

from .levels import SIGMA_TOLERANCE
from .numbers import parse_numbers


@dataclass(frozen=True)
class Window:
    """Grid indices of the mixed steps: steps i with start <= i < stop are mixed at their end, i + 1."""

    start: int
    stop: int


def find_window(sigmas: Sequence[float], sigma_max: float, sigma_min: float) -> Window:
    """First index at or below `sigma_max`, and first index from there on at or below `sigma_min`.

    Args:
        sigmas: falling noise levels, one more than steps.
        sigma_max, sigma_min: noise levels of k_max and k_min.
    """
    last = len(sigmas) - 1

    def first_below(level: float, begin: int) -> int:
        return next((i for i in range(begin, last) if sigmas[i] <= level * (1 + SIGMA_TOLERANCE)), last)

    start = first_below(sigma_max, 0)
    return Window(start, first_below(sigma_min, start))


def check_start(sigmas: Sequence[float], window: Window, sigma_max: float, k_max: float) -> None:
    """Raises ValueError if no step starts at or below k_max, though the schedule goes below it.

    The result would be the layout itself, which is what k_max 0, or one at or below the last sigma, asks for.

    Args:
        sigmas: falling noise levels.
        sigma_max: noise level of k_max.
    """
    last = len(sigmas) - 1
    if window.start == last and sigma_max > sigmas[last] * (1 + SIGMA_TOLERANCE):
        raise ValueError(
            f"k_max {k_max:g} expects a schedule with a step that starts at or below its sigma {sigma_max:.4g}, got "
            f"one that jumps from sigma {sigmas[last - 1]:.4g} to {sigmas[last]:.4g}, so the prompt would never be "
            f"read; use more steps, a larger k_max or another scheduler.")


def check_steps(
    sigmas: Sequence[float], window: Window, levels: tuple[float, float], ends: tuple[float, float],
) -> None:
    """Raises ValueError if no step of the window can be mixed, so that nu would do nothing.

    Args:
        sigmas: falling noise levels.
        levels: noise levels of k_max and k_min; ends: k_max and k_min.
    """
    if not any(sigmas[i + 1] > 0 for i in range(window.start, window.stop)):
        path = ", ".join(f"{sigma:.4g}" for sigma in sigmas[max(window.start - 1, 0):window.stop + 2])
        raise ValueError(
            f"The mixing window from k_max {ends[0]:g} to k_min {ends[1]:g} (sigma {levels[0]:.4g} to {levels[1]:.4g}) "
            f"expects a step that starts inside it and ends above sigma 0, got none on this schedule (... {path} ...), "
            f"so nu would do nothing; use more steps, a wider window or another scheduler.")


def mix_states(own: torch.Tensor, layout: torch.Tensor, nu: torch.Tensor) -> torch.Tensor:
    """nu * own + (1 - nu) * layout, exact at nu 0, at nu 1 and where both are equal (paper, section 3.2).

    Args:
        own, layout: states of one noise level, [B, ...].
        nu: broadcastable to them.
    """
    return torch.lerp(layout, own, nu.to(own).expand_as(own))


def mix_model_input(denoised: torch.Tensor, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    """Denoised that steps `x` with the noise predicted at `mixed`: x - sigma * eps, eps = (mixed - denoised) / sigma.

    The rule of the diffusers community pipeline, which mixes only what the model reads.
    """
    return denoised + (x - mixed)


def make_nu_map(nu: Sequence[float], mask: torch.Tensor | None, ndim: int) -> torch.Tensor:
    """Content weight per batch item and position: nu inside the mask, 1 outside.

    Args:
        nu: one value per batch item.
        mask: [B, C, ...] in 0..1 at latent size, or None for everywhere.
        ndim: dimensions of the latent.
    """
    weights = rearrange(torch.tensor(list(nu), dtype=torch.float32), f"b -> b {'1 ' * (ndim - 1)}")
    if mask is None:
        return weights
    return torch.lerp(torch.ones_like(mask), weights.to(mask).expand_as(mask), mask.clamp(0, 1))


def sample_layout_mix(
    run: Callable[[torch.Tensor, int, int], torch.Tensor],
    layout_state: Callable[[int], torch.Tensor],
    sigmas: Sequence[float],
    window: Window,
    nu: torch.Tensor,
) -> torch.Tensor:
    """Algorithm 1 of the paper from its line 3 on.

    Args:
        run: `run(x, i, j)` samples x from grid index i to j.
        layout_state: the layout's state at a grid index, [B, ...].
        sigmas: the grid.
        window: which steps are mixed.
        nu: content weight, broadcastable to the state.

    Returns:
        The state at the last grid index, [B, ...].
    """
    last = len(sigmas) - 1
    x = layout_state(window.start)
    for i in range(window.start, window.stop):
        x = run(x, i, i + 1)
        if sigmas[i + 1] > 0:
            x = mix_states(x, layout_state(i + 1), nu)
    return run(x, window.stop, last) if window.stop < last else x


def record_trajectory(
    run: Callable[[torch.Tensor, int, int], torch.Tensor],
    x: torch.Tensor,
    window: Window,
    last: int,
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Text-text mode: sample from index 0, keep the states that a mix will read, and go on to `last`.

    Returns:
        The states by grid index, window.start to window.stop, and the state at `last`, or at window.stop if later.
    """
    if window.start > 0:
        x = run(x, 0, window.start)
    states = {window.start: x}
    for i in range(window.start, window.stop):
        x = run(x, i, i + 1)
        states[i + 1] = x
    return states, run(x, window.stop, last) if window.stop < last else x


def parse_nu_list(text: str) -> list[float]:
    """Read "0.1, 0.3 0.5" as numbers in 0..1.

    Raises:
        ValueError: on an unreadable entry or one outside 0..1.
    """
    return parse_numbers(text, "nu_per_image", 1.0, "0.1, 0.3, 0.5", fallback="nu for every image")


def spread_nu(values: Sequence[float], nu: float, batch: int) -> list[float]:
    """One nu per image: the list first, `nu` for the images beyond it.

    Raises:
        ValueError: if there are more values than images.
    """
    if len(values) > batch:
        raise ValueError(
            f"nu_per_image expects at most one value per image, got {len(values)} values for {batch} image(s); "
            f"shorten the list or raise the batch size."
        )
    return [*values, *[nu] * (batch - len(values))]


def check_range(nu: float, k_max: float, k_min: float) -> None:
    """Raises ValueError if nu or the window is out of order."""
    if not 0.0 <= nu <= 1.0:
        raise ValueError(f"nu expects a value between 0 (layout) and 1 (content), got {nu:g}; set it in that range.")
    if not 0.0 <= k_min <= k_max <= 1.0:
        raise ValueError(
            f"The mixing window expects 0 <= k_min <= k_max <= 1, got k_min {k_min:g} and k_max {k_max:g}; "
            f"make k_max the larger of the two."
        )
