"""MagicMix with every sampler and scheduler of a real host, on tiny models of its real classes."""
from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import tiny
import torch
from mixology.host.layout import LayoutMixSampler, Mix, make_layout, mix_latent, record_layout
from mixology.host.run import Schedule
from rig import NEGATIVE, POSITIVE, SAMPLERS, SEED, mixer, run, start_index

pytestmark = pytest.mark.seam

GRIDLESS = ("uni_pc", "uni_pc_bh2", "dpm_fast", "dpm_adaptive")
KINDS = ("eps", *(pytest.param(kind, marks=pytest.mark.slow) for kind in tiny.KINDS if kind != "eps"))
SINGLE_STEP = ("ddim", "euler", "heun", "dpm_2")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_nu_one_is_the_plain_sampler(models: dict[str, Any], kind: str, name: str) -> None:
    model, latent = models[kind], tiny.latent(2, 6, 9)
    sigmas = tiny.sigmas_of(model)
    plain = run(model, comfy.samplers.sampler_object(name), latent, sigmas[start_index(model, sigmas, 0.6):])
    assert torch.equal(run(model, mixer(name, latent, 1.0), latent, sigmas), plain)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nu_one_from_pure_noise_is_the_plain_sampler(model: Any, name: str) -> None:
    """At k_max 1 the host noises with max_denoise, and so does the wrapper."""
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, "normal", 6)
    plain = run(model, comfy.samplers.sampler_object(name), latent, sigmas)
    assert torch.equal(run(model, mixer(name, latent, 1.0, k_max=1.0), latent, sigmas), plain)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", SINGLE_STEP)
def test_nu_zero_is_image_to_image_from_k_min(models: dict[str, Any], kind: str, name: str) -> None:
    model, latent = models[kind], tiny.latent(1, 7, 5)
    sigmas = tiny.sigmas_of(model, steps=20)
    plain = run(model, comfy.samplers.sampler_object(name), latent, sigmas[start_index(model, sigmas, 0.3):])
    assert torch.equal(run(model, mixer(name, latent, 0.0), latent, sigmas), plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_mixes(models: dict[str, Any], kind: str, name: str) -> None:
    """Finite, another for another nu, and the same again; the last piece may be a single step."""
    model, latent = models[kind], tiny.latent()
    sigmas = tiny.sigmas_of(model, steps=8)
    assert run(model, mixer(name, latent, 0.4, k_min=0.0), latent, sigmas).isfinite().all()
    mixed = run(model, mixer(name, latent, 0.4, k_min=0.1), latent, sigmas)
    assert mixed.isfinite().all()
    assert torch.equal(mixed, run(model, mixer(name, latent, 0.4, k_min=0.1), latent, sigmas))
    assert not torch.equal(mixed, run(model, mixer(name, latent, 0.6, k_min=0.1), latent, sigmas))


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_window_means_the_same_under_every_scheduler(model: Any, scheduler: str) -> None:
    steps = 80 if scheduler == "linear_quadratic" else 20  # which with 20 jumps over the window
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, scheduler, steps)
    start, stop = start_index(model, sigmas, 0.6), start_index(model, sigmas, 0.3)
    assert 0 < start < stop < len(sigmas) - 1
    expected = reference_mix(model, latent, sigmas, start, stop, 0.5)
    torch.testing.assert_close(run(model, mixer("euler", latent), latent, sigmas), expected, rtol=0, atol=2e-5)


def reference_mix(model: Any, latent: dict[str, Any], sigmas: torch.Tensor, start: int, stop: int, nu: float,
                  ) -> torch.Tensor:
    """Algorithm 1, one plain `euler` run a step and the states mixed in float64 outside the host."""
    samples = latent["samples"]
    noise = comfy.sample.prepare_noise(samples, SEED, None)
    inner = model.model
    picture = inner.process_latent_in(samples).double()

    def step(x: torch.Tensor, i: int) -> torch.Tensor:
        guider = tiny.cfg_guider(model, POSITIVE, NEGATIVE)
        out = guider.sample(x.float() / sigmas[i], torch.zeros_like(samples), comfy.samplers.sampler_object("euler"),
                            sigmas[i:i + 2], disable_pbar=True, seed=SEED)
        return inner.process_latent_in(out).double()

    x = picture + sigmas[start].double() * noise.double()
    for i in range(start, len(sigmas) - 1):
        x = step(x, i)
        if i < stop:
            x = nu * x + (1 - nu) * (picture + sigmas[i + 1].double() * noise.double())
    return inner.process_latent_out(x).float()


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in GRIDLESS])
def test_as_many_evaluations_as_the_plain_sampler(model: Any, name: str) -> None:
    counted, calls = tiny.count_evaluations(model)
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, steps=12)
    run(counted, comfy.samplers.sampler_object(name), latent, sigmas[start_index(model, sigmas, 0.6):])
    plain = sum(calls)
    calls.clear()
    run(counted, mixer(name, latent), latent, sigmas)
    assert 0 < sum(calls) <= plain


