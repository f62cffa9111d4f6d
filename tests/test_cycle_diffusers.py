"""The Cycle Sampler beside diffusers' CycleDiffusionPipeline on the same weights."""
from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from cycle_rig import NEGATIVE, SEED, SOURCE, TARGET, cycle, make_noise, run

pytestmark = pytest.mark.wide

STEPS, SKIP, CFG = 50, 10, 3.0
TOLERANCE = 5e-5
FIRST_SIGMA = 0.0291672  # of t = 0


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.unet("eps")


def pipeline_states(model: Any, latent: dict[str, Any], eta: float, source_cfg: float) -> list[torch.Tensor]:
    """The pipeline's target state after each of its steps, in its VP scale."""
    from diffusers import CycleDiffusionPipeline, DDIMScheduler

    noise = make_noise(latent)

    class FromEmbeddings(CycleDiffusionPipeline):
        """Takes prompts as embeddings, and the start noise of the host."""

        def encode_prompt(self, prompt: Any, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return {"source": SOURCE, "target": TARGET}[prompt][0][0], NEGATIVE[0][0]

        def prepare_latents(self, image: torch.Tensor, timestep: torch.Tensor, *rest: Any, **options: Any,
                            ) -> tuple[torch.Tensor, torch.Tensor]:
            return self.scheduler.add_noise(image, noise, timestep), image

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="leading")
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None, "safety_checker": None,
                             "feature_extractor": None, "requires_safety_checker": False}
    pipeline = FromEmbeddings(unet=tiny.diffusers_unet(model), scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    states: list[torch.Tensor] = []
    pipeline(
        "target", "source", image=model.model.process_latent_in(latent["samples"]), strength=1 - SKIP / STEPS,
        num_inference_steps=STEPS, guidance_scale=CFG, source_guidance_scale=source_cfg, eta=eta,
        generator=torch.Generator().manual_seed(SEED + 1), output_type="latent",
        callback=lambda i, t, x: states.append(x.clone()))
    return states


@pytest.mark.parametrize("eta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("source_cfg", [1.0, 2.0])
def test_every_state_is_the_pipelines(model: Any, eta: float, source_cfg: float) -> None:
    """Float32 through forty steps of two networks' code. The pipeline's last step takes x0 for the state at t = 0
    where this one steps to sigma 0, so its end is worked out from the same readings."""
    latent = tiny.latent(1, 8, 12)
    sigmas = tiny.sigmas_of(model, "ddim_uniform", STEPS)
    reports: list[tuple[torch.Tensor, torch.Tensor]] = []
    run(tiny.cfg_guider(model, TARGET, NEGATIVE, CFG), cycle(source_cfg, eta, SKIP), latent, sigmas,
        callback=lambda i, denoised, x, n: reports.append((denoised.clone(), x.clone())))
    theirs = pipeline_states(model, latent, eta, source_cfg)
    assert len(reports) == len(theirs) == STEPS - SKIP
    for (_, x), state, sigma in zip(reports[1:], theirs, sigmas[SKIP + 1:]):
        torch.testing.assert_close(x, state * math.sqrt(1 + float(sigma) ** 2), rtol=0, atol=TOLERANCE)
    x0 = model.model.process_latent_in(latent["samples"])
    shifts = [denoised - x0 for denoised, _ in reports]
    end = officials_end(x0, shifts, sigmas[SKIP:-1].tolist(), eta)
    torch.testing.assert_close(end, theirs[-1], rtol=0, atol=TOLERANCE)
    assert float((reports[-1][0] - theirs[-1]).abs().max()) < 0.05 * float(shifts[-1].abs().max())


def officials_end(x0: torch.Tensor, shifts: list[torch.Tensor], sigmas: list[float], eta: float) -> torch.Tensor:
    """Where the pipeline ends: x0 + sqrt(a_0) (D_t - D_s) + sqrt(1 - a_0 - sd^2) (eps_t - eps_s), its step to t = 0
    with the z' that leads the source to x0.

    Args:
        shifts: D_t - D_s at each step.
    """
    distance = torch.zeros_like(x0)  # y - src
    for shift, now, after in zip(shifts, sigmas, sigmas[1:]):
        keep = after / now * math.sqrt(1 - eta ** 2 * (1 - (after / now) ** 2))
        distance = (1 - keep) * shift + keep * distance
    alpha, first = (1 / (1 + sigma ** 2) for sigma in (sigmas[-1], FIRST_SIGMA))
    deviation = eta * math.sqrt((1 - first) / (1 - alpha) * (1 - alpha / first))
    straight = math.sqrt(1 - first - deviation ** 2)
    return x0 + math.sqrt(first) * shifts[-1] + straight * (distance - shifts[-1]) / sigmas[-1]
