"""Looks at what a denoiser has learned so far: a sheet of samples while it trains."""
from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from train_base import ARGS, DEVICE, WORLD, Trainer, autocast

if TYPE_CHECKING:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from train_text import Text


@torch.no_grad()
def read_captions(text: Text, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts [B, 77, C] of captions and of none, as the denoiser was trained on them."""
    nothing = text.states(text.tokenise([""]))
    tokens = text.tokenise(captions)
    return torch.where((tokens == text.end)[..., None], nothing, text.states(tokens)), nothing


@torch.no_grad()
def sample(unet: UNetModel, context: torch.Tensor, nothing: torch.Tensor, seed: int, **options: float) -> torch.Tensor:
    """Latents [B, 4, 16, 16] by DDIM with classifier-free guidance; options: steps (20), guidance (3)."""
    steps, guidance = int(options.get("steps", 20)), options.get("guidance", 3.0)
    alphas = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0).float()
    times = torch.linspace(999, 0, steps + 1).round().long()[:-1]
    shape = (len(context), 4, 16, 16)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    for index, time_now in enumerate(times.tolist()):
        t = torch.full((len(x),), time_now, device=DEVICE)
        with autocast():
            said = unet(x, t, context).float()
            unsaid = unet(x, t, nothing.expand(len(x), -1, -1)).float()
        noise = unsaid + guidance * (said - unsaid)
        a = alphas[time_now]
        b = alphas[times[index + 1]] if index + 1 < steps else torch.tensor(1.0)
        x = b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
    return x


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [B, C, H, W] in 0..1."""
    with autocast():
        return torch.cat([vae.taesd_decoder(part).float() for part in latents.split(10)]).clamp(0, 1).cpu()


def save_grid(pictures: torch.Tensor, columns: int, path: Any) -> None:
    rows = [torch.cat(list(pictures[start:start + columns]), 2) for start in range(0, len(pictures), columns)]
    grid = (torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(np.ascontiguousarray(grid)).save(path)


def make_sheet(unet: UNetModel, trainer: Trainer, text: Text, vae: Any) -> None:
    """Draws the world's captions with the averaged weights into the work folder, always from the same noise."""
    started, folder = time.time(), ARGS.work / "sheets"
    folder.mkdir(exist_ok=True)
    unet.load_state_dict(trainer.average, strict=False)
    unet = unet.to(DEVICE).train(False).requires_grad_(False)
    captions = WORLD.shown_captions()
    context, nothing = read_captions(text, captions)
    latents = sample(unet, context, nothing, 17)
    save_grid(decode(vae, latents), WORLD.SHOWN_COLUMNS, folder / f"{trainer.path.stem}-{trainer.step:06d}.png")
    print(f"sheet: step {trainer.step}, {time.time() - started:.0f}s", flush=True)
