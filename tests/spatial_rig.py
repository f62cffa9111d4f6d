"""Runs the Epsilon Merge Guider on tiny models beside plain CFG and the core's masked conditioning."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import nodes as core
import tiny
import torch
from mixology.host.spatial import EpsilonMergeGuider
from mixology.samplers.masks import resize_masks
from mixology.samplers.spatial import draw_gradient_masks

SEED = 5
STYLES = [tiny.conditioning(1), tiny.conditioning(3), tiny.conditioning(4), tiny.conditioning(6)]
NEGATIVE = tiny.conditioning(2)


def gradient(count: int = 2, width: int = 8, height: int = 8, angle: float = 0.0) -> torch.Tensor:
    return draw_gradient_masks(width, height, "linear", count, angle, 20, 1)


def merger(model: Any, masks: torch.Tensor, styles: Sequence[Any] = STYLES[:2], negative: Any = NEGATIVE,
           cfg: float = 3.0, cfg_per_style: str = "") -> EpsilonMergeGuider:
    positives = {f"positive_{i}": style for i, style in enumerate(styles)}
    return EpsilonMergeGuider(model, masks, positives, negative, cfg, cfg_per_style)


def masked_combine(masks: torch.Tensor, styles: Sequence[Any]) -> list[Any]:
    """What the core's ConditioningSetMask and ConditioningCombine make of styles and masks."""
    entries: list[Any] = []
    for mask, style in zip(masks, styles):
        entries = core.ConditioningCombine().combine(
            entries, core.ConditioningSetMask().append(style, mask, "default", 1.0)[0])[0]
    return entries


def run(guider: Any, latent: dict[str, Any], sigmas: torch.Tensor, sampler: Any = "euler", callback: Any = None,
        ) -> torch.Tensor:
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    noise = comfy.sample.prepare_noise(latent["samples"], SEED, None)
    return guider.sample(noise, latent["samples"], sampler, sigmas.clone(), denoise_mask=latent.get("noise_mask"),
                         callback=callback, disable_pbar=True, seed=SEED)


def one_step(guider: Any, latent: dict[str, Any], sigma: float) -> torch.Tensor:
    """The denoised prediction at `sigma`: one Euler step to 0."""
    return run(guider, latent, torch.tensor([sigma, 0.0]))


def merged_plain_steps(
    model: Any, masks: torch.Tensor, styles: Sequence[Any], scales: Sequence[float], latent: dict[str, Any],
    sigma: float, negative: Any = NEGATIVE,
) -> torch.Tensor:
    """sum_i M_i of plain CFG predictions, each style run by the core alone, summed in float64."""
    weights = resize_masks(masks, *latent["samples"].shape[-2:]).double()
    return sum((weight * one_step(tiny.cfg_guider(model, style, negative, scale), latent, sigma).double()
                for weight, style, scale in zip(weights, styles, scales)), start=torch.zeros(()))
