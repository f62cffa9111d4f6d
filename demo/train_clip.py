"""Train the demo CLIP: a vision tower, and the text tower's projection into the same space.

    python demo/train_clip.py --comfyui PATH --work FOLDER [--world drawings] [--steps N]

Learns from pairs of a crop and a caption of what the crop shows. The text tower is the shipped prompt encoder, frozen:
only its projection is learned. Seeded by step and resumable. See demo/MODEL_CARD.md.
"""
from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

from train_base import (
    ARGS,
    ATTRIBUTES,
    CONFIG,
    DEVICE,
    FILES,
    WORLD,
    Trainer,
    autocast,
    caption_of,
    generator,
    initialise,
)

# isort: split
import torch
import torch.nn.functional as F
from comfy import clip_model, ops
from comfy.ldm.modules.attention import optimized_attention_for_device
from safetensors.torch import save_file
from train_text import Text
from train_tuned import load_text

VISION = json.loads((FILES / "clip_vision.json").read_text(encoding="utf-8"))
SIDE = 128
WORDINGS = 4  # captions for everything that can be said
CELLS = 2  # of the silhouette along a patch's side

Box = tuple[int, int, int]  # left, top and side in pixels of a 128 x 128 picture


# ----------------------------------------------------------------------------------------------- the towers

