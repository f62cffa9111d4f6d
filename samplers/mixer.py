"""Image Mixer's arithmetic: CLIP embeddings of pictures, crops and texts as the tokens a model attends to.

Source: Justin Pinkney, Image Mixer and Image Variations (Lambda Labs). Each source is one projected, un-normalised
CLIP embedding e_i with a strength s_i; the context is the sequence of s_i e_i, padded with zeros to the number of
tokens that the model was trained with (five, or one for Image Variations); its negative is zeros of the same shape.
Cross-attention has no positions, so the order means nothing, but each zero token takes a share of attention: padding
does.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

MODES = ("concat", "average", "sum")


@dataclass(frozen=True)
class Source:
    """One picture, crop or text.

    Attributes:
        embedding: [B, C] in float32, not normalised; B is 1 for all images of a batch alike, or their number.
        strength: factor of the embedding.
    """

    embedding: torch.Tensor
    strength: float


Mixer = tuple[Source, ...]


def crop_image(image: torch.Tensor, x: float, y: float, width: float, height: float) -> torch.Tensor:
    """A part of pictures [B, H, W, C], in fractions of their sides: at least one pixel, ending at the border."""
    top, bottom = crop_span(image.shape[1], y, height)
    left, right = crop_span(image.shape[2], x, width)
    return image[:, top:bottom, left:right]


def crop_span(side: int, start: float, share: float) -> tuple[int, int]:
    """First pixel of a share of a side, and the one after its last."""
    first = min(round(start * side), side - 1)
    return first, min(max(round((start + share) * side), first + 1), side)


def add_source(mixer: Mixer, embedding: torch.Tensor, strength: float) -> Mixer:
    """The mixer with one more source.

    Args:
        embedding: [B, C].

    Raises:
        ValueError: if its width or batch does not fit the sources before it, or it is no numbers.
    """
    if not bool(embedding.isfinite().all()):
        raise ValueError(
            "The mixer expected an embedding of numbers, got NaN or infinite ones; load the CLIP at a higher precision "
            "(fp16 can overflow), or look at its file.")
    images, width = embedding.shape
    for batch, other in (source.embedding.shape for source in mixer):
        if other != width:
            raise ValueError(
                f"The mixer expected embeddings of one width, got {other} and {width}; use the vision and text encoder "
                f"of one CLIP, such as ViT-L/14, for all sources.")
        if batch != images and 1 not in (batch, images):
            raise ValueError(
                f"The mixer expected image batches of one size, got {batch} and {images} images; batches are mixed "
                f"picture by picture, so make them equally long, or give single images.")
    return (*mixer, Source(embedding.float(), strength))


def combine_sources(mixer: Mixer, mode: str, slots: int) -> torch.Tensor:
    """The context that a model attends to: [B, tokens, C] in float32.

    Args:
        mode: "concat" makes s_i e_i a token for each source; "sum" one token, sum_i s_i e_i; "average" one token,
            sum_i s_i e_i / sum_i s_i.
        slots: tokens of the context, filled up with zeros; 0 for no filling.

    Raises:
        ValueError: if there are more tokens than slots, or strengths that cannot be averaged.
    """
    images = max(len(source.embedding) for source in mixer)
    tokens = torch.stack(
        [source.strength * source.embedding.expand(images, -1) for source in mixer], dim=1)  # [B, N, C]
    if mode != "concat":
        tokens = tokens.sum(dim=1, keepdim=True)
    if mode == "average":
        tokens = tokens / total_strength(mixer)
    missing = slots - tokens.shape[1]
    if slots > 0 and missing < 0:
        raise ValueError(
            f"Mixer Conditioning expected at most {slots} source(s), got {tokens.shape[1]}; disconnect some, join them "
            f"with mode average or sum, or raise slots if your model was trained with more.")
    return torch.nn.functional.pad(tokens, (0, 0, 0, max(missing, 0) if slots > 0 else 0))


def total_strength(mixer: Mixer) -> float:
    """What an average divides by; 1 if every strength is zero, which mixes nothing.

    Raises:
        ValueError: if strengths of both signs leave nothing to divide by.
    """
    strengths = [source.strength for source in mixer]
    if not any(strengths):
        return 1.0
    total = sum(strengths)
    if total < 1e-6:
        raise ValueError(
            f"Mixer Conditioning expected strengths with a sum above 0 for mode average, got {total:g}; use mode sum "
            f"for directions, or raise a strength.")
    return total
