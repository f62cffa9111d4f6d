"""The Cycle Sampler on the demo checkpoint, beside LoRA, hooks, ControlNet, long prompts and regions in the target."""
from __future__ import annotations

from typing import Any

import nodes as core
import pytest
import tiny
import torch
from company import (
    COMPANY,
    with_controlnet,
    with_long_prompt,
    with_lora,
    with_lora_hook,
    with_region,
    with_two_positives,
)
from cycle_rig import grid, printed_cycle, run
from mixology.host import demo
from mixology.host.cycle import CycleSampler

pytestmark = pytest.mark.wide

SOURCE, TARGET = "a red circle on a blue background", "a striped red star on a blue background"


@pytest.fixture(scope="module")
def world(checkpoints: Any) -> dict[str, Any]:
    """The demo model, the latent of a picture, its prompt, another's, and the empty prompt."""
    model, clip, vae = checkpoints("shapes")
    picture, _ = demo.draw_picture(SOURCE, 4, 128, 112)
    prompts = {name: core.CLIPTextEncode().encode(clip, text)[0]
               for name, text in (("source", SOURCE), ("target", TARGET), ("negative", ""))}
    return {"model": model, "latent": core.VAEEncode().encode(vae, picture)[0], **prompts}


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_identity_prompt_returns_the_latent_of_the_picture(world: dict[str, Any], eta: float, cfg: float) -> None:
    guider = tiny.cfg_guider(world["model"], world["source"], world["negative"], cfg)
    sampler = CycleSampler(world["source"], cfg, eta, 0, world["negative"])
    result = run(guider, sampler, world["latent"], tiny.sigmas_of(world["model"], "ddim_uniform", 8))
    torch.testing.assert_close(result, world["latent"]["samples"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("company", [*COMPANY, with_long_prompt])
def test_company_acts_on_the_target_only(world: dict[str, Any], company: Any) -> None:
    """As printed, with the company in every plain reading of the target and in none of the source's, save what is in
    the model itself."""
    plain = world["model"], world["target"], world["negative"]
    model, positive, negative = company(plain)
    latent, sigmas = world["latent"], grid(model, 6)
    sampler = CycleSampler(world["source"], 1.5, 0.3, 0, world["negative"])
    before = run(tiny.cfg_guider(*plain, 4.0), sampler, latent, sigmas)
    expected = printed_cycle(
        model, lambda: tiny.cfg_guider(model, positive, negative, 4.0),
        lambda: tiny.cfg_guider(model, world["source"], world["negative"], 1.5), latent, sigmas, 0.3)
    result = run(tiny.cfg_guider(model, positive, negative, 4.0), sampler, latent, sigmas)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(result, before, atol=1e-3)
    assert torch.equal(run(tiny.cfg_guider(*plain, 4.0), sampler, latent, sigmas), before)


@pytest.mark.parametrize("company", [with_lora, with_region, with_two_positives])
def test_company_on_both_sides_cancels(world: dict[str, Any], company: Any) -> None:
    """Regions and several prompts may be in the source as well."""
    model, source, negative = company((world["model"], world["source"], world["negative"]))
    sampler = CycleSampler(source, 5.0, 0.3, 0, negative)
    result = run(tiny.cfg_guider(model, source, negative, 5.0), sampler, world["latent"], grid(model, 6))
    torch.testing.assert_close(result, world["latent"]["samples"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("company", "words"), [(with_controlnet, "a ControlNet"), (with_lora_hook, "hooks")])
def test_source_prompt_with_what_only_a_guider_prepares(world: dict[str, Any], company: Any, words: str) -> None:
    _, source, _ = company((world["model"], world["source"], world["negative"]))
    text = f"prompt of the Cycle Sampler expects plain conditioning, got {words} in it; apply that to the guider's"
    with pytest.raises(ValueError, match=f"The source {text}"):
        CycleSampler(source, 1.0, 0.1, 0)
    with pytest.raises(ValueError, match=f"The negative {text}"):
        CycleSampler(world["source"], 2.0, 0.1, 0, source)
