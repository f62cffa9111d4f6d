"""The Epsilon Merge Guider beside what people wire to it: CFG nodes, areas, time ranges, LoRA, hooks, ControlNet."""
from __future__ import annotations

from typing import Any

import comfy.hooks
import comfy.samplers
import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_cfg as cfg_nodes
import comfy_extras.nodes_fresca as fresca
import comfy_extras.nodes_mahiro as mahiro
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_sag as sag
import comfy_extras.nodes_tcfg as tcfg
import node_helpers
import nodes as core
import pytest
import tiny
import torch
from comfy import supported_models
from company import lora_weights, make_controlnet
from mixology.host import demo
from mixology.samplers.masks import normalise_masks
from spatial_rig import NEGATIVE, STYLES, gradient, masked_combine, merged_plain_steps, merger, one_step, run

CAPTIONS = ("a striped red star on a blue background", "a dotted green heart on a white background")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.unet()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def set_values(conditioning: Any, **values: Any) -> Any:
    return node_helpers.conditioning_set_values(conditioning, values)


def area(conditioning: Any, *sides: int, strength: float = 1.0) -> Any:
    return set_values(conditioning, area=sides, strength=strength)


CFG_NODES = [
    lambda m: advanced.RescaleCFG().patch(m, 0.7)[0],
    lambda m: cfg_nodes.CFGZeroStar.execute(m).result[0],
    lambda m: cfg_nodes.CFGNorm.execute(m, 0.8).result[0],
    lambda m: tcfg.TCFG.execute(m).result[0],
    lambda m: apg.APG.execute(m, 0.5, 2.0, 0.3).result[0],
    lambda m: fresca.FreSca.execute(m, 0.8, 1.4, 2).result[0],
    lambda m: mahiro.Mahiro.execute(m).result[0],
    lambda m: pag.PerturbedAttentionGuidance.execute(m, 2.0).result[0],
    lambda m: sag.SelfAttentionGuidance.execute(m, 0.5, 2.0).result[0],
]


@pytest.mark.parametrize("patch", CFG_NODES)
def test_every_core_cfg_node_acts_as_on_masked_conditioning(model: Any, patch: Any) -> None:
    """Before, in or after CFG, also where the node evaluates cond once more (perturbed or self-attention guidance)."""
    latent, sigmas, masks = tiny.latent(2, 8, 8), tiny.sigmas_of(model, "simple", 3), gradient(3)
    plain = run(merger(model, masks, STYLES[:3]), latent, sigmas)
    ours = run(merger(patch(model), masks, STYLES[:3]), latent, sigmas)
    combined = run(tiny.cfg_guider(patch(model), masked_combine(masks, STYLES), NEGATIVE), latent, sigmas)
    close(ours, combined, 2e-4)
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_what_functions_of_other_nodes_see(model: Any) -> None:
    latent, masks, seen = tiny.latent(), gradient(), []

    def before(arguments: dict[str, Any]) -> list[torch.Tensor]:
        cond, uncond = arguments["conds_out"]
        assert arguments["cond_scale"] == 4.0 and [len(conds) for conds in arguments["conds"]] == [2, 1]
        return [cond + 1, uncond - 2]

    def at(arguments: dict[str, Any]) -> torch.Tensor:
        assert arguments["cond_scale"] == 4.0
        seen.append((arguments["cond_denoised"], arguments["uncond_denoised"]))
        return 0.5 * (arguments["uncond"] + 4 * (arguments["cond"] - arguments["uncond"]))

    def after(arguments: dict[str, Any]) -> torch.Tensor:
        assert torch.equal(arguments["cond_denoised"], seen[0][0]) and arguments["cond_scale"] == 4.0
        again, = comfy.samplers.calc_cond_batch(
            arguments["model"], [arguments["cond"]], arguments["input"], arguments["sigma"], arguments["model_options"])
        seen.append((again, arguments["denoised"], arguments["input"]))
        return arguments["denoised"] * 0.25

    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(before)
    patched.set_model_sampler_cfg_function(at)
    patched.set_model_sampler_post_cfg_function(after)
    scale = model.model.latent_format.scale_factor
    result = one_step(merger(patched, masks, cfg=4.0, cfg_per_style="9"), latent, 2.0) * scale
    (cond, uncond), (again, denoised, x) = seen
    close(cond, again + 1)  # the list they get evaluates to the merged prediction
    c = [one_step(tiny.cfg_guider(model, style, NEGATIVE, 1.0), latent, 2.0) * scale for style in STYLES[:2]]
    close(cond - 1, masks[0] * c[0] + masks[1] * c[1])
    own = masks[0] * (9 - 4) * (c[0] + 1 - uncond)  # style 0's own CFG, on what the pre-CFG function left
    close(denoised, x - 0.5 * ((x - uncond) + 4 * (uncond - cond)) + own)
    close(result, denoised * 0.25)


def test_functions_see_no_uncond_at_cfg_one(model: Any) -> None:
    def before(arguments: dict[str, Any]) -> list[torch.Tensor]:
        assert arguments["conds"][1] is None
        return arguments["conds_out"]

    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(before)
    one_step(merger(patched, gradient(), cfg=1.0), tiny.latent(), 2.0)


