"""Inversion in the host: a picture followed upward to noise under a model, and the prompt it is read with."""
from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import torch
from einops import repeat
from tqdm.auto import tqdm

from ..samplers.inversion import (
    blend_embeddings,
    check_settings,
    check_weights,
    reading_index,
    sample_inversion,
)
from ..samplers.levels import Level
from ..samplers.trajectory import check_grid, check_levels, check_path
from ..samplers.wording import legible
from .coverage import check_coverage
from .marks import is_marked
from .protocols import Patcher
from .rewind import Rewind
from .run import Latent, full_sigmas, is_full, noise_levels, output_latent, read_noise_mask, run_guider, start_level
from .trajectory import Trajectory, format_name, is_sane_index


@torch.no_grad()
def sample_inversion_k(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, disable: bool,
    levels: list[Level], rule: str, keep: Any,
) -> torch.Tensor:
    """An inversion in k-diffusion's grammar. It is handed a falling grid, as all that runs beside it expects one, and
    walks it upward; x, the host's start state, is not used.

    What other nodes remember between calls is of no use on the way up: every reading is the first of a run to them.
    """
    picture, rising, guider = model.latent_image, sigmas.flip(0), model.inner_model
    read = sorted({reading_index(i, rule) for i in range(len(sigmas) - 1)})
    check_coverage(guider.conds["positive"], picture, rising[read], "The conditioning of DDIM Inversion")
    batch = x.new_ones([x.shape[0]])
    memory = Rewind(extra_args["model_options"], guider.model_options)

    def predict(state: torch.Tensor, i: int) -> torch.Tensor:
        memory.put_back()
        return model(state, rising[i] * batch, **extra_args)

    keep(picture.cpu())
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:
        def report(i: int, denoised: torch.Tensor, state: torch.Tensor) -> None:
            keep(state.cpu())
            if callback is not None:
                sigma = rising[i + 1]
                callback({"x": state, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            bar.update()

        try:
            end = sample_inversion(predict, picture, rising.tolist(), levels, rule=rule, report=report)
        finally:
            memory.put_back()
            memory.hand_back()
    if levels[-1].signal == 0:
        return end  # pure noise: there is nothing that the host's scaling could be undone for
    return guider.inner_model.model_sampling.inverse_noise_scaling(sigmas[0], end)


def read_picture(model: Patcher, latent: Latent) -> Latent:
    """The LATENT to invert, in the model's dimensions.

    Raises:
        ValueError: if it is empty, of several parts, of another latent format, or no numbers, its noise mask neither.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise ValueError(
            "DDIM Inversion expects a latent of one part, got picture and sound together; separate them and invert "
            "the picture.")
    if samples.numel() == 0 or not torch.any(samples):
        raise ValueError(
            "DDIM Inversion expects the latent of a picture, got an empty one; connect VAE Encode of the picture.")
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    channels = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != channels:
        raise ValueError(
            f"DDIM Inversion expects the model's latent format with {channels} channels, got {samples.shape[1]} "
            f"channels; encode the picture with this model's own VAE.")
    if not bool(samples.isfinite().all()):
        raise ValueError(
            "DDIM Inversion expects the latent of a picture, got one with values that are no numbers (NaN or "
            "infinite); encode the picture anew, with the VAE at a higher precision.")
    read_noise_mask(latent)
    picture = output_latent(latent, samples)
    if not is_sane_index(picture.get("batch_index"), len(samples)):
        picture.pop("batch_index", None)  # numbers that are not of these pictures
    return picture


def check_prompt(conditioning: Any) -> None:
    """Raises ValueError on an empty prompt, and on hooks with a schedule: the host walks one forward only, and so would
    stand at its end."""
    if not conditioning:
        raise ValueError(
            "DDIM Inversion expects a prompt to read the picture with, got an empty conditioning; connect for instance "
            "CLIP Text Encode, with or without words.")
    for _, options in conditioning:
        for hook in getattr(options.get("hooks"), "hooks", []):
            count = len(hook.hook_keyframe.keyframes)
            if count > 1:
                raise ValueError(
                    f"DDIM Inversion expects hooks of one strength, got a schedule of {count} keyframes; remove Set "
                    f"Hook Keyframes from its prompt.")


def check_scheduler(name: str) -> None:
    """Raises ValueError for a name that the host would exchange for another."""
    if name not in comfy.samplers.KSampler.SCHEDULERS:
        raise ValueError(
            f"scheduler expects one of the host's, got {legible(name)}; choose one from the list, for instance "
            f"ddim_uniform.")


def invert_latent(
    model: Patcher, conditioning: Any, latent: Latent, steps: int, scheduler: str, rule: str,
) -> Trajectory:
    """DDIM Inversion: one conditional evaluation a step, without guidance.

    A noise mask takes no part in it and stays with the trajectory's LATENT.

    Raises:
        ValueError: if there is no picture of this model's format, no schedule down to 0, no prompt or one that leaves
            part of the picture unread, or a hook with keyframes.
    """
    check_settings(steps, rule)
    check_scheduler(scheduler)
    check_prompt(conditioning)
    picture = read_picture(model, latent)
    sigmas = full_sigmas(model, "ddim", scheduler, steps)
    rising, sampling = sigmas.flip(0).cpu(), model.get_model_object("model_sampling")
    check_grid(rising.tolist())
    levels = noise_levels(sampling, rising)
    check_levels(levels)
    start = start_level(sampling, rising[-1], is_full(sampling, rising[-1]))
    check_path(rising.tolist(), levels, start)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    states: list[torch.Tensor] = []
    sampler = comfy.samplers.KSAMPLER(sample_inversion_k, {"levels": levels, "rule": rule, "keep": states.append})
    unmasked = {"samples": picture["samples"].float()}  # older hosts sample in the latent's own type
    end, _ = run_guider(
        guider, sampler, sigmas, unmasked, noise=torch.zeros_like(unmasked["samples"]), seed=0)
    return Trajectory(rising, torch.stack(states), picture, end, latent_format=format_name(model), levels=tuple(levels),
                      start=start)


def blend_prompts(positive: list[Any], negative: list[Any], alpha: float, beta: float) -> list[Any]:
    """alpha E(positive) - beta E(negative) as CONDITIONING, pooled vectors likewise; all else is the positive's.

    Raises:
        ValueError: if a weight is no number, the positive is empty, the negative has neither one entry nor as many as
            the positive, they do not fit together, or one of them is marked.
    """
    check_weights(alpha, beta)
    if not positive:
        raise ValueError(
            "positive expects a prompt, got an empty conditioning; connect for instance CLIP Text Encode to it.")
    if len(negative) not in (1, len(positive)):
        raise ValueError(
            f"Blend Prompts expects one negative entry or as many as the positive has, {len(positive)}, got "
            f"{len(negative)}; blend before Conditioning Combine.")
    blended = []
    for (text, options), (other, others) in zip(positive, negative * (len(positive) // len(negative))):
        if beta != 0 and (is_marked(options) or is_marked(others)):
            raise ValueError(
                "Blend Prompts expects plain prompts, got one with scaled words or merged styles, whose places mean "
                "nothing in a blend; blend first, or set beta to 0.")
        result, own = blend_embeddings(text, other, alpha, beta), dict(options)
        if own.get("pooled_output") is not None:
            own["pooled_output"] = blend_embeddings(own["pooled_output"], others.get("pooled_output"), alpha, beta)
        if own.get("attention_mask") is not None:
            mask = own["attention_mask"]
            times = result.shape[1] // mask.shape[-1]
            own["attention_mask"] = repeat(mask, "... length -> ... (times length)", times=times)
        if not all(bool(part.isfinite().all()) for part in (result, own.get("pooled_output")) if part is not None):
            raise ValueError(
                "Blend Prompts expects weights that keep the prompt finite, got numbers beyond all bounds; lower alpha "
                "and beta.")
        blended.append([result, own])
    return blended
