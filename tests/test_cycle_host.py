"""The Cycle Sampler in a real host: every guider and model kind, what a step costs, masks, errors, what it leaves."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.conds
import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import pytest
import tiny
import torch
from cycle_rig import NEGATIVE, SEED, SOURCE, TARGET, cycle, grid, make_noise, printed_cycle, run
from mixology.host.cycle import CycleSampler, part_shapes
from mixology.host.run import noise_levels
from mixology.samplers.cycle import ancestral_step
from unchanged import snapshot

pytestmark = pytest.mark.seam


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 7, 10)])
@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_same_prompts_and_cfg_return_the_latent(
    models: dict[str, Any], kind: str, eta: float, batch: int, height: int, width: int, cfg: float,
) -> None:
    """From the very first sigma too, where the host would drop the picture; flow starts there at pure noise."""
    model, latent = models[kind], tiny.latent(batch, height, width)
    guider = tiny.cfg_guider(model, SOURCE, NEGATIVE, cfg)
    result = run(guider, cycle(cfg, eta), latent, tiny.sigmas_of(model, "normal", 6))
    torch.testing.assert_close(result, latent["samples"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("source_cfg", [1.0, 2.0])
def test_it_is_the_printed_cycle_diffusion(models: dict[str, Any], kind: str, eta: float, source_cfg: float) -> None:
    """Float32 evaluations on both sides, 7 steps."""
    model, latent = models[kind], tiny.latent(2, 6, 9)
    sigmas, long = grid(model), tiny.conditioning(5, 154)
    expected = printed_cycle(
        model, lambda: tiny.cfg_guider(model, TARGET, NEGATIVE, 5.0),
        lambda: tiny.cfg_guider(model, long, NEGATIVE, source_cfg), latent, sigmas, eta)
    result = run(tiny.cfg_guider(model, TARGET, NEGATIVE, 5.0), cycle(source_cfg, eta, source=long), latent, sigmas)
    assert float((result - latent["samples"]).abs().mean()) > 0.05
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_steps_are_the_hosts_ancestral_steps(models: dict[str, Any]) -> None:
    for kind in ("eps", "v"):
        sampling = models[kind].get_model_object("model_sampling")
        sigmas = tiny.sigmas_of(models[kind], "normal", 9)
        levels = noise_levels(sampling, sigmas)
        for i in range(9):
            down, up = comfy.k_diffusion.sampling.get_ancestral_step(sigmas[i], sigmas[i + 1], 0.6)
            step = ancestral_step(levels[i], levels[i + 1], 0.6)
            assert step.keep == pytest.approx(float(down / sigmas[i]), rel=1e-5)
            assert (step.clean, step.fresh) == pytest.approx((1 - float(down / sigmas[i]), float(up)), rel=1e-4)


def guiders(model: Any, prompt: Any, cfg: float) -> list[Any]:
    """Every core guider with one prompt everywhere, at the scale `cfg`."""
    dual = custom.Guider_DualCFG(model)
    dual.set_conds(prompt, prompt, NEGATIVE)
    dual.set_cfg(1.0, cfg)
    perp = perpneg.Guider_PerpNeg(model)
    perp.set_conds(prompt, prompt, NEGATIVE)
    perp.set_cfg(cfg, 0.0)
    return [tiny.cfg_guider(model, prompt, NEGATIVE, cfg), dual, perp]


@pytest.mark.parametrize("index", range(3))
def test_inside_sampler_custom_advanced_with_every_core_guider(model: Any, index: int) -> None:
    """Guiders that batch or weigh their rows otherwise still reach the same reading, to float precision."""
    latent, sigmas, noise = tiny.latent(3, 6, 10), grid(model), custom.Noise_RandomNoise(SEED)
    same, _ = custom.SamplerCustomAdvanced.execute(
        noise, guiders(model, SOURCE, 4.0)[index], cycle(4.0, 0.5), sigmas, latent)[:2]
    torch.testing.assert_close(same["samples"], latent["samples"], rtol=0, atol=2e-5)
    edited, denoised = custom.SamplerCustomAdvanced.execute(
        noise, guiders(model, TARGET, 4.0)[index], cycle(4.0, 0.5), sigmas, latent)[:2]
    assert float((edited["samples"] - latent["samples"]).abs().mean()) > 0.05
    torch.testing.assert_close(denoised["samples"], edited["samples"], rtol=0, atol=1e-6)


def test_node_hands_its_inputs_on(model: Any) -> None:
    from mixology.nodes.cycle import CycleSampler as Node

    inputs = {socket.id: socket for socket in Node.define_schema().inputs}
    assert list(inputs) == ["conditioning", "source_cfg", "eta", "skip", "negative"]
    assert [inputs[name].default for name in ("source_cfg", "eta", "skip")] == [1.0, 0.1, 0]
    assert (inputs["eta"].min, inputs["eta"].max, inputs["negative"].optional) == (0.0, 1.0, True)
    latent, sigmas, guider = tiny.latent(), grid(model), tiny.cfg_guider(model, TARGET, NEGATIVE)
    sampler = Node.execute(SOURCE, 2.0, 0.5, 3, NEGATIVE).result[0]
    assert torch.equal(run(guider, sampler, latent, sigmas), run(guider, cycle(2.0, 0.5, 3), latent, sigmas))


def test_basic_guider(model: Any) -> None:
    guider, latent = custom.Guider_Basic(model), tiny.latent()
    guider.set_conds(SOURCE)
    result = run(guider, cycle(negative=None), latent, grid(model))
    torch.testing.assert_close(result, latent["samples"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("cfg", "source_cfg", "rows"), [(1.0, 1.0, 2), (7.5, 1.0, 3), (7.5, 2.0, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_source_evaluation_a_step(model: Any, cfg: float, source_cfg: float, rows: int, batch: int) -> None:
    counted, calls = tiny.count_evaluations(model)
    latent, sigmas = tiny.latent(batch), grid(model)
    run(tiny.cfg_guider(counted, TARGET, NEGATIVE, cfg), cycle(source_cfg, 0.5), latent, sigmas)
    assert sum(calls) == rows * batch * (len(sigmas) - 1)
    assert len(calls) == 2 * (len(sigmas) - 1)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_skip_drops_the_first_sigmas(models: dict[str, Any], kind: str) -> None:
    model, latent, seen = models[kind], tiny.latent(), []
    sigmas = tiny.sigmas_of(model, "normal", 10)
    guider = tiny.cfg_guider(model, TARGET, NEGATIVE)
    skipped = run(guider, cycle(skip=4), latent, sigmas, callback=lambda i, d, x, n: seen.append((i, n)))
    assert torch.equal(skipped, run(guider, cycle(), latent, sigmas[4:]))
    assert seen == [(i, 6) for i in range(6)]
    assert not torch.allclose(skipped, run(guider, cycle(skip=3), latent, sigmas), atol=1e-3)


def test_other_nodes_see_the_schedule_that_is_run(model: Any) -> None:
    seen: list[torch.Tensor] = []
    patched = model.clone()

    def watch(args: dict[str, Any]) -> torch.Tensor:
        seen.append(args["model_options"]["transformer_options"]["sample_sigmas"])
        return args["denoised"]

    patched.set_model_sampler_post_cfg_function(watch)
    sigmas = tiny.sigmas_of(model, "normal", 10)
    run(tiny.cfg_guider(patched, TARGET, NEGATIVE), cycle(skip=4), tiny.latent(), sigmas)
    assert len(seen) == 12 and all(torch.equal(grid, sigmas[4:]) for grid in seen)


def test_functions_of_other_nodes_act_on_both_readings(model: Any) -> None:
    """So that what they do to equal prompts cancels as well; and to others it does not."""
    latent, sigmas, patched = tiny.latent(), grid(model), model.clone()
    patched.set_model_sampler_pre_cfg_function(lambda args: [out * 0.9 for out in args["conds_out"]])
    patched.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"] * 0.7)
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"].tanh())
    same = run(tiny.cfg_guider(patched, SOURCE, NEGATIVE, 4.0), cycle(4.0, 0.3), latent, sigmas)
    torch.testing.assert_close(same, latent["samples"], rtol=0, atol=1e-6)
    edited = run(tiny.cfg_guider(patched, TARGET, NEGATIVE, 4.0), cycle(4.0, 0.3), latent, sigmas)
    plain = run(tiny.cfg_guider(model, TARGET, NEGATIVE, 4.0), cycle(4.0, 0.3), latent, sigmas)
    assert not torch.allclose(edited, plain, atol=1e-3)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_a_schedule_that_stops_early_is_finished_by_a_plain_sampler(
    models: dict[str, Any], kind: str, eta: float,
) -> None:
    """At equal prompts the state left at a sigma above 0 is the picture at that level; flow is divided by 1 - sigma,
    and a following sampler without noise multiplies it back."""
    model, latent = models[kind], tiny.latent(2, 5, 8)
    sigmas = grid(model)[:4]
    left = run(tiny.cfg_guider(model, SOURCE, NEGATIVE), cycle(3.0, eta), latent, sigmas)
    sampling = model.get_model_object("model_sampling")
    state = sampling.noise_scaling(sigmas[-1], torch.zeros_like(left), model.model.process_latent_in(left))
    level = noise_levels(sampling, sigmas)[-1]
    n = (state - level.signal * model.model.process_latent_in(latent["samples"])) / level.noise
    noise = make_noise(latent)
    if eta == 0:
        torch.testing.assert_close(n, noise, rtol=0, atol=1e-4)
    else:
        assert not torch.allclose(n, noise, atol=0.1) and float(n.std()) == pytest.approx(1, abs=0.15)


def test_noise_repeats_with_the_seed_and_eta_zero_draws_none(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latent, sigmas, guider = tiny.latent(), grid(model), tiny.cfg_guider(model, TARGET, NEGATIVE)
    noise = make_noise(latent)
    before = torch.random.get_rng_state()
    noisy = run(guider, cycle(eta=0.5), latent, sigmas, noise)
    assert torch.equal(run(guider, cycle(eta=0.5), latent, sigmas, noise), noisy)
    assert not torch.equal(run(guider, cycle(eta=0.5), latent, sigmas, noise, seed=SEED + 1), noisy)
    still = run(guider, cycle(eta=0.0), latent, sigmas, noise)
    assert torch.equal(run(guider, cycle(eta=0.0), latent, sigmas, noise, seed=SEED + 1), still)
    assert torch.equal(torch.random.get_rng_state(), before)

    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("noise was drawn")

    monkeypatch.setattr("mixology.host.cycle.default_noise_sampler", lambda x, seed=None: refuse)
    assert torch.equal(run(guider, cycle(eta=0.0), latent, sigmas), still)
    with pytest.raises(AssertionError, match="noise was drawn"):
        run(guider, cycle(eta=0.1), latent, sigmas)


@pytest.mark.parametrize("height", [8, 11])
def test_batch_items_are_independent(model: Any, height: int) -> None:
    three, sigmas, guider = tiny.latent(3, height, 8), grid(model), tiny.cfg_guider(model, TARGET, NEGATIVE)
    noise = make_noise(three)
    together = run(guider, cycle(2.0, 0.0), three, sigmas)
    for i in range(3):
        alone = run(guider, cycle(2.0, 0.0), {"samples": three["samples"][i:i + 1]}, sigmas, noise[i:i + 1])
        torch.testing.assert_close(alone, together[i:i + 1], rtol=0, atol=1e-4)


def test_rows_one_by_one_when_memory_is_short(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latent, sigmas = tiny.latent(2), grid(model)
    counted, calls = tiny.count_evaluations(model)
    guider = tiny.cfg_guider(counted, TARGET, NEGATIVE)
    together = run(guider, cycle(2.0, 0.3), latent, sigmas)
    assert set(calls) == {4}
    calls.clear()
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    torch.testing.assert_close(run(guider, cycle(2.0, 0.3), latent, sigmas), together, rtol=0, atol=1e-4)
    assert set(calls) == {2}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_noise_mask_keeps_the_picture_outside(models: dict[str, Any], kind: str) -> None:
    model, mask = models[kind], torch.zeros(1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    latent, sigmas = {**tiny.latent(), "noise_mask": mask}, grid(model)
    same = run(tiny.cfg_guider(model, SOURCE, NEGATIVE), cycle(3.0, 0.5), latent, sigmas)
    torch.testing.assert_close(same, latent["samples"], rtol=0, atol=1e-6)
    edited = run(tiny.cfg_guider(model, TARGET, NEGATIVE), cycle(1.0, 0.5), latent, sigmas)
    free = run(tiny.cfg_guider(model, TARGET, NEGATIVE), cycle(1.0, 0.5), tiny.latent(), sigmas)
    kept = torch.nn.functional.interpolate(mask[None], size=(8, 8), mode="bilinear")[0, 0] == 0
    torch.testing.assert_close(edited[..., kept], latent["samples"][..., kept], rtol=0, atol=1e-6)
    assert float((edited - latent["samples"])[..., ~kept].abs().mean()) > 0.02
    assert not torch.allclose(edited[..., ~kept], free[..., ~kept], atol=1e-3)


def test_differential_diffusion_masks_both_readings(model: Any) -> None:
    seen: list[Any] = []

    def mask_function(sigma: torch.Tensor, mask: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        seen.append(extra_options["model"].inner_model.model_sampling)
        return mask * (sigma[0] < 2)

    patched = model.clone()
    patched.set_model_denoise_mask_function(mask_function)
    latent, sigmas = {**tiny.latent(), "noise_mask": torch.ones(1, 64, 64)}, grid(model)
    result = run(tiny.cfg_guider(patched, SOURCE, NEGATIVE), cycle(3.0), latent, sigmas)
    torch.testing.assert_close(result, latent["samples"], rtol=0, atol=1e-6)
    assert len(seen) == 2 * (len(sigmas) - 1)


def test_video_latents() -> None:
    model, generator = tiny.video(), torch.Generator().manual_seed(3)
    prompts = [tiny.conditioning(seed, 8) for seed in (1, 2, 3)]
    latent = {"samples": torch.randn(2, 16, 3, 6, 4, generator=generator)}
    sigmas = tiny.sigmas_of(model, "simple", 6)
    sampler = cycle(3.0, 0.3, source=prompts[0], negative=prompts[2])
    same = run(tiny.cfg_guider(model, prompts[0], prompts[2]), sampler, latent, sigmas)
    torch.testing.assert_close(same, latent["samples"], rtol=0, atol=1e-5)
    edited = run(tiny.cfg_guider(model, prompts[1], prompts[2]), sampler, latent, sigmas)
    assert edited.shape == same.shape and not torch.allclose(edited, same, atol=1e-3)


def test_shapes_of_a_packed_latent_come_from_the_guiders_conds() -> None:
    parts = [torch.Size([1, 8, 4, 4]), torch.Size([1, 2, 9])]
    packed = torch.zeros(1, 1, 146)
    conds = {"negative": None, "positive": [{"model_conds": {"latent_shapes": comfy.conds.CONDConstant(parts)}}]}
    assert part_shapes(SimpleNamespace(conds=conds), packed) == parts
    assert part_shapes(SimpleNamespace(conds={"positive": [{"model_conds": {}}]}), packed) == [packed.shape]


@pytest.mark.parametrize(("arguments", "text"), [
    ({"source_cfg": 3.0, "negative": None}, "source_cfg 3 expects a negative prompt, got none; connect negative or"),
    ({"eta": 2.0}, "eta expects a value between 0 .* got 2; set it"),
    ({"skip": -1}, "skip expects 0 or more sigmas to drop, got -1; set it"),
    ({"skip": float("nan")}, "skip expects 0 or more sigmas to drop, got nan; set it"),
    ({"eta": float("nan")}, "eta expects a value between 0 .* got nan; set it"),
    ({"source_cfg": float("nan")}, "source_cfg expects a value between 0 and 100, got nan; set it to 1"),
    ({"source_cfg": float("inf")}, "source_cfg expects a value between 0 and 100, got inf; set it to 1"),
    ({"source_cfg": -1.0}, "source_cfg expects a value between 0 and 100, got -1; set it to 1"),
    ({"source": []}, "expects a source prompt, got an empty conditioning; connect for instance CLIP Text Encode"),
    ({"source_cfg": 3.0, "negative": []}, "source_cfg 3 expects a negative prompt, got none; connect negative or"),
])
def test_settings_that_do_not_fit(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        cycle(**arguments)
    assert cycle(source_cfg=1.0, negative=None).skip == 0


@pytest.mark.parametrize("skip", [7, 20])
def test_skip_of_the_whole_schedule(model: Any, skip: int) -> None:
    with pytest.raises(ValueError, match=rf"fewer than the schedule's 7 step\(s\), got {skip}; lower skip or raise"):
        run(tiny.cfg_guider(model, TARGET, NEGATIVE), cycle(skip=skip), tiny.latent(), grid(model))


def test_nothing_to_restyle_and_nothing_to_start_from(model: Any) -> None:
    guider, empty = tiny.cfg_guider(model, TARGET, NEGATIVE), {"samples": torch.zeros(1, 4, 8, 8)}
    with pytest.raises(ValueError, match="expects the latent of a picture to restyle, got an empty one; connect VAE E"):
        run(guider, cycle(), empty, grid(model))
    with pytest.raises(ValueError, match="expects noise to start from, got none; connect RandomNoise"):
        run(guider, cycle(), tiny.latent(), grid(model), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize(("change", "text"), [
    (lambda sigmas: sigmas.flip(0), r"sigmas that fall from noise to picture, got 0 followed by [\d.]+; take Flip"),
    (lambda sigmas: sigmas * float("nan"), "sigmas that are numbers from 0 up, got others among them; connect a sched"),
    (lambda sigmas: -sigmas, "sigmas that are numbers from 0 up, got others"),
    (lambda sigmas: torch.cat([sigmas.new_tensor([torch.inf]), sigmas]), "got others among them"),
])
def test_sigmas_that_do_not_fall(model: Any, change: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"The Cycle Sampler expects .*{text}"):
        run(tiny.cfg_guider(model, TARGET, NEGATIVE), cycle(), tiny.latent(), change(grid(model)))


def test_the_largest_seed_is_one_like_all(model: Any) -> None:
    guider, latent, noise = tiny.cfg_guider(model, TARGET, NEGATIVE), tiny.latent(), make_noise(tiny.latent())
    last, first, other = (run(guider, cycle(eta=0.5), latent, grid(model), noise, seed=seed)
                          for seed in (2 ** 64 - 1, 2 ** 64 - 2, 0))
    assert last.isfinite().all() and not torch.equal(last, first) and not torch.equal(last, other)


def test_model_that_takes_no_noise() -> None:
    class PictureToPicture(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.IMG_TO_IMG_FLOW):
        pass

    patched = tiny.unet()
    patched.add_object_patch("model_sampling", PictureToPicture(patched.model.model_config))
    with pytest.raises(ValueError, match="noise at the start of every step, got none at step 1; use a model that samp"):
        run(tiny.cfg_guider(patched, TARGET, NEGATIVE), cycle(), tiny.latent(), tiny.sigmas_of(patched, "normal", 5))


def tensors_of(thing: Any, seen: set[int]) -> set[int]:
    """Ids of all tensors that an object reaches."""
    if id(thing) in seen:
        return set()
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return {id(thing)}
    inside: list[Any] = []
    if isinstance(thing, dict):
        inside = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inside = list(thing)
    elif hasattr(thing, "__dict__") and not isinstance(thing, type) and not callable(thing):
        inside = list(vars(thing).values())
    return set().union(*(tensors_of(part, seen) for part in inside))


def test_nothing_of_the_caller_changes_and_nothing_stays_behind(model: Any) -> None:
    latent = {**tiny.latent(), "noise_mask": torch.ones(1, 64, 64)}
    source = [[SOURCE[0][0], {"pooled_output": None, "start_percent": 0.0, "end_percent": 1.0, "strength": 1.0,
                              "area": (8, 8, 0, 0), "mask": torch.ones(1, 64, 64)}]]
    copies = {key: value.clone() for key, value in latent.items()}
    weights = {key: value.clone() for key, value in model.model.state_dict().items()}
    options, sigmas, prompt = snapshot(model.model_options), grid(model), snapshot(source)
    before, sampler = sigmas.clone(), cycle(2.0, 0.5, 1, source)
    held = tensors_of(sampler, set())
    run(tiny.cfg_guider(model, TARGET, NEGATIVE), sampler, latent, sigmas)
    assert tensors_of(sampler, set()) == held
    assert held == {id(source[0][0]), id(source[0][1]["mask"]), id(NEGATIVE[0][0])}
    assert all(torch.equal(latent[key], copies[key]) for key in copies)
    assert all(torch.equal(value, weights[key]) for key, value in model.model.state_dict().items())
    assert snapshot(model.model_options) == options and torch.equal(sigmas, before) and snapshot(source) == prompt


def test_interrupt_leaves_the_host_usable(model: Any) -> None:
    latent, sigmas, guider = tiny.latent(), grid(model), tiny.cfg_guider(model, TARGET, NEGATIVE)
    sampler = CycleSampler(SOURCE, 1.0, 0.1, 0)
    before = run(guider, sampler, latent, sigmas)

    def interrupt(step: int, *rest: Any) -> None:
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(guider, sampler, latent, sigmas, callback=interrupt)
    assert torch.equal(run(guider, sampler, latent, sigmas), before)


def test_progress_shows_the_corrected_estimate(model: Any) -> None:
    latent, sigmas, seen = tiny.latent(), grid(model), []
    result = run(tiny.cfg_guider(model, TARGET, NEGATIVE), cycle(), latent, sigmas,
                 callback=lambda i, denoised, x, n: seen.append((i, n, denoised, x)))
    assert [(i, n) for i, n, _, _ in seen] == [(i, 7) for i in range(7)]
    assert torch.equal(model.model.process_latent_out(seen[-1][2]), result)
    picture = model.model.process_latent_in(latent["samples"])
    torch.testing.assert_close(seen[0][3], picture + sigmas[0] * make_noise(latent), rtol=0, atol=1e-5)
