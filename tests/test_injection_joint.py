"""Feature Injection on diffusion transformers, against queries and keys exchanged by hand between two calls."""
from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from attention_merge_rig import cell_means
from families import FAMILIES, Family
from injection_rig import guide, in_single_chunks, inject_joint_explicitly, invert, run, soft_mask
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.injection import inject_features
from mixology.host.marks import mark_conditioning
from mixology.host.networks import OVERRIDE
from torch import Tensor

pytestmark = pytest.mark.seam

JOINT = {"sd3": 3, "sd35_medium": 3, "flux": 4, "qwen": 3}  # joint attentions of the tiny models
TOKENS, SOURCE_TOKENS = 11, 7
SIZE = (9, 7)
TOLERANCE = 2e-5
EFFECT = 100 * TOLERANCE


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return {name: FAMILIES[name].model() for name in JOINT}


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


def invert_on(family: Family, model: Any, batch: int) -> Any:
    return invert(model, family.conditioning(3, SOURCE_TOKENS), {"samples": family.latent(batch, *SIZE)}, 4)


def explicit(name: str, model: Any, trajectory: Any, source: Any, weight: Tensor | None = None, **options: Any) -> Any:
    weight = torch.ones(FAMILIES[name].image_tokens(*SIZE)) if weight is None else weight
    return inject_joint_explicitly(model, trajectory, source, 0.5, JOINT[name], weight, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", JOINT)
def test_as_exchanged_by_hand(networks: dict[str, Any], name: str, batch: int) -> None:
    """Texts of other lengths than the source's, together, apart, and beside scaled tokens."""
    family, model = FAMILIES[name], networks[name]
    source = family.conditioning(3, SOURCE_TOKENS)
    trajectory = invert_on(family, model, batch)
    prompts = [family.conditioning(seed, TOKENS) for seed in (1, 2)]
    injecting = inject_features(model, trajectory, source, 0.5, 0.8)
    expected = run(guide(explicit(name, model, trajectory, source), *prompts), trajectory)
    assert distance(run(guide(injecting, *prompts), trajectory), expected) < TOLERANCE
    assert distance(run(guide(in_single_chunks(injecting), *prompts), trajectory), expected) < TOLERANCE
    assert distance(run(guide(model, *prompts), trajectory), expected) > EFFECT


@pytest.mark.parametrize("name", JOINT)
def test_override_of_another_node_and_token_scale(networks: dict[str, Any], name: str) -> None:
    family, model = FAMILIES[name], networks[name]
    source, trajectory = family.conditioning(3, SOURCE_TOKENS), invert_on(family, model, 1)
    prompts = [family.conditioning(seed, TOKENS) for seed in (1, 2)]
    other = model.clone()
    other.model_options["transformer_options"][OVERRIDE] = (
        lambda func, q, *rest, **more: func(q * 0.5, *rest, **more))
    injecting = inject_features(other, trajectory, source, 0.5, 0.8)
    early = trajectory.sigmas.flip(0)[:2]  # later steps inject nothing, where by hand nothing halves the queries
    ours, expected = (run(guide(patched, *prompts), trajectory, sigmas=early) for patched in (
        injecting, explicit(name, model, trajectory, source, query_scale=0.5)))
    assert distance(ours, expected) < TOLERANCE
    factors = torch.ones(1, TOKENS)
    factors[0, 3] = -2.0
    prompts[0] = mark_conditioning(prompts[0], SCALE_KEY, TokenScale(factors, 0.0, 1.0))
    before, after = (run(guide(patched, *prompts), trajectory, sigmas=early) for patched in (
        inject_features(patch_model(other), trajectory, source, 0.5, 0.8), patch_model(injecting)))
    assert distance(before, after) < TOLERANCE
    assert distance(before, ours) > EFFECT


@pytest.mark.parametrize("name", JOINT)
def test_mask_and_evaluations(networks: dict[str, Any], name: str) -> None:
    family, model = FAMILIES[name], networks[name]
    source, trajectory = family.conditioning(3, SOURCE_TOKENS), invert_on(family, model, 1)
    prompts = [family.conditioning(seed, TOKENS) for seed in (1, 2)]
    counted, calls = tiny.count_evaluations(model)
    mask = soft_mask()
    ours = run(guide(inject_features(counted, trajectory, source, 0.5, 0.8, mask), *prompts), trajectory)
    assert sum(calls) == 2 * 4 + 2
    weight = cell_means(cell_means(mask, *SIZE), 5, 4).float().flatten()
    assert distance(ours, run(guide(explicit(name, model, trajectory, source, weight), *prompts), trajectory)
                    ) < TOLERANCE
    assert distance(ours, run(guide(explicit(name, model, trajectory, source), *prompts), trajectory)) > EFFECT
    untouched = inject_features(model, trajectory, source, 0.0, 0.0)
    assert torch.equal(run(guide(untouched, *prompts), trajectory), run(guide(model, *prompts), trajectory))


@pytest.mark.parametrize("name", JOINT)
def test_the_same_picture_and_prompt_on_both_sides_change_nothing(networks: dict[str, Any], name: str) -> None:
    family, model = FAMILIES[name], networks[name]
    source, trajectory = family.conditioning(3, SOURCE_TOKENS), invert_on(family, model, 1)
    sigmas = trajectory.sigmas.flip(0)[:2]
    ours, plain = (run(guide(patched, source, source), trajectory, sigmas=sigmas) for patched in (
        inject_features(model, trajectory, source, 1.0, 0.0), model))
    assert distance(ours, plain) < TOLERANCE


def test_features_alone_are_refused(networks: dict[str, Any]) -> None:
    family, model = FAMILIES["flux"], networks["flux"]
    with pytest.raises(ValueError, match="expected attention_until above 0 for Flux, which has no residual features"):
        inject_features(model, invert_on(family, model, 1), family.conditioning(3, TOKENS), 0.0, 0.8)


def test_tokens_of_another_node_are_refused(networks: dict[str, Any]) -> None:
    """Nothing tells which are the picture's."""
    family, model = FAMILIES["flux"], networks["flux"].clone()
    trajectory = invert_on(family, model, 1)
    model.set_model_patch(lambda args: {**args, "txt": args["txt"].repeat(1, 2, 1), "txt_ids": args["txt_ids"].repeat(
        1, 2, 1)}, "post_input")
    injecting = inject_features(model, trajectory, family.conditioning(3, TOKENS), 0.5, 0.8)
    with pytest.raises(ValueError, match="expected 11 text and 20 picture tokens, got 42 in all; remove the node"):
        run(guide(injecting, family.conditioning(1, TOKENS), family.conditioning(2, TOKENS)), trajectory)
