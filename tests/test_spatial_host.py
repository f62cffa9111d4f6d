"""The Epsilon Merge Guider in a real host: its equation, the core's masked conditioning, identity, errors."""
from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import tiny
import torch
from comfy_api.latest import _io
from mixology.host.layout import LayoutMixSampler, Mix, make_layout
from mixology.nodes.spatial import EpsilonMergeGuider as MergeNode
from mixology.nodes.spatial import GradientMask
from mixology.samplers.spatial import draw_gradient_masks
from spatial_rig import NEGATIVE, SEED, STYLES, gradient, masked_combine, merged_plain_steps, merger, one_step, run
from unchanged import snapshot

pytestmark = pytest.mark.seam


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 8, 8), (3, 10, 6), (1, 7, 11)])
def test_equals_plain_cfg_of_each_style_under_its_mask(
    models: dict[str, Any], kind: str, batch: int, height: int, width: int,
) -> None:
    latent, sigma = tiny.latent(batch, height, width), 0.7
    masks = draw_gradient_masks(97, 61, "logistic", 3, 30, 12, 1)
    scales = [7.5, 2.0, 5.0]
    merged = one_step(merger(models[kind], masks, STYLES[:3], cfg_per_style="7.5 2 5"), latent, sigma)
    close(merged, merged_plain_steps(models[kind], masks, STYLES, scales, latent, sigma))
    equal = one_step(merger(models[kind], masks, STYLES[:3], cfg=4.0), latent, sigma)
    close(equal, merged_plain_steps(models[kind], masks, STYLES, [4.0] * 3, latent, sigma))
    assert not torch.allclose(merged, equal, atol=1e-3)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_equals_the_core_s_masked_conditioning(models: dict[str, Any], kind: str, count: int) -> None:
    """One CFG and masks at latent size: all that the core can say."""
    latent, sigmas = tiny.latent(2, 6, 10), tiny.sigmas_of(models[kind], "simple", 6)
    masks = gradient(count, 10, 6, 20)
    ours = run(merger(models[kind], masks, STYLES[:count]), latent, sigmas)
    core = run(tiny.cfg_guider(models[kind], masked_combine(masks, STYLES), NEGATIVE), latent, sigmas)
    close(ours, core, 1e-4)


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_every_scheduler_ends_where_the_core_does(model: Any, scheduler: str) -> None:
    latent, sigmas, masks = tiny.latent(), tiny.sigmas_of(model, scheduler, 4), gradient()
    core = run(tiny.cfg_guider(model, masked_combine(masks, STYLES), NEGATIVE), latent, sigmas)
    close(run(merger(model, masks), latent, sigmas), core, 1e-4)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "euler_ancestral", "dpmpp_2m_sde", "euler_cfg_pp",
                                     "euler_ancestral_cfg_pp", "res_multistep_cfg_pp", "lcm", "ddim"])
def test_any_sampler_and_noise_mask(model: Any, sampler: str) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[..., 16:48] = 1
    sigmas, masks = tiny.sigmas_of(model, "normal", 4), gradient()
    core = tiny.cfg_guider(model, masked_combine(masks, STYLES), NEGATIVE)
    for latent in (tiny.latent(), {**tiny.latent(), "noise_mask": mask}):
        close(run(merger(model, masks), latent, sigmas, sampler), run(core, latent, sigmas, sampler), 2e-4)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("masks", [
    torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]), torch.ones(1, 64, 64), torch.ones(8, 8)])
def test_one_mask_of_ones_is_plain_cfg_bit_for_bit(models: dict[str, Any], kind: str, masks: torch.Tensor) -> None:
    latent, sigmas = tiny.latent(2), tiny.sigmas_of(models[kind], "simple", 5)
    plain = run(tiny.cfg_guider(models[kind], STYLES[0], NEGATIVE), latent, sigmas)
    assert torch.equal(run(merger(models[kind], masks), latent, sigmas), plain)
    last = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    other = run(tiny.cfg_guider(models[kind], STYLES[1], NEGATIVE), latent, sigmas)
    assert torch.equal(run(merger(models[kind], last), latent, sigmas), other)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_equal_prompts_are_plain_cfg(models: dict[str, Any], kind: str, count: int) -> None:
    """The merge itself is exact; the model may round a batch of N + 1 rows unlike one of 2."""
    latent, sigmas = tiny.latent(1, 8, 6), tiny.sigmas_of(models[kind], "simple", 5)
    plain = run(tiny.cfg_guider(models[kind], STYLES[0], NEGATIVE), latent, sigmas)
    merged = run(merger(models[kind], gradient(count, 50, 40, 33), STYLES[:1] * count), latent, sigmas)
    close(merged, plain, 1e-5)


