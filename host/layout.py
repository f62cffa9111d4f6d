"""MagicMix in the host: layouts, and a SAMPLER that keeps one while another SAMPLER paints the content."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from einops import rearrange

from ..samplers.layout import (
    Window,
    check_range,
    check_start,
    check_steps,
    find_window,
    make_nu_map,
    mix_model_input,
    mix_states,
    parse_nu_list,
    record_trajectory,
    sample_layout_mix,
    spread_nu,
)
from ..samplers.levels import SIGMA_TOLERANCE, check_falling
from ..samplers.masks import check_mask, check_mask_count
from ..samplers.wording import legible
from .layout_states import (
    BoundLayout,
    ModelKind,
    NoisedLayout,
    RecordedLayout,
    check_layout_latent,
    read_kind,
    repeat_layout,
)
from .protocols import Guider, Patcher, Sampler
from .run import (
    Latent,
    Schedule,
    check_format,
    check_samples,
    check_seed,
    draw_noise,
    find_cell,
    make_guider,
    output_latent,
    pack,
    run_guider,
)
from .segments import SegmentRunner, name_sampler, start_state

VARIANTS = ("paper", "diffusers")
MODES = ("shared", "fresh")


def window_levels(sampling: Any, k_max: float, k_min: float) -> tuple[float, float]:
    """Sigmas of the window's ends; k is the noise fraction on the model's own time axis, percent 1 - k."""
    return float(sampling.percent_to_sigma(1.0 - k_max)), float(sampling.percent_to_sigma(1.0 - k_min))


def sigma_window(model: Any, sigmas: torch.Tensor, k_max: float, k_min: float) -> Window:
    """The window on this grid."""
    return find_window(sigmas.tolist(), *window_levels(model.model_sampling, k_max, k_min))


class WrappedSampler(comfy.samplers.Sampler):
    """A SAMPLER around another that keeps its options visible to other nodes."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.extra_options = getattr(sampler, "extra_options", {})
        self.inpaint_options = getattr(sampler, "inpaint_options", {})

    def max_denoise(self, model_wrap: Guider, sigmas: torch.Tensor) -> bool:
        return self.sampler.max_denoise(model_wrap, sigmas)


@dataclass(frozen=True)
class Mix:
    """How a layout is mixed into a run.

    Attributes:
        nu: content weight for every image; nu_per_image: one per image as text, first images first.
        k_max, k_min: window in fractions of the model's time axis.
        mask: MASK [B, H, W], mixed inside only, or None.
        variant: "paper" mixes states; "diffusers" mixes what the model reads, as the community pipeline does.
    """

    nu: float
    k_max: float
    k_min: float
    nu_per_image: str = ""
    mask: torch.Tensor | None = None
    variant: str = "paper"

    def check(self) -> None:
        """Raises ValueError if nu, the window or the variant is out of order."""
        check_range(self.nu, self.k_max, self.k_min)
        if self.variant not in VARIANTS:
            raise ValueError(
                f"variant expects {' or '.join(VARIANTS)}, got '{legible(self.variant)}'; choose one of them.")


