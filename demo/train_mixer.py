"""Teach the demo checkpoint to attend to pictures: the demo mixer.

    python demo/train_mixer.py --comfyui PATH --work FOLDER [--world drawings] [--steps N]

The context is five demo CLIP embeddings of random crops of one picture, un-normalised, some of them zeros, instead of a
prompt. Only attention and its feed-forward layers learn, as low-rank differences, from the noise and from what the
shipped checkpoint predicts with the picture's caption, which spares most of the steps. Needs `latents.safetensors` and
`pictures.safetensors` of train.py and `clip.safetensors` of train_clip.py. Seeded by step and resumable.
"""
from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from train_base import ARGS, DEVICE, FILES, WORLD, Trainer, autocast, generator, scene_of

# isort: split
import torch
from safetensors.torch import load_file, save_file
from train import alphas_cumprod
from train_clip import Vision, crop_box, preprocess
from train_tuned import add_differences, export, load_text, load_unet

NAME = "mixer"
LESSON = WORLD.MIXER
SLOTS, CROPS = 5, 6  # tokens of a context, crops of a picture to draw them from
PICTURES = 6000
SMALLEST = 0.085  # of the picture's area


@torch.no_grad()
def make_embeddings() -> torch.Tensor:
    """Projected embeddings [picture, CROPS, C] of random crops."""
    path = ARGS.work / "mixer_embeddings.safetensors"
    if path.exists():
        return load_file(path)["embeddings"]
    vision = Vision().to(DEVICE)
    state = load_file(FILES / "clip.safetensors")
    vision.model.load_state_dict({key: value.float() for key, value in state.items() if not key.startswith("text")})
    pictures, parts = WORLD.Pictures(ARGS.work, ARGS.pictures), []
    for start in range(0, PICTURES, 16):
        rng = random.Random(f"crops {start}")
        crops = [preprocess(picture, crop_box(rng, SMALLEST))
                 for picture in pictures.take(start, start + 16) for _ in range(CROPS)]
        with autocast():
            parts.append(vision(torch.stack(crops).to(DEVICE))[0].float().cpu().unflatten(0, (-1, CROPS)))
    embeddings = torch.cat(parts).contiguous()
    save_file({"embeddings": embeddings}, path)
    return embeddings


@torch.no_grad()
def caption_states() -> dict[Any, torch.Tensor]:
    """Contexts [77, C] of the pictures' captions, as the shipped checkpoint was trained, and of none."""
    text = load_text()
    nothing = text.states(text.tokenise([""]))
    scenes = sorted({WORLD.Scene(), *(scene_of(index) for index in range(PICTURES))}, key=str)
    found = []
    for start in range(0, len(scenes), 128):
        tokens = text.tokenise([WORLD.describe(scene) for scene in scenes[start:start + 128]])
        found.append(torch.where((tokens == text.end)[..., None], nothing, text.states(tokens)))
    return dict(zip(scenes, torch.cat(found)))


def draw_context(crops: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Five of the crops [CROPS, C], each zeroed with a chance of its own for the row; all zeros in a tenth of rows."""
    absent = rng.choice((0.1, 0.1, 0.4, 0.8))
    kept = [float(rng.random() >= absent) for _ in range(SLOTS)]
    none = rng.random() < 0.1
    return crops[rng.sample(range(CROPS), SLOTS)] * torch.tensor(kept)[:, None] * (0.0 if none else 1.0)


def train() -> Trainer:
    embeddings, captions = make_embeddings(), caption_states()
    latents = load_file(ARGS.work / "latents.safetensors")["latents"]
    teacher, unet, alphas = load_unet(), load_unet(), alphas_cumprod().to(DEVICE)
    trainer = Trainer(NAME, add_differences(unet, LESSON), 1e-3, 0.99)
    while trainer.step < ARGS.steps:
        g, rng = generator(10, trainer.step), random.Random(f"{NAME} {trainer.step}")
        rows = torch.randint(PICTURES, (ARGS.batch,), generator=g)
        context = torch.stack([draw_context(embeddings[row], rng) for row in rows.tolist()]).to(DEVICE)
        said = torch.stack([captions[scene_of(row) if shown else WORLD.Scene()]
                            for row, shown in zip(rows.tolist(), context.flatten(1).any(dim=1).tolist())])
        # the context decides while there is little to see, so high noise is drawn more often
        t = (1000 * torch.rand(ARGS.batch, generator=g).sqrt()).long().clamp(max=999).to(DEVICE)
        x0 = latents[rows].to(DEVICE)
        noise = torch.randn(x0.shape, generator=g) + 0.2 * torch.randn(*x0.shape[:2], 1, 1, generator=g)
        noise, a = noise.to(DEVICE), alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        with autocast():
            prediction = unet(x, t, context).float()
        with torch.no_grad(), autocast():
            shown = teacher(x, t, said).float()
        snr = (a / (1 - a)).flatten()
        error = sum((prediction - wanted).square().mean(dim=(1, 2, 3)) for wanted in (noise, shown))
        loss = (error * snr.clamp(max=5.0) / snr).mean()
        trainer.update(loss, max(min(1.0, (ARGS.steps - trainer.step) / (0.5 * ARGS.steps)), 0.01))
        trainer.report(ARGS.steps, loss=loss.item(), taught=(prediction - shown).square().mean().item())
    return trainer


if __name__ == "__main__":
    export(NAME, replace(LESSON, attention_only=False), train().average)
