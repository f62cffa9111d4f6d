"""A toy denoiser in float64 and the SD1.x schedule, for references without weights."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch

BETAS = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, dim=0)
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt()


def noise(shape: tuple[int, ...], k: int) -> torch.Tensor:
    """Deterministic stand-in for noise: sqrt2 sin(12.9898 (i + 1)(k + 1) + 0.5 k) at flat index i."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (math.sqrt(2) * torch.sin(12.9898 * (i + 1) * (k + 1) + 0.5 * k)).reshape(shape)


def eps_of(x: torch.Tensor, t: float, c: float) -> torch.Tensor:
    """The toy network on the VP-scaled input."""
    return 0.8 * torch.tanh(0.9 * x + 0.3 * c) + 0.1 * torch.cos(3 * x + 0.01 * t)


def guided_eps(y: torch.Tensor, t: int, c: float, cfg: float) -> torch.Tensor:
    """The toy network in sigma space with classifier-free guidance; unconditional is c = 0."""
    x = y / (1 + SIGMAS[t] ** 2).sqrt()
    uncond = eps_of(x, t, 0.0)
    return uncond + cfg * (eps_of(x, t, c) - uncond)


def ddim_timesteps(steps: int) -> list[int]:
    """981, 961, ..., 1 for 50."""
    return list(range(1, 1000, 1000 // steps))[::-1]


def ddim_runner(timesteps: list[int], sigmas: list[float], c: float, cfg: float,
                ) -> Callable[[torch.Tensor, int, int], torch.Tensor]:
    """`run(x, i, j)` of DDIM with eta 0 in sigma space."""
    def run(y: torch.Tensor, i: int, j: int) -> torch.Tensor:
        for step in range(i, j):
            y = y + (sigmas[step + 1] - sigmas[step]) * guided_eps(y, timesteps[step], c, cfg)
        return y
    return run
