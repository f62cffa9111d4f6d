"""MagicMix beside what people wire to it: LoRA, LoRA hooks, ControlNet, long prompts, regions, two positives."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from mixology.host import demo
from mixology.host.layout import full_sigmas, make_layout, mix_latent, sigma_window

pytestmark = pytest.mark.seam

CAPTION = "a striped red star on a blue background"
LORA_NAME = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
Parts = tuple[Any, Any, Any]


@pytest.fixture(scope="module", autouse=True)
def inference() -> Iterator[None]:
    """The host's executor runs every node in this mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def parts() -> Parts:
    """The demo model and a prompt and its negative."""
    model, clip, _ = demo.load_checkpoint("shapes")
    return model, *(core.CLIPTextEncode().encode(clip, text)[0] for text in (CAPTION, ""))


def lora_weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {f"{LORA_NAME}.lora_up.weight": torch.randn(128, 4, generator=g),
            f"{LORA_NAME}.lora_down.weight": torch.randn(4, 128, generator=g),
            f"{LORA_NAME}.alpha": torch.tensor(4.0)}


def with_lora(parts: Parts) -> Parts:
    import comfy.sd

    return comfy.sd.load_lora_for_models(parts[0], None, lora_weights(), 1.0, 1.0)[0], *parts[1:]


def with_lora_hook(parts: Parts) -> Parts:
    hooks = comfy.hooks.create_hook_lora(lora_weights(), 1.0, 1.0)
    return parts[0], comfy.hooks.set_hooks_for_conditioning(parts[1], hooks), parts[2]


def with_controlnet(parts: Parts) -> Parts:
    unet = {**demo.read_config()["unet"], "hint_channels": 3}
    unet.pop("out_channels")
    network = comfy.cldm.cldm.ControlNet(**unet, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    tiny.fill(network, 1)
    control = comfy.controlnet.ControlNet(
        network.train(False), load_device=comfy.model_management.get_torch_device(), manual_cast_dtype=None)
    picture, _ = demo.draw_picture(CAPTION, 0, 128, 128)
    return parts[0], *core.ControlNetApplyAdvanced().apply_controlnet(
        parts[1], parts[2], control, picture, 0.5, 0.0, 1.0)


def with_long_prompt(parts: Parts) -> Parts:
    _, clip, _ = demo.load_checkpoint("shapes")
    positive = core.CLIPTextEncode().encode(clip, ", ".join([CAPTION] * 20))[0]
    assert positive[0][0].shape[1] == 231
    return parts[0], positive, parts[2]


def with_two_positives(parts: Parts) -> Parts:
    second = [[parts[1][0][0] * 0.5, {}]]
    return parts[0], core.ConditioningCombine().combine(parts[1], second)[0], parts[2]


def with_region(parts: Parts) -> Parts:
    area = core.ConditioningSetArea().append(parts[1], 64, 64, 32, 32, 1.0)[0]
    return parts[0], core.ConditioningCombine().combine(area, parts[1])[0], parts[2]


COMPANY = [with_lora, with_lora_hook, with_controlnet, with_long_prompt, with_two_positives, with_region]


@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize("batch", [1, 3])
def test_company_acts_in_the_mix_as_in_plain_sampling(parts: Parts, company: Any, batch: int) -> None:
    """At nu 1 exactly as in the bare sampler; in between it changes the mix; afterwards nothing is left of it."""
    model, positive, negative = company(parts)
    latent = tiny.latent(batch, 16, 14)
    layout = make_layout(latent, 5, "shared")
    settings = (0, 8, 3.0, "euler", "normal")

    def mix(parts: Parts, nu: float) -> torch.Tensor:
        return mix_latent(*parts, layout, *settings, nu, 0.6, 0.3, "", None, "paper")["samples"]

    before = mix(parts, 0.5)
    sigmas = full_sigmas(model, "euler", "normal", 8)
    start = sigma_window(model.model, sigmas, 0.6, 0.3).start
    plain = tiny.cfg_guider(model, positive, negative).sample(
        layout.noise(0), latent["samples"], comfy.samplers.sampler_object("euler"), sigmas[start:], disable_pbar=True,
        seed=0)
    assert torch.equal(mix((model, positive, negative), 1.0), plain)
    assert not torch.allclose(mix((model, positive, negative), 0.5), before, atol=1e-4)
    assert torch.equal(mix(parts, 0.5), before)
