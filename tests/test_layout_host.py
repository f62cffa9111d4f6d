"""MagicMix in a real host: layouts, masks, guiders, video, errors and what it leaves behind."""
from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import pytest
import tiny
import torch
from mixology.host.cycle import CycleSampler
from mixology.host.layout import LayoutMixSampler, Mix, make_layout, mix_latent, record_layout
from mixology.host.layout_states import NoisedLayout
from mixology.host.run import Schedule
from rig import NEGATIVE, POSITIVE, SEED, mixer, run, start_index
from unchanged import snapshot

pytestmark = pytest.mark.seam


@pytest.mark.parametrize(("name", "nu"), [
    ("ddim", 0.0), ("ddim", 0.35), ("ddim", 1.0), ("dpmpp_2m", 0.0), ("dpmpp_2m", 0.35), ("euler_ancestral", 0.35)])
def test_recorded_layout_under_its_own_prompt_changes_nothing(model: Any, nu: float, name: str) -> None:
    """Also for solvers with history or noise, below nu 1, where they run in one piece as themselves."""
    empty = {"samples": torch.zeros(1, 4, 8, 6)}
    shared = (20, 7.5, name, "ddim_uniform")
    layout, finished = record_layout(
        model, POSITIVE, NEGATIVE, empty, schedule=Schedule(SEED, *shared), k_max=0.6, k_min=0.3, finish=True)
    if name == "ddim":
        plain = run(model, comfy.samplers.sampler_object(name), empty, tiny.sigmas_of(model, steps=20),
                    guider=tiny.cfg_guider(model, POSITIVE, NEGATIVE, 7.5))
        assert torch.equal(finished["samples"], plain)
    mixed = mix_latent(model, POSITIVE, NEGATIVE, layout, schedule=Schedule(SEED, *shared), mix=Mix(nu, 0.6, 0.3))
    assert torch.equal(mixed["samples"], finished["samples"])


def test_recorded_layout_of_another_schedule_is_a_clear_error(model: Any) -> None:
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    layout, _ = record_layout(
        model, POSITIVE, NEGATIVE, empty, schedule=Schedule(0, 20, 3.0, "ddim", "ddim_uniform"), k_max=0.6,
        k_min=0.3, finish=False)
    for steps, scheduler, k_max in ((24, "ddim_uniform", 0.6), (20, "karras", 0.6), (20, "ddim_uniform", 0.8)):
        with pytest.raises(ValueError, match="recorded at sigmas .* of another schedule or window .* same steps"):
            mix_latent(
                model, POSITIVE, NEGATIVE, layout, schedule=Schedule(0, steps, 3.0, "ddim", scheduler),
                mix=Mix(0.5, k_max, 0.3))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_unfinished_layout_gives_the_estimate_and_finished_the_picture(models: dict[str, Any], kind: str) -> None:
    model = models[kind]
    empty = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 8}
    schedule = Schedule(0, 20, 3.0, "ddim", "normal")
    (short, estimate), (whole, picture) = (
        record_layout(model, POSITIVE, NEGATIVE, empty, schedule=schedule, k_max=0.6, k_min=0.3, finish=finish)
        for finish in (False, True))
    assert estimate["samples"].shape == picture["samples"].shape == (1, 4, 8, 8)
    assert not torch.equal(estimate["samples"], picture["samples"])
    assert short.states.keys() == whole.states.keys()
    assert all(torch.equal(short.states[key], whole.states[key]) for key in short.states)


