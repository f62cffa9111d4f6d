"""Runs the Saliency Fusion Guider on tiny models beside plain CFG, and the printed fusion in float64 beside both."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import tiny
import torch
from mixology.host.experts import Expert, add_expert
from mixology.host.fusion import SaliencyGuider

SEED = 5
POSITIVE, OTHER, NEGATIVE = tiny.conditioning(1), tiny.conditioning(3), tiny.conditioning(2)
Spec = tuple[Any, Any, Any, float, float]  # model, positive, negative, cfg, temperature


def spec(model: Any, positive: Any = POSITIVE, negative: Any = NEGATIVE, cfg: float = 3.0, temperature: float = 1.0,
         ) -> Spec:
    return model, positive, negative, cfg, temperature


def chain(specs: Sequence[Spec]) -> tuple[Expert, ...]:
    experts: tuple[Expert, ...] = ()
    for one in specs:
        experts = add_expert(*one, experts)
    return experts


def fuser(specs: Sequence[Spec], blur: float = 4.0, softness: float = 0.0, window: tuple[float, float] = (0.0, 1.0),
          outside: int = 0, uncond: str = "own") -> SaliencyGuider:
    return SaliencyGuider(chain(specs), blur, softness, *window, outside, uncond)


def run(guider: Any, latent: dict[str, Any], sigmas: torch.Tensor, sampler: Any = "euler", callback: Any = None,
        seed: int = SEED) -> torch.Tensor:
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    noise = comfy.sample.prepare_noise(latent["samples"], SEED, None)
    return guider.sample(noise, latent["samples"], sampler, sigmas.clone(), denoise_mask=latent.get("noise_mask"),
                         callback=callback, disable_pbar=True, seed=seed)


def one_step(guider: Any, latent: dict[str, Any], sigma: float) -> torch.Tensor:
    """The denoised prediction at `sigma`: one Euler step to 0."""
    return run(guider, latent, torch.tensor([sigma, 0.0]))


def box_matrix(size: int, side: int) -> torch.Tensor:
    """One axis of the blur, [size, size] in float64: box means with zeros outside; an even box then read half a pixel
    off by linear interpolation, clamped at the ends."""
    if side <= 1:
        return torch.eye(size, dtype=torch.float64)
    pad, count = (side - 1) // 2, size - side + 1 + 2 * ((side - 1) // 2)
    means = torch.zeros(count, size, dtype=torch.float64)
    for i in range(count):
        for j in range(max(i - pad, 0), min(i - pad + side, size)):
            means[i, j] = 1 / side
    resize = torch.zeros(size, count, dtype=torch.float64)
    for i in range(size):
        place = max((i + 0.5) * count / size - 0.5, 0.0)
        low = min(int(place), count - 1)
        high, part = min(low + 1, count - 1), place - int(place)
        resize[i, low] += 1 - part
        resize[i, high] += part
    return resize @ means


@dataclass(frozen=True)
class Alone:
    """What an expert predicts at one state, all denoised [B, C, ..., H, W], with its guidance scale and temperature."""

    cond: torch.Tensor
    uncond: torch.Tensor
    guided: torch.Tensor
    cfg: float
    k: float


def printed_fusion(
    experts: Sequence[Alone], sigma: float, blur: float = 4.0, softness: float = 0.0, uncond: str = "own",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused denoised and the winners, as printed, in float64."""
    maps = []
    for own in experts:
        base = experts[0].uncond if uncond == "first" else own.uncond
        response = (own.cfg * (base.double() - own.cond.double()) / sigma).abs()  # eps_c - eps_u = (D_u - D_c) / sigma
        height, width = response.shape[-2:]
        side = round(blur * min(height, width) / 64)
        blurred = box_matrix(height, side) @ response @ box_matrix(width, side).T
        heat = torch.exp(own.k * (blurred.mean(1) - blurred.mean(1).flatten(1).max()))
        maps.append(heat / heat.flatten(1).sum(1).reshape(-1, *[1] * (heat.ndim - 1)))
    saliency = torch.stack(maps)
    winners = saliency.argmax(0)
    weights = torch.stack([(winners == i).double() for i in range(len(experts))])
    if softness > 0:
        weights = saliency ** (1 / softness) / (saliency ** (1 / softness)).sum(0)
    return sum((weight.unsqueeze(1) * own.guided.double() for weight, own in zip(weights, experts)),
               start=torch.zeros(())), winners


def read_alone(one: Spec, latent: dict[str, Any], sigma: float) -> Alone:
    """An expert at `sigma` in model space, from a plain CFG run of the host on a clone that tells what it evaluates."""
    model, positive, negative, cfg, k = one
    pairs: list[list[torch.Tensor]] = []
    telling = model.clone()

    def tell(arguments: dict[str, Any]) -> list[torch.Tensor]:
        pairs.append(arguments["conds_out"])
        return arguments["conds_out"]

    telling.model_options["sampler_pre_cfg_function"] = [
        tell, *telling.model_options.get("sampler_pre_cfg_function", [])]
    telling.model_options["disable_cfg1_optimization"] = True
    process_in = model.get_model_object("latent_format").process_in
    guided = process_in(one_step(tiny.cfg_guider(telling, positive, negative, cfg), latent, sigma))
    cond, uncond = pairs[0]
    return Alone(cond, uncond, guided, cfg, k)


def fused_plain_steps(specs: Sequence[Spec], latent: dict[str, Any], sigma: float, **options: Any,
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    """The printed fusion of plain runs of each expert, out of model space, and its winners."""
    fused, winners = printed_fusion([read_alone(one, latent, sigma) for one in specs], sigma, **options)
    return specs[0][0].get_model_object("latent_format").process_out(fused), winners


def check_step(specs: Sequence[Spec], latent: dict[str, Any], sigma: float, blur: float = 16.0, softness: float = 0.0,
               uncond: str = "own") -> SaliencyGuider:
    """One step of the guider is the printed fusion of plain runs; at most one pixel in 200 may be too close to call."""
    expected, winners = fused_plain_steps(specs, latent, sigma, blur=blur, softness=softness, uncond=uncond)
    guider = fuser(specs, blur, softness, uncond=uncond)
    result = one_step(guider, latent, sigma)
    assert guider.winners is not None
    same = guider.winners[0] == winners
    assert float(same.double().mean()) >= 0.995 and len(winners.unique()) == len(specs)
    close = (result.double() - expected).abs() <= 1e-4 + 1e-4 * expected.abs()
    assert bool((close | ~same.unsqueeze(1)).all()), float((result - expected).abs().max())
    return guider
