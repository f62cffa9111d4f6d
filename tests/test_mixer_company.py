"""A mix on the demo mixer beside LoRA, hooks, ControlNet, regions, split batches, and this pack's other patches."""
from __future__ import annotations

from typing import Any

import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from attention_merge_rig import Expected, merge, merge_explicitly
from company import CAPTION, COMPANY, Parts
from fusion_rig import check_step
from injection_rig import SD1_BLOCKS, guide, in_single_chunks, inject_explicitly, invert
from injection_rig import run as follow
from mixology.host import demo
from mixology.host.cycle import CycleSampler
from mixology.host.injection import inject_features
from mixology.host.layout import Mix, make_layout, mix_latent
from mixology.host.mixer import make_conditioning, mix_image
from mixology.host.run import Schedule
from spatial_rig import gradient, merged_plain_steps, merger, one_step, run
from torch import Tensor

OTHER = "a dotted green heart on a white background"
WHOLE = (0.0, 0.0, 1.0, 1.0)
WIDE = (15, 19)  # a latent of odd sides


@pytest.fixture(scope="module")
def world(checkpoints: Any) -> dict[str, Any]:
    """The demo mixer, two mixes of two pictures (five tokens and two), zeros, and a checkpoint that reads prompts."""
    model, _, vae = checkpoints("mixer")
    vision = demo.load_clip_vision()
    pictures = [demo.draw_picture(caption, 3, 160, 128)[0] for caption in (CAPTION, OTHER)]
    alone = [mix_image(vision, picture, 1.0, WHOLE, None) for picture in pictures]
    both, negative = make_conditioning(alone[0] + alone[1], "concat", 5)
    turned, _ = make_conditioning(alone[1] + alone[0], "concat", 5)
    short, _ = make_conditioning(alone[1], "concat", 2)
    prompts, clip, _ = checkpoints("shapes")
    text, empty = (core.CLIPTextEncode().encode(clip, words)[0] for words in (CAPTION, ""))
    return {"model": model, "both": both, "turned": turned, "short": short, "negative": negative, "prompts": prompts,
            "text": text, "empty": empty, "latent": core.VAEEncode().encode(vae, pictures[0])[0]}


def sample(parts: Parts, batch: int = 1, size: tuple[int, int] = (16, 14)) -> Tensor:
    return run(tiny.cfg_guider(*parts), tiny.latent(batch, *size), tiny.sigmas_of(parts[0], steps=3))


