"""Runs MagicMix on tiny models beside the bare sampler, for the tests of its host room."""
from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import tiny
import torch
from mixology.host.layout import LayoutMixSampler, Mix, make_layout

SEED = 11
SAMPLERS = comfy.samplers.KSampler.SAMPLERS
POSITIVE, NEGATIVE = tiny.conditioning(1), tiny.conditioning(2)


def run(model: Any, sampler: Any, latent: dict[str, Any], sigmas: torch.Tensor, noise: torch.Tensor | None = None,
        guider: Any = None, callback: Any = None, seed: int = SEED) -> torch.Tensor:
    guider = guider or tiny.cfg_guider(model, POSITIVE, NEGATIVE)
    if noise is None:
        noise = comfy.sample.prepare_noise(latent["samples"], SEED, latent.get("batch_index"))
    return guider.sample(noise, latent["samples"], sampler, sigmas.clone(), denoise_mask=latent.get("noise_mask"),
                         callback=callback, disable_pbar=True, seed=seed)


def mixer(name: str, latent: dict[str, Any], nu: float = 0.5, k_max: float = 0.6, k_min: float = 0.3, **options: Any,
          ) -> LayoutMixSampler:
    return LayoutMixSampler(
        comfy.samplers.sampler_object(name), make_layout(latent, SEED, options.pop("noise_mode", "shared")),
        Mix(nu, k_max, k_min, **options))


def start_index(model: Any, sigmas: torch.Tensor, k: float) -> int:
    level = model.get_model_object("model_sampling").percent_to_sigma(1 - k)
    return next(i for i, sigma in enumerate(sigmas.tolist()) if sigma <= level * 1.00001)