def test_sweep_in_one_batch_equals_single_runs(model: Any) -> None:
    """Float32 batching noise only; the layout picture is one, so each image meets the same noise."""
    values = [0.0, 0.25, 0.5, 0.75, 1.0]
    layout = make_layout(tiny.latent(1, 9, 13), SEED, "shared")
    schedule = Schedule(0, 20, 5.0, "ddim", "ddim_uniform")
    sweep = mix_latent(
        model, POSITIVE, NEGATIVE, layout, schedule=schedule,
        mix=Mix(0.5, 0.6, 0.3, "0, .25, .5, .75, 1"))["samples"]
    assert sweep.shape == (5, 4, 9, 13)
    for row, nu in zip(sweep, values):
        single = mix_latent(
            model, POSITIVE, NEGATIVE, layout, schedule=schedule, mix=Mix(nu, 0.6, 0.3))["samples"]
        torch.testing.assert_close(row, single[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("height", [8, 11])
def test_batch_items_are_independent(model: Any, height: int) -> None:
    three = tiny.latent(3, height, 8)  # the host draws single images like batches where 16 divides their size
    sigmas = tiny.sigmas_of(model)
    together = run(model, mixer("euler", three), three, sigmas)
    noise = comfy.sample.prepare_noise(three["samples"], SEED, None)
    for i in range(3):
        alone = {"samples": three["samples"][i:i + 1], "batch_index": [i]}
        torch.testing.assert_close(run(model, mixer("euler", alone), alone, sigmas, noise[i:i + 1]), together[i:i + 1],
                                   rtol=0, atol=1e-4)


def test_layout_noise_is_the_hosts(model: Any) -> None:
    latent = {**tiny.latent(2), "batch_index": [3, 1]}
    layout = make_layout(latent, SEED, "shared")
    expected = custom.Noise_RandomNoise(SEED).generate_noise(latent)
    before = torch.random.get_rng_state()
    assert torch.equal(layout.noise(0), expected) and torch.equal(layout.noise(5), expected)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fresh_noise_differs_by_index_and_repeats(model: Any) -> None:
    layout = make_layout(tiny.latent(), SEED, "fresh")
    draws = [layout.noise(k) for k in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(layout.noise(2), draws[2])
    assert not torch.equal(make_layout(tiny.latent(), SEED + 1, "fresh").noise(2), draws[2])
    sigmas = tiny.sigmas_of(model)
    shared = run(model, mixer("euler", tiny.latent()), tiny.latent(), sigmas)
    assert not torch.equal(run(model, mixer("euler", tiny.latent(), noise_mode="fresh"), tiny.latent(), sigmas), shared)


@pytest.mark.parametrize("variant", ["paper", "diffusers"])
def test_mask_frees_what_is_outside(model: Any, variant: str) -> None:
    latent, sigmas = tiny.latent(2, 8, 8), tiny.sigmas_of(model)
    full = run(model, mixer("euler", latent, 0.2, mask=torch.ones(1, 64, 64), variant=variant), latent, sigmas)
    bare = run(model, mixer("euler", latent, 0.2, variant=variant), latent, sigmas)
    assert torch.equal(full, bare)
    empty = run(model, mixer("euler", latent, 0.2, mask=torch.zeros(1, 64, 64), variant=variant), latent, sigmas)
    plain = run(model, comfy.samplers.sampler_object("euler"), latent, sigmas[start_index(model, sigmas, 0.6):])
    assert torch.equal(empty, plain)
    half = torch.zeros(1, 64, 64)
    half[..., :32] = 1
    mixed = run(model, mixer("euler", latent, 0.2, mask=half, variant=variant), latent, sigmas)
    assert not torch.equal(mixed, full) and not torch.equal(mixed, plain)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "uni_pc", "euler_ancestral"])
def test_noise_mask_keeps_what_is_outside(model: Any, name: str) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    latent, sigmas = {**tiny.latent(), "noise_mask": mask}, tiny.sigmas_of(model)
    mixed = run(model, mixer(name, latent), latent, sigmas)
    kept = torch.nn.functional.interpolate(mask[None], size=(8, 8), mode="bilinear")[0] == 0
    tolerance = 0.05 if name == "uni_pc" else 1e-5  # uni_pc ends at sigma 0.001, not 0
    torch.testing.assert_close(mixed[..., kept[0]], latent["samples"][..., kept[0]], rtol=0, atol=tolerance)
    plain = run(model, comfy.samplers.sampler_object(name), latent, sigmas[start_index(model, sigmas, 0.6):])
    assert torch.equal(run(model, mixer(name, latent, 1.0), latent, sigmas), plain)


def test_differential_diffusion_sees_the_whole_grid(model: Any) -> None:
    """Its threshold is set by the first and last sigma, which single pieces would not show."""
    seen: list[tuple[float, float]] = []

    def mask_function(sigma: torch.Tensor, mask: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        seen.append((float(extra_options["sigmas"][0]), float(extra_options["sigmas"][-1])))
        return mask

    patched = model.clone()
    patched.set_model_denoise_mask_function(mask_function)
    latent, sigmas = {**tiny.latent(), "noise_mask": torch.ones(1, 64, 64)}, tiny.sigmas_of(model)
    run(patched, mixer("euler", latent), latent, sigmas)
    assert set(seen) == {(float(sigmas[start_index(model, sigmas, 0.6)]), 0.0)}


def guiders(model: Any) -> list[Any]:
    dual = custom.Guider_DualCFG(model)
    dual.set_conds(POSITIVE, tiny.conditioning(3, 154), NEGATIVE)
    dual.set_cfg(3.0, 2.0)
    perp = perpneg.Guider_PerpNeg(model)
    perp.set_conds(POSITIVE, NEGATIVE, tiny.conditioning(4))
    perp.set_cfg(3.0, 1.0)
    basic = custom.Guider_Basic(model)
    basic.set_conds(POSITIVE)
    return [tiny.cfg_guider(model, POSITIVE, NEGATIVE), dual, perp, basic]


@pytest.mark.parametrize("index", range(4))
def test_inside_sampler_custom_advanced_with_every_core_guider(model: Any, index: int) -> None:
    latent, sigmas = tiny.latent(3, 6, 10), tiny.sigmas_of(model)
    noise, guider = custom.Noise_RandomNoise(SEED), guiders(model)[index]
    plain = custom.SamplerCustomAdvanced.execute(
        noise, guider, comfy.samplers.sampler_object("euler"), sigmas[start_index(model, sigmas, 0.6):], latent)[0]
    same = custom.SamplerCustomAdvanced.execute(noise, guider, mixer("euler", latent, 1.0), sigmas, latent)[0]
    mixed = custom.SamplerCustomAdvanced.execute(noise, guider, mixer("euler", latent), sigmas, latent)
    assert torch.equal(same["samples"], plain["samples"])
    assert not torch.equal(mixed[0]["samples"], plain["samples"]) and mixed[1]["samples"].isfinite().all()


def test_video_latents() -> None:
    model, conds = tiny.video(), (tiny.conditioning(1, 8), tiny.conditioning(2, 8))
    generator = torch.Generator().manual_seed(3)
    latent = {"samples": torch.randn(2, 16, 3, 6, 4, generator=generator)}
    guider = tiny.cfg_guider(model, *conds)
    sigmas = tiny.sigmas_of(model, "simple", 10)
    plain = run(model, comfy.samplers.sampler_object("euler"), latent, sigmas[start_index(model, sigmas, 0.6):],
                guider=guider)
    assert torch.equal(run(model, mixer("euler", latent, 1.0), latent, sigmas, guider=guider), plain)
    mask = torch.zeros(1, 48, 32)
    mask[:, :24] = 1
    mixed = run(model, mixer("euler", latent, 0.3, mask=mask, nu_per_image="0.1, 0.5"), latent, sigmas, guider=guider)
    assert mixed.shape == latent["samples"].shape and not torch.equal(mixed, plain)
    picture = make_layout({"samples": latent["samples"][:1, :, 0]}, SEED, "shared")  # a still image as layout
    still = mix_latent(model, *conds, picture, schedule=Schedule(0, 10, 3.0, "euler", "simple"), mix=Mix(0.3, 0.6, 0.3))
    assert still["samples"].shape == (1, 16, 1, 6, 4)


def test_edges_of_the_window(model: Any) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model)
    start = start_index(model, sigmas, 0.5)
    plain = run(model, comfy.samplers.sampler_object("euler"), latent, sigmas[start:])
    assert torch.equal(run(model, mixer("euler", latent, 0.0, 0.5, 0.5), latent, sigmas), plain)
    result = run(model, mixer("euler", latent, 0.5, 0.0, 0.0), latent, sigmas)
    torch.testing.assert_close(result, latent["samples"], rtol=0, atol=1e-5)
    noised = run(model, mixer("euler", latent, 0.5, 0.1, 0.0), latent, sigmas[:5])  # all of it above the window
    noise = comfy.sample.prepare_noise(latent["samples"], SEED, None)
    expected = latent["samples"] + noise * sigmas[4] / model.model.latent_format.scale_factor
    torch.testing.assert_close(noised, expected, rtol=1e-5, atol=1e-4)


def test_incoming_noise_is_not_used(model: Any) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model)
    other = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(99))
    assert torch.equal(run(model, mixer("euler", latent), latent, sigmas, other),
                       run(model, mixer("euler", latent), latent, sigmas))


