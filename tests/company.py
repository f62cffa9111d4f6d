"""What people wire beside a technique, on the demo checkpoint: LoRA, LoRA hooks, ControlNet, long prompts, regions."""
from __future__ import annotations

from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.ops
import nodes as core
import tiny
import torch
from mixology.host import demo

CAPTION = "a striped red star on a blue background"
LORA_NAME = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
Parts = tuple[Any, Any, Any]  # model, positive, negative


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


def make_controlnet(seed: int = 1) -> Any:
    """A ControlNet of random weights for the demo model."""
    unet = {**demo.read_config()["unet"], "hint_channels": 3}
    unet.pop("out_channels")
    network = comfy.cldm.cldm.ControlNet(**unet, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    tiny.fill(network, seed)
    return comfy.controlnet.ControlNet(
        network.train(False), load_device=comfy.model_management.get_torch_device(), manual_cast_dtype=None)


def with_controlnet(parts: Parts) -> Parts:
    picture, _ = demo.draw_picture(CAPTION, 0, 128, 128)
    return parts[0], *core.ControlNetApplyAdvanced().apply_controlnet(
        parts[1], parts[2], make_controlnet(), picture, 0.5, 0.0, 1.0)


def with_two_positives(parts: Parts) -> Parts:
    second = [[parts[1][0][0] * 0.5, {}]]
    return parts[0], core.ConditioningCombine().combine(parts[1], second)[0], parts[2]


def with_region(parts: Parts) -> Parts:
    area = core.ConditioningSetArea().append(parts[1], 64, 64, 32, 32, 1.0)[0]
    return parts[0], core.ConditioningCombine().combine(area, parts[1])[0], parts[2]


def with_long_prompt(parts: Parts) -> Parts:
    _, clip, _ = demo.load_checkpoint("shapes")
    positive = core.CLIPTextEncode().encode(clip, ", ".join([CAPTION] * 20))[0]
    assert positive[0][0].shape[1] == 231
    return parts[0], positive, parts[2]


COMPANY = [with_lora, with_lora_hook, with_controlnet, with_two_positives, with_region]