def test_order_of_the_styles_does_not_matter(model: Any) -> None:
    latent, sigmas, masks = tiny.latent(2), tiny.sigmas_of(model, "simple", 6), gradient(4, 64, 64, 45)
    first = run(merger(model, masks, STYLES, cfg_per_style="3 4 5 6"), latent, sigmas)
    order = [2, 0, 3, 1]
    other = run(merger(model, masks[order], [STYLES[i] for i in order], cfg_per_style="5 3 6 4"), latent, sigmas)
    close(other, first, 1e-4)


def test_evaluations_are_one_per_style_and_one_in_one_call(model: Any) -> None:
    latent, sigmas = tiny.latent(), tiny.sigmas_of(model, steps=10)
    steps = len(sigmas) - 1
    for count in (2, 3, 4):
        counted, calls = tiny.count_evaluations(model)
        run(merger(counted, gradient(count), STYLES[:count]), latent, sigmas)
        assert calls == [count + 1] * steps
    counted, calls = tiny.count_evaluations(model)
    run(merger(counted, gradient(2), cfg=1.0), latent, sigmas)
    run(merger(counted, gradient(2), cfg=7.5, cfg_per_style="1 1"), latent, sigmas)
    assert calls == [2] * steps * 2
    counted, calls = tiny.count_evaluations(model)
    run(merger(counted, gradient(2), cfg=1.0, cfg_per_style="1 2"), latent, sigmas)
    assert calls == [3] * steps
    counted, calls = tiny.count_evaluations(model)
    run(merger(counted, torch.ones(1, 8, 8)), latent, sigmas)  # nothing of style 2 is seen
    assert calls == [2] * steps
    patched, calls = tiny.count_evaluations(model)
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    run(merger(patched, gradient(2), cfg=1.0), latent, sigmas)
    assert calls == [3] * steps


def test_cfg_one_needs_no_negative(model: Any) -> None:
    latent, masks = tiny.latent(2), gradient()
    close(one_step(merger(model, masks, cfg=1.0), latent, 2.0),
          merged_plain_steps(model, masks, STYLES, [1.0, 1.0], latent, 2.0))
    mixed = one_step(merger(model, masks, cfg=1.0, cfg_per_style="1 6"), latent, 2.0)
    close(mixed, merged_plain_steps(model, masks, STYLES, [1.0, 6.0], latent, 2.0))
    short = one_step(merger(model, masks, cfg=4.0, cfg_per_style="6"), latent, 2.0)
    close(short, merged_plain_steps(model, masks, STYLES, [6.0, 4.0], latent, 2.0))
    agreed = one_step(merger(model, masks, cfg=7.5, cfg_per_style="5 5"), latent, 2.0)
    assert torch.equal(agreed, one_step(merger(model, masks, cfg=5.0), latent, 2.0))


@pytest.mark.parametrize("free", [0.0, 2.5, 3.5, 1e12])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_split_of_the_batch(model: Any, free: float, batch: int) -> None:
    """The host packs as many rows into a call as memory allows."""
    latent, sigmas, masks = tiny.latent(batch), tiny.sigmas_of(model, "simple", 3), gradient(4)
    whole = run(merger(model, masks, STYLES), latent, sigmas)
    counted, calls = tiny.count_evaluations(model)
    row = model.model.memory_required([batch, 4, 8, 8], cond_shapes={})
    counted.get_free_memory = lambda device: free * row * 1.5
    close(run(merger(counted, masks, STYLES), latent, sigmas), whole, 1e-4)
    largest = {0.0: 1, 2.5: 2, 3.5: 3, 1e12: 5}[free]  # what is left is tried whole, halved, in thirds
    assert max(calls) == largest * batch and sum(calls) == 5 * batch * (len(sigmas) - 1)


def test_long_and_short_prompts_together(model: Any) -> None:
    styles = [tiny.conditioning(1, 77), tiny.conditioning(3, 154), tiny.conditioning(4, 231)]
    latent, masks = tiny.latent(2), gradient(3)
    close(one_step(merger(model, masks, styles), latent, 3.0),
          merged_plain_steps(model, masks, styles, [3.0] * 3, latent, 3.0))


