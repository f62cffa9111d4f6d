"""DDIM Inversion in a real host: every model kind, what a step costs, masks, progress, errors, what it leaves."""
from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.utils
import pytest
import tiny
import torch
from inversion_rig import OTHER, PROMPT, assert_follows, invert, printed_inversion
from mixology.host.inversion import invert_latent
from mixology.host.trajectory import end_latent
from mixology.samplers.inversion import RULES
from unchanged import snapshot

pytestmark = pytest.mark.seam


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scheduler", ["ddim_uniform", "normal"])
def test_it_is_the_printed_inversion(models: dict[str, Any], kind: str, rule: str, scheduler: str) -> None:
    """Two pictures of an odd size. `normal` climbs to the model's first sigma, where flow models hold pure noise."""
    model, latent = models[kind], tiny.latent(2, 7, 10)
    found = invert(model, latent, 4, scheduler, rule)
    assert torch.equal(found.sigmas, tiny.sigmas_of(model, scheduler, 4).flip(0))
    assert found.states.dtype == found.sigmas.dtype == torch.float32
    assert torch.equal(found.states[0], model.model.process_latent_in(latent["samples"]))
    assert_follows(found, printed_inversion(model, PROMPT, latent, found.sigmas, rule), 2e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_end_latent_goes_on_in_the_host(models: dict[str, Any], kind: str) -> None:
    """Without added noise the host's samplers start at the end state: as for its own unfinished latents, flow is
    divided by 1 - sigma."""
    model, latent = models[kind], {**tiny.latent(2), "batch_index": [3, 4], "noise_mask": torch.ones(1, 64, 64)}
    found = invert(model, latent)
    end = end_latent(found)
    assert set(end) == {"samples", "batch_index"} and end["batch_index"] == [3, 4]
    again = model.get_model_object("model_sampling").noise_scaling(
        found.sigmas[-1], torch.zeros_like(found.end), model.model.process_latent_in(end["samples"]))
    torch.testing.assert_close(again, found.states[-1], rtol=1e-5, atol=1e-5)


def test_flow_that_ends_in_pure_noise_leaves_a_finite_latent(models: dict[str, Any]) -> None:
    found = invert(models["flow"], tiny.latent(), 4, "normal")
    assert float(found.sigmas[-1]) == 1.0
    torch.testing.assert_close(models["flow"].model.process_latent_in(found.end), found.states[-1])


@pytest.mark.parametrize(("steps", "evaluations"), [(50, 50), (30, 31), (1, 1)])
def test_one_evaluation_a_step(model: Any, steps: int, evaluations: int) -> None:
    counted, calls = tiny.count_evaluations(model)
    found = invert(counted, tiny.latent(3), steps)
    assert calls == [3] * evaluations and len(found.states) == len(found.sigmas) == evaluations + 1


def test_batch_items_are_independent(model: Any) -> None:
    three = tiny.latent(3, 5, 8)
    together = invert(model, three)
    for i in range(3):
        alone = invert(model, {"samples": three["samples"][i:i + 1]})
        torch.testing.assert_close(alone.states, together.states[:, i:i + 1], rtol=0, atol=1e-4)


def test_prompt_and_rule_and_model_count(model: Any) -> None:
    latent = tiny.latent()
    plain = invert(model, latent).states
    for other in (invert(model, latent, prompt=OTHER), invert(model, latent, rule="euler"),
                  invert(tiny.unet("eps", seed=1), latent)):
        assert not torch.allclose(other.states, plain, atol=1e-4)
    assert torch.equal(invert(model, latent).states, plain)


def test_noise_mask_takes_no_part_and_stays_with_the_picture(models: dict[str, Any]) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    for model in models.values():
        latent = {**tiny.latent(), "noise_mask": mask}
        masked, plain = invert(model, latent), invert(model, tiny.latent())
        assert torch.equal(masked.states, plain.states) and torch.equal(masked.end, plain.end)
        assert masked.latent["noise_mask"] is mask and "noise_mask" not in plain.latent


def test_video_latents_and_a_single_frame() -> None:
    """A picture of a video model is one frame; the host adds the axis."""
    model, prompt, generator = tiny.video(), tiny.conditioning(1, 8), torch.Generator().manual_seed(3)
    latent = {"samples": torch.randn(1, 16, 3, 6, 4, generator=generator)}
    found = invert(model, latent, 3, "simple", prompt=prompt)
    assert found.states.shape == (4, 1, 16, 3, 6, 4)
    assert_follows(found, printed_inversion(model, prompt, latent, found.sigmas, "ditail"), 1e-5)
    still = invert(model, {"samples": latent["samples"][:, :, 0]}, 3, "simple", prompt=prompt)
    assert still.states.shape == (4, 1, 16, 1, 6, 4) and still.latent["samples"].shape == (1, 16, 1, 6, 4)


# ------------------------------------------------------------------------------------------ beside other nodes

def test_other_nodes_see_a_falling_grid_and_a_rising_sigma(model: Any) -> None:
    """What indexes a step by the schedule finds every sigma in it."""
    grids: list[torch.Tensor] = []
    seen: list[float] = []
    patched = model.clone()

    def watch(args: dict[str, Any]) -> torch.Tensor:
        grids.append(args["model_options"]["transformer_options"]["sample_sigmas"])
        seen.append(float(args["sigma"][0]))
        return args["denoised"]

    patched.set_model_sampler_post_cfg_function(watch)
    found = invert(patched, tiny.latent())
    sigmas = found.sigmas.tolist()
    assert all(torch.equal(grid, found.sigmas.flip(0)) for grid in grids)
    assert seen == sigmas[1:]
    seen.clear()
    invert(patched, tiny.latent(), rule="euler")
    assert seen == [sigmas[1], *sigmas[1:-1]]


def test_timed_prompts_hold_in_their_part_of_the_schedule(model: Any) -> None:
    """Two prompts by percent are each read in their own half, as in sampling."""
    late = [[PROMPT[0][0], {"start_percent": 0.5, "end_percent": 1.0}]]
    early = [[OTHER[0][0], {"start_percent": 0.0, "end_percent": 0.5}]]
    middle = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
    timed, plain = invert(model, tiny.latent(), 10, prompt=[*early, *late]), invert(model, tiny.latent(), 10)
    low = int((timed.sigmas < middle).sum())
    assert 2 < low < 9
    assert torch.equal(timed.states[:low], plain.states[:low])
    assert not torch.allclose(timed.states[low], plain.states[low], atol=1e-4)


def test_progress_and_preview(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    states: list[torch.Tensor] = []

    def prepare(patcher: Any, steps: int, last: dict[str, Any]) -> Any:
        def report(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            assert denoised.shape == x.shape and not torch.equal(denoised, x)
            told.append((step, total))
            states.append(x)
        assert steps == 6
        return report

    monkeypatch.setattr("latent_preview.prepare_callback", prepare)
    found = invert(model, tiny.latent(), 6, "normal")
    assert told == [(i, 6) for i in range(6)]
    assert all(torch.equal(x, state) for x, state in zip(states, found.states[1:]))


def test_interrupt(model: Any) -> None:
    reports: list[int] = []

    def hook(value: int, *_: Any, **__: Any) -> None:
        reports.append(value)
        raise comfy.model_management.InterruptProcessingException

    full = invert(model, tiny.latent())
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            invert(model, tiny.latent())
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert reports == [1] and torch.equal(invert(model, tiny.latent()).states, full.states)


def test_nothing_of_the_caller_changes(model: Any) -> None:
    latent = {**tiny.latent(), "batch_index": [7], "downscale_ratio_spacial": 8}
    samples, text = latent["samples"].clone(), PROMPT[0][0].clone()
    options, keys, state = snapshot(model.model_options), set(latent), torch.random.get_rng_state()
    prompt_keys = set(PROMPT[0][1])
    found = invert(model, latent)
    assert torch.equal(latent["samples"], samples) and set(latent) == keys
    assert set(found.latent) == {"samples", "batch_index"}
    assert torch.equal(PROMPT[0][0], text) and set(PROMPT[0][1]) == prompt_keys
    assert snapshot(model.model_options) == options and torch.equal(torch.random.get_rng_state(), state)
    assert not model.model.diffusion_model.training


# ------------------------------------------------------------------------------------------ failures

@pytest.mark.parametrize(("samples", "words"), [
    (torch.zeros(1, 4, 8, 8), "expects the latent of a picture, got an empty one; connect VAE Encode of the picture"),
    (torch.zeros(0, 4, 8, 8), "expects the latent of a picture, got an empty one"),
    (torch.ones(1, 16, 8, 8), "model's latent format with 4 channels, got 16 channels; encode the picture with this"),
])
def test_latents_that_hold_no_picture_of_this_model(model: Any, samples: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        invert(model, {"samples": samples})


def test_latent_of_two_parts(model: Any) -> None:
    import comfy.nested_tensor

    nested = comfy.nested_tensor.NestedTensor([torch.ones(1, 4, 8, 8), torch.ones(1, 2, 9)])
    with pytest.raises(ValueError, match="a latent of one part, got picture and sound together; separate them"):
        invert(model, {"samples": nested})


def test_model_that_takes_no_noise() -> None:
    class PictureToPicture(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.IMG_TO_IMG_FLOW):
        pass

    patched = tiny.unet()
    patched.add_object_patch("model_sampling", PictureToPicture(patched.model.model_config))
    with pytest.raises(ValueError, match="samples from noise, got one that starts from a picture; use a text to image"):
        invert(patched, tiny.latent())


def test_schedule_that_repeats_a_sigma(model: Any) -> None:
    with pytest.raises(ValueError, match=r"repeats no sigma, got \d+ sigma\(s\) down to 0; choose another"):
        invert(model, tiny.latent(), 2000, "simple")


def test_model_that_answers_no_numbers(model: Any) -> None:
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    with pytest.raises(ValueError, match="expects finite states, got numbers beyond all bounds; lower alpha and beta"):
        invert_latent(patched, PROMPT, tiny.latent(), 2, "ddim_uniform", "ditail")
