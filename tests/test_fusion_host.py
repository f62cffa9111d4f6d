"""The Saliency Fusion Guider in a real host: its equation, identities, evaluations, windows, maps, errors."""
from __future__ import annotations

from typing import Any

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_model_advanced as advanced
import node_helpers
import pytest
import tiny
import torch
from fusion_rig import (
    NEGATIVE,
    OTHER,
    POSITIVE,
    SEED,
    chain,
    check_step,
    fuser,
    one_step,
    read_alone,
    run,
    spec,
)
from mixology.host.experts import Expert, is_same, is_same_model
from mixology.host.fusion import SaliencyGuider, show_maps
from mixology.nodes.fusion import Expert as ExpertNode
from mixology.nodes.fusion import SaliencyGuider as GuiderNode
from mixology.nodes.fusion import SaliencyMaps
from unchanged import snapshot

pytestmark = pytest.mark.seam

THIRD = tiny.conditioning(4)


@pytest.fixture(scope="module")
def others() -> dict[str, Any]:
    """Checkpoints of other weights."""
    return {kind: tiny.unet(kind, seed=1) for kind in tiny.KINDS}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "other"), [("eps", "eps"), ("eps", "v"), ("v", "eps"), ("flow", "flow")])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (3, 9, 13)])
def test_is_the_printed_fusion_of_plain_runs(
    models: dict[str, Any], others: dict[str, Any], kind: str, other: str, batch: int, height: int, width: int,
) -> None:
    specs = [spec(models[kind], cfg=4.0), spec(others[other], OTHER, cfg=2.0, temperature=3.0)]
    check_step(specs, tiny.latent(batch, height, width), 0.7)


@pytest.mark.parametrize(("blur", "softness", "uncond"), [
    (0.0, 0.0, "own"), (30.0, 0.0, "first"), (16.0, 0.4, "own"), (16.0, 3.0, "first")])
def test_every_setting(models: dict[str, Any], others: dict[str, Any], blur: float, softness: float, uncond: str,
                       ) -> None:
    specs = [spec(models["eps"]), spec(others["v"], OTHER, tiny.conditioning(6), 5.0), spec(others["eps"], THIRD)]
    check_step(specs, tiny.latent(2, 12, 10), 1.5, blur, softness, uncond)


def test_long_and_short_prompts_and_cfg_one(models: dict[str, Any], others: dict[str, Any]) -> None:
    """The unconditional is evaluated at cfg 1 too: without it there is no saliency."""
    specs = [spec(models["eps"], tiny.conditioning(1, 231), cfg=1.0), spec(others["eps"], tiny.conditioning(3, 154)),
             spec(models["eps"], tiny.conditioning(5, 77), tiny.conditioning(6, 154), 1.0)]
    check_step(specs, tiny.latent(1, 12, 10), 2.0)


