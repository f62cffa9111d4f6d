"""Feature Injection beside nodes that hand the model parts of the picture or of the batch: right, or a sentence."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.context_windows
import comfy.samplers
import pytest
import tiny
import torch
from families import raise_norms
from injection_rig import guide, invert, run, soft_mask
from mixology.host.injection import inject_features
from mixology.host.trajectory import start_trajectory
from torch import Tensor

SOURCE, POSITIVE, NEGATIVE = (tiny.conditioning(seed) for seed in (3, 1, 2))
TOLERANCE = 2e-5
EFFECT = 100 * TOLERANCE


@pytest.fixture(scope="module")
def model() -> Any:
    return raise_norms(tiny.unet())


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


def with_tiles(model: Any, size: int, together: int) -> Any:
    """Cuts the picture into tiles of `size` rows, `together` of them in a call: tile by tile, all chunks of each."""
    def tile(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        x, sigma, c = arguments["input"], arguments["timestep"], arguments["c"]
        out = torch.zeros_like(x)
        for top in range(0, x.shape[2], size * together):
            rows = [slice(i, i + size) for i in range(top, min(top + size * together, x.shape[2]), size)]
            own = {key: value.repeat(len(rows), *[1] * (value.ndim - 1)) if torch.is_tensor(value) else value
                   for key, value in c.items()}
            done = apply_model(torch.cat([x[:, :, part] for part in rows]), sigma.repeat(len(rows)), **own)
            for part, piece in zip(rows, done.chunk(len(rows))):
                out[:, :, part] = piece
        return out

    clone = model.clone()
    clone.set_model_unet_function_wrapper(tile)
    return clone


@pytest.mark.parametrize(("together", "batch", "words"), [
    (2, 1, r"expected a model call of 1 prompt\(s\) x 1 image\(s\), got 2 row\(s\); set a tile batch size of 1"),
    (2, 3, r"expected a model call of 1 prompt\(s\) x 3 image\(s\), got 6 row\(s\); set a tile batch size of 1"),
    (1, 1, "expected the model to see 48x64 pixels at once, got 48x32 pixels; remove the node that hands the model"),
])
@pytest.mark.parametrize("first", [True, False], ids=["tiles first", "tiles last"])
def test_tiles(model: Any, together: int, batch: int, words: str, first: bool) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(batch, 8, 6), 2)
    if first:
        injecting = inject_features(with_tiles(model, 4, together), trajectory, SOURCE, 0.5, 0.8)
    else:
        injecting = with_tiles(inject_features(model, trajectory, SOURCE, 0.5, 0.8), 4, together)
    with pytest.raises(ValueError, match=f"Feature Injection {words}"):
        run(guide(injecting, POSITIVE, NEGATIVE), trajectory)


def test_tiles_of_the_targets_alone(model: Any) -> None:
    """Where only the targets' calls are cut, their rows are looked at as well."""
    def tile_pairs(apply_model: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        tiled = with_tiles(model, 4, 2).model_options["model_function_wrapper"]
        plain = len(arguments["cond_or_uncond"]) == 1
        x, sigma, c = arguments["input"], arguments["timestep"], arguments["c"]
        return apply_model(x, sigma, **c) if plain else tiled(apply_model, arguments)

    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
    injecting.set_model_unet_function_wrapper(tile_pairs)
    with pytest.raises(ValueError, match=r"of 2 prompt\(s\) x 1 image\(s\), got 4 row\(s\)"):
        run(guide(injecting, POSITIVE, NEGATIVE), trajectory)


def test_one_tile_of_the_whole_picture_is_right(model: Any) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 4)
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8, soft_mask())
    assert torch.equal(run(guide(with_tiles(injecting, 8, 1), POSITIVE, NEGATIVE), trajectory),
                       run(guide(injecting, POSITIVE, NEGATIVE), trajectory))


def test_windows_of_a_guidance_node(model: Any) -> None:
    """As sliding window guidance: the model is asked about pieces of the picture after its step."""
    def look_at_windows(args: dict[str, Any]) -> Tensor:
        piece = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"]], args["input"][..., :4, :], args["sigma"], args["model_options"])[0]
        denoised = args["denoised"].clone()
        denoised[..., :4, :] += 0.1 * (denoised[..., :4, :] - piece)
        return denoised

    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
    injecting.set_model_sampler_post_cfg_function(look_at_windows)
    with pytest.raises(ValueError, match="to see 48x64 pixels at once, got 48x32 pixels; remove the node that hands"):
        run(guide(injecting, POSITIVE, NEGATIVE), trajectory)


