"""DDIM Inversion beside nodes that remember, cache or split, on inpaint and edit models, and with partial prompts."""
from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from inversion_rig import OTHER, PROMPT, assert_follows, invert, printed_inversion
from memory_rig import MEMORIES, answer_in_float64, tile
from mixology.host.trajectory import start_trajectory
from mixology.samplers.inversion import RULES
from test_cycle_beside import EARLY, HALF, LATE, limit, window_frames


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda node: node.__name__)
@pytest.mark.parametrize("rule", RULES)
def test_every_reading_is_the_first_of_a_run(model: Any, memory: Any, rule: str) -> None:
    """As plain readings, each by a guider and a node of its own; so a cache has nothing to answer with."""
    latent = tiny.latent(2)
    found = invert(memory(model), latent, 5, rule=rule)
    assert_follows(found, printed_inversion(model, PROMPT, latent, found.sigmas, rule, memory), 2e-5)


def test_records_and_counts_are_complete(model: Any) -> None:
    calls, seen, by_sigma = 0, [], {}

    def note(args: dict[str, Any]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        seen.append(float(args["sigma"][0]))
        by_sigma[float(args["sigma"][0])] = args["denoised"]
        return args["denoised"]

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(note)
    rising = invert(patched, tiny.latent(), 5).sigmas.tolist()[1:]
    assert calls == len(rising) and seen == rising and set(by_sigma) == set(rising)


@pytest.mark.parametrize("node", [tile, answer_in_float64])
def test_what_stands_around_the_model(model: Any, node: Any) -> None:
    latent = tiny.latent(1, 8, 16)
    found = invert(node(model), latent, 4)
    assert found.states.dtype == torch.float32
    assert_follows(found, printed_inversion(model, PROMPT, latent, found.sigmas, "ditail", node), 2e-5)
    assert torch.allclose(found.states, invert(model, latent, 4).states, atol=1e-3) == (node is answer_in_float64)


def test_a_video_that_is_read_in_windows() -> None:
    model, prompt, generator = tiny.video(), tiny.conditioning(1, 8), torch.Generator().manual_seed(3)
    latent = {"samples": torch.randn(1, 16, 5, 4, 4, generator=generator)}
    found = invert(window_frames(model), latent, 3, "simple", prompt=prompt)
    assert_follows(found, printed_inversion(model, prompt, latent, found.sigmas, "ditail", window_frames), 2e-5)
    assert not torch.allclose(found.states, invert(model, latent, 3, "simple", prompt=prompt).states, atol=1e-4)


# ------------------------------------------------------------------------------------------ inpaint and edit models

def special(kind: str) -> Any:
    """An SD1.x UNet with more input channels: an inpaint model, or InstructPix2Pix."""
    from comfy import supported_models

    class TinyEditConfig(supported_models.SD15_instructpix2pix):
        unet_config: dict[str, Any] = {}
        unet_extra_config: dict[str, Any] = {}

    make = tiny.TinyUNetConfig if kind == "inpaint" else TinyEditConfig
    patcher = tiny.patcher_of(make({
        "image_size": 16, "in_channels": 9 if kind == "inpaint" else 8, "out_channels": 4, "model_channels": 32,
        "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2, "num_head_channels": -1,
        "use_spatial_transformer": True, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1, "context_dim": 16, "use_linear_in_transformer": False, "adm_in_channels": None,
        "use_temporal_attention": False}), 0)
    if kind == "inpaint":
        patcher.model.set_inpaint()
    return patcher


@pytest.mark.parametrize("kind", ["inpaint", "edit"])
@pytest.mark.parametrize("shown", [False, True])
def test_models_that_are_shown_a_picture_read_what_the_prompt_shows_them(kind: str, shown: bool) -> None:
    """As InpaintModelConditioning and InstructPixToPixConditioning write it; without, an inpaint model reads as if all
    were to be painted. A noise mask takes no part."""
    model, latent = special(kind), {**tiny.latent(), "noise_mask": HALF}
    options = {"concat_latent_image": tiny.latent(seed=3)["samples"], "concat_mask": HALF} if shown else {}
    prompt = limit(PROMPT, **options)
    found = invert(model, latent, 3, prompt=prompt)
    assert_follows(found, printed_inversion(model, prompt, latent, found.sigmas, "ditail"), 2e-5)
    assert torch.equal(found.states, invert(model, tiny.latent(), 3, prompt=prompt).states)
    if shown:
        assert not torch.allclose(found.states, invert(model, latent, 3).states, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64, torch.float16])
def test_a_noise_mask_of_any_type_takes_no_part_and_stays(model: Any, dtype: torch.dtype) -> None:
    mask = HALF.to(dtype)
    found = invert(model, {**tiny.latent(), "noise_mask": mask}, 2)
    assert torch.equal(found.states, invert(model, tiny.latent(), 2).states)
    assert start_trajectory(found)[2]["noise_mask"] is mask


# ------------------------------------------------------------------------------------------ refused

@pytest.mark.parametrize(("prompt", "words"), [
    (limit(PROMPT, **EARLY), "a time range that leaves part of it out at sigma 0.04"),
    (limit(PROMPT, **LATE), "a time range that leaves"),
    (limit(PROMPT, area=(4, 8, 0, 0)), "an area that leaves"), (limit(PROMPT, mask=HALF), "a mask that leaves"),
    (limit(PROMPT, strength=0.0), "a strength that leaves"),
    ([*limit(PROMPT, **EARLY), *limit(OTHER, start_percent=0.6, end_percent=1.0)], "a time range that leaves"),
])
def test_prompts_with_gaps_are_refused_before_anything_is_read(model: Any, prompt: Any, words: str) -> None:
    counted, calls = tiny.count_evaluations(model)
    text = "The conditioning of DDIM Inversion expects to say something of the whole picture at every step"
    with pytest.raises(ValueError, match=f"{text}, got {words}.*; combine it with a prompt for the rest"):
        invert(counted, tiny.latent(), 10, prompt=prompt)
    assert calls == []


@pytest.mark.parametrize(("options", "words"), [
    ({"prompt": []}, "a prompt to read the picture with, got an empty conditioning; connect for instance CLIP Text"),
    ({"steps": 0}, "steps expects a number from 1 to 10000, got 0; the paper uses 50"),
    ({"steps": 10 ** 9}, "steps expects a number from 1 to 10000, got 1000000000"),
    ({"steps": float("nan")}, "steps expects a number from 1 to 10000, got nan"),
    ({"rule": "heun"}, "rule expects one of ditail, euler, got heun; choose ditail"),
    ({"scheduler": "linear\ud800"}, "scheduler expects one of the host's, got linear.{2,3}d800; choose one from"),
])
def test_settings_that_do_not_fit(model: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        invert(model, tiny.latent(), **options)


def test_pictures_that_are_no_numbers(model: Any) -> None:
    with pytest.raises(ValueError, match="got one with values that are no numbers .*; encode the picture anew"):
        invert(model, {"samples": tiny.latent()["samples"] * float("nan")})
