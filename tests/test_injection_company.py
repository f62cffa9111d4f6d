"""Feature Injection on the demo checkpoint beside LoRA, LoRA hooks, ControlNet, long prompts and regions."""
from __future__ import annotations

from typing import Any

import nodes as core
import pytest
import tiny
import torch
from company import COMPANY, Parts, with_long_prompt, with_lora
from injection_rig import SD1_BLOCKS, guide, inject_explicitly, invert, run
from mixology.host import demo
from mixology.host.injection import inject_features

SOURCE, TARGET = "a red circle on a blue background", "a striped red star on a blue background"


@pytest.fixture(scope="module")
def world(checkpoints: Any) -> dict[str, Any]:
    """The demo model, a trajectory of a picture in it, its prompts, and a second instance of the network."""
    model, clip, vae = checkpoints("shapes")
    picture, _ = demo.draw_picture(SOURCE, 4, 128, 112)
    empty, source, target = (core.CLIPTextEncode().encode(clip, text)[0] for text in ("", SOURCE, TARGET))
    reader, _, _ = demo.load_checkpoint("shapes")
    assert reader.model is not model.model
    trajectory = invert(model, source, core.VAEEncode().encode(vae, picture)[0], 3)
    return {"model": model, "reader": reader, "trajectory": trajectory, "empty": empty, "target": target}


@pytest.mark.parametrize("company", [*COMPANY, with_long_prompt])
def test_company_acts_on_the_targets_rows(world: dict[str, Any], company: Any) -> None:
    """As with hooks on the modules, and the same again without it; what is in the model itself reads the source too."""
    trajectory, plain = world["trajectory"], (world["model"], world["target"], world["empty"])
    model, positive, negative = company(plain)
    reader = None if company is with_lora else world["reader"]
    area = next((options["area"] for _, options in positive if "area" in options), None)
    explicit = inject_explicitly(
        model, trajectory, world["empty"], 0.5, 0.8, SD1_BLOCKS, reader=reader, area=area)
    expected = run(guide(explicit, positive, negative), trajectory)

    def draw(parts: Parts) -> torch.Tensor:
        injecting = inject_features(parts[0], trajectory, world["empty"], 0.5, 0.8)
        return run(guide(injecting, *parts[1:]), trajectory)

    before = draw(plain)
    torch.testing.assert_close(draw((model, positive, negative)), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert not torch.allclose(run(guide(model, positive, negative), trajectory), expected, atol=1e-2)
    assert torch.equal(draw(plain), before)


def test_company_costs_no_further_reading(world: dict[str, Any]) -> None:
    """Hooks and ControlNets split the targets into several calls; the source is read once."""
    for company in COMPANY[1:3]:
        model, positive, negative = company((world["model"], world["target"], world["empty"]))
        counted, calls = tiny.count_evaluations(
            inject_features(model, world["trajectory"], world["empty"], 1.0, 1.0))
        run(guide(counted, positive, negative), world["trajectory"])
        assert sum(calls) == 3 * (len(world["trajectory"].sigmas) - 1)