def test_video_latents() -> None:
    model, styles, negative = tiny.video(), [tiny.conditioning(i, 8) for i in (1, 3)], tiny.conditioning(2, 8)
    latent = {"samples": torch.randn(2, 16, 3, 6, 4, generator=torch.Generator().manual_seed(3))}
    masks = gradient(2, 64, 96, 90)
    for scales, text in (([3.0, 3.0], ""), ([2.0, 5.0], "2, 5")):
        merged = one_step(merger(model, masks, styles, negative, 3.0, text), latent, 0.8)
        close(merged, merged_plain_steps(model, masks, styles, scales, latent, 0.8, negative))
    assert run(merger(model, masks, styles, negative), latent, tiny.sigmas_of(model, "simple", 3)).isfinite().all()


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_under_the_layout_mix_sampler(model: Any, name: str) -> None:
    """Nu 1 is plain sampling by this guider; in between it mixes as under any guider."""
    latent, sigmas, masks = tiny.latent(2), tiny.sigmas_of(model, "simple", 10), gradient()
    inner = comfy.samplers.sampler_object(name)
    layout = make_layout(latent, SEED, "shared")
    plain = run(merger(model, masks), latent, sigmas[4:], inner)
    assert torch.equal(
        run(merger(model, masks), latent, sigmas, LayoutMixSampler(inner, layout, Mix(1.0, 0.6, 0.3))), plain)
    core = tiny.cfg_guider(model, masked_combine(masks, STYLES), NEGATIVE)
    mixing = LayoutMixSampler(inner, layout, Mix(0.4, 0.6, 0.3))
    close(run(merger(model, masks), latent, sigmas, mixing), run(core, latent, sigmas, mixing), 2e-4)


def test_sizes_that_samplers_ask_for_midway(model: Any) -> None:
    """Some packs' samplers call the model on an enlarged state."""
    def enlarging(guide: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, **options: Any) -> Any:
        large = torch.nn.functional.interpolate(x, size=(12, 10))
        assert guide(large, sigmas[:1].repeat(len(x)), **extra_args).shape == large.shape
        return guide(x, sigmas[:1].repeat(len(x)), **extra_args)

    latent, masks = tiny.latent(), gradient(2, 64, 64)
    result = run(merger(model, masks), latent, torch.tensor([3.0, 0.0]), comfy.samplers.KSAMPLER(enlarging))
    close(result, one_step(merger(model, masks), latent, 3.0), 1e-5)


def test_nothing_is_kept_or_changed(model: Any) -> None:
    latent, masks, styles = tiny.latent(), gradient(2, 64, 64), [tiny.conditioning(1), tiny.conditioning(3)]
    copies = [masks.clone(), *(style[0][0].clone() for style in styles)]
    options, guider = snapshot(model.model_options), merger(model, masks, styles)
    plain = comfy.samplers.CFGGuider(model)
    plain.set_conds(styles[0], NEGATIVE)
    before = {key: snapshot(value) for key, value in guider.original_conds.items()}
    first = run(guider, latent, tiny.sigmas_of(model))
    run(plain, latent, tiny.sigmas_of(model))
    assert set(guider.__dict__) - set(plain.__dict__) == {"masks", "own_scales", "weights", "painted"}
    assert guider.weights is None and not guider.painted
    assert {key: snapshot(value) for key, value in guider.original_conds.items()} == before
    assert torch.equal(run(guider, latent, tiny.sigmas_of(model)), first)
    assert all(torch.equal(a, b) for a, b in zip(copies, [masks, *(style[0][0] for style in styles)]))
    assert all(style[0][1] == {"pooled_output": None} for style in styles) and snapshot(model.model_options) == options
    other = tiny.latent(1, 10, 6)
    assert run(guider, other, tiny.sigmas_of(model)).shape == other["samples"].shape


