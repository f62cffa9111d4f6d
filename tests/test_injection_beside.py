"""Feature Injection beside every guider, our other techniques, and other nodes' patches, against hooks on modules."""
from __future__ import annotations

from typing import Any

import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from families import raise_norms
from injection_rig import guide, in_single_chunks, inject_explicitly, invert, run, soft_mask
from mixology.host.attention_merge import merge_conditionings
from mixology.host.cycle import CycleSampler
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.injection import inject_features
from mixology.host.layout import LayoutMixSampler, Mix, make_layout
from mixology.host.marks import mark_conditioning
from mixology.host.spatial import EpsilonMergeGuider
from mixology.samplers.spatial import draw_gradient_masks
from torch import Tensor

BLOCKS = [("output", 1), ("output", 2), ("output", 3)]
SOURCE, POSITIVE, NEGATIVE, OTHER = (tiny.conditioning(seed) for seed in (3, 1, 2, 4))
MASKS = draw_gradient_masks(6, 8, "linear", 2, 0, 20, 1)
TOLERANCE = 2e-5  # of one batch against two calls, in the latents' deviation
EFFECT = 100 * TOLERANCE


@pytest.fixture(scope="module")
def model() -> Any:
    return raise_norms(tiny.unet())


@pytest.fixture(scope="module")
def trajectory(model: Any) -> Any:
    return invert(model, SOURCE, tiny.latent(1, 8, 6), 4)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


def dual(model: Any) -> Any:
    guider = Guider_DualCFG(model)
    guider.set_conds(POSITIVE, OTHER, NEGATIVE)
    guider.set_cfg(3.0, 2.0)
    return guider


def perpendicular(model: Any) -> Any:
    guider = Guider_PerpNeg(model)
    guider.set_conds(POSITIVE, NEGATIVE, OTHER)
    guider.set_cfg(3.0, 1.0)
    return guider


def merging(model: Any) -> Any:
    return EpsilonMergeGuider(model, MASKS, {"positive_0": POSITIVE, "positive_1": OTHER}, NEGATIVE, 3.0)


def combined(model: Any) -> Any:
    return guide(model, core.ConditioningCombine().combine(POSITIVE, OTHER)[0], NEGATIVE)


def unguided(model: Any) -> Any:
    return guide(model, POSITIVE, NEGATIVE, 1.0)


def longer(model: Any) -> Any:
    return guide(model, tiny.conditioning(1, 154), NEGATIVE)


class Reversed(comfy.samplers.CFGGuider):
    """The negative first, as its own packs do."""

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        pair = [self.conds["negative"], None, self.conds["positive"]]
        negative, _, positive = comfy.samplers.calc_cond_batch(self.inner_model, pair, x, timestep, model_options)
        return negative + (positive - negative) * self.cfg


def reversed_cfg(model: Any) -> Any:
    guider = Reversed(model)
    guider.set_conds(POSITIVE, NEGATIVE)
    guider.set_cfg(3.0)
    return guider


@pytest.mark.parametrize("single", [False, True], ids=["batched", "split"])
@pytest.mark.parametrize("make", [dual, perpendicular, merging, combined, unguided, longer, reversed_cfg])
def test_any_guider(model: Any, trajectory: Any, make: Any, single: bool) -> None:
    prepare = in_single_chunks if single else (lambda model: model)
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8, soft_mask())
    explicit = inject_explicitly(model, trajectory, SOURCE, 0.5, 0.8, BLOCKS, soft_mask())
    ours = run(make(prepare(injecting)), trajectory)
    assert distance(ours, run(make(prepare(explicit)), trajectory)) < TOLERANCE
    assert distance(ours, run(make(model), trajectory)) > EFFECT


@pytest.mark.parametrize("make", [merging, combined])
def test_the_source_is_read_once_for_all_conditionings(model: Any, trajectory: Any, make: Any) -> None:
    counted, calls = tiny.count_evaluations(model)
    run(make(inject_features(counted, trajectory, SOURCE, 1.0, 0.0)), trajectory)
    assert calls == [1, 3] * 4


def test_region(model: Any, trajectory: Any) -> None:
    """A conditioning of an area takes over what the model reads in that area of the picture."""
    area = (4, 5, 2, 1)
    entry = [[OTHER[0][0], {**OTHER[0][1], "area": area, "strength": 1.0}]]
    regional = core.ConditioningCombine().combine(POSITIVE, entry)[0]
    for mask in (None, soft_mask()):
        counted, calls = tiny.count_evaluations(inject_features(model, trajectory, SOURCE, 0.5, 0.8, mask))
        explicit = inject_explicitly(model, trajectory, SOURCE, 0.5, 0.8, BLOCKS, mask, area=area)
        ours, expected = (run(guide(patched, regional, NEGATIVE), trajectory) for patched in (counted, explicit))
        assert distance(ours, expected) < TOLERANCE
        assert distance(ours, run(guide(model, regional, NEGATIVE), trajectory)) > EFFECT
        assert sum(calls[:4]) == 1 + 1 + 2 + 2, "two areas, each read once and sampled with both prompts"


def test_regions_alone_do_not_read_the_whole_picture(model: Any, trajectory: Any) -> None:
    halves = [[[text[0][0], {"area": (8, 3, 0, x), "strength": 1.0}]] for text, x in ((POSITIVE, 0), (OTHER, 3))]
    counted, calls = tiny.count_evaluations(model)
    run(guide(inject_features(counted, trajectory, SOURCE, 1.0, 1.0), core.ConditioningCombine().combine(*halves)[0],
              NEGATIVE, 1.0), trajectory)
    assert calls == [2, 2] * 4