def test_ddim_with_guidance_costs_two_evaluations_a_step(model: Any) -> None:
    counted, calls = tiny.count_evaluations(model)
    mix_latent(
        counted, POSITIVE, NEGATIVE, make_layout(tiny.latent(), SEED, "shared"),
        schedule=Schedule(0, 50, 7.5, "ddim", "ddim_uniform"), mix=Mix(0.5, 0.6, 0.3))
    assert sum(calls) == 60
    calls.clear()
    record_layout(
        counted, POSITIVE, NEGATIVE, {"samples": torch.zeros(1, 4, 8, 8)},
        schedule=Schedule(0, 50, 7.5, "ddim", "ddim_uniform"), k_max=0.6, k_min=0.3, finish=False)
    assert sum(calls) == 70


def test_stochastic_solvers_get_fresh_noise_at_every_step(model: Any) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, steps=20)
    seeds: list[int] = []
    plain = comfy.samplers.ksampler("euler_ancestral")

    def listening(*args: Any, **kwargs: Any) -> torch.Tensor:
        seeds.append(kwargs["extra_args"]["seed"])
        return plain.sampler_function(*args, **kwargs)

    wrapped = LayoutMixSampler(
        comfy.samplers.KSAMPLER(listening), make_layout(latent, SEED, "shared"), Mix(0.5, 0.6, 0.3))
    run(model, wrapped, latent, sigmas)
    assert len(seeds) > 5 and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("name", SAMPLERS)
def test_diffusers_variant_runs_every_sampler_in_one_piece(model: Any, name: str) -> None:
    counted, calls = tiny.count_evaluations(model)
    sigmas, latent = tiny.sigmas_of(model), tiny.latent()
    run(counted, comfy.samplers.sampler_object(name), latent, sigmas[start_index(model, sigmas, 0.6):])
    plain = len(calls)
    mixed = run(counted, mixer(name, latent, 0.4, variant="diffusers"), latent, sigmas)
    assert mixed.isfinite().all()
    assert len(calls) == 2 * plain or name == "dpm_adaptive"  # its steps follow what it reads


@pytest.mark.parametrize("nu", [0.0, 0.3, 0.7, 1.0])
def test_diffusers_variant_is_the_community_pipelines_rule(model: Any, nu: float) -> None:
    steps, cfg, latent = 50, 4.0, tiny.latent(1, 8, 6)
    layout = make_layout(latent, SEED, "shared")
    ours = mix_latent(
        model, POSITIVE, NEGATIVE, layout, schedule=Schedule(0, steps, cfg, "ddim", "ddim_uniform"),
        mix=Mix(nu, 0.6, 0.3, variant="diffusers"))["samples"]
    theirs = community_pipeline(model, latent, nu, steps, cfg)
    # float32 through thirty steps of two different parameterisations
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def community_pipeline(model: Any, latent: dict[str, Any], nu: float, steps: int, cfg: float) -> torch.Tensor:
    """The rule of diffusers' magic_mix.py on the same weights, with diffusers' own scheduler. It ends at alpha 1, as
    the host's grid ends at sigma 0."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    comfy.model_management.load_models_gpu([model])
    unet, inner = model.model.diffusion_model, model.model
    picture = inner.process_latent_in(latent["samples"])
    noise = comfy.sample.prepare_noise(latent["samples"], SEED, None)
    first, end = steps - int(0.6 * steps), steps - int(0.3 * steps)
    x = scheduler.add_noise(picture, noise, scheduler.timesteps[first:first + 1])
    for i, t in enumerate(scheduler.timesteps):
        if i < first:
            continue
        read = x
        if first < i < end:
            read = nu * x + (1 - nu) * scheduler.add_noise(picture, noise, t[None])
        uncond, cond = (unet(read, t[None].float(), context=c[0][0]) for c in (NEGATIVE, POSITIVE))
        x = scheduler.step(uncond + cfg * (cond - uncond), t, x).prev_sample
    return inner.process_latent_out(x)


def test_progress_counts_from_the_start(model: Any) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, steps=20)
    total = len(sigmas) - 1 - start_index(model, sigmas, 0.6)
    seen: list[tuple[int, int]] = []
    for nu in (0.5, 1.0):
        seen.clear()
        run(model, mixer("euler", latent, nu), latent, sigmas, callback=lambda i, x0, x, n: seen.append((i, n)))
        assert seen == [(i, total) for i in range(total)]
