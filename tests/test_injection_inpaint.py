"""Feature Injection on UNets that paint beside a picture: the source is read with the same one, as the targets are."""
from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from comfy import supported_models
from comfy.patcher_extension import WrappersMP
from families import POOLED, SDXL_SIZES, UNET, WIDTH, raise_norms
from injection_rig import OneReading, guide, in_single_chunks, inject_explicitly, invert, run
from mixology.host.injection import KEY, inject_features
from mixology.host.trajectory import start_trajectory
from torch import Tensor

TOLERANCE = 2e-5
EFFECT = 100 * TOLERANCE
SIZE = (10, 6)
SD1 = {**UNET, "num_heads": 2, "num_head_channels": -1, "transformer_depth": [1, 1], "transformer_depth_middle": 1,
       "transformer_depth_output": [1, 1, 1, 1]}
SDXL = {**UNET, "transformer_depth": [0, 2], "transformer_depth_middle": 2, "transformer_depth_output": [0, 0, 2, 2],
        "num_classes": "sequential", "adm_in_channels": POOLED + SDXL_SIZES}
BLOCKS = {"sd1": [("output", 1), ("output", 2), ("output", 3)], "sdxl": [("output", 0), ("output", 1)],
          "ip2p": [("output", 1), ("output", 2), ("output", 3)], "x4": [("output", 0), ("output", 1)]}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, seed: int = 0) -> Any:
    config, plan = {
        "sd1": (supported_models.SD15, {**SD1, "in_channels": 9}),
        "sdxl": (supported_models.SDXL, {**SDXL, "in_channels": 9}),
        "ip2p": (supported_models.SD15_instructpix2pix, {**SD1, "in_channels": 8}),
        "x4": (supported_models.SD_X4Upscaler, {
            **SD1, "in_channels": 7, "disable_self_attentions": [True, False], "num_classes": 1000}),
    }[name]
    kind = type(f"Tiny{config.__name__}", (config,), {"unet_config": {}, "unet_extra_config": {}})
    patcher = raise_norms(tiny.patcher_of(kind(plan), seed))
    if name in ("sd1", "sdxl"):
        patcher.model.set_inpaint()  # as the host's loader does
    return patcher


def text(seed: int, **options: Any) -> list[Any]:
    return [[draw(1, 77, WIDTH, seed=seed), {
        "pooled_output": draw(1, POOLED, seed=seed), "width": 512, "height": 384, **options}]]


def pictures(name: str, seed: int = 30, batch: int = 1) -> dict[str, Any]:
    """What nodes of the host put into prompts beside the words."""
    if name == "x4":
        return {"concat_image": draw(batch, 3, *SIZE, seed=seed), "noise_augmentation": 0.3}
    found: dict[str, Any] = {"concat_latent_image": draw(batch, 4, *SIZE, seed=seed)}
    if name != "ip2p":
        mask = torch.zeros(batch, 1, *SIZE)
        mask[:, :, :4] = 1
        found["concat_mask"] = mask
    return found


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_source_is_read_beside_the_targets_picture(name: str, batch: int) -> None:
    model, source = build(name), text(3)
    trajectory = invert(model, source, {"samples": draw(batch, 4, *SIZE, seed=7)}, 4)
    prompts = [text(seed, **pictures(name)) for seed in (1, 2)]
    explicit = inject_explicitly(model, trajectory, source, 0.5, 0.8, BLOCKS[name],
                                 shared=("c_concat", "y") if name == "x4" else ("c_concat",))
    ours, expected, plain = (run(guide(patched, *prompts), trajectory) for patched in (
        inject_features(model, trajectory, source, 0.5, 0.8), explicit, model))
    assert distance(ours, expected) < TOLERANCE
    assert distance(ours, plain) > EFFECT


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_noise_mask_and_picture_of_the_run(name: str) -> None:
    """Where no node put a picture into the prompts, the host takes the latent and its noise mask."""
    model, source = build(name), text(3)
    mask = torch.zeros(1, 1, 80, 48)
    mask[:, :, 24:] = 1
    trajectory = invert(model, source, {"samples": draw(1, 4, *SIZE, seed=7), "noise_mask": mask}, 4)
    prompts = [text(1), text(2)]
    explicit = inject_explicitly(model, trajectory, source, 0.5, 0.8, BLOCKS[name], shared=("c_concat",))
    ours, expected, plain = (run(guide(patched, *prompts), trajectory) for patched in (
        inject_features(model, trajectory, source, 0.5, 0.8), explicit, model))
    assert distance(ours, expected) < TOLERANCE
    assert distance(ours, plain) > EFFECT


@pytest.mark.parametrize("name", ["sd1", "ip2p"])
def test_a_source_with_a_picture_of_its_own_keeps_it(name: str) -> None:
    model, source = build(name), text(3, **pictures(name, 40))
    trajectory = invert(model, source, {"samples": draw(1, 4, *SIZE, seed=7)}, 4)
    prompts = [text(seed, **pictures(name)) for seed in (1, 2)]
    ours, expected, borrowed = (run(guide(patched, *prompts), trajectory) for patched in (
        inject_features(model, trajectory, source, 0.5, 0.8),
        inject_explicitly(model, trajectory, source, 0.5, 0.8, BLOCKS[name]),
        inject_features(model, trajectory, text(3), 0.5, 0.8)))
    assert distance(ours, expected) < TOLERANCE
    assert distance(ours, borrowed) > EFFECT


def test_one_trajectory_for_images_with_pictures_of_their_own() -> None:
    model, source = build("sd1"), text(3)
    trajectory = invert(model, source, {"samples": draw(1, 4, *SIZE, seed=7)}, 4)
    injecting = inject_features(model, trajectory, source, 0.5, 0.8)
    found = pictures("sd1", batch=2)
    noise, sigmas, latent = start_trajectory(trajectory)

    def sample(own: dict[str, Any], images: int) -> Tensor:
        import comfy.samplers

        guider = guide(injecting, text(1, **own), text(2, **own))
        return guider.sample(torch.cat([noise.generate_noise(latent)] * images),
                             torch.cat([latent["samples"]] * images), comfy.samplers.sampler_object("euler"), sigmas,
                             disable_pbar=True, seed=0)

    together = sample(found, 2)
    for index, image in enumerate(together):
        alone = sample({key: value[index:index + 1] for key, value in found.items()}, 1)
        assert distance(image[None], alone) < TOLERANCE
    assert distance(together[:1], together[1:]) > EFFECT


@pytest.mark.parametrize("name", BLOCKS)
def test_own_states_change_nothing(name: str) -> None:
    """Bit for bit, in the trajectory's own state and with the same picture on both sides."""
    model, source = build(name), text(3, **pictures(name))
    trajectory = invert(model, source, {"samples": draw(1, 4, *SIZE, seed=7)}, 4)
    reading = OneReading(trajectory.states[-1])
    ours, plain = (run(guide(in_single_chunks(patched), source, source, 1.0), trajectory, reading)
                   for patched in (inject_features(model, trajectory, source, 1.0, 1.0), model))
    assert torch.equal(ours, plain)


def test_a_guider_of_which_nothing_is_known() -> None:
    model, source = build("sd1"), text(3)
    trajectory = invert(model, source, {"samples": draw(1, 4, *SIZE, seed=7)}, 2)
    injecting = inject_features(model, trajectory, source, 0.5, 0.8)
    injecting.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    with pytest.raises(ValueError, match="expected a guider that starts the host's own sampler, to read a model that"):
        run(guide(injecting, text(1), text(2)), trajectory)
