"""DDIM Inversion beside diffusers' DDIMInverseScheduler on the same weights."""
from __future__ import annotations

from typing import Any

import families
import pytest
import tiny
import torch
from inversion_rig import PROMPT, invert
from mixology.samplers.inversion import RULES

STEPS = 25


@pytest.fixture(scope="module")
def model() -> Any:
    """Weights that heed what they read."""
    return families.raise_norms(tiny.unet("eps"))


def diffusers_states(model: Any, latent: dict[str, Any], rule: str) -> torch.Tensor:
    """diffusers' states in its VP scale. Its scheduler names the time step that a step goes to, so that its own loop
    is the paper's rule; for `euler` the network is read at the time step before."""
    from diffusers import DDIMInverseScheduler

    scheduler = DDIMInverseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(STEPS)
    unet, times = tiny.diffusers_unet(model), scheduler.timesteps.tolist()
    z = model.model.process_latent_in(latent["samples"])
    states = [z]
    for i, t in enumerate(times):
        read = t if rule == "ditail" else times[max(i - 1, 0)]
        z = scheduler.step(unet(z, read, PROMPT[0][0].expand(len(z), -1, -1)).sample, t, z, return_dict=False)[0]
        states.append(z)
    return torch.stack(states)


def test_every_state_is_diffusers(model: Any) -> None:
    """Float32 through twenty-five steps of two networks' code. Each rule is one reading order and not the other. Its
    scheduler starts at sigma 0 as well (`set_alpha_to_one`)."""
    latent, theirs, ours = tiny.latent(2, 8, 12), {}, {}
    for rule in RULES:
        theirs[rule] = diffusers_states(model, latent, rule)
        trajectory = invert(model, latent, STEPS, rule=rule)
        ours[rule] = trajectory.states / (1 + trajectory.sigmas ** 2).sqrt().reshape(-1, 1, 1, 1, 1)
        assert ours[rule].shape == theirs[rule].shape == (STEPS + 1, 2, 4, 8, 12)
        torch.testing.assert_close(ours[rule], theirs[rule], rtol=0, atol=2e-4)
    for rule, other in (RULES, RULES[::-1]):
        assert float((ours[rule] - theirs[other]).abs().max()) > 0.1