def test_area_of_one_style_stays_in_it(model: Any) -> None:
    latent, masks = tiny.latent(2, 8, 10), gradient(2, 10, 8)
    inside = core.ConditioningCombine().combine(area(STYLES[2], 4, 6, 2, 2, strength=0.8), STYLES[0])[0]
    for scales, text in (([4.0, 4.0], ""), ([4.0, 7.0], "4, 7"), ([1.0, 1.0], "1, 1")):
        counted, calls = tiny.count_evaluations(model)
        merged = one_step(merger(counted, masks, [inside, STYLES[1]], cfg=4.0, cfg_per_style=text), latent, 2.0)
        close(merged, merged_plain_steps(model, masks, [inside, STYLES[1]], scales, latent, 2.0))
        # two styles and the area; at another cfg the negative, once more beside the negative of the area
        assert sum(calls) == 2 * (3 if scales[0] == 1 else 6)
    hard = torch.zeros(2, 8, 10)
    hard[0, :, :5], hard[1, :, 5:] = 1, 1
    merged = one_step(merger(model, hard, [inside, STYLES[1]]), latent, 2.0)
    without = one_step(merger(model, hard), latent, 2.0)
    close(merged[..., 5:], without[..., 5:])
    assert not torch.allclose(merged[..., :5], without[..., :5], atol=1e-2)


def test_same_area_in_both_styles(model: Any) -> None:
    latent, masks = tiny.latent(), gradient()
    styles = [core.ConditioningCombine().combine(area(STYLES[i + 2], 4, 4, 0, 0), STYLES[i])[0] for i in (0, 1)]
    close(one_step(merger(model, masks, styles), latent, 2.0),
          merged_plain_steps(model, masks, styles, [3.0, 3.0], latent, 2.0))


def test_area_in_the_negative_finds_its_twin_in_every_style(model: Any) -> None:
    latent, masks = tiny.latent(), gradient(3)
    negative = core.ConditioningCombine().combine(NEGATIVE, area(STYLES[3], 4, 4, 2, 2))[0]
    counted, calls = tiny.count_evaluations(model)
    close(one_step(merger(counted, masks, STYLES[:3], negative), latent, 2.0),
          merged_plain_steps(model, masks, STYLES[:3], [3.0] * 3, latent, 2.0, negative))
    assert sum(calls) == 3 * 2 + 2
    close(one_step(merger(model, masks, STYLES[:1] * 3, negative), latent, 2.0),
          one_step(tiny.cfg_guider(model, STYLES[0], negative), latent, 2.0))


def test_masks_and_two_prompts_inside_a_style(model: Any) -> None:
    latent, masks = tiny.latent(2), gradient()
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    split = masked_combine(torch.cat([left, 1 - left]), [STYLES[0], STYLES[2]])
    double = core.ConditioningCombine().combine(STYLES[1], set_values(STYLES[3], strength=0.5))[0]
    close(one_step(merger(model, masks, [split, double]), latent, 2.0),
          merged_plain_steps(model, masks, [split, double], [3.0] * 2, latent, 2.0))


def test_style_out_of_its_time_leaves_its_place_to_the_others(model: Any) -> None:
    sampling = model.get_model_object("model_sampling")
    early, late = (float(sampling.percent_to_sigma(percent)) for percent in (0.2, 0.8))
    styles = [STYLES[0], set_values(STYLES[1], start_percent=0.5), STYLES[2]]
    latent, masks = tiny.latent(), gradient(3)
    others = normalise_masks(masks[[0, 2]])
    close(one_step(merger(model, masks, styles, cfg_per_style="3 9 3"), latent, early),
          merged_plain_steps(model, others, [STYLES[0], STYLES[2]], [3.0] * 2, latent, early))
    close(one_step(merger(model, masks, styles), latent, late),
          merged_plain_steps(model, masks, STYLES[:3], [3.0] * 3, latent, late))
    hard = torch.zeros(2, 8, 8)
    hard[0, :, 4:], hard[1, :, :4] = 1, 1  # style 1 alone on the left: the first style fills in
    close(one_step(merger(model, hard, styles[:2]), latent, early),
          one_step(tiny.cfg_guider(model, STYLES[0], NEGATIVE), latent, early))
    changing = core.ConditioningCombine().combine(set_values(STYLES[1], end_percent=0.5), set_values(
        STYLES[3], start_percent=0.5))[0]
    for sigma, prompt in ((early, STYLES[1]), (late, STYLES[3])):
        close(one_step(merger(model, masks[:2], [STYLES[0], changing]), latent, sigma),
              merged_plain_steps(model, masks[:2], [STYLES[0], prompt], [3.0] * 2, latent, sigma))
    nobody = [set_values(style, start_percent=0.5) for style in STYLES[:2]]
    assert one_step(merger(model, masks[:2], nobody), latent, early).isfinite().all()  # as in the core: nothing to say


class TinySDXLConfig(supported_models.SDXL):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}


