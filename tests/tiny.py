"""Tiny models with random weights, of the host's real classes: an SD1.x UNet (eps, v, flow) and a Wan video model."""
from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.samplers
import comfy.utils
import torch
from comfy import supported_models

KINDS = ("eps", "v", "flow")


class TinyUNetConfig(supported_models.SD15):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}


class TinyWanConfig(supported_models.WAN21_T2V):
    unet_config: dict[str, Any] = {}


def fill(module: torch.nn.Module, seed: int) -> None:
    """The host's layers start uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def patcher_of(config: Any, seed: int) -> Any:
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    fill(model.diffusion_model, seed)
    model.train(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def unet(kind: str = "eps", seed: int = 0, channels: int = 32, context: int = 16) -> Any:
    """A two-level UNet with attention on both levels; `kind` is set as the host's own nodes set it."""
    patcher = patcher_of(TinyUNetConfig({
        "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": channels, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "num_heads": 2, "num_head_channels": -1, "use_spatial_transformer": True,
        "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
        "context_dim": context, "use_linear_in_transformer": False, "adm_in_channels": None,
        "use_temporal_attention": False,
    }), seed)
    if kind == "v":
        from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

        patcher = ModelSamplingDiscrete().patch(patcher, "v_prediction", False)[0]
    elif kind == "flow":
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        patcher = ModelSamplingSD3().patch(patcher, 3.0)[0]
    return patcher


def diffusers_unet(model: Any) -> Any:
    """diffusers' own UNet with the weights of the host's."""
    from diffusers import UNet2DConditionModel

    config = model.model.model_config.unet_config
    unet = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2)
    weights, names = model.model.diffusion_model.state_dict(), comfy.utils.unet_to_diffusers(config)
    unet.load_state_dict({key: weights[names[key]] for key in unet.state_dict()})
    return unet.train(False)


def video(seed: int = 0) -> Any:
    """A one-layer Wan 2.1 text-to-video model: [B, 16, T, H, W] latents, flow."""
    return patcher_of(TinyWanConfig({
        "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 1,
        "text_dim": 16, "text_len": 8, "in_dim": 16, "out_dim": 16, "freq_dim": 32, "patch_size": (1, 2, 2),
    }), seed)


def conditioning(seed: int, tokens: int = 77, width: int = 16) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, width, generator=generator), {"pooled_output": None}]]


def latent(batch: int = 1, height: int = 8, width: int = 8, seed: int = 7, channels: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(batch, channels, height, width, generator=generator)}


def count_evaluations(patcher: Any) -> tuple[Any, list[int]]:
    """A clone that appends the rows of every model call to the list."""
    calls: list[int] = []
    clone = patcher.clone()

    def wrapper(apply_model: Any, arguments: dict[str, Any]) -> Any:
        calls.append(len(arguments["input"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    clone.set_model_unet_function_wrapper(wrapper)
    return clone, calls


def cfg_guider(model: Any, positive: Any, negative: Any, cfg: float = 3.0) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def sigmas_of(model: Any, scheduler: str = "ddim_uniform", steps: int = 10) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