def test_video_latents() -> None:
    latent = {"samples": torch.randn(2, 16, 3, 6, 8, generator=torch.Generator().manual_seed(3))}
    text = [tiny.conditioning(i, 8) for i in range(3)]
    specs = [spec(tiny.video(), text[0], text[2]), spec(tiny.video(seed=1), text[1], text[2], temperature=2.0)]
    guider = check_step(specs, latent, 0.6, blur=22.0)
    assert guider.winners is not None and guider.winners.shape == (1, 2, 3, 6, 8)
    image, masks = show_maps(guider, latent)
    assert image.shape == (6, 48, 64, 3) and masks.shape == (12, 6, 8)
    guider = fuser(specs)
    run(guider, latent, tiny.sigmas_of(specs[0][0], "simple", 3))
    assert guider.winners.shape == (3, 2, 3, 6, 8)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_identical_experts_are_plain_cfg_bit_for_bit(models: dict[str, Any], kind: str, cfg: float) -> None:
    model, latent = models[kind], tiny.latent(2, 8, 10)
    counted, calls = tiny.count_evaluations(model)
    sigmas = tiny.sigmas_of(model, "simple", 4)
    plain = run(tiny.cfg_guider(counted, POSITIVE, NEGATIVE, cfg), latent, sigmas)
    expected = list(calls)
    for softness in (0.0, 0.7):
        for models_used in ([counted, counted], [counted, counted.clone(), counted]):
            calls.clear()
            guider = fuser([spec(one, cfg=cfg) for one in models_used], softness=softness)
            assert torch.equal(run(guider, latent, sigmas), plain) and calls == expected
            assert not guider.winners.any()


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "euler_ancestral", "dpmpp_2m_sde", "lcm", "ddim",
                                     "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_equal_checkpoints_are_plain_cfg_under_every_sampler(model: Any, sampler: str) -> None:
    """Two loaded copies with other temperatures do not collapse: fused from equal predictions, bit for bit."""
    mask = torch.zeros(1, 64, 64)
    mask[..., 16:48] = 1
    sigmas, copy = tiny.sigmas_of(model, "normal", 3), tiny.unet()
    guider = fuser([spec(model), spec(copy, temperature=4.0)])
    for latent in (tiny.latent(2), {**tiny.latent(), "noise_mask": mask}):
        plain = run(tiny.cfg_guider(model, POSITIVE, NEGATIVE), latent, sigmas, sampler)
        assert torch.equal(run(guider, latent, sigmas, sampler), plain)
        assert len(guider.winners.unique()) == 2


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_functions_that_a_sampler_adds_see_the_fusion(model: Any, others: dict[str, Any], cfg: float, end: float,
                                                      ) -> None:
    """euler_cfg_pp steps from the unconditional: one step from 3 to 1, expert 1 alone or both."""
    specs = [spec(model, cfg=cfg), spec(others["eps"], OTHER, cfg=cfg)]
    latent, sigmas = tiny.latent(1, 12, 10), torch.tensor([3.0, 1.0])
    starts: list[torch.Tensor] = []
    guider = fuser(specs, window=(0.0, end), outside=1)
    result = run(guider, latent, sigmas, "euler_cfg_pp", lambda step, denoised, x, total: starts.append(x.clone()))
    alone = [read_alone(one, latent, 3.0) for one in specs]
    winners = guider.winners[0].unsqueeze(1)
    assert len(winners.unique()) == (2 if end else 1)
    uncond = torch.where(winners == 0, alone[0].uncond, alone[1].uncond)
    guided = torch.where(winners == 0, alone[0].guided, alone[1].guided)
    expected = guided + (starts[0] - uncond) / 3
    close(result, model.get_model_object("latent_format").process_out(expected))


def test_a_third_that_never_wins_changes_nothing(model: Any, others: dict[str, Any]) -> None:
    latent, sigmas = tiny.latent(2, 12, 10), tiny.sigmas_of(model, "simple", 5)
    pair = [spec(model), spec(others["eps"], OTHER)]
    two, three = fuser(pair), fuser([*pair, spec(tiny.unet())])  # equal to the first, which wins ties
    four = fuser([*pair, spec(model, cfg=0.0, temperature=0.0)])
    expected = run(two, latent, sigmas)
    close(run(three, latent, sigmas), expected, 1e-5)
    assert torch.equal(three.winners, two.winners) and len(two.winners.unique()) == 2
    assert not torch.equal(run(four, latent, sigmas), expected)  # an even saliency does win


def test_order_does_not_matter(model: Any, others: dict[str, Any]) -> None:
    specs = [spec(model, cfg=4.0), spec(others["v"], OTHER), spec(others["eps"], THIRD, temperature=2.0)]
    latent, sigmas, order = tiny.latent(2, 12, 10), tiny.sigmas_of(model, "simple", 6), [2, 0, 1]
    for softness in (0.0, 1.0):
        first = fuser(specs, softness=softness, window=(0.0, 0.6), outside=2)
        other = fuser([specs[i] for i in order], softness=softness, window=(0.0, 0.6), outside=0)
        close(run(other, latent, sigmas), run(first, latent, sigmas))
        assert torch.equal(torch.tensor(order)[other.winners.long()], first.winners.long())


