"""DDIM Inversion on the demo checkpoint, beside LoRA, hooks, ControlNet, long prompts and regions."""
from __future__ import annotations

from typing import Any

import comfy.hooks
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import nodes as core
import pytest
import torch
from company import CAPTION, COMPANY, lora_weights, make_controlnet, with_long_prompt
from inversion_rig import assert_follows, invert, printed_inversion
from mixology.host import demo
from mixology.host.inversion import blend_prompts
from mixology.host.trajectory import start_trajectory


@pytest.fixture(scope="module")
def world(checkpoints: Any) -> dict[str, Any]:
    """The demo model, the latent of a picture, its prompt and the empty prompt."""
    model, clip, vae = checkpoints("shapes")
    picture, _ = demo.draw_picture(CAPTION, 4, 128, 112)
    positive, negative = (core.CLIPTextEncode().encode(clip, text)[0] for text in (CAPTION, ""))
    return {"model": model, "latent": core.VAEEncode().encode(vae, picture)[0], "positive": positive,
            "negative": negative}


@pytest.mark.parametrize("company", [*COMPANY, with_long_prompt])
def test_company_acts_as_in_plain_readings(world: dict[str, Any], company: Any) -> None:
    plain, latent = (world["model"], world["positive"], world["negative"]), world["latent"]
    model, positive, _ = company(plain)
    before = invert(plain[0], latent, 2, prompt=plain[1]).states
    found = invert(model, latent, 2, prompt=positive)
    assert_follows(found, printed_inversion(model, positive, latent, found.sigmas, "ditail"), 1e-4)
    assert not torch.allclose(found.states, before, atol=1e-3)
    assert torch.equal(invert(plain[0], latent, 2, prompt=plain[1]).states, before)


def test_blend_carries_the_positives_company(world: dict[str, Any]) -> None:
    parts = world["model"], world["positive"], world["negative"]
    for company in (COMPANY[1], COMPANY[2]):
        _, positive, negative = company(parts)
        blended = blend_prompts(positive, negative, 2.0, 0.5)
        assert set(blended[0][1]) == set(positive[0][1])
        found = invert(world["model"], world["latent"], 2, prompt=blended)
        bare = invert(world["model"], world["latent"], 2, prompt=blend_prompts(*parts[1:], 2.0, 0.5))
        assert not torch.allclose(found.states, bare.states, atol=1e-3)


def test_round_trip_returns_the_picture(world: dict[str, Any]) -> None:
    """Without guidance through core's euler: the more steps, the closer."""
    model, latent, errors = world["model"], world["latent"], []
    for steps in (6, 24):
        noise, sigmas, start = start_trajectory(invert(model, latent, steps, prompt=world["positive"]))
        guider = custom.Guider_Basic(model)
        guider.set_conds(world["positive"])
        out, _ = custom.SamplerCustomAdvanced.execute(
            noise, guider, comfy.samplers.sampler_object("euler"), sigmas, start)[:2]
        errors.append(float((out["samples"] - latent["samples"]).square().mean().sqrt()))
    assert errors[1] < errors[0] / 2


def test_scheduled_hooks_are_refused(world: dict[str, Any]) -> None:
    """The host moves hook keyframes forward only, so that on the way up all but the last would be passed over."""
    schedule = comfy.hooks.HookKeyframeGroup()
    schedule.add(comfy.hooks.HookKeyframe(strength=0.5))
    hooks = comfy.hooks.create_hook_lora(lora_weights(), 1.0, 1.0)
    hooks.set_keyframes_on_hooks(schedule)
    prompt = comfy.hooks.set_hooks_for_conditioning(world["positive"], hooks)
    found = invert(world["model"], world["latent"], 2, prompt=prompt)
    assert_follows(found, printed_inversion(world["model"], prompt, world["latent"], found.sigmas, "ditail"), 1e-4)
    schedule.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.5))
    hooks.set_keyframes_on_hooks(schedule)
    prompt = comfy.hooks.set_hooks_for_conditioning(world["positive"], hooks)
    with pytest.raises(ValueError, match="hooks of one strength, got a schedule of 2 keyframes; remove Set Hook Keyf"):
        invert(world["model"], world["latent"], 2, prompt=prompt)


def test_controlnet_for_a_part_of_the_way(world: dict[str, Any]) -> None:
    """It acts by sigma, whichever way the steps go."""
    model, positive, latent = world["model"], world["positive"], world["latent"]
    picture, _ = demo.draw_picture(CAPTION, 0, 128, 128)
    prompt = core.ControlNetApplyAdvanced().apply_controlnet(
        positive, world["negative"], make_controlnet(), picture, 0.5, 0.2, 0.6)[0]
    found = invert(model, latent, 5, prompt=prompt)
    assert_follows(found, printed_inversion(model, prompt, latent, found.sigmas, "ditail"), 1e-4)
    plain = invert(model, latent, 5, prompt=positive)
    alike = [torch.equal(a, b) for a, b in zip(found.states, plain.states)]
    assert alike[:2] == [True, True] and not alike[-1]
