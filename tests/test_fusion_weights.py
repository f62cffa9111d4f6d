"""Experts on one checkpoint with different LoRAs: weights of their own where memory allows, patched once a run.

What is marked for all hosts is what older ones do as well: patch anew at each step.
"""
from __future__ import annotations

import gc
import weakref
from typing import Any

import comfy.model_management
import pytest
import tiny
import torch
from comfy.model_patcher import ModelPatcher
from fusion_rig import OTHER, fuser, run, spec
from test_fusion_memory import nudge

LATENT = tiny.latent(1, 12, 10)


@pytest.fixture
def model() -> Any:
    """A model that the host can load again."""
    model = tiny.unet()
    model.cached_patcher_init = (tiny.unet, ())
    return model


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that are patched, in order."""
    keys: list[str] = []
    original = ModelPatcher.patch_weight_to_device

    def patch(self: Any, key: str, *args: Any, **kwargs: Any) -> Any:
        if key in self.patches:
            keys.append(key)
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(ModelPatcher, "patch_weight_to_device", patch)
    return keys


def sample(first: Any, second: Any, steps: int = 5) -> torch.Tensor:
    return run(fuser([spec(first), spec(second, OTHER)]), LATENT, tiny.sigmas_of(first, "simple", steps))


def test_each_is_patched_once(model: Any, patched: list[str]) -> None:
    first, second = nudge(model, 1), nudge(model, 2)
    sample(first, second)
    assert len(patched) == 2
    comfy.model_management.unload_all_models()
    first.unpatch_model()
    untouched = tiny.unet().model.state_dict()
    assert all(torch.equal(weight, untouched[key]) for key, weight in model.model.state_dict().items())


@pytest.mark.seam
def test_the_result_is_that_of_patching_anew(model: Any, patched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nudge(model, 1), nudge(model, 2)
    found = sample(first, second)
    patched.clear()
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *args, **kwargs: 0)
    again = sample(first, second)
    assert len(patched) >= 5, "no room: patched anew at each step"
    assert torch.equal(found, again)


def test_equal_patches_share(model: Any) -> None:
    first, second = nudge(model, 1), nudge(model, 2)
    twin = second.clone()
    guider = fuser([spec(first), spec(second), spec(first, OTHER), spec(twin, OTHER), spec(model)])
    models = [own.model_patcher.model for own in guider.experts]
    assert models[0] is models[2] is model.model and models[1] is models[3] is not model.model
    assert models[4] not in models[:4]
    assert all(own.model_patcher.model_options == given.model_options
               for own, given in zip(guider.experts, (first, second, first, twin, model)))


@pytest.mark.seam
@pytest.mark.parametrize("reason", ["no loader", "little memory", "an exchanged network"])
def test_else_they_share(model: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "no loader":
        model.cached_patcher_init = None
    first, second = nudge(model, 1), nudge(model, 2)
    if reason == "little memory":
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: second.model_size())
    if reason == "an exchanged network":
        second.add_object_patch("diffusion_model.out", second.model.diffusion_model.out)
    guider = fuser([spec(first), spec(second, OTHER)])
    assert all(own.model_patcher.model is model.model for own in guider.experts)


def test_nothing_is_left(model: Any) -> None:
    guider = fuser([spec(nudge(model, 1)), spec(nudge(model, 2), OTHER)])
    run(guider, LATENT, tiny.sigmas_of(model, "simple", 2))
    own = weakref.ref(guider.others[0].model_patcher.model)
    del guider
    comfy.model_management.unload_all_models()
    gc.collect()
    assert own() is None