def test_evaluations(model: Any) -> None:
    """The lion of the published code: 100 steps, experts fused down to t = 601, then the general model: not 400."""
    (first, calls), (second, other) = tiny.count_evaluations(model), tiny.count_evaluations(tiny.unet(seed=1))
    latent, sigmas = tiny.latent(1, 4, 6), tiny.sigmas_of(model, "ddim_uniform", 100)
    steps = len(sigmas) - 1
    inside = int((sigmas[:-1] >= model.get_model_object("model_sampling").percent_to_sigma(0.4)).sum())
    guider = fuser([spec(first), spec(second, OTHER)], window=(0.0, 0.4))
    run(guider, latent, sigmas)
    assert (steps, inside, sum(calls), sum(other)) == (100, 40, 200, 80) and sum(calls) + sum(other) == 280
    assert guider.winners[:40].any() and not guider.winners[40:].any() and guider.winners.shape == (100, 1, 4, 6)
    calls.clear()
    other.clear()
    run(fuser([spec(first), spec(second, OTHER, cfg=1.0)], window=(0.4, 1.0), outside=1), latent, sigmas[::20])
    assert calls == [2] * 3 and other == [1] * 2 + [2] * 3  # cfg 1 alone skips the negative, as the core does


def test_experts_on_one_model_share_it(model: Any, others: dict[str, Any]) -> None:
    latent, sigmas = tiny.latent(1, 12, 10), tiny.sigmas_of(model, "simple", 3)
    counted, calls = tiny.count_evaluations(model)
    third, third_calls = tiny.count_evaluations(others["eps"])
    equal = [*NEGATIVE]  # another list of the same
    for specs, rows, third_rows in (
        ([spec(counted), spec(counted, OTHER)], 3, 0),
        ([spec(counted), spec(counted.clone(), OTHER, equal, 5.0, 2.0)], 3, 0),
        ([spec(counted), spec(counted, OTHER, THIRD)], 4, 0),
        ([spec(counted), spec(counted, cfg=5.0), spec(counted, OTHER)], 3, 0),
        ([spec(counted), spec(third), spec(counted, OTHER), spec(third, THIRD)], 3, 3),
    ):
        calls.clear()
        third_calls.clear()
        run(fuser(specs), latent, sigmas)
        assert calls == [rows] * 3 and third_calls == [third_rows] * 3 * bool(third_rows)
    specs = [spec(model), spec(model, OTHER, cfg=5.0), spec(model.clone(), THIRD, THIRD)]
    apart = [spec(tiny.unet(), *one[1:]) for one in specs]
    check_step(specs[:2], latent, 2.0)
    close(run(fuser(specs), latent, sigmas), run(fuser(apart), latent, sigmas))


def test_any_split_of_the_batch(model: Any) -> None:
    """The host packs as many rows into a call as memory allows. Softly, so that rounding turns no pixel's winner."""
    latent, sigmas = tiny.latent(3, 12, 10), tiny.sigmas_of(model, "simple", 3)
    whole = run(fuser([spec(model), spec(model, OTHER)], softness=0.5), latent, sigmas)
    for free, largest in ((0.0, 1), (1.5, 1), (1e12, 3)):
        counted, calls = tiny.count_evaluations(model)
        row = model.model.memory_required([3, 4, 12, 10], cond_shapes={})
        counted.get_free_memory = lambda device, free=free, row=row: free * row * 1.5
        close(run(fuser([spec(counted), spec(counted, OTHER)], softness=0.5), latent, sigmas), whole)
        assert max(calls) == largest * 3 and sum(calls) == 3 * 3 * 3


