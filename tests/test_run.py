"""What the nodes that sample share with the host's own KSampler: the global generators, in the same state."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nodes as core
import pytest
import tiny
import torch
from mixology.host.injection import sample_cocktail
from mixology.host.inversion import invert_latent
from mixology.host.layout import Mix, make_layout, mix_latent, record_layout
from mixology.host.run import Schedule
from rig import NEGATIVE, POSITIVE, SEED

pytestmark = pytest.mark.seam


def with_merged_tokens(model: Any) -> Any:
    """A patch that draws from the global generator at every call, as token merging and condition annealing do."""
    patched = model.clone()

    def draw(apply: Any, given: dict[str, Any]) -> torch.Tensor:
        out = apply(given["input"], given["timestep"], **given["c"])
        return out + 0.2 * torch.randn(out.shape[1:])

    patched.set_model_unet_function_wrapper(draw)
    return patched


def make_mix(model: Any) -> torch.Tensor:
    layout = make_layout(tiny.latent(2), SEED, "shared")
    return mix_latent(
        model, POSITIVE, NEGATIVE, layout, schedule=Schedule(3, 8, 3.0, "ddim", "normal"), mix=Mix(0.5, 0.6, 0.3)
    )["samples"]


def make_recording(model: Any) -> torch.Tensor:
    empty = {"samples": torch.zeros(1, 4, 8, 8)}
    return record_layout(
        model, POSITIVE, NEGATIVE, empty, schedule=Schedule(3, 6, 3.0, "euler", "normal"), k_max=0.6, k_min=0.3,
        finish=True)[1]["samples"]


def make_inversion(model: Any) -> torch.Tensor:
    return invert_latent(model, POSITIVE, tiny.latent(), 4, "ddim_uniform", "ditail").states


def make_cocktail(model: Any) -> torch.Tensor:
    trajectory = invert_latent(tiny.unet(), POSITIVE, tiny.latent(), 4, "ddim_uniform", "ditail")
    torch.rand(5)
    return sample_cocktail(
        model, trajectory, source_conditioning=POSITIVE, positive=POSITIVE, negative=NEGATIVE, cfg=3.0,
        attention_until=0.5, features_until=0.8)["samples"]


@pytest.mark.parametrize("make", [make_mix, make_recording, make_inversion, make_cocktail])
def test_the_same_seed_gives_the_same_picture(model: Any, make: Callable[[Any], torch.Tensor]) -> None:
    patched, results = with_merged_tokens(model), []
    for before in (1, 2):
        torch.manual_seed(before)
        results.append(make(patched))
    assert torch.equal(*results) and not torch.equal(results[0], make(model))


@pytest.mark.parametrize("name", ["euler", "ddim"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("indices", [None, [3, 1]])
def test_the_picture_is_the_hosts(model: Any, name: str, masked: bool, indices: list[int] | None) -> None:
    """nu 1 from k_max 1 is the host's KSampler, and so is a layout recorded by a solver without memory."""
    latent = tiny.latent(2)
    if masked:
        latent["noise_mask"] = torch.zeros(1, 64, 64)
        latent["noise_mask"][..., 16:] = 1
    if indices is not None:
        latent["batch_index"] = indices
    patched = with_merged_tokens(model)
    host = core.common_ksampler(patched, 3, 5, 3.0, name, "normal", POSITIVE, NEGATIVE, latent)[0]["samples"]
    torch.manual_seed(9)
    ours = mix_latent(
        patched, POSITIVE, NEGATIVE, make_layout(latent, 3, "shared"), schedule=Schedule(3, 5, 3.0, name, "normal"),
        mix=Mix(1.0, 1.0, 0.0))["samples"]
    assert torch.equal(ours, host)
    torch.manual_seed(9)
    _, recorded = record_layout(
        patched, POSITIVE, NEGATIVE, latent, schedule=Schedule(3, 5, 3.0, name, "normal"), k_max=0.8, k_min=0.3,
        finish=True)
    assert torch.equal(recorded["samples"], host)
    assert not torch.equal(host, core.common_ksampler(model, 3, 5, 3.0, name, "normal", POSITIVE, NEGATIVE, latent)[0][
        "samples"])


def test_layout_noise_leaves_the_global_generator(model: Any) -> None:
    before = torch.random.get_rng_state()
    make_layout(tiny.latent(), 3, "fresh").noise(2)
    assert torch.equal(torch.random.get_rng_state(), before)
