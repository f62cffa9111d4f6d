"""Train the demo checkpoint from nothing: pictures, autoencoder, text encoder, latents, denoiser.

    python demo/train.py --comfyui PATH --work FOLDER [--world drawings] [--stage STAGE] [--steps N]

Every stage is seeded by its step number and resumes from the last file it saved, so an interrupted run
goes on where it stopped and ends in the same weights on the same machine. A file named by --pause stops it for as long
as it exists. See demo/MODEL_CARD.md, and train_drawings.py for what the drawn world does otherwise.
"""
from __future__ import annotations

import math
import random
import time
from typing import Any

from train_base import (
    ARGS,
    CONFIG,
    DEVICE,
    FILES,
    STAGES,
    WORLD,
    Trainer,
    autocast,
    caption_of,
    generator,
    initialise,
    scene_of,
)

# isort: split
import torch
from comfy import ops
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD
from safetensors.torch import load_file, save_file
from train_sheet import make_sheet
from train_text import load_text, train_text


def load_pictures() -> Any:
    return WORLD.Pictures(ARGS.work, ARGS.pictures)


# ----------------------------------------------------------------------------------------------------- vae

def train_vae() -> None:
    pictures = load_pictures()
    network = TAESD()
    initialise(network, 1)
    network.vae_scale.data.fill_(0.18215)
    network.vae_shift.data.zero_()
    network.vae_scale.requires_grad_(False)
    network.vae_shift.requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    trainer = Trainer("vae", network, 1e-3, 0.998)
    side, batch = 48, WORLD.CROPS
    while trainer.step < ARGS.vae_steps:
        g = generator(1, trainer.step)
        x = pictures.crop(side, batch, g).to(DEVICE).contiguous(memory_format=torch.channels_last)
        with autocast():
            z = network.taesd_encoder(x)
        z = z.float()
        # unit-variance, decorrelated latents suit the noise schedule; the noise makes the decoder forgive
        flat = z.permute(1, 0, 2, 3).flatten(1)
        mean = flat.mean(dim=1, keepdim=True)
        covariance = (flat - mean) @ (flat - mean).T / flat.shape[1]
        spread = (covariance - torch.eye(4, device=DEVICE)).square().mean() + mean.square().mean()
        if WORLD.COLOUR_PULL:
            spread = spread + WORLD.COLOUR_PULL / 0.02 * (z[:, :3] - WORLD.code_colours(x)).square().mean()
        level = torch.rand(batch, 1, 1, 1, generator=g).to(DEVICE) * 0.25
        noisy = z + level * torch.randn(z.shape, generator=g).to(DEVICE)
        with autocast():
            y = network.taesd_decoder(noisy)
        error = (y.float() - x).abs().mean() + 2 * (y.float() - x).square().mean()
        progress = trainer.step / ARGS.vae_steps
        trainer.update(error + 0.02 * spread, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        trainer.report(ARGS.vae_steps, error=error.item(), spread=spread.item())


def load_vae() -> TAESD:
    state = load_file(ARGS.work / "vae.safetensors")
    network = TAESD()
    network.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("average.")}, strict=False)
    network.vae_scale.data.fill_(0.18215)
    network.vae_shift.data.zero_()
    return network.to(DEVICE).train(False).requires_grad_(False)


# ------------------------------------------------------------------------------------------------- latents

@torch.no_grad()
def make_latents() -> None:
    path = ARGS.work / "latents.safetensors"
    if path.exists():
        return
    pictures = load_pictures()
    vae = load_vae().to(memory_format=torch.channels_last)
    latents = []
    for start in range(0, len(pictures), 50):
        x = pictures.show(start, min(start + 50, len(pictures))).to(DEVICE)
        with autocast():
            z = vae.taesd_encoder(x.contiguous(memory_format=torch.channels_last))
        latents.append(z.float().cpu().contiguous())
    z = torch.cat(latents)
    print(f"latents: mean {z.mean((0, 2, 3)).tolist()} std {z.std((0, 2, 3)).tolist()}", flush=True)
    save_file({"latents": z}, path)


# ---------------------------------------------------------------------------------------------------- unet

