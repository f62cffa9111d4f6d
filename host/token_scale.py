"""MagicMix's token attention scale in the host: a text whose words carry factors, and a model that reads them.

The factors ride in the conditioning. The patched model looks for them in every call, so that any number of scaled
conditionings, guiders and samplers may share it, in any order of nodes.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from comfy import model_base
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import Tensor

from ..attention_patches.token_scale import extend_factors, make_joint_override, make_value_patch, spread_factors
from .marks import (
    Call,
    call_with,
    find_images,
    find_rows,
    keep_text,
    leave_out,
    mark_conditioning,
    read_marks,
    take_marks,
    watch_regions,
)
from .networks import family_name, find_network
from .words import parse_scales, place_scales

KEY = "mixology_token_scale"
CROSS = (UNetModel,)  # text through cross-attention with bias-free values
JOINT = (MMDiT, Flux, QwenImageTransformer2DModel)  # text first in a joint sequence
OVERRIDE = "optimized_attention_override"


@dataclass(frozen=True)
class TokenScale:
    """What a conditioning carries: a factor for each of its tokens, and when it acts.

    Attributes:
        factors: [values, tokens]; one row for every image of the batch, or one for all.
        start_percent, end_percent: on the model's own time axis, 0 at pure noise.
    """

    node: ClassVar[str] = "Token Attention Scale"
    factors: Tensor
    start_percent: float
    end_percent: float

    def factors_at(self, model_sampling: Any, timestep: Tensor, images: tuple[int, list[int]], made: dict[Any, Any],
                   ) -> Tensor:
        """Factors [1 or images, tokens] at sigma `timestep` [B]: ones outside the window, whose ends belong to it.

        Whether sigma is inside is left to the device, which is never waited for.

        Args:
            images: size of the whole batch, and which of its images the model sees.
            made: what this run has computed before.

        Raises:
            ValueError: if a phrase has another number of values than the batch has images.
        """
        total, shown = images
        if len(self.factors) not in (1, total):
            raise ValueError(
                f"Token Attention Scale got {len(self.factors)} values for a phrase and {total} images; give one "
                f"value, or one for each image of the batch.")
        factors = self.factors if len(self.factors) == 1 else self.factors[shown]
        window = self.start_percent, self.end_percent
        if window == (0.0, 1.0):
            return factors
        if window not in made:
            made[window] = tuple(model_sampling.percent_to_sigma(percent) for percent in window)
        start, end = made[window]
        inside = (timestep[:1] <= start) & (timestep[:1] >= end)
        return torch.where(inside.unsqueeze(1), factors.to(timestep.device), 1.0)


def scale_tokens(model: Any, clip: Any, text: str, scales: str, start_percent: float, end_percent: float,
                 ) -> tuple[Any, list[Any]]:
    """The model that reads factors, and the text as CLIPTextEncode encodes it, with the factors of its phrases.

    Args:
        scales: lines `phrase = s` or `phrase = [s, s, ...]`, the latter one s for each image of the batch.

    Raises:
        ValueError: for a model, text encoder, line or phrase that cannot be used, or a window that ends before it
            starts.
    """
    if not all(0.0 <= percent <= 1.0 for percent in (start_percent, end_percent)):
        raise ValueError(
            f"Token Attention Scale expected start_percent and end_percent from 0 to 1, got {start_percent:g} and "
            f"{end_percent:g}; choose values in between.")
    if start_percent > end_percent:
        raise ValueError(
            f"Token Attention Scale expected start_percent at or below end_percent, got {start_percent:g} and "
            f"{end_percent:g}; swap them.")
    if clip is None:
        raise ValueError(
            "Token Attention Scale expected a text encoder, got none; use a checkpoint that holds one, or Load CLIP.")
    lines = parse_scales(scales)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    factors = place_scales(clip, text, lines, conditioning[0][0].shape[1])
    model = patch_model(model)
    if bool((factors != 1.0).any()):
        mark = TokenScale(factors, start_percent, end_percent)
        conditioning = mark_conditioning(conditioning, KEY, mark)
        keep_text(model, KEY, mark, conditioning[0][0])
    return model, conditioning


def patch_model(model: Any) -> Any:
    """A clone of the model that reads factors; a model that does so already stays as it is.

    Raises:
        ValueError: for a model family without a usable seam.
    """
    network, config = find_network(model.model), model.model.model_config.unet_config
    if not isinstance(network, CROSS + JOINT) or config.get("use_temporal_attention"):
        raise ValueError(
            f"Token Attention Scale expected an SD1.x, SD2.x, SDXL, SD3, Flux or Qwen-Image model, got "
            f"{family_name(model.model)}; its attention gives no place to scale text tokens.")
    return read_marks(model, KEY, hand_out_factors, apply_factors)


def hand_out_factors(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
                     model_options: dict[str, Any]) -> Any:
    """Around `calc_cond_batch`: tells the model calls inside which rows to scale."""
    conds, found = take_marks(conds, KEY)
    if not found:
        return executor(model, conds, x, timestep, model_options)
    images = find_images(x, model_options)
    rows = {}
    for one in found:
        factors = one.mark.factors_at(model.model_sampling, timestep, images, one.made)
        rows[one.row] = extend_factors(factors, one.read, max(0, one.read - one.own) if pads_in_front(model) else 0)
    call = Call(found, rows, len(x))
    return call_with(executor, model, conds, x, timestep, model_options, KEY, call)


def pads_in_front(model: Any) -> bool:
    """Where a model makes a text longer than its conditioning's: in front of it, else behind."""
    return isinstance(model, model_base.Flux2)


def apply_factors(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                  control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Around one call of the model: patches its attention for this call if it holds rows to scale."""
    options = watch_regions(transformer_options or {}, KEY, len(x), TokenScale.node)
    chunks = find_rows(options, KEY, len(x), TokenScale.node)
    options = leave_out(options, KEY)
    if not chunks:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    factors = spread_factors([part if part is None else part.to(x.device) for part in chunks], len(x),
                             0 if c_crossattn is None else c_crossattn.shape[1])
    factors = factors.to(executor.class_obj.get_dtype_inference())
    options = scale_attention(executor.class_obj, options, factors, x)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def scale_attention(model: Any, options: dict[str, Any], factors: Tensor, x: Tensor) -> dict[str, Any]:
    """A copy of `transformer_options` with the attention of this call scaled.

    The patch goes before those of other nodes, which may change the text's length; the override around the one found.
    """
    network = find_network(model)
    if isinstance(network, CROSS):
        patches = options.get("patches", {})
        own = {"attn2_patch": [make_value_patch(factors), *patches.get("attn2_patch", [])]}
        if reads_text_twice(model):
            own["attn1_patch"] = [make_value_patch(factors, first_attention=True), *patches.get("attn1_patch", [])]
        return {**options, "patches": {**patches, **own}}
    side = network.patch_size
    image_tokens = -(-x.shape[-2] // side) * -(-x.shape[-1] // side)
    return {**options, OVERRIDE: make_joint_override(factors, image_tokens, options.get(OVERRIDE))}


def reads_text_twice(model: Any) -> bool:
    """Whether a UNet has transformers whose first attention reads the text as well, in place of the picture."""
    config = model.model_config.unet_config
    return any(config.get("disable_self_attentions") or ()) or bool(config.get("disable_middle_self_attn"))
