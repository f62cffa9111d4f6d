"""The taught demo checkpoints: how their differences load, what the judge of styles reads, what they draw."""
from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import nodes as core
import pytest
import torch
from mixology.demo import difference, judge, style_judge, world
from mixology.host import demo
from safetensors.torch import load_file, save_file
from torch import Tensor

FRESH = 20_000_000  # training draws its seeds below
COUNT = 96
LORA = demo.DEMO / "loras" / "mixology-demo-neon.safetensors"
TAUGHT = ("sketch", "scenes", "hearts")
WHOLE = tuple(shape for shape in world.SHAPES if shape != "ring")  # drawn in lines, a ring shows no hole


def scenes_of(count: int, shapes: tuple[str, ...] = world.SHAPES) -> list[world.Scene]:
    rng = random.Random("taught")
    found = []
    for _ in range(count):
        colour, background = rng.sample(list(world.COLOURS), 2)
        found.append(world.Scene(rng.choice(shapes), colour, rng.choice(world.TEXTURES), background))
    return found


# -------------------------------------------------------------------------------------------------- judge

@pytest.mark.slow
@pytest.mark.parametrize("style", world.STYLES)
def test_the_judge_of_styles_reads_fresh_drawings(style: str) -> None:
    scenes = scenes_of(COUNT, WHOLE)
    drawn = [world.draw_scene(scene, FRESH + i, style=style) for i, scene in enumerate(scenes)]
    verdict = style_judge.judge_styles(torch.stack([image for image, _ in drawn]))
    assert float(verdict.shows_style(style).float().mean()) >= 0.95
    assert float(verdict.shows_shapes([str(scene.shape) for scene in scenes]).float().mean()) >= 0.95
    overlap = judge.silhouette_overlap(verdict.mask, torch.stack([mask for _, mask in drawn]))
    assert float(overlap.mean()) >= 0.9


def test_the_judge_of_styles_sees_no_style_without_a_shape() -> None:
    blank, _ = world.draw_scene(world.Scene(background="blue"), 1)
    verdict = style_judge.judge_styles(blank[None])
    assert not verdict.styles.any() and not verdict.shapes.any()


def test_styles_share_the_silhouette_and_an_unknown_one_is_refused() -> None:
    scene = world.Scene("star", "red", "striped", "blue")
    masks = [world.draw_scene(scene, 3, style=style)[1] for style in world.STYLES]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    with pytest.raises(ValueError, match="The style must be one of flat, sketch, neon, got 'oil'"):
        world.draw_scene(scene, 3, style="oil")


# --------------------------------------------------------------------------------------------- difference

def test_a_difference_is_added_as_a_product() -> None:
    g = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(6, 5, 3, 3, generator=g, dtype=torch.float64), "b": torch.randn(4, generator=g)}
    up, down = torch.randn(6, 2, generator=g).double(), torch.randn(2, 5, 3, 3, generator=g).double()
    found = difference.add_difference(base, {"a.up": up, "a.down": down})
    expected = base["a"] + torch.einsum("or,rixy->oixy", up, down)
    torch.testing.assert_close(found["a"], expected, rtol=0, atol=1e-14)
    assert found["b"] is base["b"]


@pytest.mark.parametrize("name", [*TAUGHT, "mixer"])
def test_a_taught_checkpoint_is_the_base_and_its_difference(name: str) -> None:
    stored = load_file(demo.shipped_file(name))
    base = load_file(demo.shipped_file("shapes"))
    assert demo.shipped_file(name).stat().st_size < 10e6
    loaded = demo.load_checkpoint(name)[0].model.state_dict()
    for key, weight in base.items():
        expected = weight.double()
        if f"{key}.up" in stored:
            expected = expected + torch.einsum(
                "or,r...->o...", stored[f"{key}.up"].double(), stored[f"{key}.down"].double())
        found = loaded[key.replace("model.diffusion_model.", "diffusion_model.")]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage", ["another size", "no up", "unknown weight"])
