"""Layouts of MagicMix in the host: a picture's or a trajectory's states at the noise levels of a sampling run."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling
import torch
from einops import rearrange, repeat

from ..samplers.trajectory import find_span
from ..samplers.wording import format_picture
from .run import Latent, check_samples, draw_noise, find_cell, pack
from .segments import SEED_STRIDE

SAME_SIGMA = 1e-4  # relative
PROBE = 0.5  # a sigma at which flow models differ from all others


@dataclass(frozen=True)
class ModelKind:
    """How a model mixes picture and noise: what people call it, its signal and noise at a sigma, its sigma halfway."""

    name: str
    signal: float
    noise: float
    halfway: float

    def mixes_as(self, other: ModelKind) -> bool:
        return math.isclose(self.signal, other.signal, rel_tol=1e-5, abs_tol=1e-6) and math.isclose(
            self.noise, other.noise, rel_tol=1e-5, abs_tol=1e-6)


def read_kind(sampling: Any) -> ModelKind:
    """The kind of a model's sampling; eps and v models share their states."""
    sigma, none, unit = torch.tensor(PROBE).double(), torch.zeros(1).double(), torch.ones(1).double()
    names = ((comfy.model_sampling.CONST, "a flow model"), (comfy.model_sampling.V_PREDICTION, "a v model"),
             (comfy.model_sampling.EPS, "an eps model"))
    name = next((name for kind, name in names if isinstance(sampling, kind)), type(sampling).__name__)
    return ModelKind(name, float(sampling.noise_scaling(sigma, none, unit)),
                     float(sampling.noise_scaling(sigma, unit, none)), float(sampling.percent_to_sigma(0.5)))


@dataclass(frozen=True)
class NoisedLayout:
    """Layout states y_k = noise_scaling(sigma_k, n, picture): one noise for all k, or a fresh one per k.

    latent: the host's LATENT of the picture.
    """

    latent: Latent
    seed: int
    fresh: bool

    def check_kind(self, sampling: Any) -> None:
        """Models of any kind can be used: states are made by the model itself."""

    def noise(self, index: int) -> torch.Tensor:
        """Noise at a grid index, [B, ...] on the CPU."""
        seed = (self.seed + SEED_STRIDE * (index + 1)) % 2 ** 64 if self.fresh else self.seed
        return pack(draw_noise(self.latent, seed))

    def check(self, sampling: Any, like: torch.Tensor, sigmas: list[float], cell: int | None) -> None:
        """Raises ValueError if the layout does not fit a run on latents like these; it has a state at any sigma."""
        fit_layout(pack(self.latent["samples"]), like, cell)

    def bind(self, model: Any, sigmas: torch.Tensor, like: torch.Tensor) -> BoundLayout:
        """The layout on one run's model, grid, size, batch and device."""
        picture = fit_layout(pack(self.latent["samples"]), like, find_cell(model))
        picture = model.process_latent_in(picture.to(like))
        shared = None if self.fresh else fit_layout(self.noise(0), like).to(like)

        def noise_at(index: int) -> torch.Tensor:
            return fit_layout(self.noise(index), like).to(like) if shared is None else shared

        def state(sigma: torch.Tensor, index: int, max_denoise: bool = False) -> torch.Tensor:
            return model.model_sampling.noise_scaling(sigma, noise_at(index), picture, max_denoise)

        return BoundLayout(sigmas, noise_at, state)


