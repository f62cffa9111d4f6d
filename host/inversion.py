"""Inversion in the host: a picture's states from clean to noise under a model, and sampling from where they end."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ..samplers.cycle import Level
from ..samplers.inversion import (
    blend_embeddings,
    check_grid,
    check_levels,
    find_span,
    repeat_to,
    sample_inversion,
    solve_noise,
)
from .cycle import noise_levels
from .layout import Latent, describe_size, full_sigmas, output_latent, run_guider

SAME_LEVEL = 1e-4  # relative


def format_name(model: Any) -> str:
    """The host's name of a model's latent format."""
    return type(model.get_model_object("latent_format")).__name__


def start_level(sampling: Any, sigma: torch.Tensor) -> Level:
    """Signal and noise of the state that the host's samplers start from at this sigma (KSAMPLER.max_denoise)."""
    none, unit, sigma = torch.zeros(1).double(), torch.ones(1).double(), sigma.cpu().double()
    full = float(sigma) >= float(sampling.sigma_max) * (1 - 1e-5)
    return Level(*(float(sampling.noise_scaling(sigma, *parts, full)) for parts in ((none, unit), (unit, none))))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The states of a picture from sigma 0 to noise, as a model was followed upward. Latents only, on the CPU.

    sigmas: [S + 1] float32, rising from 0: the host's grid flipped.
    states: [S + 1, B, C, ..., H, W] float32, what a sampler holds at each sigma; the first is the picture.
    latent: the picture's LATENT.
    end: its last state as the host's latents are, [B, C, ..., H, W].
    latent_format: the host's name of the latent format; levels: signal and noise at each sigma; start: those that the
        host's samplers start from at the last one, which differ where it is the model's first.

    Raises:
        ValueError: if these do not fit together or are not numbers.
    """

    sigmas: torch.Tensor
    states: torch.Tensor
    latent: Latent
    end: torch.Tensor
    latent_format: str
    levels: tuple[Level, ...]
    start: Level

    def __post_init__(self) -> None:
        check_grid(self.sigmas.tolist())
        check_levels((*self.levels, self.start))
        shape = tuple(self.states.shape[1:])
        fits = len(self.states) == len(self.sigmas) == len(self.levels) and shape == tuple(self.end.shape)
        if not fits or shape != tuple(self.latent["samples"].shape):
            raise ValueError(
                f"The trajectory expects one state for each of its {len(self.sigmas)} sigmas, of its picture's size, "
                f"got {tuple(self.states.shape)}; invert the picture again.")
        if not all(bool(part.isfinite().all()) for part in (self.states, self.end)):
            raise ValueError(
                "The trajectory expects finite states, got numbers beyond all bounds; lower alpha and beta of the "
                "prompt, or load the model at a higher precision, and invert again.")

    def state_at(self, sigma: float, like: torch.Tensor) -> torch.Tensor:
        """The state at a sigma on like's device and in its type; linear in sigma between recorded ones.

        Args:
            like: [B, C, ..., H, W]; one picture serves a whole batch.

        Raises:
            ValueError: on a sigma outside the trajectory, or another size, channels or batch than like's.
        """
        self.check_shape(like.shape)
        i, weight = find_span(self.sigmas.tolist(), sigma)
        state = self.states[i] if weight == 0 else torch.lerp(self.states[i], self.states[i + 1], weight)
        return state.to(device=like.device, dtype=like.dtype, copy=True).expand(like.shape)

    def check_shape(self, shape: torch.Size) -> None:
        """Raises ValueError if a latent of this shape is not of the picture's size, channels and batch."""
        own = self.states[0]
        if own.ndim != len(shape) or own.shape[1] != shape[1]:
            raise ValueError(
                f"The trajectory expects latents of {own.shape[1]} channels like its own, got {shape[1]} channels; "
                f"sample with a model of the same latent format.")
        if own.shape[2:] != shape[2:]:
            raise ValueError(
                f"The trajectory expects latents of its size {describe_size(own)}, got "
                f"{'x'.join(str(side) for side in reversed(shape[2:]))}; connect the latent of Start from Trajectory.")
        if own.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"The trajectory expects a batch of {own.shape[0]} like its own, got {shape[0]}; connect the latent "
                f"of Start from Trajectory, or invert one picture for all.")

    def check_model(self, model: Any) -> None:
        """Raises ValueError if a MODEL has another latent format or other noise levels."""
        if format_name(model) != self.latent_format:
            raise ValueError(
                f"The trajectory expects a model of the latent format {self.latent_format}, got "
                f"{format_name(model)}; use source and target models of one family.")
        sampling = model.get_model_object("model_sampling")
        own, its = (torch.tensor([[level.signal, level.noise] for level in levels])
                    for levels in (self.levels, noise_levels(sampling, self.sigmas)))
        if not torch.allclose(own, its, rtol=SAME_LEVEL, atol=SAME_LEVEL):
            raise ValueError(
                "The trajectory expects a model that mixes picture and noise as its own did, got another kind; use a "
                "flow model with trajectories of flow models, and eps or v models with those of eps or v models.")