def test_nothing_of_the_caller_changes(model: Any) -> None:
    latent = {**tiny.latent(), "noise_mask": torch.ones(1, 64, 64)}
    copies = {key: value.clone() for key, value in latent.items()}
    weights = {key: value.clone() for key, value in model.model.state_dict().items()}
    options, sigmas = snapshot(model.model_options), tiny.sigmas_of(model)
    sampling, grid = dict(model.model.model_sampling.__dict__), sigmas.clone()
    for name in ("euler", "uni_pc", "dpmpp_2m_sde", "euler_cfg_pp", "lcm"):
        mix_latent(
            model, POSITIVE, NEGATIVE, make_layout(latent, SEED, "shared"),
            schedule=Schedule(0, 10, 3.0, name, "normal"), mix=Mix(0.5, 0.6, 0.3))
        run(model, mixer(name, latent), latent, sigmas)
    assert all(torch.equal(latent[key], copies[key]) for key in copies)
    assert all(torch.equal(value, weights[key]) for key, value in model.model.state_dict().items())
    assert snapshot(model.model_options) == options and torch.equal(sigmas, grid)
    assert model.model.model_sampling.__dict__.keys() == sampling.keys()


def test_interrupt_leaves_the_host_usable(model: Any) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model)
    before = run(model, mixer("euler", latent), latent, sigmas)

    def interrupt(step: int, *rest: Any) -> None:
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, mixer("euler", latent), latent, sigmas, callback=interrupt)
    assert torch.equal(run(model, mixer("euler", latent), latent, sigmas), before)


