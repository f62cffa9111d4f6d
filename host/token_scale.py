"""MagicMix's token attention scale in the host: a text whose words carry factors, and a model that reads them."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .factors import SCALE_KEY, TokenScale, patch_model
from .families.encoders import T5_IDS, TEXT, count_rows
from .marks import keep_text, mark_conditioning, read_mark, warn_of_unwired
from .prompts import check_pictures, check_same, read_prompt, take_entry
from .protocols import Patcher
from .words import Scale, parse_scales, place_scales


def scale_tokens(model: Patcher, clip: Any, text: str, scales: str, start_percent: float, end_percent: float,
                 conditioning: list[Any] | None = None) -> tuple[Any, list[Any]]:
    """The model that reads factors, and the text as CLIPTextEncode encodes it, with the factors of its phrases.

    Args:
        scales: lines `phrase = s` or `phrase = [s, s, ...]`, the latter one s for each image of the batch.
        conditioning: the text as another node encoded it, which gets the factors in place of one that is made here.

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
    prompt = encode(clip, text) if conditioning is None else conditioning
    factors = find_factors(clip, text, lines, prompt, elsewhere=conditioning is not None)
    model = patch_model(model)
    if any(bool((rows != 1.0).any()) for rows in factors.values()):
        own, others = own_factors(factors, prompt[0][0].shape[1])
        mark = TokenScale(own, start_percent, end_percent, others)
        prompt = mark_conditioning(prompt, SCALE_KEY, mark)
        keep_text(model, SCALE_KEY, mark, prompt[0][0])
        warn_of_unwired(mark.node)
    return model, prompt


def own_factors(factors: dict[str, Tensor], rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Factors of a conditioning's own rows, ones where no tokenizer reads them, and those of its options."""
    name = next((name for name in (TEXT, T5_IDS) if name in factors), None)
    others = {option: values for option, values in factors.items() if option != name}
    return torch.ones(1, rows) if name is None else factors[name], others


def encode(clip: Any, text: str) -> list[Any]:
    """A text as CLIPTextEncode encodes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def find_factors(clip: Any, text: str, lines: Sequence[Scale], conditioning: list[Any], elsewhere: bool,
                 ) -> dict[str, Tensor]:
    """Factors for the rows of a conditioning; see `place_scales`. None where nothing is to be scaled.

    Args:
        elsewhere: another node made it, so that it is held against the text.

    Raises:
        ValueError: if it has several entries, has scales already, or is not that of the text.
    """
    rows, options = take_entry(conditioning) if elsewhere else conditioning[0]
    if elsewhere and read_mark(options, SCALE_KEY) is not None:
        raise ValueError(
            "Token Attention Scale expected a conditioning without scales, got one that has some; write all lines into "
            "one node.")
    if not lines:
        return {}
    readings = read_prompt(clip, text, count_rows(rows, options), elsewhere)
    factors = place_scales(readings, lines)
    if any(reading.after_pictures for reading in readings):
        check_pictures(clip, rows, readings)
    elif elsewhere:
        check_same((rows, options), encode(clip, text)[0], readings)
    return factors
