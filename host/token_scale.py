"""MagicMix's token attention scale in the host: a text whose words carry factors, and a model that reads them.

The factors ride in the conditioning. The patched model looks for them in every call, so that any number of scaled
conditionings, guiders and samplers may share it, in any order of nodes.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import Tensor

from ..attention_patches.token_scale import extend_factors, make_joint_override, make_value_patch, spread_factors
from .marks import Row, chunk_rows, find_marks, hand_rows, mark_conditioning, read_marks
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

    factors: Tensor
    start_percent: float
    end_percent: float

    def factors_at(self, model_sampling: Any, timestep: Tensor, images: int, tokens: int) -> Tensor | None:
        """Factors [values, tokens] at sigma `timestep` [B]; None outside the window, whose ends belong to it.

        Args:
            images: size of the batch; tokens: length of the conditioning, which other text may be appended to.

        Raises:
            ValueError: if a phrase has another number of values than the batch has images.
        """
        if self.start_percent > 0.0 or self.end_percent < 1.0:
            start, end = (model_sampling.percent_to_sigma(p) for p in (self.start_percent, self.end_percent))
            if not end <= float(timestep[0]) <= start:
                return None
        values = len(self.factors)
        if values not in (1, images):
            raise ValueError(
                f"Token Attention Scale got {values} values for a phrase and {images} images; give one value, or one "
                f"for each image of the batch.")
        return extend_factors(self.factors, tokens)


def scale_tokens(model: Any, clip: Any, text: str, scales: str, start_percent: float, end_percent: float,
                 ) -> tuple[Any, list[Any]]:
    """The model that reads factors, and the text as CLIPTextEncode encodes it, with the factors of its phrases.

    Args:
        scales: lines `phrase = s` or `phrase = [s, s, ...]`, the latter one s for each image of the batch.

    Raises:
        ValueError: for a model, text encoder, line or phrase that cannot be used, or a window that ends before it
            starts.
    """
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
    if bool((factors != 1.0).any()):
        conditioning = mark_conditioning(conditioning, KEY, TokenScale(factors, start_percent, end_percent))
    return patch_model(model), conditioning


def patch_model(model: Any) -> Any:
    """A clone of the model that reads factors; a model that does so already stays as it is.

    Raises:
        ValueError: for a model family without a usable seam.
    """
    network = model.model.diffusion_model
    if not isinstance(network, CROSS + JOINT):
        raise ValueError(
            f"Token Attention Scale expected an SD1.x, SD2.x, SDXL, SD3, Flux or Qwen-Image model, got "
            f"{type(network).__name__}; its attention gives no place to scale text tokens.")
    return read_marks(model, KEY, hand_out_factors, apply_factors)


def hand_out_factors(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
                     model_options: dict[str, Any]) -> Any:
    """Around `calc_cond_batch`: tells the model calls inside which rows to scale."""
    table: dict[Row, Tensor] = {}
    for row, (mark, tokens) in find_marks(conds, KEY).items():
        factors = mark.factors_at(model.model_sampling, timestep, len(x), tokens)
        if factors is not None:
            table[row] = factors
    return executor(model, conds, x, timestep, hand_rows(model_options, KEY, table))


def apply_factors(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                  control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Around one call of the model: patches its attention for this call if it holds rows to scale."""
    options = transformer_options or {}
    table = options.get(KEY, {})
    chunks = [table.get(row) for row in chunk_rows(options)] if table else []
    if c_crossattn is not None and any(chunk is not None for chunk in chunks):
        factors = spread_factors(chunks, len(x), c_crossattn.shape[1])
        factors = factors.to(x.device, executor.class_obj.get_dtype_inference())
        options = scale_attention(executor.class_obj.diffusion_model, options, factors, x)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def scale_attention(network: Any, options: dict[str, Any], factors: Tensor, x: Tensor) -> dict[str, Any]:
    """A copy of `transformer_options` with the attention of this call scaled.

    The patch goes before those of other nodes, which may change the text's length; the override around the one found.
    """
    if isinstance(network, CROSS):
        patches = options.get("patches", {})
        listed = [make_value_patch(factors), *patches.get("attn2_patch", [])]
        return {**options, "patches": {**patches, "attn2_patch": listed}}
    side = network.patch_size
    image_tokens = -(-x.shape[-2] // side) * -(-x.shape[-1] // side)
    return {**options, OVERRIDE: make_joint_override(factors, image_tokens, options.get(OVERRIDE))}
