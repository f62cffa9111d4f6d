"""What Diffusion Cocktail does to pictures, measured on the demo checkpoints by the judges, over 64 pictures.

Figures in the docstrings were measured on a CPU in float32.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nodes as core
import pytest
import torch
import torch.nn.functional as F
from mixology.demo import judge, style_judge, world
from mixology.host.injection import sample_cocktail
from mixology.host.inversion import blend_prompts, invert_latent
from mixology.host.trajectory import Trajectory
from torch import Tensor

pytestmark = [pytest.mark.meaning, pytest.mark.usefixtures("usual_kernel")]

COUNT = 64
STYLE_STEPS, SHAPE_STEPS = 12, 8
SEED = 30_000_000  # training draws its seeds below
STYLE_CFG, SHAPE_CFG = 3.0, 5.0
RATIOS = ((0.0, 0.0), (0.5, 0.8), (1.0, 1.0))  # attention_until, features_until
STRENGTHS = (0.8, 1.0)
WHOLE = tuple(shape for shape in world.SHAPES if shape != "ring")  # drawn in lines, a ring shows no hole
Models = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Sources:
    """Drawn pictures [B, H, W, C], what they show, and their silhouettes as the judge of styles sees them."""

    scenes: Sequence[world.Scene]
    pictures: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Reading:
    """Means over pictures: overlap with the source's silhouette, and shares that show the style and the shape."""

    overlap: float
    style: float
    shape: float


@pytest.fixture(scope="module")
def base(checkpoints: Callable[[str], Models]) -> Models:
    return checkpoints("shapes")


@pytest.fixture(scope="module")
def sketch(checkpoints: Callable[[str], Models]) -> Models:
    return checkpoints("sketch")


@pytest.fixture(scope="module")
def sources() -> Sources:
    rng = random.Random("cocktail")
    scenes = []
    for _ in range(COUNT):
        colour, background = rng.sample(list(world.COLOURS), 2)
        scenes.append(world.Scene(rng.choice(WHOLE), colour, rng.choice(world.TEXTURES), background))
    pictures = torch.stack([world.draw_scene(scene, SEED + i)[0] for i, scene in enumerate(scenes)])
    return Sources(scenes, pictures, style_judge.judge_styles(pictures).mask)


def encode(models: Models, texts: Sequence[str]) -> Any:
    """The prompts as the rows of one conditioning: the host samples one prompt for a whole batch."""
    rows = [core.CLIPTextEncode().encode(models[1], text)[0][0][0] for text in texts]
    return [[torch.cat(rows), {"pooled_output": None}]]


def invert(models: Models, pictures: Tensor, texts: Sequence[str], steps: int = SHAPE_STEPS, alpha: float = 1.0,
           ) -> Trajectory:
    prompt = blend_prompts(encode(models, texts), encode(models, [""]), alpha, 0.0)
    latent = {"samples": models[2].encode(pictures)}
    return invert_latent(models[0], prompt, latent, steps, "ddim_uniform", "ditail")


def mix(models: Models, trajectory: Trajectory, texts: Sequence[str], cfg: float, attention: float, features: float,
        ) -> Tensor:
    empty = encode(models, [""])
    latent = sample_cocktail(
        models[0], trajectory, source_conditioning=empty, positive=encode(models, texts), negative=empty, cfg=cfg,
        attention_until=attention, features_until=features)
    return models[2].decode(latent["samples"])


def read(pictures: Tensor, sources: Sources, shapes: Sequence[str], style: str = "sketch") -> Reading:
    verdict = style_judge.judge_styles(pictures)
    return Reading(float(judge.silhouette_overlap(verdict.mask, sources.masks).mean()),
                   float(verdict.shows_style(style).float().mean()),
                   float(verdict.shows_shapes(list(shapes)).float().mean()))


def describe(scenes: Sequence[world.Scene]) -> list[str]:
    return [world.describe_scene(scene) for scene in scenes]


@pytest.fixture(scope="module")
def trajectory(base: Models, sources: Sources) -> Trajectory:
    return invert(base, sources.pictures, describe(sources.scenes))


# ------------------------------------------------------------------------------------------------ a new style

@pytest.fixture(scope="module")
def transfers(base: Models, sketch: Models, sources: Sources) -> dict[str, list[Reading]]:
    """From the flat world to sketches, over the ratios, beside image to image with the same model and prompts."""
    trajectory = invert(base, sources.pictures, describe(sources.scenes), STYLE_STEPS)
    texts = describe([replace(scene, background=None) for scene in sources.scenes])
    shapes = [str(scene.shape) for scene in sources.scenes]
    mixed = [read(mix(sketch, trajectory, texts, STYLE_CFG, *ratio), sources, shapes) for ratio in RATIOS]
    latent = {"samples": sketch[2].encode(sources.pictures)}
    positive, negative = encode(sketch, texts), encode(sketch, [""])
    plain = []
    for strength in STRENGTHS:
        out = core.common_ksampler(sketch[0], 5, STYLE_STEPS, STYLE_CFG, "ddim", "ddim_uniform", positive, negative,
                                   latent, denoise=strength)[0]
        plain.append(read(sketch[2].decode(out["samples"]), sources, shapes))
    return {"cocktail": mixed, "image to image": plain}


def test_the_style_arrives(transfers: dict[str, list[Reading]]) -> None:
    """At the paper's ratios in .92."""
    paper, strongest = transfers["cocktail"][1], transfers["image to image"][-1]
    assert paper.style >= 0.88 and paper.style >= strongest.style - 0.05 and paper.shape >= 0.9, transfers