def scaled(model: Any, text: Any = POSITIVE) -> tuple[Any, Any]:
    factors = torch.ones(1, 77)
    factors[0, 3:9] = -2.0
    return patch_model(model), mark_conditioning(text, SCALE_KEY, TokenScale(factors, 0.0, 1.0))


def merged(model: Any) -> tuple[Any, Any]:
    return merge_conditionings(model, MASKS, {"conditioning_0": POSITIVE, "conditioning_1": OTHER})


@pytest.mark.parametrize("change", [scaled, merged])
def test_token_scale_and_attention_merge(model: Any, trajectory: Any, change: Any) -> None:
    """In the target's prompts, on a model patched before or after."""
    patched, positive = change(model)
    explicit = inject_explicitly(patched, trajectory, SOURCE, 0.5, 0.8, BLOCKS, reader=model)
    expected = run(guide(explicit, positive, NEGATIVE), trajectory)
    before, after = inject_features(patched, trajectory, SOURCE, 0.5, 0.8), change(
        inject_features(model, trajectory, SOURCE, 0.5, 0.8))[0]
    for injecting in (before, after):
        assert distance(run(guide(injecting, positive, NEGATIVE), trajectory), expected) < TOLERANCE
    assert distance(run(guide(before, POSITIVE, NEGATIVE), trajectory), expected) > EFFECT


def test_token_scale_of_the_prompt_that_the_source_is_read_with(model: Any, trajectory: Any) -> None:
    scaling, source = scaled(model, SOURCE)
    before, after = (run(guide(patched, POSITIVE, NEGATIVE), trajectory) for patched in (
        inject_features(scaling, trajectory, source, 0.5, 0.8),
        patch_model(inject_features(model, trajectory, source, 0.5, 0.8))))
    assert distance(before, after) < TOLERANCE
    assert distance(before, run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE),
                                trajectory)) > EFFECT


def test_cycle_sampler_and_layout_mix(model: Any, trajectory: Any) -> None:
    """Their own readings of the model are injected too."""
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
    explicit = inject_explicitly(model, trajectory, SOURCE, 0.5, 0.8, BLOCKS)
    layout = make_layout(tiny.latent(1, 8, 6, seed=8), 5, "shared")
    for sampler in (CycleSampler(OTHER, 1.0, 0.1, 1),
                    LayoutMixSampler(comfy.samplers.sampler_object("euler"), layout, Mix(0.5, 0.9, 0.2))):
        ours, expected, plain = (run(guide(patched, POSITIVE, NEGATIVE), trajectory, sampler)
                                 for patched in (injecting, explicit, model))
        assert distance(ours, expected) < TOLERANCE and distance(ours, plain) > EFFECT


def with_attention_patches(model: Any) -> Any:
    """Rows alike before and after self-attention, in a block's input, and in the override."""
    clone = model.clone()
    clone.set_model_attn1_patch(lambda n, context, value, options: (n * 1.1, context * 0.8, value * 0.9))
    clone.set_model_attn1_output_patch(lambda n, options: n * 0.7)
    clone.set_model_input_block_patch(lambda h, options: h * 1.05)
    clone.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda func, q, *rest, **more: func(q * 0.5, *rest, **more))
    return clone


def with_replaced_attention(model: Any) -> Any:
    clone = model.clone()
    for block in range(4):
        clone.set_model_attn1_replace(lambda q, k, v, options: v + 0.1 * q - 0.2 * k, "output", block)
    return clone


@pytest.mark.parametrize("change", [with_attention_patches, with_replaced_attention])
def test_patches_of_other_nodes_act_on_the_source_as_well(model: Any, trajectory: Any, change: Any) -> None:
    explicit = inject_explicitly(change(model), trajectory, SOURCE, 0.5, 0.8, BLOCKS)
    expected = run(guide(explicit, POSITIVE, NEGATIVE), trajectory)
    for patched in (inject_features(change(model), trajectory, SOURCE, 0.5, 0.8),
                    change(inject_features(model, trajectory, SOURCE, 0.5, 0.8))):
        assert distance(run(guide(patched, POSITIVE, NEGATIVE), trajectory), expected) < TOLERANCE
    plain = run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE), trajectory)
    assert distance(plain, expected) > EFFECT


def test_a_second_evaluation_of_a_guidance_node(model: Any, trajectory: Any) -> None:
    guiding = PerturbedAttentionGuidance.execute(model, 2.0).result[0]
    explicit = inject_explicitly(guiding, trajectory, SOURCE, 0.5, 0.8, BLOCKS)
    ours = run(guide(inject_features(guiding, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE), trajectory)
    assert distance(ours, run(guide(explicit, POSITIVE, NEGATIVE), trajectory)) < TOLERANCE
    plain = run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE), trajectory)
    assert distance(ours, plain) > EFFECT


def test_a_prompt_out_of_its_time_is_no_reason_to_read(model: Any, trajectory: Any) -> None:
    late = [[OTHER[0][0], {"area": (4, 4, 0, 0), "start_percent": 0.7, "end_percent": 1.0}]]
    counted, calls = tiny.count_evaluations(model)
    run(guide(inject_features(counted, trajectory, SOURCE, 0.5, 0.0), core.ConditioningCombine().combine(
        POSITIVE, late)[0], NEGATIVE, 1.0), trajectory)
    assert calls[:2] == [1, 1]