@torch.no_grad()
def sample_inversion_k(
    model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, disable: bool,
    levels: list[Level], rule: str, keep: Any,
) -> torch.Tensor:
    """An inversion in k-diffusion's grammar. It is handed a falling grid, as all that runs beside it expects one, and
    walks it upward; x, the host's start state, is not used."""
    picture, rising = model.latent_image, sigmas.flip(0)
    batch = x.new_ones([x.shape[0]])
    keep(picture.cpu())
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:
        def report(i: int, denoised: torch.Tensor, state: torch.Tensor) -> None:
            keep(state.cpu())
            if callback is not None:
                sigma = rising[i + 1]
                callback({"x": state, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
            bar.update()

        end = sample_inversion(
            lambda state, i: model(state, rising[i] * batch, **extra_args), picture, rising.tolist(), levels, rule,
            report)
    if levels[-1].signal == 0:
        return end  # pure noise: there is nothing that the host's scaling could be undone for
    return model.inner_model.inner_model.model_sampling.inverse_noise_scaling(sigmas[0], end)


def read_picture(model: Any, latent: Latent) -> Latent:
    """The LATENT to invert, in the model's dimensions.

    Raises:
        ValueError: if it is empty, of several parts, or of another latent format.
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
    return output_latent(latent, samples)


def check_hooks(conditioning: Any) -> None:
    """Raises ValueError on hooks with a schedule: the host walks one forward only, and so would stand at its end."""
    for _, options in conditioning:
        for hook in getattr(options.get("hooks"), "hooks", []):
            count = len(hook.hook_keyframe.keyframes)
            if count > 1:
                raise ValueError(
                    f"DDIM Inversion expects hooks of one strength, got a schedule of {count} keyframes; remove Set "
                    f"Hook Keyframes from its prompt.")


def invert_latent(model: Any, conditioning: Any, latent: Latent, steps: int, scheduler: str, rule: str) -> Trajectory:
    """DDIM Inversion: one conditional evaluation a step, without guidance.

    A noise mask takes no part in it and stays with the trajectory's LATENT.

    Raises:
        ValueError: if there is no picture of this model's format, no schedule down to 0, or a hook with keyframes.
    """
    check_hooks(conditioning)
    picture = read_picture(model, latent)
    sigmas = full_sigmas(model, "ddim", scheduler, steps)
    rising, sampling = sigmas.flip(0).cpu(), model.get_model_object("model_sampling")
    check_grid(rising.tolist())
    levels = noise_levels(sampling, rising)
    check_levels(levels)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    states: list[torch.Tensor] = []
    sampler = comfy.samplers.KSAMPLER(sample_inversion_k, {"levels": levels, "rule": rule, "keep": states.append})
    unmasked = {"samples": picture["samples"].float()}  # older hosts sample in the latent's own type
    end, _ = run_guider(guider, sampler, sigmas, unmasked, torch.zeros_like(unmasked["samples"]), 0)
    return Trajectory(rising, torch.stack(states), picture, end, format_name(model), tuple(levels),
                      start_level(sampling, rising[-1]))


def end_latent(trajectory: Trajectory) -> Latent:
    """The noisy end state as a LATENT; a noise mask would hold the noise fast and is left out."""
    latent = output_latent(trajectory.latent, trajectory.end)
    return {key: value for key, value in latent.items() if key != "noise_mask"}


@dataclass(frozen=True, eq=False)
class StartNoise:
    """A NOISE from which the host's samplers start at the end of a trajectory.

    level: signal and noise of the sampler's start state.
    """

    trajectory: Trajectory
    level: Level
    seed: int = 0

    def generate_noise(self, input_latent: Latent) -> torch.Tensor:
        """[B, ...] float32. Raises ValueError unless the latent is the trajectory's picture."""
        samples, picture = input_latent["samples"], self.trajectory.latent["samples"]
        self.trajectory.check_shape(samples.shape)
        if not torch.equal(samples.to(picture), picture.expand(samples.shape)):
            raise ValueError(
                "The noise of Start from Trajectory expects the trajectory's own picture as latent_image, got "
                "another latent; connect the latent of Start from Trajectory.")
        states = self.trajectory.states
        return solve_noise(states[-1], states[0], self.level).expand(samples.shape).clone()


def start_trajectory(trajectory: Trajectory) -> tuple[StartNoise, torch.Tensor, Latent]:
    """NOISE, SIGMAS (falling) and LATENT (the picture) with which SamplerCustomAdvanced starts at the last state."""
    return StartNoise(trajectory, trajectory.start), trajectory.sigmas.flip(0), {**trajectory.latent}


def blend_prompts(positive: list[Any], negative: list[Any], alpha: float, beta: float) -> list[Any]:
    """alpha E(positive) - beta E(negative) as CONDITIONING, pooled vectors likewise; all else is the positive's.

    Raises:
        ValueError: if the negative has neither one entry nor as many as the positive, or they do not fit together.
    """
    if len(negative) not in (1, len(positive)):
        raise ValueError(
            f"Blend Prompts expects one negative entry or as many as the positive has, {len(positive)}, got "
            f"{len(negative)}; blend before Conditioning Combine.")
    blended = []
    for (text, options), (other, others) in zip(positive, negative * (len(positive) // len(negative))):
        result, own = blend_embeddings(text, other, alpha, beta), dict(options)
        if own.get("pooled_output") is not None:
            own["pooled_output"] = blend_embeddings(own["pooled_output"], others.get("pooled_output"), alpha, beta)
        if own.get("attention_mask") is not None:
            own["attention_mask"] = repeat_to(own["attention_mask"], result.shape[1], -1)
        blended.append([result, own])
    return blended
