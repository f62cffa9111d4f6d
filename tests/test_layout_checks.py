"""What MagicMix refuses before it samples: schedules, windows, masks, formats, seeds and values that cannot act."""
from __future__ import annotations

import re
from typing import Any

import comfy.samplers
import pytest
import tiny
import torch
from mixology.host.layout import Mix, make_layout, mix_latent, record_layout
from mixology.host.run import Schedule, check_format, full_sigmas
from mixology.samplers.layout import Window, check_start, check_steps, find_window
from mixology.samplers.levels import check_falling
from rig import NEGATIVE, POSITIVE, SEED, mixer, run, start_index

NAN = float("nan")


def mix(model: Any, layout: Any, steps: int = 8, scheduler: str = "normal", name: str = "euler", nu: float = 0.5,
        k_max: float = 0.6, k_min: float = 0.3, **rest: Any) -> torch.Tensor:
    return mix_latent(
        model, POSITIVE, NEGATIVE, layout,
        schedule=Schedule(rest.get("seed", 0), steps, rest.get("cfg", 3.0), name, scheduler),
        mix=Mix(nu, k_max, k_min, rest.get("values", ""), rest.get("mask"), rest.get("variant", "paper")))["samples"]


@pytest.mark.parametrize(("sigmas", "text"), [
    ([3.0], "at least one step, got 1 sigma"),
    ([], r"at least one step, got 0 sigma\(s\)"),
    ([0.0, 1.0, 3.0], "fall from noise to picture, got 0 followed by 1; take Flip Sigmas out"),
    ([3.0, 2.0, 2.0, 0.0], "fall at every step, got 2 twice in a row; use fewer steps"),
    ([3.0, NAN, 0.0], "numbers from 0 up, got others"),
    ([float("inf"), 1.0], "numbers from 0 up, got others"),
    ([3.0, 1.0, -1.0], "numbers from 0 up, got others"),
])
def test_schedules_that_do_not_fall(model: Any, sigmas: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=f"The node expects .*{text}"):
        check_falling(sigmas, "The node")
    if sigmas:
        for nu in (0.5, 1.0):
            with pytest.raises(ValueError, match=f"The Layout Mix Sampler expects .*{text}"):
                run(model, mixer("euler", tiny.latent(), nu), tiny.latent(), torch.tensor(sigmas))


@pytest.mark.parametrize(("scheduler", "steps"), [
    (scheduler, steps) for scheduler in comfy.samplers.KSampler.SCHEDULERS for steps in (1, 2, 7, 50)
    if (scheduler, steps) != ("kl_optimal", 1)])  # where the host divides by zero
def test_every_schedule_of_the_host_falls(models: dict[str, Any], scheduler: str, steps: int) -> None:
    for model in models.values():
        check_falling(tiny.sigmas_of(model, scheduler, steps).tolist(), "The node")


@pytest.mark.parametrize(("steps", "scheduler", "text"), [
    (20, "linear_quadratic", r"k_max 0.6 expects a schedule with a step .* below its sigma 2.\d+, got one that jumps "
                             r"from sigma 2.67\d to 0, .* use more steps, a larger k_max or another scheduler"),
    (1, "normal", r"k_max 0.6 expects .* jumps from sigma 14.\d+ to 0, so the prompt would never be read"),
])
@pytest.mark.parametrize("nu", [0.5, 1.0])
def test_schedules_without_a_step_below_k_max(model: Any, steps: int, scheduler: str, text: str, nu: float) -> None:
    counted, calls = tiny.count_evaluations(model)
    layout, sigmas = make_layout(tiny.latent(), SEED, "shared"), tiny.sigmas_of(model, scheduler, steps)
    with pytest.raises(ValueError, match=text):
        mix(counted, layout, steps, scheduler, nu=nu)
    with pytest.raises(ValueError, match=text):
        run(counted, mixer("euler", tiny.latent(), nu), tiny.latent(), sigmas)
    with pytest.raises(ValueError, match=text):
        record_layout(
            counted, POSITIVE, NEGATIVE, {"samples": torch.zeros(1, 4, 8, 8)},
            schedule=Schedule(0, steps, 3.0, "euler", scheduler), k_max=0.6, k_min=0.3, finish=True)
    assert not calls


def test_k_max_at_or_below_the_last_sigma_returns_the_layout(model: Any) -> None:
    layout = make_layout(tiny.latent(), SEED, "shared")
    torch.testing.assert_close(mix(model, layout, k_max=0.0, k_min=0.0), tiny.latent()["samples"], rtol=0, atol=1e-5)
    check_start([4.0, 2.0, 1.0], Window(2, 2), 0.5, 0.1)  # a first stage that ends above the window
    check_start([4.0, 2.0, 1.0], Window(2, 2), 1.0, 0.2)
    with pytest.raises(ValueError, match="jumps from sigma 2 to 1, so"):
        check_start([4.0, 2.0, 1.0], Window(2, 2), 1.5, 0.3)


@pytest.mark.parametrize(("steps", "scheduler", "k_max", "k_min"), [
    (3, "ddim_uniform", 0.6, 0.45), (40, "linear_quadratic", 0.6, 0.3), (1, "ddim_uniform", 1.0, 0.0)])
