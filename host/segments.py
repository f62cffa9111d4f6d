"""Run any of the host's SAMPLER objects between two points of its grid, from a given state."""
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeGuard

import comfy.model_patcher
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ..samplers.levels import solve_noise
from ..samplers.wording import legible
from .protocols import Guider, Sampler
from .run import MOST_SEED, start_level

# These solve for the whole grid at once: one step of it is not theirs to make.
GRIDLESS = ("sample_unipc", "sample_unipc_bh2", "dpm_fast_function", "dpm_adaptive_function")
SEED_STRIDE = 0x9E3779B97F4A7C15

Callback = Callable[[int, torch.Tensor, torch.Tensor, int], None]
MakeReader = Callable[[Guider, torch.Tensor], comfy.samplers.KSamplerX0Inpaint]


def start_state(
    sampler: Sampler, guider: Guider, sigmas: torch.Tensor, noise: torch.Tensor, latent: torch.Tensor,
) -> torch.Tensor:
    """The state that `sampler` itself would start from."""
    scaling = guider.inner_model.model_sampling
    return scaling.noise_scaling(sigmas[0], noise, latent, sampler.max_denoise(guider, sigmas))


def is_gridless(sampler: Sampler) -> bool:
    return getattr(getattr(sampler, "sampler_function", None), "__name__", "") in GRIDLESS


def is_function(sampler: Sampler) -> TypeGuard[comfy.samplers.KSAMPLER]:
    """Whether a SAMPLER is the host's KSAMPLER around a function, and does nothing of its own."""
    own = comfy.samplers.KSAMPLER
    return isinstance(sampler, own) and type(sampler).sample is own.sample and "sample" not in vars(sampler)


