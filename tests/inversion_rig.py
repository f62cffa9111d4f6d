"""Inverts latents on a host's models, and the printed inversion beside it on plain readings of the host."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.samplers
import tiny
import torch
from mixology.host.inversion import invert_latent
from mixology.host.trajectory import Trajectory

PROMPT, OTHER = tiny.conditioning(1), tiny.conditioning(2)


def invert(model: Any, latent: dict[str, Any], steps: int = 6, scheduler: str = "ddim_uniform", rule: str = "ditail",
           prompt: Any = PROMPT) -> Trajectory:
    return invert_latent(model, prompt, latent, steps, scheduler, rule)


def read(model: Any, prompt: Any, y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The model's clean estimate of a state, in model space and float64, from a guider of its own."""
    def once(model_k: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **_: Any) -> torch.Tensor:
        return model_k(y.to(x), sigmas[0] * x.new_ones([len(x)]), **extra_args)

    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": prompt})
    zeros = torch.zeros(y.shape)
    out = guider.sample(zeros, zeros, comfy.samplers.KSAMPLER(once), torch.stack([sigma, torch.zeros(())]),
                        disable_pbar=True, seed=0)
    return model.model.process_latent_in(out).double()


def printed_inversion(model: Any, prompt: Any, latent: dict[str, Any], sigmas: torch.Tensor, rule: str,
                      decorate: Callable[[Any], Any] = lambda model: model) -> list[torch.Tensor]:
    """States at rising sigmas in the sampler's space, float64 around the host's readings, each of them of a model that
    `decorate` hung another node on.

    As printed in VP variables for eps and v; a flow model's step is Euler's on its own path.
    """
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    s = sigmas.double()
    scales = ((1 - s) ** 2 + s ** 2).sqrt() if flow else (1 + s ** 2).sqrt()
    alphas = 1 / (1 + s ** 2)
    y = model.model.process_latent_in(latent["samples"]).double()
    states = [y]
    for i in range(len(s) - 1):
        at = i + 1 if rule == "ditail" else max(i, 1)
        z = y / scales[i]
        clean = read(decorate(model), prompt, z * scales[at], sigmas[at])
        if flow:
            y = y + (s[i + 1] - s[i]) * (z * scales[at] - clean) / s[at]
        else:
            eps = (z - alphas[at].sqrt() * clean) / (1 - alphas[at]).sqrt()
            clean = (z - (1 - alphas[i]).sqrt() * eps) / alphas[i].sqrt()
            y = (alphas[i + 1].sqrt() * clean + (1 - alphas[i + 1]).sqrt() * eps) * scales[i + 1]
        states.append(y)
    return states


def assert_follows(trajectory: Trajectory, printed: list[torch.Tensor], tolerance: float) -> None:
    """Every state, to a fraction of its own size."""
    for state, expected in zip(trajectory.states, printed):
        torch.testing.assert_close(state.double(), expected, rtol=0, atol=tolerance * float(expected.std()))
