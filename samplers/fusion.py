"""MagicFusion's saliency-aware noise blending (Zhao et al., ICCV 2023, arXiv 2303.13126), for any number of experts.

    saliency_m = softmax over pixels of k_m mean over channels of Blur(|s_m (eps_m(c_m) - eps_m(u_m))|)

At each pixel the expert with the highest saliency supplies its guided prediction. At one state and sigma the denoised
is affine in eps, so blending denoised predictions is blending eps; the saliency itself is measured on eps,
|D_c - D_u| / sigma, since softmax(k x) depends on the size of x.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from .masks import blend_styles

PUBLISHED_SIDE = 64  # latent pixels for which the published blur was set
MAX_SOFTNESS = 1000
PALETTE = (  # far apart also for colour-blind eyes, light and dark in turn
    (0.00, 0.45, 0.70), (0.90, 0.62, 0.00), (0.00, 0.62, 0.45), (0.80, 0.47, 0.65), (0.94, 0.89, 0.26),
    (0.84, 0.37, 0.00), (0.34, 0.71, 0.91), (0.60, 0.60, 0.60),
)
DARKER = 0.6  # each further round through the palette
OVERLAY = 0.5  # share of a picture below the colours
LUMA = (0.299, 0.587, 0.114)

Colour = tuple[float, float, float]  # 0 to 1


def measure_response(cond: torch.Tensor, uncond: torch.Tensor, sigma: torch.Tensor, scale: float) -> torch.Tensor:
    """mean over channels of |scale (eps_c - eps_u)|, [B, ..., H, W].

    Args:
        cond, uncond: denoised predictions at one state, [B, C, ..., H, W].
        sigma: noise level of each batch item, [B].
    """
    response = (scale * (cond - uncond)).abs().mean(1)
    sigma = sigma.to(response).clamp_min(torch.finfo(response.dtype).tiny)  # at 0 all denoised are equal
    return response / sigma.reshape(-1, *[1] * (response.ndim - 1))


def box_side(blur: float, height: int, width: int) -> int:
    """Side of the box filter in latent pixels: `blur` at a shorter side of 64, in proportion elsewhere."""
    return round(blur * min(height, width) / PUBLISHED_SIDE)


def blur_response(response: torch.Tensor, side: int) -> torch.Tensor:
    """Box filter of `side` pixels over the last two axes, zeros outside the picture counted.

    An even box has no middle pixel: its result, one pixel smaller, is resized back bilinearly, as in the published code
    (AvgPool2d(4, stride 1, padding 1) and Resize). A side of 1 or less leaves the response as it is.

    Args:
        response: [B, ..., H, W].
    """
    if side <= 1:
        return response
    height, width = response.shape[-2:]
    pictures = rearrange(response, "... h w -> (...) 1 h w")
    pooled = F.avg_pool2d(pictures, side, stride=1, padding=(side - 1) // 2)
    if side % 2 == 0:
        pooled = F.interpolate(pooled, size=(height, width), mode="bilinear", align_corners=False)
    return pooled.reshape(response.shape)


def compare_saliency(responses: Sequence[torch.Tensor], temperatures: Sequence[float], blur: float) -> torch.Tensor:
    """log softmax over all pixels of an item of temperature * blurred response, [N, B, ..., H, W].

    The pixels of a video are those of all its frames: an expert may keep to a part of the time as to a part of the
    picture.

    Args:
        responses: of each expert, [B, ..., H, W]; temperatures: k_m of the paper.
        blur: side of the box filter at 64 latent pixels.
    """
    side = box_side(blur, *responses[0].shape[-2:])
    heats = [k * blur_response(response, side) for response, k in zip(responses, temperatures)]
    return torch.stack([rearrange(heat, "b ... -> b (...)").log_softmax(1).reshape(heat.shape) for heat in heats])


def pick_winners(saliency: torch.Tensor) -> torch.Tensor:
    """Index of the most salient expert at each pixel, [B, ..., H, W]; ties go to the first.

    Args:
        saliency: logarithms, [N, B, ..., H, W].
    """
    return saliency.argmax(0)


def blend_experts(values: Sequence[torch.Tensor], saliency: torch.Tensor, softness: float) -> torch.Tensor:
    """The winner's value at each pixel or, with softness t, the mean with weights softmax over experts of saliency / t.

    Exact where all values agree.

    Args:
        values: of each expert, [B, C, ..., H, W].
        saliency: logarithms, [N, B, ..., H, W].
        softness: 0 takes the winner; a large one averages.
    """
    if softness > 0:
        return blend_styles(values, rearrange((saliency / softness).softmax(0), "n b ... -> n b 1 ..."))
    winners = rearrange(pick_winners(saliency), "b ... -> b 1 ...")
    result = values[0]
    for i, value in enumerate(values[1:], 1):
        result = torch.where(winners == i, value, result)
    return result


def expert_colours(count: int) -> list[Colour]:
    """The colour that each of the first `count` experts is shown in."""
    colours: list[Colour] = []
    for i in range(count):
        (red, green, blue), shade = PALETTE[i % len(PALETTE)], DARKER ** (i // len(PALETTE))
        colours.append((red * shade, green * shade, blue * shade))
    return colours


def draw_winners(winners: torch.Tensor, factor: int) -> torch.Tensor:
    """Winners as pictures, each expert in a colour of its own, [steps * B * frames, H * factor, W * factor, 3].

    Args:
        winners: expert indices, [steps, B, ..., H, W].
        factor: pixels per latent pixel.
    """
    colours = torch.tensor(expert_colours(int(winners.max()) + 1))
    enlarged = repeat(winners, "steps ... h w -> (steps ...) (h down) (w across)", down=factor, across=factor)
    return colours[enlarged.long()]


def lay_over(maps: torch.Tensor, pictures: torch.Tensor, items: int, frames: int) -> torch.Tensor:
    """Maps over the pictures that they were made in, these in grey so that the colours stay what they are.

    Args:
        maps: [steps * items * frames, H, W, 3], frame by frame, image by image, step by step.
        pictures: [P, H', W', C], 0 to 1, of any size: one for all, or as many for each of the images. A video may have
            more frames in pictures than in its latent.
        items, frames: of the latent.

    Raises:
        ValueError: if the number of pictures does not fit, or they have no size.
    """
    if pictures.ndim != 4 or 0 in pictures.shape or len(pictures) not in (1, items) and (
            frames == 1 or len(pictures) % items):
        raise ValueError(
            f"Saliency Maps expects one picture at image, or one for each of the {items} image(s) of the latent, got "
            f"{len(pictures) if pictures.ndim == 4 else 'something else'}; connect what the latent was decoded to.")
    each = max(1, len(pictures) // items)
    chosen = [item * each * (len(pictures) > 1) + frame * (each - 1) // max(1, frames - 1)
              for item in range(items) for frame in range(frames)]
    parts = pictures[chosen, ..., :3].to(maps).nan_to_num().clamp(0, 1)
    grey = parts @ maps.new_tensor(LUMA) if parts.shape[-1] == 3 else parts[..., 0]
    grey = F.interpolate(grey[:, None], size=maps.shape[1:3], mode="bilinear", antialias=True, align_corners=False)
    below = rearrange(grey, "n 1 h w -> n h w 1")
    return rearrange(rearrange(maps, "(s n) h w c -> s n h w c", n=len(chosen)).lerp(below, OVERLAY),
                     "s n h w c -> (s n) h w c")


def split_winners(winners: torch.Tensor, experts: int) -> torch.Tensor:
    """What each expert won, expert after expert: [experts * steps * B * frames, H, W].

    Args:
        winners: expert indices, [steps, B, ..., H, W].
    """
    won = [(winners == i).float() for i in range(experts)]
    return rearrange(won, "experts steps ... h w -> (experts steps ...) h w")


def check_settings(blur: float, softness: float, start_percent: float, end_percent: float) -> None:
    """Raises ValueError if the blur or softness is out of range, or the window ends before it starts."""
    for name, value, none in (("blur", blur, "no blur"), ("softness", softness, "the winner alone")):
        if not value >= 0:
            raise ValueError(f"{name} expects 0 ({none}) or more, got {value:g}; raise it.")
    if blur > PUBLISHED_SIDE:
        raise ValueError(f"blur expects at most {PUBLISHED_SIDE}, got {blur:g}; lower it.")
    if softness == math.inf:
        raise ValueError(f"softness expects a finite number, got inf; {MAX_SOFTNESS} averages as well.")
    if not 0 <= start_percent <= end_percent <= 1:
        raise ValueError(
            f"The Saliency Fusion Guider expects start_percent at or below end_percent, both from 0 to 1, got "
            f"{start_percent:g} and {end_percent:g}; swap or correct them."
        )