def test_structure_is_kept_better_than_by_image_to_image(transfers: dict[str, list[Reading]]) -> None:
    """At every ratio: any strength that brings as much style keeps less of the silhouette."""
    for point in transfers["cocktail"]:
        rivals = [plain for plain in transfers["image to image"] if plain.style >= point.style]
        rival = max((plain.overlap for plain in rivals), default=transfers["image to image"][-1].overlap)
        assert point.overlap >= rival + 0.05, transfers


# ------------------------------------------------------------------------------------------------ a new shape

@pytest.fixture(scope="module")
def others(sources: Sources) -> list[world.Scene]:
    """The same scenes with another shape."""
    rng = random.Random("others")
    return [replace(scene, shape=rng.choice([shape for shape in WHOLE if shape != scene.shape]))
            for scene in sources.scenes]


@pytest.fixture(scope="module")
def reshaped(base: Models, sources: Sources, trajectory: Trajectory, others: list[world.Scene]) -> dict[str, Reading]:
    """Prompts that ask for another shape: what stays of the picture's own."""
    texts, shapes = describe(others), [str(scene.shape) for scene in others]
    found = {f"attention {until:g}": read(mix(base, trajectory, texts, SHAPE_CFG, until, 0.0), sources, shapes)
             for until in (0.0, 0.5, 1.0)}
    found["features 1"] = read(mix(base, trajectory, texts, SHAPE_CFG, 0.0, 1.0), sources, shapes)
    found["cfg 1.5"] = read(mix(base, trajectory, texts, 1.5, 0.5, 0.0), sources, shapes)
    strong = invert(base, sources.pictures, describe(sources.scenes), alpha=4.0)
    found["alpha 4"] = read(mix(base, strong, texts, SHAPE_CFG, 0.5, 0.0), sources, shapes)
    return found


def test_structure_rises_with_attention(reshaped: dict[str, Reading]) -> None:
    """Overlap .53, .62, .72. Features alone leave it at .53: the demo network's block 4 sees 4 x 4 cells."""
    never, half, always = (reshaped[f"attention {until}"].overlap for until in ("0", "0.5", "1"))
    assert half >= never + 0.04 and always >= half + 0.04, reshaped
    assert abs(reshaped["features 1"].overlap - never) < 0.04, reshaped


def test_structure_rises_with_alpha(reshaped: dict[str, Reading]) -> None:
    """From alpha 1 to 4, overlap .62 to .66."""
    assert reshaped["alpha 4"].overlap >= reshaped["attention 0.5"].overlap + 0.015, reshaped


def test_guidance_changes_the_kind(reshaped: dict[str, Reading]) -> None:
    """From cfg 1.5 to 5 the asked shape is seen in .83 instead of .50, at an overlap of .62 instead of .78; without
    injection it is .88 at .53."""
    weak, strong, free = reshaped["cfg 1.5"], reshaped["attention 0.5"], reshaped["attention 0"]
    assert strong.shape >= weak.shape + 0.15, reshaped
    assert strong.shape >= free.shape - 0.15 and strong.overlap >= free.overlap + 0.04, reshaped


# -------------------------------------------------------------------------------------------- number of things

def count_things(pictures: Tensor) -> list[int]:
    """Connected things of a fair size in pictures [B, H, W, C] on plain backgrounds."""
    counts = []
    for picture in pictures[:, ::2, ::2]:
        backdrop = picture[:3].flatten(0, 1).median(dim=0).values
        rest = ((picture - backdrop).norm(dim=-1) > 0.25).float()
        found = 0
        while float(rest.sum()) > 60:
            part = torch.zeros_like(rest).flatten()
            part[int(rest.flatten().argmax())] = 1
            part = part.view_as(rest)
            for _ in range(150):
                wider = F.max_pool2d(part[None, None], 3, 1, 1)[0, 0] * rest
                if torch.equal(wider, part):
                    break
                part = wider
            found += int(part.sum() > 60)
            rest = rest * (1 - part)
        counts.append(found)
    return counts


def test_the_number_of_things_stays(base: Models) -> None:
    """Two things stay two in .81 although model and prompt know only one: the limit that the authors name."""
    captions = [("circle", "blue"), ("square", "red"), ("triangle", "green"), ("cross", "purple")]
    pairs, texts, shown = [], [], []
    for index in range(16):
        shape, colour = captions[index % 4]
        drawn = world.draw_scene(world.Scene(shape, colour, "plain", "white"), SEED + index, 64, 64)[0]
        pairs.append(F.pad(torch.cat([drawn, drawn], dim=1).permute(2, 0, 1)[None], (0, 0, 32, 32), mode="replicate"))
        shown.append(f"a plain {colour} {shape} on a white background")
        texts.append(f"a plain {colour} star on a white background")
    pictures = torch.cat(pairs).permute(0, 2, 3, 1)
    assert count_things(pictures) == [2] * 16
    out = mix(base, invert(base, pictures, shown), texts, 3.0, 0.5, 0.8)
    alone = core.common_ksampler(base[0], 3, SHAPE_STEPS, 3.0, "ddim", "ddim_uniform", encode(base, texts),
                                 encode(base, [""]), {"samples": torch.zeros(16, 4, 16, 16)})[0]
    kept = sum(count == 2 for count in count_things(out)) / 16
    plain = sum(count == 2 for count in count_things(base[2].decode(alone["samples"]))) / 16
    assert kept >= 0.7 and plain <= 0.1, (kept, plain)
