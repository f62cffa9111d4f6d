"""CycleDiffusion without its noise (Wu and De la Torre, arXiv 2210.05559, the DPM-Encoder).

The paper encodes a picture as the noises z' that lead the source prompt back to it, and decodes them under the target
prompt. Writing z' out and putting it into the target's step cancels it: both paths step with one common noise z,

    src' = step(x0, src, z)
    y'   = step(x0 + (D_target(y) - D_source(src)), y, z)

where step(D, x, z) is a DDIM(eta) step from x with clean estimate D. Nothing is divided by the step's noise, so every
eta in 0..1 works, and equal readings on both sides return x0.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .levels import Level

LARGEST_CFG = 100.0


@dataclass(frozen=True)
class Step:
    """Weights of the clean estimate, the state and fresh noise in a step."""

    clean: float
    keep: float
    fresh: float


def ancestral_step(now: Level, end: Level, eta: float) -> Step:
    """DDIM(eta) between two levels of any Gaussian path (arXiv 2010.02502, equations 12 and 16).

    eta 0 is deterministic and eta 1 draws from q(end | now, x0). eta counts on the ratio of noise to signal, so it
    means the same for eps, v and flow models; with signal 1 it is k-diffusion's ancestral step.
    """
    from_ratio = now.signal / now.noise  # signal to noise: 0 where a flow model starts
    to_ratio = end.signal / end.noise if end.noise > 0 else math.inf
    falling = from_ratio / to_ratio if to_ratio > from_ratio else 1.0
    fresh = eta * end.noise * math.sqrt(1.0 - falling ** 2)
    keep = math.sqrt(end.noise ** 2 - fresh ** 2) / now.noise
    return Step(end.signal - keep * now.signal, keep, fresh)


def take_step(denoised: torch.Tensor, x: torch.Tensor, z: torch.Tensor | None, step: Step) -> torch.Tensor:
    """clean * denoised + keep * x + fresh * z, all [B, ...]; z is None where a step draws no noise."""
    moved = step.clean * denoised + step.keep * x
    return moved if z is None else moved + step.fresh * z


def correct_denoised(x0: torch.Tensor, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """x0 + (target - source), in this order: equal readings cancel exactly.

    Args:
        x0: the picture; target, source: clean estimates of the two paths, [B, ...].
    """
    return x0 + (target - source)


def read_source(
    source: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor, x0: torch.Tensor, steps: Sequence[Step],
    draw: Callable[[int], torch.Tensor],
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The picture's own path: the clean estimate and the fresh noise (None where it takes none) of every step."""
    read = []
    for i, step in enumerate(steps):
        denoised = source(x, i).to(x)
        z = draw(i) if step.fresh > 0 else None
        read.append((denoised, z))
        x = take_step(x0, x, z, step)
    return read


def sample_cycle(
    target: Callable[[torch.Tensor, int], torch.Tensor],
    source: Callable[[torch.Tensor, int], torch.Tensor],
    x: torch.Tensor,
    x0: torch.Tensor,
    levels: Sequence[Level],
    eta: float,
    draw: Callable[[int], torch.Tensor],
    report: Callable[[int, torch.Tensor, torch.Tensor], None],
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Restyle x0 along a falling grid of noise levels.

    The source's path needs nothing of the target's, so it is read first and whole, as the paper's encoder does: each
    path then looks like a sampling run of its own to whatever watches the model.

    Args:
        target, source: `target(x, i)` is the clean estimate of state x at grid index i, [B, ...].
        x: the noised picture at the first level, where both paths start; x0: the picture, [B, ...].
        levels: the grid, one more than steps; noise above 0 everywhere but at its end.
        eta: share of fresh noise, 0..1.
        draw: `draw(i)` is the unit noise of step i, [B, ...]; not called where a step takes none.
        report: `report(i, denoised, x)` is told the corrected estimate before each of the target's steps.
        between: called once the source is read.

    Returns:
        The target's state at the last level, [B, ...].
    """
    steps = [ancestral_step(now, end, eta) for now, end in zip(levels, levels[1:])]
    read = read_source(source, x, x0, steps, draw=draw)
    between()
    for i, (step, (reading, z)) in enumerate(zip(steps, read)):
        denoised = correct_denoised(x0, target(x, i).to(x), reading)
        report(i, denoised, x)
        x = take_step(denoised, x, z, step)
    return x


def check_settings(eta: float, skip: int, source_cfg: float = 1.0) -> None:
    """Raises ValueError if a setting is out of range."""
    if not 0.0 <= source_cfg <= LARGEST_CFG:
        raise ValueError(
            f"source_cfg expects a value between 0 and {LARGEST_CFG:g}, got {source_cfg:g}; set it to 1 to read the "
            f"picture without guidance.")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(
            f"eta expects a value between 0 (no fresh noise) and 1 (as much as DDPM), got {eta:g}; set it in that "
            f"range."
        )
    if not isinstance(skip, int) or skip < 0:
        raise ValueError(f"skip expects 0 or more sigmas to drop, got {skip}; set it to 0 to use the whole schedule.")


def check_levels(levels: Sequence[Level]) -> None:
    """Raises ValueError if a step would start without noise."""
    for i, level in enumerate(levels[:-1]):
        if level.noise <= 0:
            raise ValueError(
                f"The Cycle Sampler expects noise at the start of every step, got none at step {i + 1}; use a model "
                f"that samples from noise and a schedule that reaches 0 at its end only."
            )
