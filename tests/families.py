"""Tiny models with random weights of the host's diffusion families, and texts that fit them."""
from __future__ import annotations

from typing import Any

import tiny
import torch
from comfy import model_base, supported_models
from families_modern import MODERN as MODERN
from families_modern import UNET
from families_modern import missing as missing
from family import POOLED, WIDTH, Family, raise_norms

SDXL_SIZES = 6 * 256  # what SDXL appends to the pooled text: three pairs of sizes, embedded


class TinySD2Config(supported_models.SD20):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {"attn_precision": torch.float32}

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> model_base.ModelType:
        return model_base.ModelType.V_PREDICTION


class TinySDXLConfig(supported_models.SDXL):
    unet_config: dict[str, Any] = {}


class TinySD3Config(supported_models.SD3):
    unet_config: dict[str, Any] = {}


class TinyFluxConfig(supported_models.Flux):
    unet_config: dict[str, Any] = {}


class TinyQwenConfig(supported_models.QwenImage):
    unet_config: dict[str, Any] = {}


class TinyFlux2Config(supported_models.Flux2):
    unet_config: dict[str, Any] = {}


class TinyUpscalerConfig(supported_models.SD_X4Upscaler):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}


def sd1(seed: int = 0) -> Any:
    return raise_norms(tiny.unet(seed=seed, context=WIDTH))


def sd2(seed: int = 0) -> Any:
    """Linear projections around the transformers, heads of one width, v-prediction."""
    return raise_norms(tiny.patcher_of(TinySD2Config({
        **UNET, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
    }), seed))


def sdxl(seed: int = 0) -> Any:
    """No attention on the first level, two transformers in a block, sizes and a pooled text beside the timestep."""
    return raise_norms(tiny.patcher_of(TinySDXLConfig({
        **UNET, "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2], "transformer_depth_middle": 2,
        "num_classes": "sequential", "adm_in_channels": POOLED + SDXL_SIZES,
    }), seed))


def sd3(seed: int = 0, **options: Any) -> Any:
    """Two heads of 64, the class's fixed width, in three joint blocks, the last of which drops the text."""
    return raise_norms(tiny.patcher_of(TinySD3Config({
        "input_size": None, "in_channels": 16, "patch_size": 2, "depth": 2, "num_blocks": 3, "mlp_ratio": 1.0,
        "adm_in_channels": POOLED, "pos_embed_max_size": 32, "pos_embed_scaling_factor": None,
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}}, **options,
    }), seed))


def sd35_medium(seed: int = 0) -> Any:
    """As SD3, with a second attention among image tokens alone in its first blocks."""
    return sd3(seed, qk_norm="rms", x_block_self_attn_layers=[0, 1])


def flux(seed: int = 0) -> Any:
    return raise_norms(tiny.patcher_of(TinyFluxConfig({
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED, "context_in_dim": WIDTH,
        "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [],
    }), seed))


def qwen(seed: int = 0) -> Any:
    return raise_norms(tiny.patcher_of(TinyQwenConfig({
        "image_model": "qwen_image", "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 3,
        "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
    }), seed))


def flux2(seed: int = 0, guidance: bool = True) -> Any:
    """The host makes a text shorter than 512 tokens longer, in front. With `guidance` dev, else Klein."""
    return raise_norms(tiny.patcher_of(TinyFlux2Config({
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": WIDTH,
        "hidden_size": 32, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [4, 4, 4, 4], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": guidance,
        "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0, "txt_ids_dims": [3],
    }), seed))


def klein(seed: int = 0) -> Any:
    return flux2(seed, guidance=False)


def upscaler(seed: int = 0) -> Any:
    """SD x4 Upscaler: the transformers of its first level read the text in both attentions."""
    return raise_norms(tiny.patcher_of(TinyUpscalerConfig({
        **UNET, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
        "in_channels": 7, "disable_self_attentions": [True, False], "num_classes": 1000, "num_heads": 2,
        "num_head_channels": -1,
    }), seed))


FAMILIES = {
    "sd1": Family(sd1, False, 4, False),
    "sd2": Family(sd2, False, 4, False),
    "sdxl": Family(sdxl, False, 4, True, options={"width": 512, "height": 384}),
    "sd3": Family(sd3, True, 16, True),
    "sd35_medium": Family(sd35_medium, True, 16, True),
    "flux": Family(flux, True, 16, True, options={"guidance": 2.5}),
    "qwen": Family(qwen, True, 16, False, video=True),
}
# Families with a way of their own, for the tests that name them.
PECULIAR = {
    "flux2": Family(flux2, True, 128, False, options={"guidance": 2.5}, patch=1, size=(5, 4), least=512),
    "klein": Family(klein, True, 128, False, patch=1, size=(5, 4), least=512),
    "upscaler": Family(upscaler, False, 4, False),
}
