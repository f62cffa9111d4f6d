"""CycleDiffusion in the host: a SAMPLER that restyles a picture under any guider."""
from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from tqdm.auto import tqdm

from ..samplers.cycle import check_levels, check_settings, sample_cycle
from ..samplers.levels import check_falling
from .conds import UNPREPARED
from .coverage import check_coverage
from .protocols import Guider
from .rewind import Rewind
from .run import MOST_SEED, noise_levels


@dataclass(frozen=True)
class SourcePrompt:
    """How the picture is read: CONDITIONING, its negative or None, and the guidance scale."""

    conditioning: Any
    negative: Any
    cfg: float


def check_source(source: SourcePrompt) -> None:
    """Raises ValueError if the prompt cannot be read on another guider's model."""
    if not source.conditioning:
        raise ValueError(
            "The Cycle Sampler expects a source prompt, got an empty conditioning; connect for instance CLIP Text "
            "Encode to it.")
    if not math.isclose(source.cfg, 1.0) and not source.negative:
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
    """Raises ValueError if there are no steps downward, no picture or no noise to start from."""
    check_falling(sigmas.tolist(), "The Cycle Sampler", repeats=True)
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


def part_shapes(guider: Guider, latent: torch.Tensor) -> list[Any]:
    """Shapes of a latent's parts. Of one packed from several, only the guider's own conds remember them."""
    for cond in (cond for conds in guider.conds.values() for cond in conds or []):
        if "latent_shapes" in cond.get("model_conds", {}):
            return cond["model_conds"]["latent_shapes"].cond
    return [latent.shape]


def prepare_source(model: Any, source: SourcePrompt, sigmas: torch.Tensor, extra_args: dict[str, Any],
                   ) -> comfy.samplers.CFGGuider:
    """The host's own guider for the source prompt, made ready on the target guider's loaded model as that one is.

    Guidance and the functions of other nodes act here as on the target, so that the same prompts and CFG on both sides
    cancel.

    Raises:
        ValueError: if the prompt leaves something of the picture unread.
    """
    guider, latent = model.inner_model, model.latent_image
    prompts = {"positive": source.conditioning, "negative": source.negative}
    conds = {name: comfy.sampler_helpers.convert_cond(prompt) for name, prompt in prompts.items() if prompt}
    conds = comfy.samplers.process_conds(
        guider.inner_model, model.noise, conds, latent.device, latent, extra_args["denoise_mask"],
        extra_args.get("seed"), part_shapes(guider, latent))
    check_coverage(conds["positive"], latent, sigmas[:-1], "The source prompt of the Cycle Sampler")
    if not math.isclose(source.cfg, 1.0):
        check_coverage(conds["negative"], latent, sigmas[:-1], "The negative prompt of the Cycle Sampler")
    reader = comfy.samplers.CFGGuider(guider.model_patcher)
    reader.model_options, reader.inner_model, reader.conds = guider.model_options, guider.inner_model, conds
    reader.set_cfg(source.cfg)
    return reader


def make_noise_source(x: torch.Tensor, seed: int | None) -> Callable[[Any, Any], torch.Tensor]:
    """The host's noise for steps; on the CPU it adds 1 to the seed, which the largest one has no room for."""
    seed = seed or 0
    return default_noise_sampler(x, seed=-1 if x.device.type == "cpu" and seed == MOST_SEED else seed)


@torch.no_grad()
def sample_cycle_k(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, disable: bool,
    source: SourcePrompt, eta: float,
) -> torch.Tensor:
    """CycleDiffusion in k-diffusion's grammar; `model` is the host's KSamplerX0Inpaint, which holds the picture.

    What other nodes remember between calls, and the global generator that some of them draw from, start anew for the
    target. Each reading has a progress bar of its own; the target's is the sampling node's.
    """
    levels = noise_levels(model.inner_model.inner_model.model_sampling, sigmas)
    check_levels(levels)
    reader = comfy.samplers.KSamplerX0Inpaint(prepare_source(model, source, sigmas, extra_args), sigmas)
    reader.noise, reader.latent_image = model.noise, model.latent_image  # outside a noise mask both return the picture
    fresh, batch = make_noise_source(x, extra_args.get("seed")), x.new_ones([x.shape[0]])
    memory = Rewind(extra_args["model_options"], model.inner_model.model_options)
    progress = comfy.utils.ProgressBar(len(sigmas) - 1)

    with ExitStack() as chance, tqdm(total=2 * (len(sigmas) - 1), disable=disable) as bar:
        chance.enter_context(torch.random.fork_rng([x.device] if x.device.type == "cuda" else []))

        def read(state: torch.Tensor, i: int) -> torch.Tensor:
            comfy.model_management.throw_exception_if_processing_interrupted()
            denoised = reader(state, sigmas[i] * batch, **extra_args)
            progress.update(1)
            bar.update()
            return denoised

        def start_anew() -> None:
            memory.put_back(len(sigmas) - 1)
            chance.close()

        def report(i: int, denoised: torch.Tensor, state: torch.Tensor) -> None:
            if callback is not None:
                callback({"x": state, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            bar.update()

        try:
            return sample_cycle(
                lambda state, i: model(state, sigmas[i] * batch, **extra_args), read, x, model.latent_image,
                levels=levels, eta=eta, draw=lambda i: fresh(sigmas[i], sigmas[i + 1]), report=report,
                between=start_anew)
        finally:
            memory.hand_back()


class CycleSampler(comfy.samplers.KSAMPLER):
    """CycleDiffusion as a SAMPLER (arXiv 2210.05559): the guider restyles the latent it is given.

    Args:
        conditioning: CONDITIONING that describes the picture; negative: its negative, needed unless source_cfg is 1.
        source_cfg: guidance scale of the source reading.
        eta: share of fresh noise per step, 0..1.
        skip: sigmas dropped from the start of the schedule.

    Raises:
        ValueError: on settings out of range, an empty prompt or one with ControlNet or hooks; when sampling, on an
            empty latent, no noise, no steps left, sigmas that rise, or a prompt that leaves something unread.
    """

    holds_picture = "the Cycle Sampler"  # for samplers that would wrap this one

    def __init__(self, conditioning: Any, source_cfg: float, eta: float, skip: int, negative: Any = None):
        check_settings(eta, skip, source_cfg)
        source = SourcePrompt(conditioning, negative, source_cfg)
        check_source(source)
        super().__init__(sample_cycle_k, {"source": source, "eta": eta})
        self.skip = skip

    def max_denoise(self, model_wrap: Guider, sigmas: torch.Tensor) -> bool:
        return False  # the picture stays in the start state, whatever the first sigma

    def sample(
        self, model_wrap: Guider, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:
        check_run(sigmas, self.skip, noise, latent_image)
        sigmas = sigmas[self.skip:]
        options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
        options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        return super().sample(model_wrap, sigmas, {**extra_args, "model_options": options}, callback, noise,
                              latent_image, denoise_mask, disable_pbar)
