"""MagicMix's token attention scale in the host: a text whose words carry factors, and a model that reads them."""
from __future__ import annotations

from typing import Any

from .factors import SCALE_KEY, TokenScale, patch_model
from .marks import keep_text, mark_conditioning, warn_of_unwired
from .protocols import Patcher
from .words import parse_scales, place_scales


def scale_tokens(model: Patcher, clip: Any, text: str, scales: str, start_percent: float, end_percent: float,
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
        conditioning = mark_conditioning(conditioning, SCALE_KEY, mark)
        keep_text(model, SCALE_KEY, mark, conditioning[0][0])
        warn_of_unwired(mark.node)
    return model, conditioning