def test_a_difference_that_does_not_fit_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  ) -> None:
    state = load_file(demo.shipped_file("sketch"))
    key = next(key for key in state if key.endswith(".down"))
    if damage == "another size":
        state[key] = state[key][:, :-1].contiguous()
    elif damage == "no up":
        del state[key.replace(".down", ".up")]
    else:
        state["model.diffusion_model.none.weight.down"] = state[key].clone()
        state["model.diffusion_model.none.weight.up"] = state[key.replace(".down", ".up")].clone()
    path = tmp_path / "sketch.safetensors"
    save_file(state, path)
    monkeypatch.setattr(demo, "find_file", lambda name: path)
    with pytest.raises(ValueError, match="expected the sizes of the demo model"):
        demo.load_checkpoint("sketch")


# --------------------------------------------------------------------------------------------------- LoRA

@pytest.mark.seam
def test_the_lora_has_the_usual_names_and_every_one_is_used(caplog: pytest.LogCaptureFixture) -> None:
    state = comfy.utils.load_torch_file(str(LORA), safe_load=True)
    assert all(key.startswith("lora_unet_") for key in state)
    assert LORA.stat().st_size < 2e6
    model, clip, _ = demo.load_checkpoint("shapes")
    patched, _ = comfy.sd.load_lora_for_models(model, clip, state, 1.0, 1.0)
    assert len(patched.patches) == sum(key.endswith(".alpha") for key in state)
    assert not [record for record in caplog.records if "lora key not loaded" in record.getMessage().lower()]


# ------------------------------------------------------------------------------------------------- meaning

def paint(model: Any, clip: Any, vae: Any, scenes: list[world.Scene], seed: int) -> Tensor:
    """One picture a prompt in 12 ddim steps at cfg 3: [B, H, W, C]."""
    encoded = [core.CLIPTextEncode().encode(clip, world.describe_scene(scene))[0][0] for scene in scenes]
    positive = [[torch.cat([row[0] for row in encoded]), {"pooled_output": None}]]
    negative = core.CLIPTextEncode().encode(clip, "")[0]
    latent = {"samples": torch.zeros(len(scenes), 4, 16, 16)}
    out = core.common_ksampler(model, seed, 12, 3.0, "ddim", "ddim_uniform", positive, negative, latent)[0]
    return vae.decode(out["samples"])


@pytest.mark.meaning
@pytest.mark.usefixtures("usual_kernel")
@pytest.mark.parametrize(("style", "share"), [("sketch", 0.85), ("neon", 0.35)])
def test_a_style_is_painted(style: str, share: float) -> None:
    """The LoRA, a tenth of the difference's size, brings its style to half of the pictures."""
    model, clip, vae = demo.load_checkpoint("sketch" if style == "sketch" else "shapes")
    if style == "neon":
        model, clip = comfy.sd.load_lora_for_models(model, clip, load_file(LORA), 1.0, 1.0)
    scenes = [replace(scene, background=None) for scene in scenes_of(64, WHOLE)]
    verdict = style_judge.judge_styles(paint(model, clip, vae, scenes, 5))
    assert float(verdict.shows_style(style).float().mean()) >= share
    assert float(verdict.shows_shapes([str(scene.shape) for scene in scenes]).float().mean()) >= 0.6


@pytest.mark.meaning
@pytest.mark.usefixtures("usual_kernel")
def test_the_experts_know_what_the_other_does_not() -> None:
    scenes = scenes_of(64, ("heart", "star"))
    shapes, backgrounds = ([str(getattr(scene, part)) for scene in scenes] for part in ("shape", "background"))
    found = {}
    for name in ("scenes", "hearts"):
        model, clip, vae = demo.load_checkpoint(name)
        verdict = judge.judge_pictures(paint(model, clip, vae, scenes, 6))
        found[name] = [float(verdict.recognised(part, values).float().mean())
                       for part, values in (("shape", shapes), ("background", backgrounds))]
    assert found["hearts"][0] >= 0.85 and found["hearts"][1] <= 0.35, found
    assert found["scenes"][0] <= 0.2 and found["scenes"][1] >= 0.85, found
