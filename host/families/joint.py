"""Diffusion transformers in which text and picture share one sequence of tokens, the text first."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..networks import find_network, is_kind

SD3 = "comfy.ldm.modules.diffusionmodules.mmdit.MMDiT"
FLUX = "comfy.ldm.flux.model.Flux"
QWEN = "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel"
# The arguments that a wrapper around a call gets in order; those in question go by the names of the first line.
MODEL = ("x", "t", "c_concat", "context", "control", "transformer_options")  # BaseModel.apply_model
NETWORKS = {FLUX: ("x", "timestep", "context", "y", "guidance", "ref_latents", "control", "transformer_options"),
            QWEN: ("x", "timestep", "context", "attention_mask", "ref_latents", "additional_t_cond",
                   "transformer_options")}


def is_joint(model: Any) -> bool:
    """Whether a BaseModel's network is of this kind and known here (SD3, Flux, Qwen-Image)."""
    return is_kind(find_network(model), SD3, FLUX, QWEN)


def pads_in_front(model: Any) -> bool:
    """Where a model makes a text longer than its conditioning's: in front of it, else behind."""
    return is_kind(model, "comfy.model_base.Flux2")


def name_arguments(network: Any) -> tuple[str, ...]:
    """The arguments of a call of the network, or of its model where the network itself has no place for wrappers."""
    return next((names for kind, names in NETWORKS.items() if is_kind(network, kind)), MODEL)


def count_attentions(network: Any) -> int:
    """How many attentions a call makes among text and picture."""
    if is_kind(network, SD3):
        return len(network.joint_blocks)
    if is_kind(network, FLUX):
        return len(network.double_blocks) + len(network.single_blocks)
    return len(network.transformer_blocks)


def count_tokens(latent: Any, side: int) -> tuple[int, int, int]:
    """Frames of a latent [B, C, (T,) H, W], and tokens of `side` pixels down and across, the last ones padded."""
    height, width = latent.shape[-2:]
    return latent.shape[2] if latent.ndim == 5 else 1, -(-height // side), -(-width // side)


def count_picture_tokens(latents: Sequence[Any], side: int) -> int:
    """Tokens of several latents together."""
    return sum(math.prod(count_tokens(latent, side)) for latent in latents)
