"""MagicMix in the host: layouts, and a SAMPLER that keeps one while another SAMPLER paints the content."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ..samplers.layout import (
    SIGMA_TOLERANCE,
    Window,
    check_range,
    find_window,
    make_nu_map,
    mix_model_input,
    mix_states,
    parse_nu_list,
    record_trajectory,
    sample_layout_mix,
    spread_nu,
)
from .cycle import CycleSampler
from .segments import SEED_STRIDE, Forward, SegmentRunner, start_state

Latent = dict[str, Any]


def pack(latent: Any) -> torch.Tensor:
    """The flat form in which the host samples latents of several parts."""
    return comfy.utils.pack_latents(latent.unbind())[0] if getattr(latent, "is_nested", False) else latent


def draw_noise(latent: Latent, seed: int) -> Any:
    """The host's noise for a latent and seed, shaped like it; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))


def describe_size(x: torch.Tensor) -> str:
    return "x".join(str(side) for side in reversed(x.shape[2:]))


def check_layout_latent(latent: Latent) -> None:
    """Raises ValueError if the latent holds no picture."""
    samples = pack(latent["samples"])
    if samples.numel() == 0 or not torch.any(samples):
        raise ValueError(
            "The layout expects the latent of a picture, got an empty one; encode a picture with VAE Encode, "
            "or use Layout Noise (Prompt) for a layout from words."
        )


@dataclass(frozen=True)
class NoisedLayout:
    """Layout states y_k = noise_scaling(sigma_k, n, picture): one noise for all k, or a fresh one per k.

    latent: the host's LATENT of the picture.
    """

    latent: Latent
    seed: int
    fresh: bool

    def noise(self, index: int) -> torch.Tensor:
        """Noise at a grid index, [B, ...] on the CPU."""
        seed = (self.seed + SEED_STRIDE * (index + 1)) % 2 ** 64 if self.fresh else self.seed
        return pack(draw_noise(self.latent, seed))

    def bind(self, model: Any, sigmas: torch.Tensor, like: torch.Tensor) -> BoundLayout:
        """The layout on one run's model, grid, size, batch and device."""
        picture = fit_layout(pack(self.latent["samples"]), like)
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

    latent: the LATENT that was sampled on; noise: its start noise; states: [B, ...] by sigma, on the CPU.
    """

    latent: Latent
    noise: torch.Tensor
    states: dict[float, torch.Tensor]

    def bind(self, model: Any, sigmas: torch.Tensor, like: torch.Tensor) -> BoundLayout:
        def noise_at(index: int) -> torch.Tensor:
            return fit_layout(self.noise, like).to(like)

        def state(sigma: torch.Tensor, index: int, max_denoise: bool = False) -> torch.Tensor:
            level = float(sigma)
            for recorded, x in self.states.items():
                if math.isclose(recorded, level, rel_tol=1e-4, abs_tol=1e-6):
                    return fit_layout(x, like).to(like)
            raise ValueError(
                f"This layout was recorded at sigmas {max(self.states):.4g} to {min(self.states):.4g} of another "
                f"schedule or window and has no state at {level:.4g}; give both nodes the same steps, scheduler and "
                f"sampler kind, and a window inside the recorded one."
            )

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


def fit_layout(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give a layout tensor the dimensions and batch of the sampler's latent.

    Raises:
        ValueError: on another latent format, size or batch.
    """
    if x.ndim == like.ndim - 1:
        x = x.unsqueeze(2)  # BCHW -> BCTHW, as the host does for video models
    if x.ndim != like.ndim or x.shape[1] != like.shape[1]:
        raise ValueError(
            f"The layout expects the model's latent format with {like.shape[1]} channels, got {x.shape[1]} channels "
            f"in {x.ndim - 2} dimensions; encode the layout picture with this model's own VAE."
        )
    if x.shape[2:] != like.shape[2:]:
        raise ValueError(
            f"The layout expects the sampler's latent to have its size {describe_size(x)}, "
            f"got {describe_size(like)}; connect the latent that the layout was made from, or resize the picture."
        )
    if x.shape[0] not in (1, like.shape[0]):
        raise ValueError(
            f"The layout expects a batch of {x.shape[0]} like its own, got {like.shape[0]} image(s); "
            f"use one layout picture for all images or one for each."
        )
    return x.expand(like.shape)


def sigma_window(model: Any, sigmas: torch.Tensor, k_max: float, k_min: float) -> Window:
    """The window on this grid; k is the noise fraction on the model's own time axis, percent 1 - k."""
    levels = [float(model.model_sampling.percent_to_sigma(1.0 - k)) for k in (k_max, k_min)]
    return find_window(sigmas.tolist(), *levels)


