"""The Epsilon Merge Guider beside nodes that know one prompt and its negative, keep state, or cut the picture.

Reference is what plain CFG runs of each style give with the same node, merged by hand.
"""
from __future__ import annotations

import copy
import math
from typing import Any

import comfy.context_windows
import comfy.samplers
import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_slg as slg
import families
import node_helpers
import nodes as core
import pytest
import tiny
import torch
from mixology.host.conds import keeps_state, wants_pairs
from mixology.host.token_scale import scale_tokens
from mixology.nodes.spatial import GradientMask
from mixology.samplers.spatial import draw_gradient_masks
from spatial_rig import NEGATIVE, STYLES, gradient, masked_combine, merged_plain_steps, merger, one_step, run


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.unet()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def turns_texts(model: Any, heard: list[bool]) -> Any:
    """Evaluates in the host's place with other texts, as CADS does: of a pair, which it unpacks."""
    def replaced(arguments: dict[str, Any]) -> list[torch.Tensor]:
        cond, uncond = arguments["conds"]
        heard.append(uncond is None)
        turned = []
        for conds, factor in ((cond, 1.5), (uncond, -0.5)):
            turned.append(conds and [
                {**own, "model_conds": {name: value._copy_with(value.cond * factor) if name == "c_crossattn" else value
                                        for name, value in own["model_conds"].items()}} for own in conds])
        return comfy.samplers.calc_cond_batch(
            arguments["model"], turned, arguments["input"], arguments["sigma"], arguments["model_options"])

    clone = model.clone()
    clone.set_model_sampler_calc_cond_batch_function(replaced)
    return clone


@pytest.mark.parametrize("scales", [[3.0] * 3, [3.0, 6.0, 2.0], [1.0] * 3])
def test_a_node_that_replaces_the_evaluation_is_asked_for_each_style(model: Any, scales: list[float]) -> None:
    heard: list[bool] = []
    counted, calls = tiny.count_evaluations(model)
    patched, latent, masks = turns_texts(counted, heard), tiny.latent(2), gradient(3)
    text = " ".join(map(str, scales))
    merged = one_step(merger(patched, masks, STYLES[:3], cfg_per_style=text), latent, 2.0)
    assert heard == [scales[0] == 1.0] * 3 and sum(calls) == 2 * 3 * (1 if scales[0] == 1 else 2)
    close(merged, merged_plain_steps(patched, masks, STYLES, scales, latent, 2.0))
    assert not torch.allclose(merged, one_step(merger(model, masks, STYLES[:3], cfg_per_style=text), latent, 2.0),
                              atol=1e-3)


def test_skip_layer_guidance_simple() -> None:
    """Core's, which evaluates the negative with skipped layers."""
    family = families.FAMILIES["sd3"]
    model = family.model()
    patched = slg.SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "0", "0").result[0]
    texts = [family.conditioning(seed, 20) for seed in (1, 3, 2)]
    latent, masks = tiny.latent(1, 8, 8, channels=16), gradient()
    merged = one_step(merger(patched, masks, texts[:2], texts[2]), latent, 0.7)
    close(merged, merged_plain_steps(patched, masks, texts[:2], [3.0] * 2, latent, 0.7, texts[2]))
    assert not torch.allclose(merged, one_step(merger(model, masks, texts[:2], texts[2]), latent, 0.7), atol=1e-3)


def test_normalized_attention_guidance_reaches_every_style(model: Any) -> None:
    """Core's takes the first positive row and the first negative one of a call."""
    counted, calls = tiny.count_evaluations(model)
    patched = nag.NAGuidance.execute(counted, 5.0, 0.5, 1.5).result[0]
    latent, masks = tiny.latent(2), gradient(3)
    assert wants_pairs(patched.model_options) and not wants_pairs(model.model_options)
    merged = one_step(merger(patched, masks, STYLES[:3], cfg_per_style="3 5 1"), latent, 2.0)
    assert calls == [4] * 3
    close(merged, merged_plain_steps(patched, masks, STYLES, [3.0, 5.0, 1.0], latent, 2.0))
    plain = one_step(merger(model, masks, STYLES[:3], cfg_per_style="3 5 1"), latent, 2.0)
    for place in range(3):  # each style, not one for all
        where = masks.argmax(0) == place
        assert not torch.allclose(merged[..., where], plain[..., where], atol=1e-3)