def name_sampler(sampler: Sampler) -> str:
    """What a SAMPLER is called, for a message."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    return legible(name.removeprefix("sample_"))


class SegmentRunner:
    """One sampling run in pieces: the same guider, noise and latent, a state handed from piece to piece."""

    def __init__(
        self,
        sampler: Sampler,
        guider: Guider,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        *,
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
        self.levels = sigmas.tolist()
        self.numbers: list[tuple[str, torch.Tensor]] = []  # of each piece, and whether its end is finite
        self.extra_args, self.callback = extra_args, callback
        self.noise, self.latent_image, self.denoise_mask = noise, latent_image, denoise_mask
        self.last = len(sigmas) - 1
        self.end = self.last if end is None else end
        self.options = self._make_options()
        self.fill = self._draw_fill()
        self.stepless = is_gridless(sampler)
        self.bar = tqdm(total=self.end - begin, disable=disable_pbar)

    def _make_options(self) -> dict[str, Any]:
        """Model options of the run: all pieces see the grid of the whole, and what nodes keep between calls."""
        options = comfy.model_patcher.create_model_options_clone(self.extra_args["model_options"])
        grid = self.sigmas[self.begin:]
        options.setdefault("transformer_options", {})["sample_sigmas"] = grid
        mask_function = options.get("denoise_mask_function")
        if mask_function is not None:
            def over_whole_grid(sigma: Any, mask: Any, extra_options: dict[str, Any]) -> Any:
                return mask_function(
                    sigma, mask, extra_options={**extra_options, "model": self.guider, "sigmas": grid})
            options["denoise_mask_function"] = over_whole_grid
        return options

    def _draw_fill(self) -> torch.Tensor:
        """The noise that fills outside a noise mask. `ddim` draws its own, once a run and as the host does it."""
        if not (is_function(self.sampler) and self.sampler.inpaint_options.get("random", False)):
            return self.noise
        seed = self.extra_args.get("seed")
        generator = torch.manual_seed(((41 if seed is None else seed) + 1) % 2 ** 64)
        return torch.randn(self.noise.shape, generator=generator, device="cpu").to(self.noise)

    def _arguments(self, index: int | None) -> dict[str, Any]:
        """Sampler arguments of one piece; a fresh noise stream per piece, as one run would have.

        Dicts in the options are shared by all pieces, since nodes keep their state there; lists are not, since
        samplers add their own functions.
        """
        options = {key: list(value) if isinstance(value, list) else value for key, value in self.options.items()}
        seed = self.extra_args.get("seed")
        if index is not None and seed is not None:
            seed = (seed + SEED_STRIDE * (index + 1)) % 2 ** 63
        return {**self.extra_args, "model_options": options, "seed": seed, "denoise_mask": self.denoise_mask}

    def _report(self, first: int) -> Callback:
        def report(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            done = min(first + step + 1, self.end) - self.begin
            self.bar.update(max(done - self.bar.n, 0))
            if self.callback is not None:
                self.callback(done - 1, denoised, x, self.end - self.begin)
        return report

    def _sample(
        self, sampler: Sampler, x: torch.Tensor, i: int, j: int, index: int | None,
        make_reader: MakeReader | None = None,
    ) -> torch.Tensor:
        """The state at grid index j in the type of x, scaled as the host does where the grid ends."""
        sigmas, arguments = self.sigmas[i:j + 1].clone(), self._arguments(index)
        sampling = self.guider.inner_model.model_sampling
        if is_function(sampler):
            reader = (make_reader or comfy.samplers.KSamplerX0Inpaint)(self.guider, sigmas)
            reader.latent_image, reader.noise = self.latent_image, self.fill.clone()
            report = self._report(i)
            result = sampler.sampler_function(
                reader, x.clone(), sigmas, extra_args=arguments,
                callback=lambda told: report(told["i"], told["denoised"], told["x"], j - i), disable=True,
                **sampler.extra_options)
            self._check(sampler, result, x, piece=(i, j))
            return (sampling.inverse_noise_scaling(sigmas[-1], result) if j == self.last else result).to(x)
        result = sampler.sample(
            self.guider, sigmas, arguments, self._report(i), self._noise_to(sampler, x, sigmas), self.latent_image,
            self.denoise_mask, True)
        self._check(sampler, result, x, piece=(i, j))
        if j < self.last:
            result = result / float(sampling.inverse_noise_scaling(self.sigmas.cpu()[j], torch.ones(1).double()))
        return result.to(x)

    def _noise_to(self, sampler: Sampler, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """The noise from which a SAMPLER with its own `sample` starts at state x, as the host noises a latent.

        Raises:
            ValueError: if there is none, or the sampler would also fill a noise mask with it.
        """
        sampling, full = self.guider.inner_model.model_sampling, sampler.max_denoise(self.guider, sigmas)
        if torch.equal(sampling.noise_scaling(sigmas[0], self.noise, self.latent_image, full), x):
            return self.noise.clone()
        if self.denoise_mask is not None:
            raise ValueError(
                f"A sampler in pieces expects one of the host's kind under a noise mask, got {name_sampler(sampler)}, "
                f"which fills the mask by itself; choose another sampler or take the noise mask out.")
        level = start_level(sampling, sigmas[0], full)
        if level.noise <= 0:
            raise ValueError(
                f"A sampler in pieces expects one of the host's kind on a model that starts from a picture, got "
                f"{name_sampler(sampler)}; choose another sampler.")
        return solve_noise(x, self.latent_image, level)

    def _check(self, sampler: Sampler, result: Any, x: torch.Tensor, piece: tuple[int, int]) -> None:
        """Raises ValueError if what a sampler returned is no state. Numbers are looked at where the run ends, since
        that waits for the device."""
        name = name_sampler(sampler)
        if not isinstance(result, torch.Tensor) or result.shape != x.shape:
            got = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(
                f"The sampling run expects a latent of the shape {tuple(x.shape)} back from the sampler {name}, got "
                f"{got}; choose another sampler.")
        low, high = (self.levels[index] for index in piece)
        self.numbers.append((f"{name} from sigma {low:.4g} to {high:.4g}", result.isfinite().all()))
        if piece[1] < self.end:
            return
        finite = torch.stack([finite for _, finite in self.numbers]).tolist()
        for (span, _), numbers in zip(self.numbers, finite):
            if not numbers:
                raise ValueError(
                    f"The sampling run expects numbers back from the sampler {span}, got NaN or infinite ones; "
                    f"choose another sampler, or load the model at a higher precision.")

    def run(self, x: torch.Tensor, i: int, j: int) -> torch.Tensor:
        """Sample `x` from grid index i to j and return the state there. Euler steps for who makes no single step."""
        if j > i + 1:
            return self._sample(self.sampler, x, i, j, index=i)
        if not self.stepless:
            try:
                return self._sample(self.sampler, x, i, j, index=i)
            except (ZeroDivisionError, IndexError) as error:
                logging.warning(
                    "Mixology: the sampler %s makes no single step (%s), so Euler steps for it inside the window.",
                    name_sampler(self.sampler), legible(error))
                self.stepless = True
        return self._sample(comfy.samplers.ksampler("euler"), x, i, j, index=i)

    def run_whole(self, x: torch.Tensor, make_reader: MakeReader | None = None) -> torch.Tensor:
        """Run the sampler untouched from `begin` to the end; bit-identical to it on the same start.

        Args:
            make_reader: what stands between the sampler and the guider; the host's KSamplerX0Inpaint without it.

        Raises:
            ValueError: if the sampler is no function, and so lets nothing stand there; on a seed beyond the sampler's.
        """
        if make_reader is not None and not is_function(self.sampler):
            raise ValueError(
                f"variant diffusers expects a sampler of the host's kind, got {name_sampler(self.sampler)}, which "
                f"reads the model by itself; choose another sampler or variant paper.")
        try:
            return self._sample(self.sampler, x, self.begin, self.last, index=None, make_reader=make_reader)
        except (ValueError, RuntimeError) as error:
            if "overflow" not in str(error).lower() or self.extra_args.get("seed") != MOST_SEED:
                raise
            raise ValueError(
                f"seed expects less than {MOST_SEED} for the sampler {name_sampler(self.sampler)}, which counts on "
                f"from it, got just that; enter a smaller one.") from None

    def close(self) -> None:
        self.bar.close()