def test_out_of_memory_leaves_the_host_usable(model: Any) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model)
    before = run(model, mixer("euler", latent), latent, sigmas)

    def exhausted(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise comfy.model_management.OOM_EXCEPTION("no memory")

    broken = LayoutMixSampler(
        comfy.samplers.KSAMPLER(exhausted), make_layout(latent, SEED, "shared"), Mix(0.5, 0.6, 0.3))
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        run(model, broken, latent, sigmas)
    assert torch.equal(run(model, mixer("euler", latent), latent, sigmas), before)


def test_options_of_the_wrapped_sampler_stay_visible() -> None:
    inner = comfy.samplers.ksampler("euler", {"s_churn": 0.1}, {"random": True})
    wrapped = LayoutMixSampler(inner, make_layout(tiny.latent(), 0, "shared"), Mix(0.5, 0.6, 0.3))
    assert wrapped.extra_options == {"s_churn": 0.1} and wrapped.inpaint_options == {"random": True}


@pytest.mark.parametrize(("layout", "sampler_latent", "text"), [
    (tiny.latent(1, 8, 8), tiny.latent(1, 8, 10), r"its size, 64x64 pixels, got 80x64 pixels; connect the"),
    (tiny.latent(1, 8, 8, channels=16), tiny.latent(), r"format with 4 channels, got 16 channels in 2 dimensions; enc"),
    (tiny.latent(2), tiny.latent(3), r"a batch of 2 like its own, got 3 image\(s\); use one layout picture"),
])
def test_layouts_that_do_not_fit(model: Any, layout: dict[str, Any], sampler_latent: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run(model, mixer("euler", layout), sampler_latent, tiny.sigmas_of(model))


def test_more_values_than_images(model: Any) -> None:
    with pytest.raises(ValueError, match=r"got 3 values for 2 image\(s\); shorten the list"):
        run(model, mixer("euler", tiny.latent(2), nu_per_image="0.1 0.2 0.3"), tiny.latent(2), tiny.sigmas_of(model))


def test_empty_layout() -> None:
    with pytest.raises(ValueError, match="expects the latent of a picture, got an empty one; encode a picture"):
        make_layout({"samples": torch.zeros(1, 4, 8, 8)}, 0, "shared")


def test_one_layout_for_a_batch_and_masks_per_image(model: Any) -> None:
    one, sigmas = tiny.latent(1), tiny.sigmas_of(model)
    three = {"samples": one["samples"].repeat(3, 1, 1, 1)}
    sampler = LayoutMixSampler(
        comfy.samplers.sampler_object("euler"), NoisedLayout(one, SEED, False), Mix(0.5, 0.6, 0.3))
    result = run(model, sampler, three, sigmas)
    torch.testing.assert_close(result[0], result[2], rtol=0, atol=1e-5)


def test_a_sampler_that_holds_a_picture_by_itself() -> None:
    layout = make_layout(tiny.latent(), SEED, "shared")
    with pytest.raises(ValueError, match="expects a solver, got the Cycle Sampler, .*; wire only one of the two"):
        LayoutMixSampler(CycleSampler(POSITIVE, 1.0, 0.1, 0), layout, Mix(0.5, 0.6, 0.3))