class WrappedSampler(comfy.samplers.Sampler):
    """A SAMPLER around another that keeps its options visible to other nodes."""

    def __init__(self, sampler: Any):
        self.sampler = sampler
        self.extra_options = getattr(sampler, "extra_options", {})
        self.inpaint_options = getattr(sampler, "inpaint_options", {})

    def max_denoise(self, model_wrap: Any, sigmas: torch.Tensor) -> bool:
        return self.sampler.max_denoise(model_wrap, sigmas)


class LayoutMixSampler(WrappedSampler):
    """MagicMix around any SAMPLER (arXiv 2210.16056, Algorithm 1).

    Args:
        sampler: the sampler that paints the content.
        layout: NoisedLayout or RecordedLayout.
        nu: content weight for every image; nu_values: one per image, first images first.
        k_max, k_min: window in fractions of the model's time axis.
        mask: MASK [B, H, W], mixed inside only, or None.
        variant: "paper" mixes states; "diffusers" mixes what the model reads, as the community pipeline does.

    Raises:
        ValueError: if nu or the window is out of order, or the sampler holds a picture by itself.
    """

    def __init__(
        self, sampler: Any, layout: NoisedLayout | RecordedLayout, nu: float, k_max: float, k_min: float,
        nu_per_image: str = "", mask: torch.Tensor | None = None, variant: str = "paper",
    ):
        super().__init__(sampler)
        if isinstance(sampler, CycleSampler):
            raise ValueError(
                "The Layout Mix Sampler expects a solver, got the Cycle Sampler, which holds a picture by itself; wire "
                "only one of the two to the sampling node.")
        check_range(nu, k_max, k_min)
        self.layout, self.nu, self.k_max, self.k_min = layout, nu, k_max, k_min
        self.nu_values, self.mask, self.variant = parse_nu_list(nu_per_image), mask, variant

    def nu_map(self, like: torch.Tensor) -> torch.Tensor:
        """Content weight per position, broadcastable to the latent."""
        nu = spread_nu(self.nu_values, self.nu, like.shape[0])
        mask = None
        if self.mask is not None:
            if like.ndim < 4:
                raise ValueError(
                    "The mask expects an image or video latent, got one without height and width; "
                    "disconnect the mask for this model."
                )
            mask = comfy.sampler_helpers.prepare_mask(self.mask, like.shape, like.device).to(like)
        return make_nu_map(nu, mask, like.ndim).to(like)

    def sample(
        self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:
        latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        nu = self.nu_map(noise)
        model = model_wrap.inner_model
        layout = self.layout.bind(model, sigmas, noise)
        window = sigma_window(model, sigmas, self.k_max, self.k_min)
        last = len(sigmas) - 1
        if window.start == last:
            return model.model_sampling.inverse_noise_scaling(sigmas[last], layout.state(last))
        runner = SegmentRunner(
            self.sampler, model_wrap, sigmas, extra_args, callback, layout.noise_at(window.start), latent_image,
            denoise_mask, disable_pbar, window.start)
        try:
            if bool((nu >= 1).all()):
                full = self.sampler.max_denoise(model_wrap, sigmas[window.start:])
                return runner.run_whole(layout.state(window.start, full))
            if self.variant == "diffusers":
                reader = MixedReader(model_wrap, layout, window, nu)
                return runner.run_whole(layout.state(window.start), reader)
            return sample_layout_mix(runner.run, layout.state, sigmas.tolist(), window, nu)
        finally:
            runner.close()


class MixedReader(Forward):
    """A guider that reads nu * x + (1 - nu) * layout inside the window, while the sampler steps x itself."""

    def __init__(self, guider: Any, layout: BoundLayout, window: Window, nu: torch.Tensor):
        super().__init__(guider)
        sigmas = layout.sigmas.tolist()
        self.__dict__.update(_layout=layout, _nu=nu, _highest=sigmas[window.start], _end=sigmas[window.stop])

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = self.__dict__
        level = float(sigma.max())
        inside = own["_end"] * (1 + SIGMA_TOLERANCE) < level <= own["_highest"] * (1 + SIGMA_TOLERANCE)
        if not inside:
            return own["_target"](x, sigma, *args, **kwargs)
        layout = own["_layout"].state_at_sigma(sigma.max(), own["_layout"].nearest_index(level))
        mixed = mix_states(x, layout, own["_nu"])
        return mix_model_input(own["_target"](mixed, sigma, *args, **kwargs), x, mixed)


class LayoutRecorder(WrappedSampler):
    """Runs a SAMPLER and keeps the states from k_max to k_min; stops there unless `finish`."""

    def __init__(self, sampler: Any, k_max: float, k_min: float, finish: bool):
        super().__init__(sampler)
        self.k_max, self.k_min, self.finish = k_max, k_min, finish
        self.states: dict[float, torch.Tensor] = {}

    def sample(
        self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:
        latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        window = sigma_window(model_wrap.inner_model, sigmas, self.k_max, self.k_min)
        last = len(sigmas) - 1 if self.finish else window.stop
        x = start_state(self.sampler, model_wrap, sigmas, noise, latent_image)
        runner = SegmentRunner(
            self.sampler, model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar,
            end=last)
        try:
            states, x = record_trajectory(runner.run, x, window, last)
        finally:
            runner.close()
        self.states = {float(sigmas[i]): state.cpu() for i, state in states.items()}
        return x


def full_sigmas(model: Any, sampler_name: str, scheduler: str, steps: int) -> torch.Tensor:
    """The grid that the host's KSampler uses."""
    return comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise=1.0).sigmas


def make_guider(model: Any, positive: Any, negative: Any, cfg: float) -> comfy.samplers.CFGGuider:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def run_guider(
    guider: Any, sampler: Any, sigmas: torch.Tensor, latent: Latent, noise: Any, seed: int,
) -> tuple[Any, Any]:
    """Sample as the host's SamplerCustomAdvanced does; returns the samples and the last clean estimate (or None)."""
    last: dict[str, Any] = {}
    callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1, last)
    samples = guider.sample(
        noise, latent["samples"], sampler, sigmas, denoise_mask=latent.get("noise_mask"), callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    device = comfy.model_management.intermediate_device()
    estimate = last.get("x0")
    if estimate is not None:
        estimate = guider.model_patcher.model.process_latent_out(estimate.cpu()).to(device)
    return samples.to(device), estimate


def output_latent(latent: Latent, samples: Any) -> Latent:
    """The caller's latent with new samples; what belonged to the old size or batch is dropped."""
    stale = {"samples", "downscale_ratio_spacial", "downscale_ratio_temporal"}
    if samples.shape[0] != latent["samples"].shape[0]:
        stale |= {"batch_index"}
    return {**{key: value for key, value in latent.items() if key not in stale}, "samples": samples}


def repeat_layout(samples: Any, count: int) -> Any:
    """One layout picture for `count` images, [1, ...] -> [count, ...]; other batches stay."""
    if count <= 1 or getattr(samples, "is_nested", False) or samples.shape[0] != 1:
        return samples
    return samples.expand(count, *samples.shape[1:]).clone()


def record_layout(
    model: Any, positive: Any, negative: Any, latent: Latent, seed: int, steps: int, cfg: float, sampler_name: str,
    scheduler: str, k_max: float, k_min: float, finish: bool,
) -> tuple[RecordedLayout, Latent]:
    """Sample a layout from a prompt and record it (arXiv 2210.16056, text-text mode).

    Returns:
        The layout, and the LATENT of the finished picture, or of its clean estimate at k_min.

    Raises:
        ValueError: if the window is out of order.
    """
    check_range(1.0, k_max, k_min)
    empty = latent["samples"]
    ratio = latent.get("downscale_ratio_spacial")
    latent = {**latent, "samples": comfy.sample.fix_empty_latent_channels(model, empty, ratio)}
    recorder = LayoutRecorder(comfy.samplers.sampler_object(sampler_name), k_max, k_min, finish)
    sigmas = full_sigmas(model, sampler_name, scheduler, steps)
    noise = draw_noise(latent, seed)
    guider = make_guider(model, positive, negative, cfg)
    samples, estimate = run_guider(guider, recorder, sigmas, latent, noise, seed)
    if not finish and estimate is not None:
        samples = estimate
    return RecordedLayout(latent, pack(noise), recorder.states), output_latent(latent, samples)


def mix_latent(
    model: Any, positive: Any, negative: Any, layout: NoisedLayout | RecordedLayout, seed: int, steps: int, cfg: float,
    sampler_name: str, scheduler: str, nu: float, k_max: float, k_min: float, nu_per_image: str,
    mask: torch.Tensor | None, variant: str,
) -> Latent:
    """KSampler (Layout Mix): the host's KSampler with a LayoutMixSampler inside. Returns a LATENT."""
    sampler = LayoutMixSampler(
        comfy.samplers.sampler_object(sampler_name), layout, nu, k_max, k_min, nu_per_image, mask, variant)
    samples = comfy.sample.fix_empty_latent_channels(model, layout.latent["samples"])
    latent = {**layout.latent, "samples": repeat_layout(samples, len(sampler.nu_values))}
    sigmas = full_sigmas(model, sampler_name, scheduler, steps)
    guider = make_guider(model, positive, negative, cfg)
    noise = draw_noise({"samples": latent["samples"]}, seed)  # the sampler starts at the layout, whatever this is
    result, _ = run_guider(guider, sampler, sigmas, latent, noise, seed)
    return output_latent(layout.latent, result)


def make_layout(latent: Latent, seed: int, noise_mode: str) -> NoisedLayout:
    """Layout Noise. Raises ValueError if the latent holds no picture."""
    check_layout_latent(latent)
    return NoisedLayout(latent, seed, noise_mode == "fresh")