@dataclass(frozen=True)
class RecordedLayout:
    """Layout states of one sampled trajectory (text-text mode), in model space.

    latent: the LATENT that was sampled on; noise: its start noise; states: [B, ...] by sigma, on the CPU; kind: that of
        the model.
    """

    latent: Latent
    noise: torch.Tensor
    states: dict[float, torch.Tensor]
    kind: ModelKind | None = None

    def check_kind(self, sampling: Any) -> None:
        """Raises ValueError if a model mixes picture and noise otherwise, so that its schedule means other states."""
        own, its = self.kind, read_kind(sampling)
        if own is not None and not own.mixes_as(its):
            raise ValueError(
                f"This layout was recorded with {own.name}, but this one is {its.name}, whose noised states are "
                f"others; record it with a model of the same kind, or finish the layout and use Layout Noise.")

    def recorded_at(self, level: float) -> torch.Tensor | None:
        """The state at a recorded sigma, or None."""
        return next((x for recorded, x in self.states.items() if is_same_sigma(recorded, level)), None)

    def state_at(self, level: float) -> torch.Tensor:
        """The state at any sigma of the recorded range, linear in sigma between recorded ones.

        Raises:
            ValueError: outside the range.
        """
        found = self.recorded_at(level)
        if found is not None:
            return found
        rising = sorted(self.states)
        if not rising[0] < level < rising[-1]:
            raise self.has_none_at(level)
        i, weight = find_span(rising, level)
        return torch.lerp(self.states[rising[i]], self.states[rising[min(i + 1, len(rising) - 1)]], weight)

    def has_none_at(self, level: float) -> ValueError:
        return ValueError(
            f"This layout was recorded at sigmas {max(self.states):.4g} to {min(self.states):.4g} of another "
            f"schedule or window and has no state at {level:.4g}; give both nodes the same steps, scheduler and "
            f"sampler kind, and a window inside the recorded one."
        )

    def check(self, sampling: Any, like: torch.Tensor, sigmas: list[float], cell: int | None) -> None:
        """Raises ValueError if the layout does not fit a run on latents like these that mixes at these sigmas."""
        fit_layout(self.noise, like, cell)
        own, its = self.kind, read_kind(sampling)
        for sigma in sigmas:
            if self.recorded_at(sigma) is None:
                if own is not None and not is_same_sigma(own.halfway, its.halfway):
                    raise ValueError(
                        f"This layout was recorded with a model whose noise is at sigma {own.halfway:.4g} halfway, but "
                        f"this one's is at {its.halfway:.4g}, so that their steps have other sigmas; use one model for "
                        f"both nodes, or the same shift and model sampling.")
                raise self.has_none_at(sigma)

    def bind(self, model: Any, sigmas: torch.Tensor, like: torch.Tensor) -> BoundLayout:
        """The layout on one run's grid, size, batch and device."""
        def noise_at(index: int) -> torch.Tensor:
            return fit_layout(self.noise, like).to(like)

        def state(sigma: torch.Tensor, index: int, max_denoise: bool = False) -> torch.Tensor:
            return fit_layout(self.state_at(float(sigma)), like).to(like)

        return BoundLayout(sigmas, noise_at, state)


@dataclass(frozen=True)
class BoundLayout:
    """A layout on one run: noise and state by grid index, and the state at any sigma."""

    sigmas: torch.Tensor
    noise_at: Callable[[int], torch.Tensor]
    state_at_sigma: Callable[..., torch.Tensor]

    def state(self, index: int, max_denoise: bool = False) -> torch.Tensor:
        return self.state_at_sigma(self.sigmas[index], index, max_denoise)

    def nearest_index(self, sigma: float) -> int:
        return int((self.sigmas - sigma).abs().argmin())


def is_same_sigma(recorded: float, level: float) -> bool:
    return math.isclose(recorded, level, rel_tol=SAME_SIGMA, abs_tol=1e-6)


def fit_layout(x: torch.Tensor, like: torch.Tensor, cell: int | None = None) -> torch.Tensor:
    """Give a layout tensor the dimensions and batch of the sampler's latent.

    Args:
        cell: see `find_cell`, for the message.

    Raises:
        ValueError: on another latent format, size or batch.
    """
    if x.ndim == like.ndim - 1:
        x = rearrange(x, "b c h w -> b c 1 h w")  # as the host does for video models
    if x.ndim != like.ndim or x.shape[1] != like.shape[1]:
        raise ValueError(
            f"The layout expects the model's latent format with {like.shape[1]} channels, got {x.shape[1]} channels "
            f"in {x.ndim - 2} dimensions; encode the layout picture with this model's own VAE."
        )
    if x.shape[2:] != like.shape[2:]:
        raise ValueError(
            f"The layout expects the sampler's latent to have its size, {format_picture(x.shape, cell)}, got "
            f"{format_picture(like.shape, cell)}; connect the latent that the layout was made from, or resize the "
            f"picture."
        )
    if x.shape[0] not in (1, like.shape[0]):
        raise ValueError(
            f"The layout expects a batch of {x.shape[0]} like its own, got {like.shape[0]} image(s); "
            f"use one layout picture for all images or one for each."
        )
    return x.expand(like.shape)


def check_layout_latent(latent: Latent) -> None:
    """Raises ValueError if the latent holds no picture."""
    samples = pack(latent["samples"])
    if samples.numel() == 0 or not torch.any(samples):
        raise ValueError(
            "The layout expects the latent of a picture, got an empty one; encode a picture with VAE Encode, "
            "or use Layout Noise (Prompt) for a layout from words."
        )
    check_samples(latent["samples"], "The layout")


def repeat_layout(samples: Any, count: int) -> Any:
    """One layout picture for `count` images, [1, ...] -> [count, ...]; other batches stay."""
    if count <= 1 or getattr(samples, "is_nested", False) or samples.shape[0] != 1:
        return samples
    return repeat(samples, "1 ... -> count ...", count=count).clone()