def test_windows_between_two_steps(model: Any, steps: int, scheduler: str, k_max: float, k_min: float) -> None:
    """No step starts inside, or the only one that does ends at sigma 0, where nothing is mixed."""
    layout = make_layout(tiny.latent(), SEED, "shared")
    with pytest.raises(ValueError, match=rf"window from k_max {k_max:g} to k_min {k_min:g} \(sigma .* to .*\) expects "
                                         r"a step that starts inside it and ends above sigma 0, got none .*, so nu "
                                         r"would do nothing; use more steps, a wider window or another scheduler"):
        mix(model, layout, steps, scheduler, k_max=k_max, k_min=k_min)
    assert mix(model, layout, steps, scheduler, k_max=k_max, k_min=k_max).isfinite().all()  # image to image
    assert mix(model, layout, steps, scheduler, k_max=k_max, k_min=k_min, nu=1.0).isfinite().all()


def test_windows_that_hold_steps() -> None:
    grid = [4.0, 3.0, 2.0, 1.0, 0.0]
    check_steps(grid, find_window(grid, 2.0, 1.0), (2.0, 1.0), (0.5, 0.4))
    check_steps(grid, find_window(grid, 2.0, 0.0), (2.0, 0.0), (0.5, 0.0))
    for levels in ((2.5, 2.2), (1.0, 0.0)):
        with pytest.raises(ValueError, match="got none on this schedule"):
            check_steps(grid, find_window(grid, *levels), levels, (0.5, 0.4))


def test_variant_diffusers_without_a_reading_that_mixes(model: Any) -> None:
    """Its first reading is the layout itself, so a window of one step mixes nothing for a solver of one reading."""
    layout = make_layout(tiny.latent(), SEED, "shared")
    settings: dict[str, Any] = {"steps": 4, "scheduler": "ddim_uniform", "variant": "diffusers"}
    with pytest.raises(ValueError, match="reads the model inside the window after its start, got euler on a schedule"):
        mix(model, layout, **settings)
    assert mix(model, layout, name="dpm_2", **settings).isfinite().all()


@pytest.mark.parametrize(("value", "text"), [
    ({"nu": NAN}, "nu expects a value between 0 .* got nan"),
    ({"k_max": NAN}, "window expects 0 <= k_min <= k_max <= 1, got k_min 0.3 and k_max nan"),
    ({"k_min": NAN}, "window expects 0 <= k_min <= k_max <= 1, got k_min nan"),
    ({"cfg": NAN}, "cfg expects a number, got nan"),
    ({"cfg": float("inf")}, "cfg expects a number, got inf"),
    ({"steps": 0}, "steps expects a number from 1 to 10000, got 0"),
    ({"steps": 10 ** 9}, "steps expects a number from 1 to 10000, got 1000000000"),
    ({"seed": 2 ** 64}, "seed expects a whole number from 0 to 18446744073709551615, got one beyond it"),
    ({"variant": "both"}, "variant expects paper or diffusers, got 'both'"),
    ({"values": "0.1, 0.2, 0.3"}, r"at most one value per image, got 3 values for 2 image\(s\)"),
    ({"mask": torch.full((1, 64, 64), NAN)}, "mask expects values from 0 to 1, got some that are no numbers"),
    ({"mask": torch.ones(3, 64, 64)}, "mask expects one mask for all images or one for each of the 2, got 3"),
    ({"mask": torch.ones(0, 64, 64)}, "mask expects pictures of height x width"),
])
def test_values_that_cannot_act(model: Any, value: dict[str, Any], text: str) -> None:
    counted, calls = tiny.count_evaluations(model)
    layout = make_layout(tiny.latent(2), SEED, "shared")
    with pytest.raises(ValueError, match=text):
        mix(counted, layout, **value)
    assert not calls


def test_layout_nodes_refuse_what_is_no_picture(model: Any) -> None:
    for samples in (torch.full((1, 4, 8, 8), NAN), torch.ones(1, 4, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="The layout expects a latent of finite numbers"):
            make_layout({"samples": samples}, 0, "shared")
        with pytest.raises(ValueError, match=r"Layout Noise \(Prompt\) expects a latent of finite numbers"):
            record_layout(
                model, POSITIVE, NEGATIVE, {"samples": samples}, schedule=Schedule(0, 8, 3.0, "euler", "normal"),
                k_max=0.6, k_min=0.3, finish=True)
    with pytest.raises(ValueError, match="noise_mode expects shared or fresh, got 'new'"):
        make_layout(tiny.latent(), 0, "new")
    with pytest.raises(ValueError, match="seed expects a whole number"):
        make_layout(tiny.latent(), 2 ** 64, "shared")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64, torch.float16])
def test_masks_of_any_type(model: Any, dtype: torch.dtype) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    layout = make_layout(tiny.latent(), SEED, "shared")
    assert torch.equal(mix(model, layout, mask=mask.to(dtype)), mix(model, layout, mask=mask))
    plain, odd = ({**tiny.latent(), "noise_mask": kind} for kind in (mask, mask.to(dtype)))
    assert torch.equal(mix(model, make_layout(odd, SEED, "shared")), mix(model, make_layout(plain, SEED, "shared")))
    assert odd["noise_mask"].dtype == dtype


