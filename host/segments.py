"""Run any of the host's SAMPLER objects between two points of its grid, from a given state."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from tqdm.auto import tqdm

# These solve for the whole grid at once: one step of it is not theirs to make.
GRIDLESS = ("sample_unipc", "sample_unipc_bh2", "dpm_fast_function", "dpm_adaptive_function")
SEED_STRIDE = 0x9E3779B97F4A7C15

Callback = Callable[[int, torch.Tensor, torch.Tensor, int], None]


def make_sampling_view(sampling: Any, state: torch.Tensor, final: bool) -> Any:
    """A shallow copy of a model sampling whose first noise_scaling returns `state` instead of noising a latent.

    `final` False also keeps inverse_noise_scaling from rescaling a state that goes on (flow models).
    """
    view = copy.copy(sampling)

    def noise_scaling(sigma: Any, noise: Any, latent_image: Any, max_denoise: bool = False) -> torch.Tensor:
        del view.__dict__["noise_scaling"]  # once: lcm and others noise with it inside their loops
        return state.clone()

    view.__dict__["noise_scaling"] = noise_scaling
    if not final:
        view.__dict__["inverse_noise_scaling"] = lambda sigma, latent: latent
    return view


class Forward:
    """Forwards every attribute to another object, save those set here. Nothing is written to the other."""

    def __init__(self, target: Any, **own: Any):
        self.__dict__.update(own, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_target"](*args, **kwargs)


def start_state(
    sampler: Any, guider: Any, sigmas: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor,
) -> torch.Tensor:
    """The state that `sampler` itself would start from."""
    scaling = guider.inner_model.model_sampling
    return scaling.noise_scaling(sigmas[0], noise, latent, sampler.max_denoise(guider, sigmas))


def is_gridless(sampler: Any) -> bool:
    return getattr(getattr(sampler, "sampler_function", None), "__name__", "") in GRIDLESS


class SegmentRunner:
    """One sampling run in pieces: the same guider, noise and latent, a state handed from piece to piece."""

    def __init__(
        self,
        sampler: Any,
        guider: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callback | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor,
        denoise_mask: torch.Tensor | None,
        disable_pbar: bool,
        begin: int = 0,
        end: int | None = None,
    ):
        """
        Args:
            sigmas: the whole grid; progress counts from index `begin` to `end`, the grid's end without it.
            noise, latent_image: what fills outside a noise mask, [B, C, ...] in model space.
        """
        self.sampler, self.guider, self.sigmas, self.begin = sampler, guider, sigmas, begin
        self.extra_args, self.callback = extra_args, callback
        self.noise, self.latent_image, self.denoise_mask = noise, latent_image, denoise_mask
        self.last = len(sigmas) - 1
        self.end = self.last if end is None else end
        self.bar = tqdm(total=self.end - begin, disable=disable_pbar)
        self.pieces = self._fix_inpaint_noise(sampler)

    def _fix_inpaint_noise(self, sampler: Any) -> Any:
        """`ddim` draws its own noise for the kept area from the seed, which changes per piece: draw it once."""
        if self.denoise_mask is None or not getattr(sampler, "inpaint_options", {}).get("random", False):
            return sampler
        generator = torch.Generator().manual_seed(self.extra_args.get("seed", 41) + 1)
        drawn = torch.randn(self.noise.shape, generator=generator)
        self.noise = drawn.to(self.noise)
        sampler = copy.copy(sampler)
        sampler.inpaint_options = {**sampler.inpaint_options, "random": False}
        return sampler

    def _arguments(self, index: int | None) -> dict[str, Any]:
        """Sampler arguments of one piece; a fresh noise stream per piece, as one run would have."""
        options = comfy.model_patcher.create_model_options_clone(self.extra_args["model_options"])
        grid = self.sigmas[self.begin:]
        options.setdefault("transformer_options", {})["sample_sigmas"] = grid
        mask_function = options.get("denoise_mask_function")
        if mask_function is not None:
            def over_whole_grid(sigma: Any, mask: Any, extra_options: dict[str, Any]) -> Any:
                return mask_function(sigma, mask, extra_options={**extra_options, "sigmas": grid})
            options["denoise_mask_function"] = over_whole_grid
        seed = self.extra_args.get("seed")
        if index is not None and seed is not None:
            seed = (seed + SEED_STRIDE * (index + 1)) % 2 ** 63
        return {**self.extra_args, "model_options": options, "seed": seed}

    def _report(self, first: int) -> Callback:
        def report(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            done = min(first + step + 1, self.end) - self.begin
            self.bar.update(max(done - self.bar.n, 0))
            if self.callback is not None:
                self.callback(done - 1, denoised, x, self.end - self.begin)
        return report

    def _sample(
        self, sampler: Any, x: torch.Tensor, i: int, j: int, arguments: dict[str, Any], final: bool,
    ) -> torch.Tensor:
        sampling = make_sampling_view(self.guider.inner_model.model_sampling, x, final)
        view = Forward(self.guider, inner_model=Forward(self.guider.inner_model, model_sampling=sampling))
        return sampler.sample(
            view, self.sigmas[i:j + 1].clone(), arguments, self._report(i), self.noise.clone(), self.latent_image,
            self.denoise_mask, True)

    def run(self, x: torch.Tensor, i: int, j: int) -> torch.Tensor:
        """Sample `x` from grid index i to j and return the state there."""
        sampler = self.pieces
        if j == i + 1 and is_gridless(sampler):
            sampler = comfy.samplers.ksampler("euler", {}, sampler.inpaint_options)
        return self._sample(sampler, x, i, j, self._arguments(i), final=j == self.last)

    def run_whole(self, x: torch.Tensor, guider: Any = None) -> torch.Tensor:
        """Run the sampler untouched from `begin` to the end; bit-identical to it on the same start."""
        self.pieces, self.guider = self.sampler, guider or self.guider
        return self._sample(self.sampler, x, self.begin, self.last, self._arguments(None), final=True)

    def close(self) -> None:
        self.bar.close()