def close(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first.double(), second.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_company_acts_on_a_mix_as_on_a_prompt(world: dict[str, Any], company: Any, batch: int) -> None:
    """It changes the picture, the sources' order still means nothing, and nothing is left of it."""
    plain = world["model"], world["both"], world["negative"]
    kept = world["both"][0][0].clone()
    before = sample(plain, batch)
    beside = sample(company(plain), batch)
    assert not torch.allclose(beside, before, atol=1e-3)
    close(sample(company((world["model"], world["turned"], world["negative"])), batch), beside)
    assert torch.equal(sample(plain, batch), before) and torch.equal(world["both"][0][0], kept)


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_in_calls_of_their_own(world: dict[str, Any], batch: int) -> None:
    parts = world["model"], world["both"], world["negative"]
    close(sample((in_single_chunks(world["model"]), *parts[1:]), batch, WIDE), sample(parts, batch, WIDE))


def test_a_mix_costs_what_a_prompt_costs(world: dict[str, Any]) -> None:
    """Two rows a step, in one call."""
    counted, calls = tiny.count_evaluations(world["model"])
    sample((counted, world["both"], world["negative"]), 2)
    assert calls == [4] * 3


def test_mixes_of_several_lengths_in_one_picture(world: dict[str, Any]) -> None:
    """Core's masks: five tokens here, two there. Each is the prediction of its own where its mask is 1."""
    masks, latent = gradient(2, 112, 128), tiny.latent(1, 16, 14)
    masks = (masks > 0.5).float()
    parts = [core.ConditioningSetMask().append(mix, mask[None], "default", 1.0)[0]
             for mix, mask in zip((world["both"], world["short"]), masks)]
    together = core.ConditioningCombine().combine(*parts)[0]
    result = one_step(tiny.cfg_guider(world["model"], together, world["negative"]), latent, 3.0)
    close(result, merged_plain_steps(world["model"], masks, [world["both"], world["short"]], [3.0] * 2, latent, 3.0,
                                     world["negative"]))


# ---------------------------------------------------------------------------------- this pack's other patches

def test_under_the_epsilon_merge_guider(world: dict[str, Any]) -> None:
    masks, latent = gradient(2, 112, 128), tiny.latent(3, 16, 14)
    styles = [world["both"], world["short"]]
    merged = one_step(merger(world["model"], masks, styles, world["negative"]), latent, 3.0)
    close(merged, merged_plain_steps(world["model"], masks, styles, [3.0] * 2, latent, 3.0, world["negative"]))


def test_merged_in_cross_attention(world: dict[str, Any]) -> None:
    masks = gradient(2, 112, 128)
    merged, positive = merge(world["model"], masks, world["both"], world["short"])
    ours = sample((merged, positive, world["negative"]))
    plain = world["model"], world["both"], world["negative"]
    with merge_explicitly(world["model"], Expected([world["both"][0][0], world["short"][0][0]], masks)):
        close(ours, sample(plain))
    assert not torch.allclose(ours, sample(plain), atol=1e-2)


def test_as_the_content_of_a_layout(world: dict[str, Any]) -> None:
    """At nu 1 the plain run bit for bit; below, the layout holds."""
    parts = world["model"], world["both"], world["negative"]
    latent = tiny.latent(1, 16, 14)
    layout = make_layout(latent, 5, "shared")

    def mix(nu: float) -> Tensor:
        return mix_latent(
            *parts, layout, schedule=Schedule(0, 6, 3.0, "ddim", "ddim_uniform"), mix=Mix(nu, 1.0, 0.3))["samples"]

    sampler, sigmas = comfy.samplers.sampler_object("ddim"), tiny.sigmas_of(world["model"], steps=6)
    plain = tiny.cfg_guider(*parts).sample(
        layout.noise(0), latent["samples"], sampler, sigmas, disable_pbar=True, seed=0)
    assert torch.equal(mix(1.0), plain)
    assert not torch.allclose(mix(0.5), plain, atol=1e-2)


def test_as_one_of_two_experts(world: dict[str, Any]) -> None:
    """Beside a model that reads a prompt of 77 tokens: the printed fusion of plain runs."""
    check_step([(world["model"], world["both"], world["negative"], 3.0, 1.0),
                (world["prompts"], world["text"], world["empty"], 4.0, 1.0)], tiny.latent(1, 16, 14), 3.0)


def test_with_features_injected(world: dict[str, Any]) -> None:
    """A picture inverted by a prompt's model gives its structure to a mix: as with hooks on the modules."""
    trajectory = invert(world["prompts"], world["text"], world["latent"], 3)
    reader, _, _ = demo.load_checkpoint("mixer")
    explicit = inject_explicitly(world["model"], trajectory, world["negative"], 0.5, 0.8, SD1_BLOCKS, reader=reader)
    expected = follow(guide(explicit, world["both"], world["negative"]), trajectory)
    injecting = inject_features(world["model"], trajectory, world["negative"], 0.5, 0.8)
    close(follow(guide(injecting, world["both"], world["negative"]), trajectory), expected)
    plain = follow(guide(world["model"], world["both"], world["negative"]), trajectory)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_exchanged_by_the_cycle_sampler(world: dict[str, Any]) -> None:
    """The same mix as source and target returns the picture; another one changes it."""
    sigmas = tiny.sigmas_of(world["model"], steps=6)
    sampler = CycleSampler(world["both"], 3.0, 0.1, 0, world["negative"])
    same, other = (run(tiny.cfg_guider(world["model"], target, world["negative"]), world["latent"], sigmas, sampler)
                   for target in (world["both"], world["short"]))
    torch.testing.assert_close(same, world["latent"]["samples"], rtol=0, atol=1e-6)
    assert not torch.allclose(other, same, atol=1e-2)