class Vision(torch.nn.Module):
    """The host's CLIP vision model; its own forward adds in place, without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.model = clip_model.CLIPVisionModelProjection(VISION, torch.float32, DEVICE, ops.disable_weight_init)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Projected embeddings [B, C] of preprocessed pixels [B, 3, H, W], and patches' states halfway [B, N, C]."""
        network = self.model.vision_model
        x = network.pre_layrnorm(network.embeddings(pixels))
        attention = optimized_attention_for_device(x.device, mask=False, small_input=True)
        states = []
        for layer in network.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), None, attention)
            x = x + layer.mlp(layer.layer_norm2(x))
            states.append(x[:, 1:])
        return self.model.visual_projection(network.post_layernorm(x[:, 0])), states[len(states) // 2 - 1]


def build() -> torch.nn.ModuleDict:
    vision = Vision()
    initialise(vision, 8)
    torch.nn.init.normal_(vision.model.vision_model.embeddings.class_embedding, std=0.02)
    width = VISION["projection_dim"]
    projection = torch.nn.Linear(CONFIG["text"]["hidden_size"], width, bias=False)
    torch.nn.init.orthogonal_(projection.weight)
    heads = torch.nn.Linear(width, sum(len(values) + 1 for values in ATTRIBUTES.values()))
    inside = torch.nn.Sequential(torch.nn.LayerNorm(VISION["hidden_size"]),
                                 torch.nn.Linear(VISION["hidden_size"], CELLS * CELLS))
    temperature = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(temperature.weight, math.log(10.0))
    return torch.nn.ModuleDict({"vision": vision, "text": projection, "heads": heads, "inside": inside,
                                "temperature": temperature})


# ----------------------------------------------------------------------------------------------- the crops

def crop_box(rng: random.Random, smallest: float) -> Box:
    """A square with `smallest` to all of the picture's area, anywhere."""
    side = round(SIDE * math.sqrt(rng.uniform(smallest, 1.0)))
    return rng.randint(0, SIDE - side), rng.randint(0, SIDE - side), side


def preprocess(picture: torch.Tensor, box: Box) -> torch.Tensor:
    """The box of a picture [H, W, C] in bytes as the host hands it to the vision tower: [3, h, h]."""
    left, top, side = box
    image = picture[top:top + side, left:left + side].float()[None] / 255
    return clip_model.clip_preprocess(image, size=VISION["image_size"])[0]


def inside_of(silhouette: torch.Tensor, box: Box) -> torch.Tensor:
    """The silhouette's share of every cell of every patch of the box: [patches, CELLS * CELLS]."""
    left, top, side = box
    whole = F.interpolate(silhouette[None, None], (SIDE, SIDE), mode="bilinear")
    grid = VISION["image_size"] // VISION["patch_size"]
    cells = F.adaptive_avg_pool2d(whole[..., top:top + side, left:left + side], grid * CELLS)
    return F.unfold(cells, CELLS, stride=CELLS)[0].T


def draw_batch(pictures: Any, rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Preprocessed crops [B, 3, h, h], their silhouettes by patch [B, patches, cells] and what each shows.

    Two thirds of them are nearly whole pictures.
    """
    pixels, inside, said = [], [], []
    for row in (rng.randrange(len(pictures.pictures)) for _ in range(count)):
        box = crop_box(rng, rng.choice((0.085, 0.8, 0.8)))
        pixels.append(preprocess(pictures.pictures[row], box))
        inside.append(inside_of(pictures.silhouette(row), box))
        said.append(pictures.said(row, box))
    return torch.stack(pixels), torch.stack(inside), said


# -------------------------------------------------------------------------------------------- the captions

def all_scenes() -> list[Any]:
    """Everything that a caption can say."""
    return [WORLD.Scene(*parts) for parts in itertools.product(*((None, *values) for values in ATTRIBUTES.values()))]


@torch.no_grad()
def end_states(text: Text, captions: list[str]) -> torch.Tensor:
    """The states [N, C] of the first end tokens, which the projection reads."""
    rows = []
    for start in range(0, len(captions), 256):
        tokens = text.tokenise(captions[start:start + 256])
        places = (tokens == text.end).int().argmax(dim=1)
        rows.append(text.states(tokens)[torch.arange(len(tokens)), places])
    return torch.cat(rows)


def targets(said: list[Any]) -> torch.Tensor:
    """Class numbers [B, attribute]; 0 is unsaid."""
    return torch.tensor([[0 if getattr(scene, name) is None else 1 + list(values).index(getattr(scene, name))
                          for name, values in ATTRIBUTES.items()] for scene in said])


# -------------------------------------------------------------------------------------------------- training

def loss_of(network: torch.nn.Module, pixels: torch.Tensor, inside: torch.Tensor, states: torch.Tensor,
            classes: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is learned: to pair crops and captions, to say the attributes, to see the silhouette, to share one scale."""
    parts: Any = network  # a ModuleDict of `build`
    with autocast():
        image, patches = parts["vision"](pixels)
    image, text, seen = image.float(), parts["text"](states), parts["inside"](patches.float())
    logits = parts["temperature"].weight.exp().clamp(max=100) * F.normalize(image) @ F.normalize(text).T
    same = (classes[:, None] == classes[None]).all(dim=2).float()
    same = same / same.sum(dim=1, keepdim=True)
    spans = [len(values) + 1 for values in ATTRIBUTES.values()]
    said = zip(parts["heads"](image).split(spans, dim=1), classes.T)
    return {
        "pairs": (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2,
        "said": torch.stack([F.cross_entropy(scores, values) for scores, values in said]).sum(),
        "inside": F.binary_cross_entropy_with_logits(seen, inside),
        # pictures and words take each other's place in a mix: no gap between them, entries of about one
        "gap": (image - text).square().mean() + (text.square().mean() - 1).square(),
    }


def train() -> Trainer:
    text, pictures, scenes = load_text(), WORLD.ClipPictures(ARGS.work, ARGS.pictures), all_scenes()
    row_of = {scene: row for row, scene in enumerate(scenes)}
    table = torch.stack([
        end_states(text, [caption_of(scene, random.Random(f"{wording} {row}"), 0.0)[0]
                          for row, scene in enumerate(scenes)])
        for wording in range(WORDINGS)])
    trainer = Trainer("clip", build(), 1e-3, 0.995)
    while trainer.step < ARGS.steps:
        rng, g = random.Random(f"clip {trainer.step}"), generator(9, trainer.step)
        pixels, inside, said = draw_batch(pictures, rng, ARGS.batch)
        pixels = pixels + 0.15 * torch.rand(len(pixels), 1, 1, 1, generator=g) * torch.randn(pixels.shape, generator=g)
        states = torch.stack([table[rng.randrange(WORDINGS), row_of[scene]] for scene in said])
        losses = loss_of(trainer.network, pixels.to(DEVICE), inside.to(DEVICE), states, targets(said).to(DEVICE))
        progress = trainer.step / ARGS.steps
        trainer.update(losses["pairs"] + losses["said"] + losses["inside"] + 0.5 * losses["gap"],
                       0.01 + 0.99 * min(1.0, 2 * (1 - progress)))
        trainer.report(ARGS.steps, **{name: value.item() for name, value in losses.items()})
    return trainer


def export(average: dict[str, torch.Tensor]) -> None:
    """Write both parts in fp16 under the host's names."""
    state = {key.removeprefix("vision.model."): value for key, value in average.items() if key.startswith("vision.")}
    state["text_projection.weight"] = average["text.weight"]
    path = FILES / "clip.safetensors"
    save_file({key: value.half().contiguous().cpu() for key, value in state.items()}, path,
              metadata={"format": CONFIG["format"]})
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    export(train().average)
