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
    check_path,
    check_settings,
    check_weights,
    describe_path,
    find_span,
    is_near,
    reading_index,
    repeat_to,
    sample_inversion,
    solve_noise,
)
from ..samplers.trajectory import LARGEST_INDEX
from ..samplers.wording import legible
from .coverage import check_coverage
from .cycle import noise_levels
from .marks import is_marked
from .rewind import Rewind
from .run import Latent, describe_size, full_sigmas, output_latent, read_noise_mask, run_guider


def format_name(model: Any) -> str:
    """The host's name of a model's latent format."""
    return type(model.get_model_object("latent_format")).__name__


def start_level(sampling: Any, sigma: torch.Tensor) -> Level:
    """Signal and noise of the state that the host's samplers start from at this sigma (KSAMPLER.max_denoise)."""
    none, unit, sigma = torch.zeros(1).double(), torch.ones(1).double(), sigma.cpu().double()
    full = float(sigma) >= float(sampling.sigma_max) * (1 - 1e-5)
    return Level(*(float(sampling.noise_scaling(sigma, *parts, full)) for parts in ((none, unit), (unit, none))))


def is_sane_index(index: Any, batch: int) -> bool:
    """Whether a LATENT's batch_index numbers its pictures in a way that the host can work off."""
    items = index.tolist() if isinstance(index, torch.Tensor) else index
    return isinstance(items, list | tuple | range) and len(items) == batch and all(
        isinstance(item, int) and 0 <= item <= LARGEST_INDEX for item in items)


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
        check_path(self.sigmas.tolist(), self.levels, self.start)
        index = self.latent.get("batch_index")
        if index is not None and not is_sane_index(index, shape[0]):
            raise ValueError(
                f"The trajectory expects a batch_index of one number from 0 to {LARGEST_INDEX} for each of its "
                f"{shape[0]} image(s), got another; invert the picture again.")
        if not all(bool(part.isfinite().all()) for part in (self.states, self.end, self.latent["samples"])):
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
                f"{'x'.join(str(side) for side in reversed(shape[2:]))}; sample the latent of Start from Trajectory as "
                f"it is, with nothing between that resizes it, or invert the picture at the new size.")
        if own.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"The trajectory expects a batch of {own.shape[0]} like its own, got {shape[0]}; sample the latent of "
                f"Start from Trajectory as it is, with nothing between that repeats or splits it, or invert one "
                f"picture for all.")

    def check_model(self, model: Any) -> None:
        """Raises ValueError if a MODEL has another latent format or other noise levels."""
        if format_name(model) != self.latent_format:
            raise ValueError(
                f"The trajectory expects a model of the latent format {self.latent_format}, got "
                f"{format_name(model)}; use source and target models of one family.")
        its = noise_levels(model.get_model_object("model_sampling"), self.sigmas)
        if not all(is_near(a.signal, b.signal) and is_near(a.noise, b.noise) for a, b in zip(self.levels, its)):
            kinds = describe_path(self.levels), describe_path(its)
            raise ValueError(
                f"The trajectory expects a model of its own kind, {kinds[0]}, got {kinds[1]}"
                f"{'' if kinds[0] != kinds[1] else ' that scales its noise otherwise'}; eps and v models go with one "
                f"another and flow models with flow models, so invert the picture with a model of that kind.")


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
            end = sample_inversion(predict, picture, rising.tolist(), levels, rule, report)
        finally:
            memory.put_back()
            memory.hand_back()
    if levels[-1].signal == 0:
        return end  # pure noise: there is nothing that the host's scaling could be undone for
    return guider.inner_model.model_sampling.inverse_noise_scaling(sigmas[0], end)


def read_picture(model: Any, latent: Latent) -> Latent:
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


def invert_latent(model: Any, conditioning: Any, latent: Latent, steps: int, scheduler: str, rule: str) -> Trajectory:
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
    start = start_level(sampling, rising[-1])
    check_path(rising.tolist(), levels, start)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    states: list[torch.Tensor] = []
    sampler = comfy.samplers.KSAMPLER(sample_inversion_k, {"levels": levels, "rule": rule, "keep": states.append})
    unmasked = {"samples": picture["samples"].float()}  # older hosts sample in the latent's own type
    end, _ = run_guider(guider, sampler, sigmas, unmasked, torch.zeros_like(unmasked["samples"]), 0)
    return Trajectory(rising, torch.stack(states), picture, end, format_name(model), tuple(levels), start)


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
                "another latent; connect the latent output of the same node, with nothing between that changes the "
                "picture, or RandomNoise for another one.")
        states = self.trajectory.states
        return solve_noise(states[-1], states[0], self.level).expand(samples.shape).clone()


def start_trajectory(trajectory: Trajectory) -> tuple[StartNoise, torch.Tensor, Latent]:
    """NOISE, SIGMAS (falling) and LATENT (the picture) with which SamplerCustomAdvanced starts at the last state."""
    return StartNoise(trajectory, trajectory.start), trajectory.sigmas.flip(0), {**trajectory.latent}


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
            own["attention_mask"] = repeat_to(own["attention_mask"], result.shape[1], -1)
        if not all(bool(part.isfinite().all()) for part in (result, own.get("pooled_output")) if part is not None):
            raise ValueError(
                "Blend Prompts expects weights that keep the prompt finite, got numbers beyond all bounds; lower alpha "
                "and beta.")
        blended.append([result, own])
    return blended