@pytest.mark.parametrize(("mask", "text"), [
    (torch.full((1, 64, 64), NAN), "noise mask expects values from 0 to 1, got some that are no numbers"),
    (torch.ones(64), "noise mask expects a picture of height x width"),
])
def test_noise_masks_that_are_none(model: Any, mask: torch.Tensor, text: str) -> None:
    latent = {**tiny.latent(), "noise_mask": mask}
    with pytest.raises(ValueError, match=text):
        mix(model, make_layout(latent, SEED, "shared"))
    with pytest.raises(ValueError, match=text):
        record_layout(
            model, POSITIVE, NEGATIVE, latent, schedule=Schedule(0, 8, 3.0, "euler", "normal"), k_max=0.6, k_min=0.3,
            finish=True)
    if mask.ndim > 1:
        with pytest.raises(ValueError, match=text):
            run(model, mixer("euler", latent), latent, tiny.sigmas_of(model))


def test_one_mask_for_each_still_of_a_video_model() -> None:
    """Latents [B, C, 1, H, W]: the host would stretch a batch of masks over time."""
    model, conds = tiny.video(), (tiny.conditioning(1, 8), tiny.conditioning(2, 8))
    generator = torch.Generator().manual_seed(3)
    two = {"samples": torch.randn(2, 16, 1, 6, 4, generator=generator)}
    masks = torch.zeros(2, 48, 32)
    masks[0, :24], masks[1, :, :16] = 1, 1
    layout, schedule = make_layout(two, SEED, "shared"), Schedule(0, 8, 3.0, "euler", "simple")
    both = mix_latent(model, *conds, layout, schedule=schedule, mix=Mix(0.2, 0.6, 0.3, mask=masks))["samples"]
    for i in range(2):
        same = mix_latent(
            model, *conds, layout, schedule=schedule, mix=Mix(0.2, 0.6, 0.3, mask=masks[i:i + 1]))["samples"]
        torch.testing.assert_close(both[i], same[i], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("samples", "text"), [
    (torch.ones(1, 16, 8, 8), "latent format with 4 channels, got 16 channels; encode the picture with this"),
    (torch.ones(1, 4, 2, 8, 8), "latent of 2 dimensions beside batch and channels, .*, got 3; encode"),
    (torch.ones(1, 4, 8), "latent of 2 dimensions beside batch and channels, .*, got 1; encode"),
    (torch.ones(8, 8), "latent format with 4 channels, got 8 channels"),
])
def test_layouts_of_another_format(model: Any, samples: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=f"The layout expects .*{text}"):
        mix(model, make_layout({"samples": samples}, SEED, "shared"))
    with pytest.raises(ValueError, match=re.escape("Layout Noise (Prompt)") + f" expects .*{text}"):
        record_layout(
            model, POSITIVE, NEGATIVE, {"samples": samples}, schedule=Schedule(0, 8, 3.0, "euler", "normal"),
            k_max=0.6, k_min=0.3, finish=True)


def test_a_video_network_on_the_latent_format_of_pictures_takes_frames() -> None:
    import comfy.latent_formats

    model = tiny.video().clone()
    model.add_object_patch("latent_format", comfy.latent_formats.Flux())
    check_format(model, torch.ones(1, 16, 1, 6, 4), "The layout")
    check_format(model, torch.ones(1, 16, 6, 4), "The layout")


@pytest.mark.parametrize("name", ["ddim", "euler", "euler_ancestral", "dpmpp_sde"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_largest_seed(model: Any, name: str, masked: bool) -> None:
    """In pieces each has a seed of its own; in one piece the solver is given what the host would give it."""
    latent, most = {**tiny.latent(), **({"noise_mask": torch.ones(1, 64, 64)} if masked else {})}, 2 ** 64 - 1
    shared, fresh = (make_layout(latent, most, mode) for mode in ("shared", "fresh"))
    mixed = mix(model, shared, name=name, seed=most)
    assert mixed.isfinite().all() and not torch.equal(mix(model, fresh, name=name, seed=most), mixed)
    if name == "euler_ancestral":  # the host counts one on for it on a CPU
        with pytest.raises(ValueError, match="seed expects less than 18446744073709551615 for the sampler euler_ances"):
            mix(model, shared, name=name, nu=1.0, seed=most)
    else:
        whole = mix(model, shared, name=name, nu=1.0, seed=most)
        assert whole.isfinite().all()
        if name == "dpmpp_sde":
            sigmas = tiny.sigmas_of(model, "normal", 8)
            bare = run(model, comfy.samplers.sampler_object(name), latent, sigmas[start_index(model, sigmas, 0.6):],
                       shared.noise(0), seed=most)
            assert torch.equal(whole, bare)


def test_steps_of_the_host_are_taken(model: Any) -> None:
    assert len(full_sigmas(model, "dpm_2", "normal", 6)) == 7
