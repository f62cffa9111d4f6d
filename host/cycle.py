"""CycleDiffusion in the host: a SAMPLER that restyles a picture under any guider."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from tqdm.auto import tqdm

from ..samplers.cycle import Level, check_levels, check_settings, sample_cycle
from .segments import Forward

# What a guider prepares for its own conds only: loaded networks and patched weights.
UNPREPARED = {"control": "a ControlNet", "hooks": "hooks", "gligen": "GLIGEN", "additional_models": "extra models"}


@dataclass(frozen=True)
class SourcePrompt:
    """How the picture is read: CONDITIONING, its negative or None, and the guidance scale."""

    conditioning: Any
    negative: Any
    cfg: float


class SourceReader(Forward):
    """A guider that predicts with the source prompt on the target guider's model, as the host's CFGGuider does.

    Guidance and the model's own pre- and post-CFG functions act here as on the target, so that the same prompts and
    CFG on both sides cancel.
    """

    def __init__(self, guider: Any, conds: dict[str, Any], cfg: float):
        super().__init__(guider, _conds=conds, _cfg=cfg)

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any], seed: int | None = None,
    ) -> torch.Tensor:
        own = self.__dict__
        return comfy.samplers.sampling_function(
            own["_target"].inner_model, x, sigma, own["_conds"].get("negative"), own["_conds"]["positive"],
            own["_cfg"], model_options=model_options, seed=seed)


def check_source(source: SourcePrompt) -> None:
    """Raises ValueError if the prompt cannot be read on another guider's model."""
    if not math.isclose(source.cfg, 1.0) and source.negative is None:
        raise ValueError(
            f"source_cfg {source.cfg:g} expects a negative prompt, got none; connect negative or set source_cfg to 1."
        )
    for name, conditioning in (("source", source.conditioning), ("negative", source.negative or [])):
        for _, options in conditioning:
            found = [words for key, words in UNPREPARED.items() if options.get(key) is not None]
            if found:
                raise ValueError(
                    f"The {name} prompt of the Cycle Sampler expects plain conditioning, got {' and '.join(found)} in "
                    f"it; apply that to the guider's prompts, and give this node the prompt before it was applied."
                )


def check_run(sigmas: torch.Tensor, skip: int, noise: torch.Tensor, picture: torch.Tensor | None) -> None:
    """Raises ValueError if there are no steps, no picture or no noise to start from."""
    steps = len(sigmas) - 1
    if skip >= steps:
        raise ValueError(
            f"skip expects fewer than the schedule's {steps} step(s), got {skip}; lower skip or raise the steps."
        )
    if picture is None or not torch.any(picture):
        raise ValueError(
            "The Cycle Sampler expects the latent of a picture to restyle, got an empty one; connect VAE Encode of "
            "the picture to the sampling node's latent_image."
        )
    if not torch.any(noise):
        raise ValueError(
            "The Cycle Sampler expects noise to start from, got none; connect RandomNoise to the sampling node."
        )


def noise_levels(sampling: Any, sigmas: torch.Tensor) -> list[Level]:
    """Signal and noise at each sigma, asked of the model's own noise_scaling (which is linear in both)."""
    none, unit = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return [Level(float(sampling.noise_scaling(sigma, none, unit)), float(sampling.noise_scaling(sigma, unit, none)))
            for sigma in sigmas.cpu().double()]


def part_shapes(guider: Any, latent: torch.Tensor) -> list[Any]:
    """Shapes of a latent's parts. Of one packed from several, only the guider's own conds remember them."""
    for cond in (cond for conds in guider.conds.values() for cond in conds or []):
        if "latent_shapes" in cond.get("model_conds", {}):
            return cond["model_conds"]["latent_shapes"].cond
    return [latent.shape]


def read_source(model: Any, source: SourcePrompt, extra_args: dict[str, Any]) -> SourceReader:
    """The source prompt, made ready on the guider's model as the guider does with its own."""
    guider, latent = model.inner_model, model.latent_image
    prompts = {"positive": source.conditioning, "negative": source.negative}
    conds = {name: comfy.sampler_helpers.convert_cond(prompt) for name, prompt in prompts.items() if prompt is not None}
    conds = comfy.samplers.process_conds(
        guider.inner_model, model.noise, conds, latent.device, latent, extra_args["denoise_mask"],
        extra_args.get("seed"), part_shapes(guider, latent))
    return SourceReader(guider, conds, source.cfg)


@torch.no_grad()
def sample_cycle_k(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, disable: bool,
    source: SourcePrompt, eta: float,
) -> torch.Tensor:
    """CycleDiffusion in k-diffusion's grammar; `model` is the host's KSamplerX0Inpaint, which holds the picture."""
    levels = noise_levels(model.inner_model.inner_model.model_sampling, sigmas)
    check_levels(levels)
    reader = comfy.samplers.KSamplerX0Inpaint(read_source(model, source, extra_args), sigmas)
    reader.noise, reader.latent_image = model.noise, model.latent_image  # outside a noise mask both return the picture
    fresh = default_noise_sampler(x, seed=extra_args.get("seed") or 0)
    batch = x.new_ones([x.shape[0]])

    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:
        def report(i: int, denoised: torch.Tensor, state: torch.Tensor) -> None:
            if callback is not None:
                callback({"x": state, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            bar.update()

        return sample_cycle(
            lambda state, i: model(state, sigmas[i] * batch, **extra_args),
            lambda state, i: reader(state, sigmas[i] * batch, **extra_args),
            x, model.latent_image, levels, eta, lambda i: fresh(sigmas[i], sigmas[i + 1]), report)


class CycleSampler(comfy.samplers.KSAMPLER):
    """CycleDiffusion as a SAMPLER (arXiv 2210.05559): the guider restyles the latent it is given.

    Args:
        conditioning: CONDITIONING that describes the picture; negative: its negative, needed unless source_cfg is 1.
        source_cfg: guidance scale of the source reading.
        eta: share of fresh noise per step, 0..1.
        skip: sigmas dropped from the start of the schedule.

    Raises:
        ValueError: on settings out of range or a prompt with ControlNet or hooks; when sampling, on an empty latent,
            no noise, or no steps left.
    """

    def __init__(self, conditioning: Any, source_cfg: float, eta: float, skip: int, negative: Any = None):
        check_settings(eta, skip)
        source = SourcePrompt(conditioning, negative, source_cfg)
        check_source(source)
        super().__init__(sample_cycle_k, {"source": source, "eta": eta})
        self.skip = skip

    def max_denoise(self, model_wrap: Any, sigmas: torch.Tensor) -> bool:
        return False  # the picture stays in the start state, whatever the first sigma

    def sample(
        self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:
        check_run(sigmas, self.skip, noise, latent_image)
        sigmas = sigmas[self.skip:]
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        return super().sample(model_wrap, sigmas, {**extra_args, "model_options": options}, callback, noise,
                              latent_image, denoise_mask, disable_pbar)
