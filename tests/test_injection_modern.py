"""Feature Injection on the families that people use now, against queries and keys exchanged by hand."""
from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import torch
from families import MODERN
from injection_rig import OneReading, invert, run
from mixology.host.injection import inject_features
from modern_rig import CROSS, KNOWN, ORDERS, distance, injecting_by_hand

pytestmark = pytest.mark.seam

TOLERANCE, TOLERANCES = 2e-5, {"krea2": 2e-3}
NAMES = [name for name in (*ORDERS, *CROSS) if not MODERN[name].is_missing()]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


def model_of(name: str, models: dict[str, Any]) -> Any:
    if name not in models:
        models[name] = KNOWN[name].model()
    return models[name]


def sample(model: Any, trajectory: Any, positive: Any, negative: Any, cfg: float = 3.0,
           sampler: Any = "euler") -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    with torch.inference_mode():
        return run(guider, trajectory, sampler, sigmas=trajectory.sigmas.flip(0)[:2])


def invert_on(name: str, model: Any, source: Any, batch: int = 1) -> Any:
    family = KNOWN[name]
    with torch.inference_mode():
        return invert(model, source, {"samples": family.latent(batch, *family.size)}, 3)


@pytest.mark.parametrize("name", NAMES)
def test_as_exchanged_by_hand(models: dict[str, Any], name: str) -> None:
    """Own states change nothing, to the bit; another prompt's do what they do by hand."""
    model, family = model_of(name, models), KNOWN[name]
    source, prompts = family.conditioning(3), (family.conditioning(1), family.conditioning(2))
    trajectory = invert_on(name, model, source)
    injecting = inject_features(model, trajectory, source, 1.0, 0.0)
    start = OneReading(trajectory.states[-1])
    own, untouched = (sample(patched, trajectory, source, source, 1.0, start) for patched in (injecting, model))
    assert torch.equal(own, untouched)
    ours, plain = (sample(patched, trajectory, *prompts) for patched in (injecting, model))
    by_hand = sample(injecting_by_hand(name, model, trajectory, source, family.tokens), trajectory, *prompts)
    tolerance = TOLERANCES.get(name, TOLERANCE)
    assert distance(ours, by_hand) < tolerance
    assert distance(ours, plain) > 20 * tolerance
