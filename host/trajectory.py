"""Trajectories: a picture's states from clean to noise under a model, and sampling from where they end."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import torch

from ..samplers.levels import Level, solve_noise
from ..samplers.trajectory import (
    LARGEST_INDEX,
    check_grid,
    check_levels,
    check_path,
    describe_path,
    find_span,
    is_near,
)
from ..samplers.wording import format_picture
from .protocols import Patcher
from .run import Latent, noise_levels, output_latent


def format_name(model: Patcher) -> str:
    """The host's name of a model's latent format."""
    return type(model.get_model_object("latent_format")).__name__


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
            cell = getattr(getattr(comfy.latent_formats, self.latent_format, None), "spacial_downscale_ratio", None)
            raise ValueError(
                f"The trajectory expects latents of its size, {format_picture(own.shape, cell)}, got "
                f"{format_picture(shape, cell)}; sample the latent of Start from Trajectory as it is, with nothing "
                f"between that resizes it, or invert the picture at the new size.")
        if own.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"The trajectory expects a batch of {own.shape[0]} like its own, got {shape[0]}; sample the latent of "
                f"Start from Trajectory as it is, with nothing between that repeats or splits it, or invert one "
                f"picture for all.")

    def check_model(self, model: Patcher) -> None:
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
