"""UNets: text through cross-attention with bias-free values, pictures through self-attention and residual blocks."""
from __future__ import annotations

from typing import Any

from ..networks import find_network, is_kind

NETWORK = "comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel"
TRANSFORMER = "comfy.ldm.modules.attention.SpatialTransformer"


def is_unet(model: Any) -> bool:
    """Whether a BaseModel's network is a UNet of single pictures (SD1.x, SD2.x, SDXL and their kin)."""
    return is_kind(find_network(model), NETWORK) and not model.model_config.unet_config.get("use_temporal_attention")


def reads_text_twice(model: Any) -> bool:
    """Whether a UNet has transformers whose first attention reads the text as well, in place of the picture."""
    config = model.model_config.unet_config
    return any(config.get("disable_self_attentions") or ()) or bool(config.get("disable_middle_self_attn"))


def find_depths(block: Any) -> list[int]:
    """The transformers of a block, by their number in it, that attend among a picture's tokens.

    Those with `disable_self_attn` read the text in both of their attentions.
    """
    return [depth for layer in block if is_kind(layer, TRANSFORMER)
            for depth, transformer in enumerate(layer.transformer_blocks) if not transformer.disable_self_attn]