def pair_patch(seen: list[Any]) -> Any:
    """Indexes a pair by `cond_or_uncond`, as image prompt adapters do."""
    def patch(out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        indices = options["cond_or_uncond"]
        seen.append((tuple(indices), tuple(getattr(indices, "true", indices))))
        share = len(out) // len(indices)
        factors = torch.tensor([(1.5, 0.25)[index] for index in indices]).repeat_interleave(share)
        return out * factors.reshape(-1, 1, 1)
    return patch


def test_patches_see_positives_and_negatives_in_one_call(model: Any) -> None:
    seen: list[Any] = []
    counted, calls = tiny.count_evaluations(model)
    patched, latent, masks = counted.clone(), tiny.latent(2), gradient(3)
    patched.set_model_attn2_output_patch(pair_patch(seen))
    close(one_step(merger(patched, masks, STYLES[:3]), latent, 2.0),
          merged_plain_steps(patched, masks, STYLES, [3.0] * 3, latent, 2.0))
    assert calls[0] == 2 * 4 and sorted(seen[0][1]) == [0, 1, 2, 3]
    assert all(shown == (true == 1) for shown, true in zip(*seen[0]))
    area = node_helpers.conditioning_set_values(STYLES[2], {"area": (4, 6, 2, 2), "strength": 0.8})
    inside = core.ConditioningCombine().combine(area, STYLES[0])[0]
    close(one_step(merger(patched, gradient(), [inside, STYLES[1]]), latent, 2.0),
          merged_plain_steps(patched, gradient(), [inside, STYLES[1]], [3.0] * 2, latent, 2.0))
    assert "mixology_pairs" not in repr(patched.model_options)


def test_our_own_marks_are_found_beside_such_a_patch(checkpoints: Any) -> None:
    model, clip, _ = checkpoints("shapes")
    captions = ("a striped red star on a blue background", "a dotted green heart on a white background")
    first, empty = (core.CLIPTextEncode().encode(clip, text)[0] for text in (captions[0], ""))
    scaled, second = scale_tokens(model, clip, captions[1], "heart = -2", 0.0, 1.0)
    patched, latent, masks = scaled.clone(), tiny.latent(1, 16, 16), gradient(2, 16, 16)
    patched.set_model_attn1_output_patch(pair_patch([]))
    merged = one_step(merger(patched, masks, [first, second], empty), latent, 3.0)
    close(merged, merged_plain_steps(patched, masks, [first, second], [3.0] * 2, latent, 3.0, empty))
    unscaled = core.CLIPTextEncode().encode(clip, captions[1])[0]
    without = one_step(merger(patched, masks, [first, unscaled], empty), latent, 3.0)
    assert not torch.allclose(merged, without, atol=1e-3)


def test_copies_of_a_guider(model: Any) -> None:
    """Nodes of other packs copy a guider and give the copy other prompts, a model or options."""
    latent, sigmas, masks = tiny.latent(), tiny.sigmas_of(model, "simple", 3), gradient()
    guider = merger(model, masks)
    expected, twin = run(guider, latent, sigmas), copy.copy(guider)
    assert torch.equal(run(twin, latent, sigmas), expected)
    twin.set_cfg(5.0)
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"] * 0.5)
    twin.model_patcher, twin.model_options = patched, patched.model_options
    close(run(twin, latent, sigmas), run(merger(patched, masks, cfg=5.0), latent, sigmas), 1e-6)
    with pytest.raises(ValueError, match="^The Epsilon Merge Guider expects the prompts of its own styles, got ano"):
        twin.set_conds(STYLES[2], STYLES[3])
    own = [[cond["cross_attn"], cond] for cond in guider.original_conds["positive"]]
    twin.set_conds(own, STYLES[3])
    close(run(twin, latent, sigmas), run(merger(patched, masks, negative=STYLES[3], cfg=5.0), latent, sigmas), 1e-6)
    assert torch.equal(run(guider, latent, sigmas), expected)


@pytest.mark.parametrize("patch", [
    lambda m: easycache.EasyCacheNode.execute(m, 3.0, 0.2, 0.95, False).result[0],
    lambda m: easycache.LazyCacheNode.execute(m, 3.0, 0.2, 0.95, False).result[0],
    lambda m: apg.APG.execute(m, 0.5, 2.0, 0.3).result[0],
])
def test_nodes_that_remember_act_as_on_masked_conditioning(model: Any, patch: Any) -> None:
    """Caches whose threshold lets them skip wherever they may, a running mean; twice with one guider."""
    latent, sigmas, masks = tiny.latent(1, 16, 16), tiny.sigmas_of(model, "simple", 8), gradient(2, 16, 16)
    plain = run(merger(model, masks), latent, sigmas)
    expected = run(tiny.cfg_guider(patch(model), masked_combine(masks, STYLES), NEGATIVE), latent, sigmas)
    guider = merger(patch(model), masks)
    for _ in range(2):
        ours = run(guider, latent, sigmas)
        close(ours, expected, 2e-3)
        assert not torch.allclose(ours, plain, rtol=1e-2, atol=1e-2)


def cuts_tiles(model: Any) -> Any:
    """Hands the model halves of the picture, as tile by tile [c, u, c, u]."""
    def tiled(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        x, t, c = arguments["input"], arguments["timestep"], dict(arguments["c"])
        c["c_crossattn"] = torch.cat([c["c_crossattn"]] * 2)
        left, right = apply_model(torch.cat(x.chunk(2, -1)), torch.cat([t, t]), **c).chunk(2)
        return torch.cat([left, right], -1)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(tiled)
    return clone


def test_tiles_are_merged_as_they_are_in_plain_runs(model: Any) -> None:
    patched, latent, masks = cuts_tiles(model), tiny.latent(2, 8, 16), gradient(2, 16, 8)
    merged = one_step(merger(patched, masks), latent, 2.0)
    close(merged, merged_plain_steps(patched, masks, STYLES, [3.0] * 2, latent, 2.0))
    assert not torch.allclose(merged, one_step(merger(model, masks), latent, 2.0), atol=1e-3)


def test_context_windows_of_the_core() -> None:
    model = tiny.video()
    patched = model.clone()
    patched.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=3, context_overlap=1, context_stride=1, closed_loop=False, dim=2)
    comfy.context_windows.create_prepare_sampling_wrapper(patched)
    latent = {"samples": torch.randn(1, 16, 6, 6, 8, generator=torch.Generator().manual_seed(3))}
    styles, negative = [tiny.conditioning(seed, 8) for seed in (1, 3)], tiny.conditioning(2, 8)
    masks = gradient()
    merged = one_step(merger(patched, masks, styles, negative), latent, 0.6)
    close(merged, merged_plain_steps(patched, masks, styles, [3.0] * 2, latent, 0.6, negative))
    assert not torch.allclose(merged, one_step(merger(model, masks, styles, negative), latent, 0.6), atol=1e-4)


def test_nodes_that_draw_from_the_global_generator(model: Any) -> None:
    """Token merging draws once a layer: as often in the call of all styles as in a plain run's."""
    drawn: list[float] = []

    def draw(out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        drawn.append(float(torch.rand(1)))
        return out * (0.5 + drawn[-1])

    patched, latent, sigmas = model.clone(), tiny.latent(), tiny.sigmas_of(model, "simple", 3)
    patched.set_model_attn1_output_patch(draw)
    plain = run(tiny.cfg_guider(patched, STYLES[0], NEGATIVE), latent, sigmas)
    expected = drawn[:]
    drawn.clear()
    close(run(merger(patched, gradient(), STYLES[:1] * 2), latent, sigmas), plain, 1e-5)
    assert drawn == expected


def test_flipped_sigmas_unsample_as_in_the_core(model: Any) -> None:
    sigmas, latent, masks = torch.tensor([0.3, 1.0, 4.0]), tiny.latent(), gradient()
    close(run(merger(model, masks), latent, sigmas),
          run(tiny.cfg_guider(model, masked_combine(masks, STYLES), NEGATIVE), latent, sigmas), 1e-3)


BAD = [
    (lambda m: merger(m, gradient(), cfg=math.nan), "^cfg expects a number such as 7.5, got nan; correct it.$"),
    (lambda m: merger(m, gradient(), cfg=math.inf), "^cfg expects a number such as 7.5, got inf; correct it.$"),
    (lambda m: merger(m, gradient(), cfg_per_style="nan"), "^cfg_per_style expects numbers between 0 and 100"),
    (lambda m: merger(m, gradient() * math.nan), "^The masks expect values from 0 to 1, got negative or undefined"),
    (lambda m: merger(m, gradient() * math.inf), "^The masks expect values from 0 to 1, got negative or undefined"),
    (lambda m: run(merger(m, gradient()), tiny.latent(), torch.tensor([3.0, math.nan, 0.0])),
     "^The Epsilon Merge Guider expects sigmas that are numbers from 0 up, got some that are negative or no numbers"),
    (lambda m: run(merger(m, gradient()), tiny.latent(), torch.tensor([3.0, -1.0])), "expects sigmas that are numbers"),
    (lambda m: run(merger(m, gradient()), tiny.latent(), torch.tensor([math.inf, 0])), "expects sigmas that are numb"),
]


@pytest.mark.parametrize(("act", "text"), BAD)
def test_numbers_that_are_none(model: Any, act: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        act(model)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_bool_masks(model: Any) -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :3], masks[1, :, 3:] = True, True
    assert torch.equal(one_step(merger(model, masks), tiny.latent(), 2.0),
                       one_step(merger(model, masks.float()), tiny.latent(), 2.0))


GRADIENT = {"width": 64, "height": 48, "profile": "linear", "parts": 2, "angle": 0.0, "sharpness": 20.0, "rows": 1}


@pytest.mark.parametrize(("changed", "text"), [
    ({"width": 10 ** 9}, "^width expects 1 to 16384, got 1000000000; correct it.$"),
    ({"width": 0}, "^width expects 1 to 16384, got 0; correct it.$"),
    ({"height": -3}, "^height expects 1 to 16384, got -3; correct it.$"),
    ({"width": 16384, "height": 16384}, "at most 268435456, got 16384 x 16384 x 2; draw them smaller, since they"),
    ({"parts": 0}, "^parts expects 1 to 16, got 0; correct it.$"),
    ({"rows": -1}, "^rows expects 1 to 16, got -1; correct it.$"),
    ({"rows": 10 ** 12}, "^rows expects 1 to 16, got 1000000000000; correct it.$"),
    ({"angle": math.nan}, "^angle expects a number of degrees, got nan; correct it.$"),
    ({"sharpness": math.nan}, "^sharpness expects 0 or more .*, got nan; correct it.$"),
    ({"sharpness": -1.0}, "^sharpness expects 0 or more .*, got -1.0; correct it.$"),
    ({"profile": "sharp\ud800"}, r"^profile expects linear or logistic, got sharp\\ud800; pick one of them.$"),
])
def test_masks_that_cannot_be_drawn(changed: dict[str, Any], text: str) -> None:
    """Whoever asks for them: the node holds its values against the schema besides."""
    with pytest.raises(ValueError, match=text):
        draw_gradient_masks(**{**GRADIENT, **changed})
    assert torch.equal(GradientMask.execute(**GRADIENT).result[0], draw_gradient_masks(64, 48, "linear", 2, 0, 20, 1))


def test_which_functions_keep_state() -> None:
    kept = 0

    def remembers() -> int:
        nonlocal kept
        kept += 1
        return kept

    def reads() -> int:
        return kept

    assert keeps_state(remembers) and not keeps_state(reads) and not keeps_state(print) and not keeps_state(object())
