"""Saliency Maps of the latent that was sampled: each item of a list, both outputs of the sampler, bounded memory."""
from __future__ import annotations

import asyncio
import copy
from typing import Any

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import execution
import pytest
import tiny
import torch
from comfy_api.latest import _io
from fusion_rig import OTHER, SEED, fuser, run, spec
from mixology.host import maps
from mixology.host.fusion import show_maps
from mixology.nodes.fusion import SaliencyMaps


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.unet()


def execute(node: Any, inputs: dict[str, list[Any]]) -> list[list[Any]]:
    """The host's own execution of one node over lists; its outputs, each a list."""
    _, _, v3_data = _io.get_finalized_class_inputs(node.INPUT_TYPES(), dict.fromkeys(inputs))
    results, *_ = asyncio.run(execution.get_output_data(
        "prompt", "1", node, inputs, v3_data={**v3_data, "hidden_inputs": {}}))
    return results


def test_each_latent_of_a_list_gets_its_own_maps(model: Any) -> None:
    """One sampler node, one guider, three latents of two sizes; then the maps node over the list of its outputs."""
    guider = fuser([spec(model), spec(tiny.unet(seed=1), OTHER)])
    sampled: list[torch.Tensor] = []
    latents = [tiny.latent(1, 12, 10, seed=1), tiny.latent(1, 12, 10, seed=2), tiny.latent(2, 8, 10, seed=3)]
    plain = []
    for latent in latents:
        alone = fuser([spec(model), spec(tiny.unet(seed=1), OTHER)])
        sampled.append(run(alone, latent, tiny.sigmas_of(model, "simple", 3)))
        plain.append(show_maps(alone, latent))
    outputs, denoised = execute(custom.SamplerCustomAdvanced, {
        "noise": [custom.Noise_RandomNoise(SEED)], "guider": [guider], "latent_image": latents,
        "sampler": [comfy.samplers.sampler_object("euler")], "sigmas": [tiny.sigmas_of(model, "simple", 3)]})
    assert all(torch.equal(output["samples"], expected) for output, expected in zip(outputs, sampled))
    for given in (outputs, denoised, [outputs[2], outputs[0]]):
        images, masks = execute(SaliencyMaps, {"guider": [guider], "latent": given})
        wanted = plain if len(given) == 3 else [plain[2], plain[0]]
        assert all(torch.equal(image, expected[0]) and torch.equal(mask, expected[1])
                   for image, mask, expected in zip(images, masks, wanted))
    assert not torch.equal(plain[0][1], plain[1][1])


def test_latents_that_no_run_made(model: Any) -> None:
    guider = fuser([spec(model), spec(model, OTHER)])
    sigmas, latent = tiny.sigmas_of(model, "simple", 2), tiny.latent(1, 12, 10)
    result = run(guider, latent, sigmas)
    last = run(guider, latent, sigmas, seed=8, sampler="euler_ancestral")
    first, second = (show_maps(guider, {"samples": samples})[1] for samples in (result, last))
    assert not torch.equal(first, second)
    assert torch.equal(show_maps(guider, latent)[1], second)  # the one that went in: its latest run
    assert torch.equal(show_maps(guider, {"samples": result.double()})[1], first)
    with pytest.raises(ValueError, match=r"^Saliency Maps expects a latent as it came out of the sampling node, got "
                                         r"one that none of the 2 run\(s\) that the guider remembers has made; conn"):
        show_maps(guider, {"samples": result * 1.5})
    with pytest.raises(ValueError, match=r"with 1 image\(s\) of 80x96 pixels, got 1 image\(s\) of 96x80 pixels; "):
        show_maps(guider, {"samples": result.transpose(2, 3)})
    with pytest.raises(ValueError, match="got one without a finished run"):
        show_maps(fuser([spec(model), spec(model, OTHER)]), {"samples": result})

    def stop(*state: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        run(guider, latent, sigmas, callback=stop)
    assert guider.winners is None and torch.equal(show_maps(guider, {"samples": result})[1], first)
    assert torch.equal(show_maps(copy.copy(guider), {"samples": last})[1], second)


def test_the_oldest_are_forgotten(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MAX_BYTES", 3 * 16 * 2)
    guider = fuser([spec(model), spec(model, OTHER)])
    sigmas = tiny.sigmas_of(model, "simple", 2)
    results = [run(guider, tiny.latent(1, 4, 4, seed=place), sigmas) for place in range(5)]
    for samples in results[:2]:
        with pytest.raises(ValueError, match=r"none of the 3 run\(s\)"):
            show_maps(guider, {"samples": samples})
    for samples in results[2:]:
        assert show_maps(guider, {"samples": samples})[1].shape == (4, 4, 4)
    large = run(guider, tiny.latent(1, 16, 16), sigmas)  # more than there is room for: kept alone
    assert show_maps(guider, {"samples": large})[1].shape == (4, 16, 16) and len(guider.maps.runs) == 1
    assert all(run.winners.dtype == torch.uint8 and run.winners.device.type == "cpu" for run in guider.maps.runs)
