"""One sampling run as the host's own KSampler makes it: noise, grid, guider, masks, seeds and the resulting LATENT."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from ..samplers.levels import MOST_STEPS, Level
from .protocols import Guider, Patcher, Sampler

Latent = dict[str, Any]

MOST_SEED = 2 ** 64 - 1


def pack(latent: Any) -> torch.Tensor:
    """The flat form in which the host samples latents of several parts."""
    return comfy.utils.pack_latents(latent.unbind())[0] if getattr(latent, "is_nested", False) else latent


def find_cell(model: Any) -> int | None:
    """Pixels along each side of a cell of the latents that a BaseModel samples; None where its format states none."""
    return getattr(getattr(model, "latent_format", None), "spacial_downscale_ratio", None)


def check_seed(seed: int) -> None:
    """Raises ValueError on a seed that the host's generators do not take."""
    if not -2 ** 63 <= seed <= MOST_SEED:
        raise ValueError(
            f"seed expects a whole number from 0 to {MOST_SEED}, got one beyond it; enter a smaller one.")


def draw_noise(latent: Latent, seed: int) -> Any:
    """The host's noise for a latent and seed, shaped like it; the global generator is left as it was."""
    check_seed(seed)
    with torch.random.fork_rng(devices=[]):
        return comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))


def check_samples(samples: Any, name: str) -> None:
    """Raises ValueError unless a LATENT's samples are numbers; `name` says whose they are, for the message."""
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    if not all(part.is_floating_point() and bool(part.isfinite().all()) for part in parts):
        raise ValueError(
            f"{name} expects a latent of finite numbers, got others among them (NaN, infinite or whole numbers); look "
            f"at the node that made the latent, or encode the picture anew.")


def count_dimensions(model: Patcher) -> set[int]:
    """How many dimensions a model's latents may have, batch and channels included."""
    counts = {model.get_model_object("latent_format").latent_dimensions + 2}
    patch = getattr(model.get_model_object("diffusion_model"), "patch_size", None)
    if isinstance(patch, (tuple, list)) and len(patch) == 3:
        counts.add(5)  # a video network on the latent format of pictures
    return counts


def check_format(model: Patcher, samples: Any, name: str) -> None:
    """Raises ValueError if samples are not of the model's latent format; `name` says whose they are."""
    if getattr(samples, "is_nested", False):
        return
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim < 3 or samples.shape[1] != channels:
        got = f"{samples.shape[1]} channels" if samples.ndim > 1 else "none"
        raise ValueError(
            f"{name} expects the model's latent format with {channels} channels, got {got}; encode the picture with "
            f"this model's own VAE.")
    if samples.ndim not in count_dimensions(model):
        wanted = " or ".join(str(count - 2) for count in sorted(count_dimensions(model)))
        raise ValueError(
            f"{name} expects a latent of {wanted} dimensions beside batch and channels, as this model's latents have, "
            f"got {samples.ndim - 2}; encode the picture with this model's own VAE.")


@dataclass(frozen=True)
class Schedule:
    """What the host's KSampler is told of a run besides its model, prompts and latent."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str

    def sampler(self) -> comfy.samplers.KSAMPLER:
        """The SAMPLER of that name."""
        return comfy.samplers.sampler_object(self.sampler_name)

    def sigmas(self, model: Patcher) -> torch.Tensor:
        """The grid on this model, [steps + 1]; see `full_sigmas`."""
        return full_sigmas(model, self.sampler_name, self.scheduler, self.steps)


def full_sigmas(model: Patcher, sampler_name: str, scheduler: str, steps: int) -> torch.Tensor:
    """The grid that the host's KSampler uses. Raises ValueError on a number of steps that no schedule has."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps expects a number from 1 to {MOST_STEPS}, got {steps}; enter one in that range.")
    return comfy.samplers.KSampler(model, steps, model.load_device, sampler_name, scheduler, denoise=1.0).sigmas


def make_guider(model: Patcher, positive: Any, negative: Any, cfg: float) -> comfy.samplers.CFGGuider:
    """The host's CFG guider. Raises ValueError if cfg is not a number."""
    if not math.isfinite(cfg):
        raise ValueError(f"cfg expects a number, got {cfg:g}; enter one, such as 7.5.")
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def read_noise_mask(latent: Latent) -> Any:
    """A LATENT's noise mask in float32 from 0 to 1, of any type of number or bool; None without one.

    Raises:
        ValueError: for one without height and width, or values that are no numbers.
    """
    mask = latent.get("noise_mask")
    if mask is None or getattr(mask, "is_nested", False):
        return mask
    if mask.ndim < 2 or mask.numel() == 0:
        raise ValueError(
            f"The noise mask expects a picture of height x width, got the shape {tuple(mask.shape)}; connect a MASK to "
            f"Set Latent Noise Mask.")
    mask = mask.float()  # the host resizes no bool, and older ones sample in the mask's type
    if not bool(mask.isfinite().all()):
        raise ValueError(
            "The noise mask expects values from 0 to 1, got some that are no numbers (NaN or infinite); look at the "
            "node that made the mask, or paint it anew.")
    return mask.clamp(0.0, 1.0)


def seed_generators(latent: Latent, seed: int) -> None:
    """Leave the global generators as the host's KSampler has them when it samples: nodes draw from them."""
    check_seed(seed)
    comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))


def run_guider(
    guider: Guider, sampler: Sampler, sigmas: torch.Tensor, latent: Latent, *, noise: Any, seed: int,
) -> tuple[Any, Any]:
    """Sample as the host's KSampler and SamplerCustomAdvanced do.

    Returns:
        The samples, and the last clean estimate (or None).

    Raises:
        ValueError: on a noise mask that is none, or a seed out of range.
    """
    mask = read_noise_mask(latent)
    seed_generators(latent, seed)
    last: dict[str, Any] = {}
    callback = latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1, last)
    samples = guider.sample(
        noise, latent["samples"], sampler, sigmas, denoise_mask=mask, callback=callback,
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


def noise_levels(sampling: Any, sigmas: torch.Tensor) -> list[Level]:
    """Signal and noise at each sigma, asked of the model's own noise_scaling (which is linear in both)."""
    none, unit = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return [Level(float(sampling.noise_scaling(sigma, none, unit)), float(sampling.noise_scaling(sigma, unit, none)))
            for sigma in sigmas.cpu().double()]


def start_level(sampling: Any, sigma: torch.Tensor, full: bool) -> Level:
    """Signal and noise of the state that the host's samplers start from at this sigma; `full` as their max_denoise."""
    none, unit, sigma = torch.zeros(1).double(), torch.ones(1).double(), sigma.cpu().double()
    return Level(*(float(sampling.noise_scaling(sigma, *parts, full)) for parts in ((none, unit), (unit, none))))


def is_full(sampling: Any, sigma: torch.Tensor) -> bool:
    """Whether the host's samplers start from pure noise at this sigma (KSAMPLER.max_denoise)."""
    return float(sigma.cpu().double()) >= float(sampling.sigma_max) * (1 - 1e-5)
