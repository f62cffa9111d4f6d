"""Towers, files and checkpoints for the tests of Image Mixer: the host's real classes with random weights."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sd
import tiny
import torch
from comfy import ops, sd1_clip
from comfy.clip_model import CLIPTextModel
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.supported_models_base import ClipTarget
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
VISION: dict[str, Any] = {
    "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 32, "image_size": 32,
    "intermediate_size": 64, "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 2, "patch_size": 8,
}
# an SD1.x UNet of published widths, cut down to one block on each side of its first level
UNET: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1],
    "channel_mult": [1], "num_heads": 8, "use_spatial_transformer": True, "transformer_depth": [1],
    "transformer_depth_output": [1, 1], "transformer_depth_middle": 1, "context_dim": 768,
    "use_linear_in_transformer": False,
}
AUTOENCODER: dict[str, Any] = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}


def vision(folder: Path, **projection: int) -> Any:
    """A CLIP vision model from a config file, as the host builds its own; without `projection_dim` it projects not."""
    path = folder / "vision.json"
    path.write_text(json.dumps({**VISION, **projection}), encoding="utf-8")
    model = comfy.clip_vision.ClipVisionModel(str(path))
    tiny.fill(model.model, 3)
    return model


def text_state(seed: int = 4, layers: int = 2) -> State:
    """A CLIP text encoder's file under its published names, with its projection, at a small width."""
    config = {**TEXT, "num_hidden_layers": layers, "hidden_act": "quick_gelu", "max_position_embeddings": 77,
              "eos_token_id": 49407}
    network = CLIPTextModel(config, torch.float32, "cpu", ops.disable_weight_init)
    tiny.fill(network, seed)
    return {name: value.contiguous() for name, value in network.state_dict().items()}


def load_text(path: Path, state: State) -> Any:
    """The text encoder as Load CLIP reads it from a file."""
    save_file(state, path)
    return comfy.sd.load_clip([str(path)], model_options={"model_config": dict(TEXT), "dtype": torch.float32})


def load_two_texts(folder: Path, first: State, second: State) -> Any:
    """CLIP-L (of three layers) and CLIP-G as DualCLIPLoader reads them from two files."""
    for name, state in (("l", first), ("g", second)):
        save_file(state, folder / f"{name}.safetensors")
    small, deep = ({**TEXT, "num_hidden_layers": layers} for layers in (3, 32))
    return comfy.sd.load_clip([str(folder / "l.safetensors"), str(folder / "g.safetensors")], model_options={
        "model_config": small, "clip_g_model_config": deep, "dtype": torch.float32})


def bare_text() -> Any:
    """An SD1.x text encoder that no file filled."""
    return comfy.sd.CLIP(ClipTarget(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
                         model_options={"clip_l_model_config": dict(TEXT), "dtype": torch.float32})


def clip_image_state(blocks: int = 24, width: int = 1024) -> State:
    """OpenAI's ViT-L/14 under `cond_stage_model.model.`, its text transformer deleted, as the authors saved it."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 768), "text_projection": (768, 768), "logit_scale": (),
        "token_embedding.weight": (49408, 768), "ln_final.weight": (768,), "ln_final.bias": (768,),
        "visual.class_embedding": (width,), "visual.positional_embedding": (257, width),
        "visual.proj": (width, 768), "visual.conv1.weight": (width, 3, 14, 14),
        "visual.ln_pre.weight": (width,), "visual.ln_pre.bias": (width,),
        "visual.ln_post.weight": (width,), "visual.ln_post.bias": (width,),
    }
    for block in range(blocks):
        name = f"visual.transformer.resblocks.{block}"
        shapes |= {
            f"{name}.attn.in_proj_weight": (3 * width, width), f"{name}.attn.in_proj_bias": (3 * width,),
            f"{name}.attn.out_proj.weight": (width, width), f"{name}.attn.out_proj.bias": (width,),
            f"{name}.ln_1.weight": (width,), f"{name}.ln_1.bias": (width,),
            f"{name}.ln_2.weight": (width,), f"{name}.ln_2.bias": (width,),
            f"{name}.mlp.c_fc.weight": (4 * width, width), f"{name}.mlp.c_fc.bias": (4 * width,),
            f"{name}.mlp.c_proj.weight": (width, 4 * width), f"{name}.mlp.c_proj.bias": (width,),
        }
    return {f"cond_stage_model.model.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def mixer_checkpoint() -> State:
    """An image-mixer checkpoint's names and widths: LDM's, with a CLIP image model where SD1.x has its text encoder."""
    unet = UNetModel(**UNET, dtype=torch.float32, operations=ops.disable_weight_init)
    tiny.fill(unet, 5)
    autoencoder = AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4)
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    state |= {f"first_stage_model.{name}": torch.zeros(()).expand(value.shape)
              for name, value in autoencoder.state_dict().items()}
    ema = {f"model_ema.{name.replace('.', '')}": value for name, value in unet.state_dict().items()}
    schedule = {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)}
    return {**state, **ema, **schedule, **clip_image_state()}