@pytest.mark.parametrize("outside", [0, 1])
def test_window_edges_are_the_core_s(model: Any, others: dict[str, Any], outside: int) -> None:
    sampling = model.get_model_object("model_sampling")
    start, end = (float(sampling.percent_to_sigma(percent)) for percent in (0.3, 0.7))
    latent, specs = tiny.latent(1, 12, 10), [spec(model), spec(others["eps"], OTHER)]
    windowed, whole = fuser(specs, window=(0.3, 0.7), outside=outside), fuser(specs)
    plain = tiny.cfg_guider(specs[outside][0], specs[outside][1], NEGATIVE)
    for sigma, inside in ((start, True), (start * 1.001, False), (end, True), (end * 0.999, False)):
        expected = one_step(whole if inside else plain, latent, sigma)
        assert torch.equal(one_step(windowed, latent, sigma), expected)
        assert bool((windowed.winners != outside).any()) == inside
    ranged = node_helpers.conditioning_set_values(OTHER, {"start_percent": 0.3, "end_percent": 0.7})
    timed = fuser([spec(model), spec(others["eps"], ranged)])  # an expert out of its time leaves its place
    assert torch.equal(one_step(timed, latent, start), one_step(whole, latent, start))
    assert torch.equal(one_step(timed, latent, start * 1.001), one_step(tiny.cfg_guider(model, POSITIVE, NEGATIVE),
                                                                        latent, start * 1.001))
    for count in (2, 3):  # all of them out of their time: as the core, nothing to say
        assert one_step(fuser([spec(model, ranged)] + [spec(others["eps"], ranged)] * (count - 1)), latent,
                        20.0).isfinite().all()