def test_pooled_outputs_of_each_style(model: Any) -> None:
    sdxl = tiny.patcher_of(TinySDXLConfig({
        "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": [1, 2], "num_heads": 2, "num_head_channels": -1, "use_spatial_transformer": True,
        "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
        "context_dim": 16, "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential",
        "use_temporal_attention": False,
    }), 0)
    g = torch.Generator().manual_seed(0)
    styles = [set_values(STYLES[i], pooled_output=torch.randn(1, 1280, generator=g), width=size, height=64)
              for i, size in ((0, 64), (1, 1024))]
    negative = set_values(NEGATIVE, pooled_output=torch.zeros(1, 1280))
    latent, masks = tiny.latent(2), gradient()
    merged = one_step(merger(sdxl, masks, styles, negative), latent, 2.0)
    close(merged, merged_plain_steps(sdxl, masks, styles, [3.0] * 2, latent, 2.0, negative))
    swapped = [set_values(a, pooled_output=b[0][1]["pooled_output"]) for a, b in zip(styles, styles[::-1])]
    assert not torch.allclose(one_step(merger(sdxl, masks, swapped, negative), latent, 2.0), merged, atol=1e-4)


@pytest.fixture(scope="module")
def parts(checkpoints: Any) -> tuple[Any, list[Any], Any]:
    """The demo model, two styles and the empty prompt."""
    model, clip, _ = checkpoints("shapes")
    first, second, empty = (core.CLIPTextEncode().encode(clip, text)[0] for text in (*CAPTIONS, ""))
    return model, [first, second], empty


def with_lora(model: Any, styles: list[Any], empty: Any) -> tuple[Any, list[Any], Any]:
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora_weights(), 1.0, 1.0)[0], styles, empty


def with_lora_hook(model: Any, styles: list[Any], empty: Any) -> tuple[Any, list[Any], Any]:
    hooks = comfy.hooks.create_hook_lora(lora_weights(), 1.0, 1.0)
    return model, [comfy.hooks.set_hooks_for_conditioning(styles[0], hooks), styles[1]], empty


def with_controlnet(model: Any, styles: list[Any], empty: Any) -> tuple[Any, list[Any], Any]:
    picture, _ = demo.draw_picture(CAPTIONS[0], 0, 128, 128)
    apply = core.ControlNetApplyAdvanced().apply_controlnet
    controlled = apply(styles[0], empty, make_controlnet(1), picture, 0.5, 0, 1)
    return model, [controlled[0], styles[1]], empty


def with_two_controlnets(model: Any, styles: list[Any], empty: Any) -> tuple[Any, list[Any], Any]:
    picture, _ = demo.draw_picture(CAPTIONS[0], 0, 128, 128)
    apply = core.ControlNetApplyAdvanced().apply_controlnet
    pairs = [apply(style, empty, make_controlnet(i), picture, 0.5, 0, 1) for i, style in enumerate(styles)]
    return model, [pair[0] for pair in pairs], empty


def with_long_prompt(model: Any, styles: list[Any], empty: Any) -> tuple[Any, list[Any], Any]:
    _, clip, _ = demo.load_checkpoint("shapes")
    long = core.CLIPTextEncode().encode(clip, ", ".join([CAPTIONS[0]] * 20))[0]
    assert long[0][0].shape[1] == 231
    return model, [styles[0], long], empty


COMPANY = [with_lora, with_lora_hook, with_controlnet, with_two_controlnets, with_long_prompt]


@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize("batch", [1, 3])
def test_company_acts_in_its_style_as_in_plain_sampling(parts: Any, company: Any, batch: int) -> None:
    latent, masks = tiny.latent(batch, 16, 14), gradient(2, 112, 128, 20)
    before = one_step(merger(parts[0], masks, parts[1], parts[2]), latent, 3.0)
    model, styles, empty = company(*parts)
    merged = one_step(merger(model, masks, styles, empty, cfg_per_style="3 5"), latent, 3.0)
    close(merged, merged_plain_steps(model, masks, styles, [3.0, 5.0], latent, 3.0, empty))
    assert not torch.allclose(one_step(merger(model, masks, styles, empty), latent, 3.0), before, atol=1e-4)
    assert torch.equal(one_step(merger(parts[0], masks, parts[1], parts[2]), latent, 3.0), before)


def test_controlnet_of_the_simple_node_reaches_the_negative_but_no_other_style(parts: Any) -> None:
    """Apply ControlNet without a negative marks it for the negative too; the core hands it on, as in plain CFG."""
    model, styles, empty = parts
    latent, masks = tiny.latent(1, 16, 16), gradient(2, 16, 16)
    picture, _ = demo.draw_picture(CAPTIONS[0], 0, 128, 128)
    network = make_controlnet(1)
    simple = core.ControlNetApply().apply_controlnet(styles[0], network, picture, 0.5)[0]
    controlled = core.ControlNetApplyAdvanced().apply_controlnet(styles[0], empty, network, picture, 0.5, 0, 1)
    merged = one_step(merger(model, masks, [simple, styles[1]], empty), latent, 3.0)
    close(merged, merged_plain_steps(model, masks, [controlled[0], styles[1]], [3.0] * 2, latent, 3.0, controlled[1]))
