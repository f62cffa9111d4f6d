"""The demo checkpoint is good enough to measure meaning: what it draws is what the prompt says."""
from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import nodes as core
import pytest
import torch
from mixology.demo import judge, world

pytestmark = [pytest.mark.meaning, pytest.mark.usefixtures("usual_kernel")]

PROMPTS = 96
BATCH = 32
BAR = 0.90


def random_scenes(count: int) -> list[world.Scene]:
    rng = random.Random("quality of the demo checkpoint")
    scenes = []
    for _ in range(count):
        background = rng.choice(list(world.COLOURS))
        colour = rng.choice([name for name in world.COLOURS if name != background])
        scenes.append(world.Scene(rng.choice(world.SHAPES), colour, rng.choice(world.TEXTURES), background))
    return scenes


def draw(model: Any, clip: Any, vae: Any, scenes: list[world.Scene], seed: int) -> torch.Tensor:
    """One picture a prompt, 25 ddim steps at cfg 4: [B, H, W, C]. The host samples one prompt for a whole batch, so
    the prompts go in as the rows of one conditioning."""
    encoded = [core.CLIPTextEncode().encode(clip, world.describe_scene(scene))[0][0] for scene in scenes]
    positive = [[torch.cat([row[0] for row in encoded]), {"pooled_output": None}]]
    negative = core.CLIPTextEncode().encode(clip, "")[0]
    latent = {"samples": torch.zeros(len(scenes), 4, 16, 16)}
    out = core.common_ksampler(model, seed, 25, 4.0, "ddim", "ddim_uniform", positive, negative, latent)[0]
    return vae.decode(out["samples"])


@pytest.fixture(scope="module")
def figures(checkpoints: Callable[[str], tuple[Any, Any, Any]]) -> dict[str, float]:
    model, clip, vae = checkpoints("shapes")
    scenes = random_scenes(PROMPTS)
    hits: dict[str, list[torch.Tensor]] = {name: [] for name in ("shape", "colour", "texture", "background")}
    for start in range(0, PROMPTS, BATCH):
        part = scenes[start:start + BATCH]
        verdict = judge.judge_pictures(draw(model, clip, vae, part, start))
        for name, found in hits.items():
            found.append(verdict.recognised(name, [getattr(scene, name) for scene in part]))
    return {name: float(torch.cat(found).float().mean()) for name, found in hits.items()}


@pytest.mark.parametrize("name", ["shape", "colour", "texture", "background"])
def test_recognised(figures: dict[str, float], name: str) -> None:
    assert figures[name] >= BAR, figures