def with_windows(model: Any, dim: int, length: int) -> Any:
    """The host's Context Windows along one dimension of the latent."""
    windows = comfy.context_windows
    clone = model.clone()
    clone.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID),
        context_length=length, context_overlap=1, dim=dim)
    return clone


def test_context_windows_of_the_picture(model: Any) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    injecting = with_windows(inject_features(model, trajectory, SOURCE, 0.5, 0.8), 2, 4)
    with pytest.raises(ValueError, match="to see 48x64 pixels at once, got 48x.. pixels; remove the node that hands"):
        run(guide(injecting, POSITIVE, NEGATIVE), trajectory)


@pytest.mark.parametrize("mask", [None, soft_mask(), soft_mask(3)], ids=["everywhere", "one mask", "a mask each"])
@pytest.mark.parametrize("pictures", [1, 3])
def test_context_windows_of_the_batch(model: Any, pictures: int, mask: Any) -> None:
    """One picture for all images is right in every window; one for each is not known there."""
    trajectory = invert(model, SOURCE, tiny.latent(pictures, 8, 6), 4)
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8, mask)
    noise, sigmas, latent = start_trajectory(trajectory)
    count = 3 // pictures

    def sample(patched: Any) -> Tensor:
        return guide(patched, POSITIVE, NEGATIVE).sample(
            torch.cat([noise.generate_noise(latent)] * count), torch.cat([latent["samples"]] * count),
            comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)

    if pictures == 1 and (mask is None or len(mask) == 1):
        assert distance(sample(with_windows(injecting, 0, 2)), sample(injecting)) < TOLERANCE
        assert distance(sample(with_windows(injecting, 0, 2)), sample(with_windows(model, 0, 2))) > EFFECT
    else:
        with pytest.raises(ValueError, match="expected the model to see all images and frames at once, got a part of"):
            sample(with_windows(injecting, 0, 2))


@pytest.mark.parametrize("area", [(4, 5, 2, 1), (8, 6, 5, 2)], ids=["inside", "over the edge"])
def test_areas_are_no_parts(model: Any, area: tuple[int, int, int, int]) -> None:
    """A prompt for an area sees that area, which the host cuts at the picture's edge."""
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 4)
    regional = [*POSITIVE, [tiny.conditioning(4)[0][0], {"pooled_output": None, "area": area, "strength": 1.0}]]
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8, soft_mask())
    assert distance(run(guide(injecting, regional, NEGATIVE), trajectory),
                    run(guide(model, regional, NEGATIVE), trajectory)) > EFFECT


@pytest.mark.parametrize(("mask", "words"), [
    (torch.full((1, 8, 6), float("nan")), "mask expects values from 0 to 1, got some that are no numbers"),
    (torch.ones(2, 3, 8, 6), "mask expects pictures of height x width, one or a batch, got the shape 2x3x8x6"),
    (torch.ones(2, 8, 6), "mask expects one mask for all images or one for each of the 3, got 2"),
])
def test_masks_that_cannot_be_used(model: Any, mask: Tensor, words: str) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(3, 8, 6), 2)
    with pytest.raises(ValueError, match=words):
        run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8, mask), POSITIVE, NEGATIVE), trajectory)


def test_a_mask_of_bool_is_one_of_numbers(model: Any) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    mask = soft_mask() > 0.5
    kept = mask.clone()
    ours, numbers = (run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8, own), POSITIVE, NEGATIVE),
                         trajectory) for own in (mask, mask.float()))
    assert torch.equal(ours, numbers) and torch.equal(mask, kept) and mask.dtype == torch.bool


@pytest.mark.parametrize(("name", "value"), [
    ("attention_until", float("nan")), ("features_until", float("nan")), ("attention_until", float("inf")),
    ("features_until", -0.5), ("attention_until", 1.5)])
def test_times_that_are_none(model: Any, name: str, value: float) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    with pytest.raises(ValueError, match=f"{name} expects a number from 0 to 1, got"):
        inject_features(model, trajectory, SOURCE, **{"attention_until": 0.5, "features_until": 0.8, name: value})


def test_a_noise_level_that_is_none(model: Any) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    sigmas = trajectory.sigmas.flip(0).clone()
    sigmas[1] = float("nan")
    with pytest.raises(ValueError, match="expected a noise level to read the trajectory at, got nan"):
        run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE), trajectory, sigmas=sigmas)
