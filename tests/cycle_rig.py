"""Runs the Cycle Sampler on a host's models, and the printed CycleDiffusion beside it on plain runs of the host."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import tiny
import torch
from mixology.host.cycle import CycleSampler
from mixology.host.run import noise_levels
from mixology.samplers.cycle import ancestral_step, take_step

SEED = 11
SOURCE, TARGET, NEGATIVE = tiny.conditioning(1), tiny.conditioning(2), tiny.conditioning(3)


def make_noise(latent: dict[str, Any]) -> torch.Tensor:
    return comfy.sample.prepare_noise(latent["samples"], SEED, latent.get("batch_index"))


def run(guider: Any, sampler: Any, latent: dict[str, Any], sigmas: torch.Tensor, noise: torch.Tensor | None = None,
        callback: Any = None, seed: int = SEED) -> torch.Tensor:
    noise = make_noise(latent) if noise is None else noise
    return guider.sample(noise, latent["samples"], sampler, sigmas.clone(), denoise_mask=latent.get("noise_mask"),
                         callback=callback, disable_pbar=True, seed=seed)


def cycle(source_cfg: float = 1.0, eta: float = 0.1, skip: int = 0, source: Any = SOURCE, negative: Any = NEGATIVE,
          ) -> CycleSampler:
    return CycleSampler(source, source_cfg, eta, skip, negative)


def grid(model: Any, steps: int = 8) -> torch.Tensor:
    """Falling to 0 from below the model's first sigma."""
    return tiny.sigmas_of(model, "normal", steps)[1:]


def printed_cycle(
    model: Any, target: Callable[[], Any], source: Callable[[], Any], latent: dict[str, Any], sigmas: torch.Tensor,
    eta: float,
) -> torch.Tensor:
    """The DPM-Encoder as printed (arXiv 2210.05559) in VP variables and float64, its last step onto sigma 0.

    A clean estimate is one step of the host's plain `euler` to sigma 0 under a fresh guider. A flow model's state is
    (1 - s) times the eps state of sigma s / (1 - s).
    """
    import comfy.model_sampling

    inner, shape = model.model, latent["samples"].shape
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    x0, n = inner.process_latent_in(latent["samples"]).double(), make_noise(latent).double()
    generator = torch.Generator().manual_seed(SEED + 1)
    levels = [float(s) / (1 - float(s)) if flow else float(s) for s in sigmas[:-1]]
    alphas = [1 / (1 + level ** 2) for level in levels]

    def predict(guider: Callable[[], Any], x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean estimate and noise at the VP state x."""
        y = x / alphas[i] ** 0.5 * (1 - float(sigmas[i]) if flow else 1.0)
        start, euler = (y / sigmas[i].double()).float(), comfy.samplers.sampler_object("euler")
        out = guider().sample(start, torch.zeros(shape), euler, torch.stack([sigmas[i], torch.zeros(())]),
                              disable_pbar=True, seed=0)
        clean = inner.process_latent_in(out).double()
        return clean, (x - alphas[i] ** 0.5 * clean) / (1 - alphas[i]) ** 0.5

    x = y = alphas[0] ** 0.5 * x0 + (1 - alphas[0]) ** 0.5 * n
    for i in range(len(alphas) - 1):
        now, after = alphas[i], alphas[i + 1]
        deviation = eta * ((1 - after) / (1 - now)) ** 0.5 * (1 - now / after) ** 0.5
        straight = (1 - after - deviation ** 2) ** 0.5
        drawn = torch.randn(shape, generator=generator).double()
        moved = after ** 0.5 * x0 + straight * (x - now ** 0.5 * x0) / (1 - now) ** 0.5 + deviation * drawn
        clean, eps = predict(source, x, i)
        code = (moved - after ** 0.5 * clean - straight * eps) / deviation
        clean, eps = predict(target, y, i)
        x, y = moved, after ** 0.5 * clean + straight * eps + deviation * code
    end = len(alphas) - 1
    return inner.process_latent_out(x0 + predict(target, y, end)[0] - predict(source, x, end)[0]).float()


def two_runs(source: Any, target: Any, latent: dict[str, Any], sigmas: torch.Tensor, eta: float) -> torch.Tensor:
    """CycleDiffusion as two sampling runs of the host under guiders on models of their own: the first follows the
    noised picture down and notes what it reads, the second restyles. In the host's float32."""
    read: list[torch.Tensor] = []

    def follow(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any],
               reading: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        levels = noise_levels(model.inner_model.inner_model.model_sampling, sigmas)
        generator = torch.Generator().manual_seed(SEED + 1)
        for i in range(len(sigmas) - 1):
            step = ancestral_step(levels[i], levels[i + 1], eta)
            denoised = reading(model(x, sigmas[i] * x.new_ones(len(x)), **extra_args), i)
            z = torch.randn(x.shape, generator=generator) if step.fresh > 0 else None
            x = take_step(denoised, x, z, step)
        return x

    def encode(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **_: Any) -> torch.Tensor:
        def note(denoised: torch.Tensor, i: int) -> torch.Tensor:
            read.append(denoised)
            return model.latent_image

        return follow(model, x, sigmas, extra_args, note)

    def decode(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **_: Any) -> torch.Tensor:
        return follow(model, x, sigmas, extra_args,
                      lambda denoised, i: model.latent_image + (denoised - read[i]))

    run(source, comfy.samplers.KSAMPLER(encode), latent, sigmas)
    return run(target, comfy.samplers.KSAMPLER(decode), latent, sigmas)
