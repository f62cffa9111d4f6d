"""Tell how good the drawn world's networks are so far: the autoencoder, and the denoiser as the judge reads it.

    python demo/train_check.py --world drawings --comfyui PATH --work FOLDER

Reads the averaged weights from FOLDER and the judge from demo/drawn. 256 random prompts, 25 ddim steps, guidance 4;
the first of them are drawn to FOLDER/sheets/check.png.
"""
from __future__ import annotations

import random
import sys

from train_base import ARGS, DEVICE, HERE, WORLD, autocast

sys.path.append(str(HERE.parent))

# isort: split
import drawings
import torch
from safetensors.torch import load_file
from train import build_unet, load_vae
from train_drawings import Drawing, Pictures
from train_sheet import decode, read_captions, sample, save_grid
from train_text import load_text

from demo.drawn_judge import judge_drawings

PROMPTS, BATCH, SHOWN = 256, 64, 40


@torch.no_grad()
def check_autoencoder() -> None:
    """Peak signal to noise of every style, in decibels."""
    pictures, vae, count = Pictures(ARGS.work, 1), load_vae(), len(drawings.THINGS)
    for style, name in enumerate(WORLD.STYLES):
        shown, _ = pictures.look([style * count + thing for thing in range(0, count, 8)])
        with autocast():
            again = vae.taesd_decoder(vae.taesd_encoder(shown.to(DEVICE))).float().clamp(0, 1).cpu()
        error = (again - shown).square().mean(dim=(1, 2, 3))
        print(f"check: autoencoder, {name}: {float((-10 * error.log10()).mean()):.1f} dB", flush=True)


def check_denoiser(prompts: int) -> None:
    """Shares of prompts whose parts the judge finds."""
    unet, text, vae = build_unet(), load_text(), load_vae()
    state = load_file(ARGS.work / "unet.safetensors")
    unet.load_state_dict({key[8:]: value for key, value in state.items() if key.startswith("average.")})
    unet = unet.to(DEVICE).train(False).requires_grad_(False)
    rng = random.Random("check")
    scenes = [Drawing(rng.choice(drawings.THINGS), rng.choice(WORLD.STYLES), rng.choice(list(drawings.BACKGROUNDS)))
              for _ in range(prompts)]
    parts = []
    for start in range(0, prompts, BATCH):
        captions = [drawings.describe_drawing(scene) for scene in scenes[start:start + BATCH]]
        context, nothing = read_captions(text, captions)
        parts.append(decode(vae, sample(unet, context, nothing, start, steps=25, guidance=4.0)))
    pictures = torch.cat(parts)
    (ARGS.work / "sheets").mkdir(exist_ok=True)
    save_grid(pictures[:SHOWN], 10, ARGS.work / "sheets" / "check.png")
    verdict = judge_drawings(pictures.movedim(1, -1))
    things, styles = [str(scene.thing) for scene in scenes], [str(scene.style) for scene in scenes]
    shares = {
        "thing": verdict.shows(things), "thing among three": verdict.shows(things, 3),
        "style": verdict.shows_styles(styles),
        "background": verdict.shows_backgrounds([str(scene.background) for scene in scenes])}
    told = ", ".join(f"{name} {float(hits.float().mean()):.1%}" for name, hits in shares.items())
    print(f"check: step {int(state['step'])}: {told} of {prompts}", flush=True)
    for name in WORLD.STYLES:
        rows = torch.tensor([style == name for style in styles])
        print(f"check: thing in {name} style {float(shares['thing'][rows].float().mean()):.1%}", flush=True)
    missed = [f"{thing} ({style})" for thing, style, hit in zip(things, styles, shares["thing"].tolist()) if not hit]
    print(f"check: missed {', '.join(sorted(missed))}", flush=True)


if __name__ == "__main__":
    check_autoencoder()
    if (ARGS.work / "unet.safetensors").exists():
        check_denoiser(PROMPTS)