def test_interrupt_and_errors_leave_the_host_usable(model: Any) -> None:
    latent, sigmas, guider = tiny.latent(), tiny.sigmas_of(model), merger(model, gradient())
    before = run(guider, latent, sigmas)

    def interrupt(step: int, *rest: Any) -> None:
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    def exhausted(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise comfy.model_management.OOM_EXCEPTION("no memory")

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(guider, latent, sigmas, callback=interrupt)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        run(guider, latent, sigmas, comfy.samplers.KSAMPLER(exhausted))
    assert guider.weights is None and torch.equal(run(guider, latent, sigmas), before)


@pytest.mark.parametrize(("arguments", "text"), [
    ({"masks": torch.ones(3, 8, 8)}, "^2 styles expect 2 masks, or 1 where .*, got 3; connect as many prompts as"),
    ({"masks": torch.zeros(2, 8, 8)}, "at least one painted area, got empty masks only; paint them"),
    ({"styles": [STYLES[0], []]}, "^positive_1 expects a prompt, got an empty conditioning; connect for instance CLIP"),
    ({"negative": []}, "^negative expects a prompt, got an empty conditioning; connect"),
    ({"cfg_per_style": "5; high"}, "got 'high'; correct that entry or leave the field empty"),
    ({"cfg_per_style": "1 2 3"}, "got 3 numbers for 2 styles; shorten the list"),
])
def test_bad_input(model: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        merger(model, **{"masks": gradient(), **arguments})
    assert str(caught.value).count(".") - str(caught.value).count("7.5") == 1 and str(caught.value).endswith(".")


def test_latent_without_height_and_width(model: Any) -> None:
    with pytest.raises(ValueError, match="expects an image or video latent, got one without height and width; use CFG"):
        run(merger(model, gradient()), {"samples": torch.randn(1, 4, 64)}, tiny.sigmas_of(model))


def call_as_the_host_does(node: Any, wired: dict[str, Any]) -> Any:
    """The host's own expansion and nesting of an Autogrow group, then execute."""
    _, _, v3_data = _io.get_finalized_class_inputs(node.INPUT_TYPES(), dict.fromkeys(wired))
    clone = node.PREPARE_CLASS_CLONE({**v3_data, "hidden_inputs": {}})
    return clone.EXECUTE_NORMALIZED(**_io.build_nested_inputs(wired, v3_data)).result[0]


def test_nodes_as_the_host_calls_them(model: Any) -> None:
    masks = call_as_the_host_does(GradientMask, {
        "width": 64, "height": 48, "profile": "linear", "parts": 3, "angle": 0.0, "sharpness": 20.0, "rows": 1})
    assert torch.equal(masks, draw_gradient_masks(64, 48, "linear", 3, 0.0, 20.0, 1))
    wired = {f"positives.positive_{i}": STYLES[i] for i in (2, 0, 1)}  # wired in another order than numbered
    guider = call_as_the_host_does(MergeNode, {
        "model": model, "masks": masks, "negative": NEGATIVE, "cfg": 3.0, "cfg_per_style": "", **wired})
    latent, sigmas = tiny.latent(1, 6, 8), tiny.sigmas_of(model, "simple", 4)
    result = custom.SamplerCustomAdvanced.execute(
        custom.Noise_RandomNoise(SEED), guider, comfy.samplers.sampler_object("euler"), sigmas, latent)[0]["samples"]
    assert torch.equal(result, run(merger(model, masks, STYLES[:3]), latent, sigmas))


def test_group_of_prompts_grows_from_two_to_sixteen(model: Any) -> None:
    inputs, _, _ = _io.get_finalized_class_inputs(MergeNode.INPUT_TYPES(), {})
    names = [f"positives.positive_{i}" for i in range(16)]
    assert [name for name in inputs["required"] if name.startswith("positives.")] == names[:2]
    assert [name for name in inputs["optional"] if name.startswith("positives.")] == names[2:]


def test_cfg_changed_by_a_wrapper_during_the_run(model: Any) -> None:
    """Core's CFG Override sets guider.cfg around each prediction; a style's own CFG stays."""
    def doubled(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        guider = executor.class_obj
        saved, guider.cfg = guider.cfg, 6.0
        try:
            return executor(*args, **kwargs)
        finally:
            guider.cfg = saved

    patched, latent, masks = model.clone(), tiny.latent(), gradient()
    patched.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, doubled)
    assert torch.equal(one_step(merger(patched, masks), latent, 2.0),
                       one_step(merger(model, masks, cfg=6.0), latent, 2.0))
    own = one_step(merger(patched, masks, cfg_per_style="2"), latent, 2.0)
    assert torch.equal(own, one_step(merger(model, masks, cfg=6.0, cfg_per_style="2"), latent, 2.0))