def alphas_cumprod() -> torch.Tensor:
    """The SD1.x schedule: scaled-linear betas, 0.00085 to 0.012 over 1000 steps."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def build_unet() -> UNetModel:
    unet = UNetModel(**CONFIG["unet"], dtype=torch.float32, operations=ops.disable_weight_init)
    initialise(unet, 4)
    # a denoiser learns faster when every residual branch and the output start at zero
    for name, parameter in unet.named_parameters():
        if any(part in name for part in (".out_layers.3.", ".proj_out.", "out.2.")):
            parameter.data.zero_()
    return unet


def train_unet() -> None:
    latents = load_file(ARGS.work / "latents.safetensors")["latents"].to(DEVICE)
    scenes = [scene_of(index) for index in range(len(latents))]
    text = load_text()
    nothing = text.states(text.tokenise([""]))
    alphas = alphas_cumprod().to(DEVICE)
    trainer, shown = Trainer("unet", build_unet(), 5e-4, WORLD.DECAY), time.time()
    while trainer.step < ARGS.steps:
        g = generator(4, trainer.step)
        rng = random.Random(f"unet {trainer.step}")
        rows = WORLD.draw_rows(len(latents), ARGS.batch, trainer.step, g)
        x0 = latents[rows]
        captions = ["" if rng.random() < 0.1 else caption_of(scenes[row], rng, 0.08)[0] for row in rows.tolist()]
        tokens = text.tokenise(captions)
        with torch.no_grad(), autocast():
            context = text.states(tokens).float()
        # the states after the last word retell the caption; hide them mostly, so that each word counts by itself
        after = (tokens == text.end) & (torch.rand(len(tokens), 1, generator=g) < 0.85).to(DEVICE)
        context = torch.where(after[..., None], nothing, context)
        t = WORLD.draw_times(len(x0), g).to(DEVICE)
        noise = torch.randn(x0.shape, generator=g).to(DEVICE)
        # the schedule stops short of pure noise: without an offset the background would follow the noise's mean
        noise = noise + 0.2 * torch.randn(*x0.shape[:2], 1, 1, generator=g).to(DEVICE)
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        with autocast():
            prediction = trainer.network(x, t, context)
        snr = (a / (1 - a)).flatten()
        weight = snr.clamp(max=5.0) / snr
        loss = ((prediction.float() - noise).square().mean(dim=(1, 2, 3)) * weight).mean()
        factor = min(1.0, (ARGS.steps - trainer.step) / max(ARGS.cooldown, 1))
        trainer.update(loss, max(factor, 0.01))
        trainer.report(ARGS.steps, loss=loss.item())
        if ARGS.sheet_minutes and time.time() - shown > 60 * ARGS.sheet_minutes:
            make_sheet(build_unet(), trainer, text, load_vae())
            shown = time.time()


# -------------------------------------------------------------------------------------------------- export

def export() -> None:
    """Write the fp16 files that the pack ships."""
    average = {key[8:]: value for key, value in load_file(ARGS.work / "unet.safetensors").items()
               if key.startswith("average.")}
    text = load_text().model.transformer.state_dict()
    parts = {
        WORLD.NAME: {f"model.diffusion_model.{key}": value for key, value in average.items()},
        "vae": {f"first_stage_model.{key}": value for key, value in load_vae().state_dict().items()},
        "text": {f"cond_stage_model.transformer.{key}": value for key, value in text.items()},
    }
    for name, state in parts.items():
        half = {key: value.half().contiguous().cpu() for key, value in state.items()}
        save_file(half, FILES / f"{name}.safetensors", metadata={"format": CONFIG["format"]})
        print(f"{name}: {sum(value.numel() for value in half.values()) / 1e6:.2f} M parameters", flush=True)


def main() -> None:
    ARGS.work.mkdir(parents=True, exist_ok=True)
    run = {"pictures": load_pictures, "vae": train_vae, "text": train_text, "latents": make_latents,
           "unet": train_unet, "export": export}
    for stage in STAGES if ARGS.stage == "all" else (ARGS.stage,):
        run[stage]()


if __name__ == "__main__":
    main()