@pytest.mark.parametrize("sampler", ["heun", "uni_pc", "dpmpp_2s_ancestral"])
def test_the_maps_are_those_it_used(model: Any, others: dict[str, Any], sampler: str) -> None:
    """Every pixel that a step reports is the winner's guided prediction in the evaluation behind it."""
    said: list[list[torch.Tensor]] = [[], []]
    experts = [model.clone(), others["eps"].clone()]
    for heard, expert in zip(said, experts):
        expert.set_model_sampler_post_cfg_function(
            lambda arguments, heard=heard: heard.append(arguments["denoised"].clone()) or arguments["denoised"])
    guider = fuser([spec(experts[0]), spec(experts[1], OTHER)], window=(0.0, 0.8))
    latent, steps = tiny.latent(2, 12, 10), []

    def report(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        assert guider.winners is None  # not before the end
        steps.append((step, denoised.clone(), [heard[-1] for heard in said], len(said[1])))

    run(guider, latent, tiny.sigmas_of(model, "normal", 6), sampler, report)
    assert guider.winners.shape == (6, 2, 12, 10) and guider.winners.dtype == torch.uint8
    assert guider.winners.device.type == "cpu" and [step for step, *_ in steps] == list(range(6))
    assert steps[0][3] < steps[-1][3] and not guider.winners[-1].any()
    for step, denoised, guided, _ in steps:
        assert float((guided[0] - guided[1]).abs().median()) > 0.02  # uni_pc turns what it reports to and fro
        close(torch.where(guider.winners[step].unsqueeze(1) == 0, *guided), denoised)
    image, masks = show_maps(guider, latent)
    assert image.shape == (12, 96, 80, 3) and masks.shape == (24, 12, 10)
    assert torch.equal(masks[12:].reshape(6, 2, 12, 10), (guider.winners == 1).float())
    first = guider.winners
    run(guider, tiny.latent(1), tiny.sigmas_of(model, "normal", 3), sampler)
    assert guider.winners.shape == (3, 1, 8, 8) and first.shape[0] == 6  # the last run only


def test_sizes_that_samplers_ask_for_midway(model: Any, others: dict[str, Any]) -> None:
    """Some packs' samplers call the model on an enlarged state."""
    def enlarging(guide: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None,
                  **options: Any) -> Any:
        result = guide(x, sigmas[:1].repeat(len(x)), **extra_args)
        large = torch.nn.functional.interpolate(x, size=(12, 10))
        assert guide(large, sigmas[:1].repeat(len(x)), **extra_args).shape == large.shape
        callback({"i": 0, "denoised": result, "x": x})
        return result

    guider = fuser([spec(model), spec(others["eps"], OTHER)])
    latent = tiny.latent()
    result = run(guider, latent, torch.tensor([3.0, 0.0]), comfy.samplers.KSAMPLER(enlarging))
    enlarged = guider.winners
    close(result, one_step(guider, latent, 3.0), 1e-5)
    assert torch.equal(enlarged, guider.winners)


def test_nothing_is_kept_or_changed(model: Any, others: dict[str, Any]) -> None:
    pair, latent, sigmas = (model, others["v"]), tiny.latent(), tiny.sigmas_of(model, "simple", 3)
    plain = [run(tiny.cfg_guider(one, POSITIVE, NEGATIVE), latent, sigmas) for one in pair]
    before = [(snapshot(one.model_options), one.patches_uuid, one.object_patches.copy(), one.hook_mode) for one in pair]
    prompts = [text[0][0].clone() for text in (POSITIVE, OTHER, NEGATIVE)]
    guider = fuser([spec(model), spec(others["v"], OTHER), spec(model, OTHER, OTHER)])
    assert guider.model_patcher is model and guider.cfg == 3.0
    first = run(guider, latent, sigmas)
    assert guider.run is None and all(own.prediction is None and not own.run_options for own in guider.experts)
    assert torch.equal(run(guider, latent, sigmas), first)
    after = [(snapshot(one.model_options), one.patches_uuid, one.object_patches, one.hook_mode) for one in pair]
    assert after == before
    assert all(torch.equal(a, b[0][0]) for a, b in zip(prompts, (POSITIVE, OTHER, NEGATIVE)))
    assert all(torch.equal(run(tiny.cfg_guider(one, POSITIVE, NEGATIVE), latent, sigmas), result)
               for one, result in zip(pair, plain))
    assert torch.equal(guider.sample(latent["samples"], latent["samples"], None, torch.zeros(0)), latent["samples"])
    other = tiny.latent(1, 10, 6)
    assert run(guider, other, sigmas).shape == other["samples"].shape


def test_what_is_the_same() -> None:
    model = tiny.unet()
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"])
    lora = model.clone()
    key = "diffusion_model.out.2.weight"
    lora.add_patches({key: (torch.zeros_like(model.model.state_dict()[key]),)})
    sampling = advanced.ModelSamplingDiscrete().patch(model, "v_prediction", False)[0]
    assert is_same_model(model, model.clone()) and is_same_model(patched, patched.clone())
    assert not any(is_same_model(model, other) for other in (patched, lora, sampling, tiny.unet()))
    a = {"x": [1, torch.ones(2)], "f": print, "n": None}
    assert is_same(a, {"x": [1, torch.ones(2)], "f": print, "n": None})
    assert not is_same(a, {**a, "x": [1, torch.zeros(2)]}) and not is_same(a, {**a, "n": 0})
    assert not is_same([1], (1,)) and not is_same({"x": 1}, {"y": 1}) and not is_same(object(), object())


BAD = [
    (lambda m, o: fuser([spec(m)]), "^The Saliency Fusion Guider expects two experts or more, got 1; connect the"),
    (lambda m, o: fuser([spec(m), spec(m, temperature=-0.5)]), "^temperature expects 0 or more .*, got -0.5; raise it"),
    (lambda m, o: fuser([spec(m), spec(m)], outside=2), "^outside expects the number of an expert, 0 to 1, got 2"),
    (lambda m, o: fuser([spec(m), spec(m)], outside=-1), "^outside expects the number of an expert, 0 to 1, got -1"),
    (lambda m, o: fuser([spec(m), spec(m)], blur=-1), "^blur expects 0"),
    (lambda m, o: fuser([spec(m), spec(m)], window=(0.5, 0.2)), "start_percent at or below end_percent"),
    (lambda m, o: fuser([spec(m, []), spec(m)]), "^positive expects a prompt, got an empty conditioning; connect for"),
    (lambda m, o: fuser([spec(m), spec(m, POSITIVE, [])]), "^negative expects a prompt, got an empty conditioning"),
    (lambda m, o: fuser([spec(m), spec(o["flow"])]), "^The experts expect one noise schedule, got diffusion from sigma "
                                                     "14.6146 of expert 0 and flow from sigma 1 of expert 1; use"),
    (lambda m, o: fuser([spec(m), spec(m), spec(advanced.ModelSamplingDiscrete().patch(m, "v_prediction", True)[0])]),
     "^The experts expect one noise schedule, .* and diffusion from sigma [0-9.]+ of expert 2; use models that start"),
    (lambda m, o: fuser([spec(m), spec(tiny.video())]), "^The experts expect one latent format, got SD15 with 4 "
                                                        "channels of expert 0 and Wan21 with 16 channels of expert 1;"),
    (lambda m, o: chain([spec(m)] * 257), "^A fusion expects at most 256 experts, got one more; remove one"),
    (lambda m, o: run(fuser([spec(m), spec(m)]), {"samples": torch.randn(1, 4, 64)}, tiny.sigmas_of(m)),
     "expects an image or video latent, got one without height and width; use CFG Guider"),
    (lambda m, o: fuser([spec(m), spec(m)])(torch.ones(1, 4, 8, 8), torch.ones(1)), "asked during sampling, got no"),
    (lambda m, o: show_maps(tiny.cfg_guider(m, POSITIVE, NEGATIVE), tiny.latent()),
     "^Saliency Maps expects a guider from Saliency Fusion Guider, got CFGGuider; connect that one"),
    (lambda m, o: show_maps(fuser([spec(m), spec(m)]), tiny.latent()),
     "^Saliency Maps expects a guider that has sampled, got one without a finished run; connect the latent"),
]


@pytest.mark.parametrize(("act", "text"), BAD)
def test_bad_input(model: Any, others: dict[str, Any], act: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        act(model, others)
    words = str(caught.value)
    assert words.endswith(".") and ". " not in words and "\n" not in words


def test_maps_of_another_latent(model: Any) -> None:
    guider = fuser([spec(model), spec(model, OTHER)])
    run(guider, tiny.latent(2, 8, 10), tiny.sigmas_of(model, "simple", 2))
    for latent in (tiny.latent(1, 8, 10), tiny.latent(2, 10, 8)):
        with pytest.raises(ValueError, match=r"last run, with 2 image\(s\) of 80x64 pixels, got .*; connect that"):
            show_maps(guider, latent)


def test_flow_models_of_other_shifts_are_one_schedule(model: Any) -> None:
    """A shift moves the steps, not what a sigma means."""
    shifted = advanced.ModelSamplingSD3().patch(tiny.unet(seed=1), 1.0)[0]
    base = advanced.ModelSamplingSD3().patch(model, 3.0)[0]
    check_step([spec(base), spec(shifted, OTHER)], tiny.latent(1, 12, 10), 0.5)


def test_nodes_as_the_host_calls_them(model: Any, others: dict[str, Any]) -> None:
    first = ExpertNode.execute(model, POSITIVE, NEGATIVE, 3.0, 1.0).result[0]
    experts = ExpertNode.execute(others["eps"], OTHER, NEGATIVE, 4.0, 2.0, experts=first).result[0]
    assert len(first) == 1 and [type(one) for one in experts] == [Expert] * 2 and experts[0] is first[0]
    guider = GuiderNode.execute(experts, 4.0, 0.0, 0.0, 1.0, 0, "own").result[0]
    assert isinstance(guider, SaliencyGuider)
    latent = tiny.latent(1, 12, 10)
    result = run(guider, latent, tiny.sigmas_of(model, "simple", 3))
    expected = fuser([spec(model), spec(others["eps"], OTHER, NEGATIVE, 4.0, 2.0)])
    assert torch.equal(result, run(expected, latent, tiny.sigmas_of(model, "simple", 3)))
    wired = custom.SamplerCustomAdvanced.execute(
        custom.Noise_RandomNoise(SEED), guider, comfy.samplers.sampler_object("euler"),
        tiny.sigmas_of(model, "simple", 3), latent).result[0]
    assert torch.equal(wired["samples"], result)
    image, masks = SaliencyMaps.execute(guider, wired).result
    assert image.shape == (3, 96, 80, 3) and masks.shape == (6, 12, 10)
    for node in (ExpertNode, GuiderNode, SaliencyMaps):
        node.GET_SCHEMA()
        assert bool(node.NOT_IDEMPOTENT) == (node is GuiderNode)  # or two equal guider nodes would be one object
