"""MagicMix beside what people wire to it: LoRA, LoRA hooks, ControlNet, long prompts, regions, two positives."""
from __future__ import annotations

from typing import Any

import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from company import CAPTION, COMPANY, Parts, with_long_prompt
from mixology.host.layout import Mix, make_layout, mix_latent, sigma_window
from mixology.host.run import Schedule, full_sigmas


@pytest.fixture(scope="module")
def parts(checkpoints: Any) -> Parts:
    """The demo model and a prompt and its negative."""
    model, clip, _ = checkpoints("shapes")
    return model, *(core.CLIPTextEncode().encode(clip, text)[0] for text in (CAPTION, ""))


@pytest.mark.parametrize("company", [*COMPANY, with_long_prompt])
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_company_acts_in_the_mix_as_in_plain_sampling(parts: Parts, company: Any, batch: int) -> None:
    """At nu 1 exactly as in the bare sampler; in between it changes the mix; afterwards nothing is left of it."""
    model, positive, negative = company(parts)
    latent = tiny.latent(batch, 16, 14)
    layout = make_layout(latent, 5, "shared")
    schedule = Schedule(0, 8, 3.0, "euler", "normal")

    def mix(parts: Parts, nu: float) -> torch.Tensor:
        return mix_latent(*parts, layout, schedule=schedule, mix=Mix(nu, 0.6, 0.3))["samples"]

    before = mix(parts, 0.5)
    sigmas = full_sigmas(model, "euler", "normal", 8)
    start = sigma_window(model.model, sigmas, 0.6, 0.3).start
    plain = tiny.cfg_guider(model, positive, negative).sample(
        layout.noise(0), latent["samples"], comfy.samplers.sampler_object("euler"), sigmas[start:], disable_pbar=True,
        seed=0)
    assert torch.equal(mix((model, positive, negative), 1.0), plain)
    assert not torch.allclose(mix((model, positive, negative), 0.5), before, atol=1e-4)
    assert torch.equal(mix(parts, 0.5), before)