class LayoutMixSampler(WrappedSampler):
    """MagicMix around any SAMPLER (arXiv 2210.16056, Algorithm 1).

    Args:
        sampler: the sampler that paints the content.
        layout: NoisedLayout or RecordedLayout.

    Raises:
        ValueError: if the mix is out of order, or the sampler holds a picture by itself; when sampling, if the layout,
            the mask or the schedule do not fit.
    """

    holds_picture = "another Layout Mix Sampler"  # for samplers that would wrap this one

    def __init__(self, sampler: Sampler, layout: NoisedLayout | RecordedLayout, mix: Mix):
        super().__init__(sampler)
        holder = getattr(sampler, "holds_picture", None)
        if holder is not None:
            raise ValueError(
                f"The Layout Mix Sampler expects a solver, got {holder}, which holds a picture by itself; wire only "
                f"one of the two to the sampling node.")
        mix.check()
        self.layout, self.mix = layout, mix
        self.nu_values = parse_nu_list(mix.nu_per_image)
        self.mask = None if mix.mask is None else check_mask(mix.mask)

    def nu_map(self, like: torch.Tensor) -> torch.Tensor:
        """Content weight per position, broadcastable to the latent."""
        nu = spread_nu(self.nu_values, self.mix.nu, like.shape[0])
        mask = None if self.mask is None else self.spread_mask(self.mask, like)
        return make_nu_map(nu, mask, like.ndim).to(like)

    def spread_mask(self, mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The mask [N, H, W] at latent size, [B, C, ...]. Several masks on one video follow its frames."""
        if like.ndim < 4:
            raise ValueError(
                "The mask expects an image or video latent, got one without height and width; "
                "disconnect the mask for this model."
            )
        if like.ndim == 4 or like.shape[0] > 1 or like.shape[2] == 1:
            check_mask_count(mask, like.shape[0])
            if like.ndim == 5 and len(mask) > 1:
                mask = rearrange(mask, "b h w -> b 1 1 h w")  # the host would take a batch for frames
        return comfy.sampler_helpers.prepare_mask(mask, like.shape, like.device).to(like)

    def plan(
        self, sampling: Any, sigmas: torch.Tensor, like: torch.Tensor, cell: int | None,
    ) -> tuple[Window, torch.Tensor]:
        """The window and the content weights of a run on latents like these; everything is checked before it starts.

        Args:
            cell: see `find_cell`.

        Raises:
            ValueError: if the schedule, the window, the layout, nu_per_image or the mask do not fit.
        """
        self.layout.check_kind(sampling)  # the schedule is to blame for what differs between two kinds otherwise
        grid, levels = sigmas.tolist(), window_levels(sampling, self.mix.k_max, self.mix.k_min)
        check_falling(grid, "The Layout Mix Sampler")
        nu, window = self.nu_map(like), find_window(grid, *levels)
        check_start(grid, window, levels[0], self.mix.k_max)
        mixes = self.mix.k_min < self.mix.k_max and bool((nu < 1).any()) and window.start < len(grid) - 1
        if mixes:
            check_steps(grid, window, levels, (self.mix.k_max, self.mix.k_min))
        unread = not mixes or self.mix.variant == "diffusers" or grid[window.stop] == 0
        ends = window.stop if unread else window.stop + 1
        self.layout.check(sampling, like, grid[window.start:max(ends, window.start + 1)], cell)
        return window, nu

    def sample(
        self, model_wrap: Guider, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:
        latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        check_fill(denoise_mask)
        model = model_wrap.inner_model
        window, nu = self.plan(model.model_sampling, sigmas, noise, find_cell(model))
        layout = self.layout.bind(model, sigmas, noise)
        last = len(sigmas) - 1
        if window.start == last:
            return model.model_sampling.inverse_noise_scaling(sigmas[last], layout.state(last))
        runner = SegmentRunner(
            self.sampler, model_wrap, sigmas, extra_args, callback=callback,
            noise=layout.noise_at(window.start), latent_image=latent_image, denoise_mask=denoise_mask,
            disable_pbar=disable_pbar, begin=window.start)
        try:
            if bool((nu >= 1).all()):
                full = self.sampler.max_denoise(model_wrap, sigmas[window.start:])
                return runner.run_whole(layout.state(window.start, full))
            if self.mix.variant == "diffusers":
                return self.sample_mixed_input(runner, layout, window, nu)
            return sample_layout_mix(runner.run, layout.state, sigmas.tolist(), window, nu=nu)
        finally:
            runner.close()

    def sample_mixed_input(
        self, runner: SegmentRunner, layout: BoundLayout, window: Window, nu: torch.Tensor,
    ) -> torch.Tensor:
        """Variant diffusers. Raises ValueError if the sampler never looked where the layout differs from its start."""
        inputs = InputMix(layout, window, nu)
        result = runner.run_whole(
            layout.state(window.start), lambda guider, sigmas: MixedReader(guider, sigmas, inputs))
        if window.start < window.stop and not inputs.mixed:
            raise ValueError(
                f"variant diffusers expects a sampler that reads the model inside the window after its start, got "
                f"{name_sampler(self.sampler)} on a schedule where it does not; use more steps, a wider window or "
                f"variant paper.")
        return result


def check_fill(denoise_mask: torch.Tensor | None) -> None:
    """Raises ValueError if a noise mask, as the host hands it to samplers, is not of numbers."""
    if denoise_mask is not None and not bool(denoise_mask.isfinite().all()):
        raise ValueError(
            "The noise mask expects values from 0 to 1, got some that are no numbers (NaN or infinite); look at the "
            "node that made the mask, or paint it anew.")


class InputMix:
    """Asks a model about nu * x + (1 - nu) * layout inside the window, and about x outside it.

    mixed: whether that was so below the window's start, where the sampler stands on the layout itself.
    """

    def __init__(self, layout: BoundLayout, window: Window, nu: torch.Tensor):
        sigmas = layout.sigmas.tolist()
        self.layout, self.nu, self.highest, self.end = layout, nu, sigmas[window.start], sigmas[window.stop]
        self.mixed = False

    def read(self, model: Any, x: torch.Tensor, sigma: torch.Tensor, **options: Any) -> torch.Tensor:
        level = float(sigma.max())
        if not self.end * (1 + SIGMA_TOLERANCE) < level <= self.highest * (1 + SIGMA_TOLERANCE):
            return model(x, sigma, **options)
        layout = self.layout.state_at_sigma(sigma.max(), self.layout.nearest_index(level))
        if layout.shape != x.shape:
            raise ValueError(
                f"variant diffusers expects a sampler that reads latents of the shape {tuple(layout.shape)}, got one "
                f"that reads {tuple(x.shape)}; choose another sampler or variant paper.")
        self.mixed = self.mixed or level < self.highest * (1 - SIGMA_TOLERANCE)
        mixed = mix_states(x, layout, self.nu)
        return mix_model_input(model(mixed, sigma, **options), x, mixed)


class MixedReader(comfy.samplers.KSamplerX0Inpaint):
    """What stands between a sampler and the guider, as the host's own does; what it asks is mixed.

    `inner_model` is the guider itself, so that samplers may copy it, exchange it and write to it.
    """

    def __init__(self, guider: Guider, sigmas: torch.Tensor, inputs: InputMix):
        super().__init__(guider, sigmas)
        self.inputs = inputs

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        inner = comfy.samplers.KSamplerX0Inpaint(MixedModel(self.inner_model, self.inputs), self.sigmas)
        inner.latent_image, inner.noise = self.latent_image, self.noise
        return inner(x, sigma, *args, **kwargs)


class MixedModel:
    """What the host's reader asks in the guider's place, once it has filled outside a noise mask.

    The one object here that stands for one of the host's. The mix belongs between that fill and the guider, where the
    host asks nobody: its wrappers around predictions lie inside the guider among those of other nodes, and a guider of
    another pack may run none. It lives for one call and no one else meets it: samplers have the guider itself in
    `MixedReader.inner_model`, and mask functions from `SegmentRunner`.
    """

    def __init__(self, guider: Guider, inputs: InputMix):
        self.guider, self.inputs, self.inner_model = guider, inputs, guider.inner_model

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.inputs.read(self.guider, x, sigma, **options)


class LayoutRecorder(WrappedSampler):
    """Runs a SAMPLER and keeps the states from k_max to k_min; stops there unless `finish`."""

    def __init__(self, sampler: Sampler, *, k_max: float, k_min: float, finish: bool):
        super().__init__(sampler)
        self.k_max, self.k_min, self.finish = k_max, k_min, finish
        self.states: dict[float, torch.Tensor] = {}
        self.kind: ModelKind | None = None

    def plan(self, sampling: Any, sigmas: torch.Tensor) -> Window:
        """The window of a run. Raises ValueError if the schedule does not fall, or none of it lies in the window."""
        grid, levels = sigmas.tolist(), window_levels(sampling, self.k_max, self.k_min)
        check_falling(grid, "Layout Noise (Prompt)")
        window = find_window(grid, *levels)
        check_start(grid, window, levels[0], self.k_max)
        return window

    def sample(
        self, model_wrap: Guider, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:
        latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        sampling = model_wrap.inner_model.model_sampling
        window = self.plan(sampling, sigmas)
        last = len(sigmas) - 1 if self.finish else window.stop
        x = start_state(self.sampler, model_wrap, sigmas, noise, latent=latent_image)
        runner = SegmentRunner(
            self.sampler, model_wrap, sigmas, extra_args, callback=callback, noise=noise,
            latent_image=latent_image, denoise_mask=denoise_mask, disable_pbar=disable_pbar, end=last)
        try:
            states, x = record_trajectory(runner.run, x, window, last)
        finally:
            runner.close()
        self.states = {float(sigmas[i]): state.cpu() for i, state in states.items()}
        self.kind = read_kind(sampling)
        return x


def record_layout(
    model: Patcher, positive: Any, negative: Any, latent: Latent, *, schedule: Schedule, k_max: float, k_min: float,
    finish: bool,
) -> tuple[RecordedLayout, Latent]:
    """Sample a layout from a prompt and record it (arXiv 2210.16056, text-text mode).

    Returns:
        The layout, and the LATENT of the finished picture, or of its clean estimate at k_min.

    Raises:
        ValueError: if the window is out of order or holds nothing of the schedule, or the latent or a setting does not
            fit; before the model is loaded.
    """
    check_range(1.0, k_max, k_min)
    check_samples(latent["samples"], "Layout Noise (Prompt)")
    empty = latent["samples"]
    ratio = latent.get("downscale_ratio_spacial")
    latent = {**latent, "samples": comfy.sample.fix_empty_latent_channels(model, empty, ratio)}
    check_format(model, latent["samples"], "Layout Noise (Prompt)")
    recorder = LayoutRecorder(schedule.sampler(), k_max=k_max, k_min=k_min, finish=finish)
    sigmas = schedule.sigmas(model)
    recorder.plan(model.get_model_object("model_sampling"), sigmas)
    noise = draw_noise(latent, schedule.seed)
    guider = make_guider(model, positive, negative, schedule.cfg)
    samples, estimate = run_guider(guider, recorder, sigmas, latent, noise=noise, seed=schedule.seed)
    if not finish and estimate is not None:
        samples = estimate
    return RecordedLayout(latent, pack(noise), recorder.states, recorder.kind), output_latent(latent, samples)


def mix_latent(
    model: Patcher, positive: Any, negative: Any, layout: NoisedLayout | RecordedLayout, *, schedule: Schedule,
    mix: Mix,
) -> Latent:
    """KSampler (Layout Mix): the host's KSampler with a LayoutMixSampler inside. Returns a LATENT.

    Raises:
        ValueError: if the layout, the mask, the window or a setting does not fit; before the model is loaded.
    """
    sampler = LayoutMixSampler(schedule.sampler(), layout, mix)
    samples = comfy.sample.fix_empty_latent_channels(model, layout.latent["samples"])
    check_format(model, samples, "The layout")
    latent = output_latent(layout.latent, repeat_layout(samples, len(sampler.nu_values)))
    sigmas = schedule.sigmas(model)
    sampling = model.get_model_object("model_sampling")
    sampler.plan(sampling, sigmas, pack(latent["samples"]), find_cell(model.model))
    guider = make_guider(model, positive, negative, schedule.cfg)
    # the sampler starts at the layout, whatever this noise is
    noise = draw_noise({"samples": latent["samples"]}, schedule.seed)
    result, _ = run_guider(guider, sampler, sigmas, latent, noise=noise, seed=schedule.seed)
    return output_latent(layout.latent, result)


def make_layout(latent: Latent, seed: int, noise_mode: str) -> NoisedLayout:
    """Layout Noise. Raises ValueError if the latent holds no picture, or a setting does not fit."""
    check_layout_latent(latent)
    check_seed(seed)
    if noise_mode not in MODES:
        raise ValueError(f"noise_mode expects {' or '.join(MODES)}, got '{legible(noise_mode)}'; choose one of them.")
    return NoisedLayout(latent, seed, noise_mode == "fresh")
