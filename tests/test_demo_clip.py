"""The demo CLIP: the host's vision and text towers in one space, and how well they tell captions apart."""
from __future__ import annotations

import itertools
import random
from typing import Any

import comfy.clip_vision
import nodes as core
import pytest
import torch
import torch.nn.functional as F
from mixology.demo import world
from mixology.host import demo
from mixology.host.mixer import mix_image, mix_text
from safetensors.torch import load_file
from torch import Tensor

WHOLE = (0.0, 0.0, 1.0, 1.0)
HELD_OUT = 50_000_000  # seeds from here on: no picture of the training set
COLOURS = tuple(world.COLOURS)
CHOICES = {"shape": world.SHAPES, "colour": COLOURS, "texture": world.TEXTURES, "background": COLOURS}


@pytest.fixture(scope="module")
def vision() -> Any:
    return demo.load_clip_vision()


@pytest.fixture(scope="module")
def clip(checkpoints: Any) -> Any:
    return checkpoints("shapes")[1]


def embed_texts(clip: Any, texts: list[str]) -> Tensor:
    """The text tower itself, many texts at once."""
    found = []
    for start in range(0, len(texts), 256):
        rows = [[token for token, _ in clip.tokenize(text)["l"][0]] for text in texts[start:start + 256]]
        found.append(clip.cond_stage_model.clip_l.transformer(torch.tensor(rows))[2])
    return torch.cat(found)


def embed_pictures(vision: Any, pictures: Tensor) -> Tensor:
    return mix_image(vision, pictures, 1.0, WHOLE, None)[0].embedding


def draw_scenes(count: int, style: str) -> tuple[list[world.Scene], Tensor]:
    """What is to be seen, and the pictures."""
    rng = random.Random("held out")
    scenes = [world.complete_scene(world.Scene(texture=rng.choice(world.TEXTURES)), rng) for _ in range(count)]
    pictures = torch.stack([world.draw_scene(scene, HELD_OUT + i, style=style)[0] for i, scene in enumerate(scenes)])
    return [world.seen_in(scene, style) for scene in scenes], pictures


@pytest.mark.seam
def test_towers_are_the_hosts_with_the_files_weights(vision: Any, clip: Any) -> None:
    assert type(vision) is comfy.clip_vision.ClipVisionModel
    file = {name: value.float() for name, value in load_file(demo.shipped_file("clip")).items()}
    projection = file.pop("text_projection.weight")
    held = vision.model.state_dict()
    assert held.keys() == file.keys() and all(torch.equal(held[name].float(), value) for name, value in file.items())
    transformer = clip.cond_stage_model.clip_l.transformer
    assert torch.equal(transformer.text_projection.weight.float(), projection)
    assert vision.model.visual_projection.weight.shape[0] == demo.read_config()["unet"]["context_dim"]


@pytest.mark.seam
def test_core_nodes_take_it(vision: Any) -> None:
    picture, _ = demo.draw_picture("a striped red star on a blue background", 1, 192, 128)
    output, = core.CLIPVisionEncode().encode(vision, picture, "center")
    assert torch.equal(output["image_embeds"], embed_pictures(vision, picture))
    assert output["penultimate_hidden_states"].shape == (1, 65, 128)


def test_prompts_are_what_they_were(clip: Any) -> None:
    """The projection is for the mixer alone: the pooled state of a prompt stays the end token's."""
    conditioning = core.CLIPTextEncode().encode(clip, "a red star")[0]
    states, pooled = conditioning[0][0], conditioning[0][1]["pooled_output"]
    assert torch.equal(pooled[0], states[0, 4])


@pytest.fixture(scope="module")
def captions(clip: Any) -> tuple[list[world.Scene], Tensor]:
    """Every scene of the world, and the embedding of its caption."""
    every = [scene for scene in map(world.Scene, *zip(*itertools.product(*CHOICES.values())))
             if scene.colour != scene.background]
    texts = embed_texts(clip, [world.describe_scene(scene) for scene in every])
    one = mix_text(clip, world.describe_scene(every[7]), 1.0, None)[0].embedding[0]
    torch.testing.assert_close(texts[7], one, rtol=1e-4, atol=1e-4)
    return every, texts


@pytest.mark.slow
@pytest.mark.parametrize("style", world.STYLES)
def test_it_tells_captions_apart(vision: Any, captions: tuple[list[world.Scene], Tensor], style: str) -> None:
    """200 held-out pictures, each against its caption and those with one part changed (about 23), then against all."""
    scenes, pictures = draw_scenes(200, style)
    every, texts = captions
    scores = F.normalize(embed_pictures(vision, pictures)) @ F.normalize(texts).T
    own = torch.tensor([every.index(scene) for scene in scenes])
    parts = torch.tensor([[values.index(getattr(scene, name)) for name, values in CHOICES.items()] for scene in every])
    changed = (parts[own][:, None] != parts).sum(dim=2)
    near = scores.masked_fill(changed > 1, -1.0).argmax(dim=1) == own
    assert near.float().mean() >= 0.95, near.float().mean()
    assert (scores.argmax(dim=1) == own).float().mean() >= 0.95, (scores.argmax(dim=1) == own).float().mean()
