"""Fit what the live preview of the demo checkpoints is made with: colours of a latent pixel, without the decoder.

    python demo/train_preview.py --comfyui PATH --work FOLDER [--world drawings]

The demo autoencoder's latents are no linear picture of colours, as those of large autoencoders nearly are. So a latent
pixel and its neighbours go through one hidden layer first (the host's `latent_rgb_factors_reshape`); from there least
squares give `latent_rgb_factors` and their bias. Three minutes on one CPU core.
"""
from __future__ import annotations

from train_base import ARGS, FILES, WORLD, generator

# isort: split
import torch
import torch.nn.functional as F
from comfy.taesd.taesd import TAESD
from safetensors.torch import load_file, save_file
from train_lessons import Lesson

PICTURES, HELD_OUT, FEATURES, STEPS, BATCH = 600, 100, 16, 4000, 16
FACTOR, SCALE = 8, 0.18215  # pixels of a latent pixel; SD1.x's scale of latents in the model


def load_autoencoder() -> TAESD:
    network = TAESD()
    state = load_file(FILES / "vae.safetensors")
    network.load_state_dict({key.removeprefix("first_stage_model."): value.float() for key, value in state.items()})
    return network.float().requires_grad_(False)


def make_pairs(network: TAESD) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents in the model's space [N, 4, h, w] and what they decode to, at their size, [N, 3, h, w] in -1..1.

    Every second one is a mix of two pictures or a pale one, as a model's first guesses are.
    """
    source = WORLD.lesson_source(ARGS.work, ARGS.pictures)
    images = WORLD.lesson_pictures(source, Lesson(), WORLD.preview_indices(PICTURES))
    latents = torch.cat([network.encode(part * 2 - 1) for part in images.split(BATCH)])
    g = generator(7)
    share = torch.rand(PICTURES, 1, 1, 1, generator=g)
    mixes = latents * share + latents.roll(1, 0) * torch.rand(PICTURES, 1, 1, 1, generator=g) * (1 - share)
    latents = torch.stack([latents, mixes], 1).flatten(0, 1)
    colours = torch.cat([
        F.avg_pool2d(network.decode(part).clamp(-1, 1), FACTOR) for part in latents.split(BATCH)])
    return latents * SCALE, colours


def read_features(hidden: torch.nn.Conv2d, latents: torch.Tensor) -> torch.Tensor:
    """[N, FEATURES, h, w], as host/demo.py makes them."""
    return F.conv2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), hidden.weight, hidden.bias).relu()


def train_features(latents: torch.Tensor, colours: torch.Tensor) -> torch.nn.Conv2d:
    torch.manual_seed(7)
    hidden, last = torch.nn.Conv2d(4, FEATURES, 3), torch.nn.Conv2d(FEATURES, 3, 1)
    optimiser = torch.optim.Adam([*hidden.parameters(), *last.parameters()])
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = 0.01 * (1 - step / STEPS)
        rows = torch.randint(len(latents), (BATCH,), generator=generator(8, step))
        loss = (last(read_features(hidden, latents[rows])) - colours[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return hidden.requires_grad_(False)


def fit_factors(features: torch.Tensor, colours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares: [FEATURES, 3] and [3]."""
    known = F.pad(features.movedim(1, -1).flatten(0, 2), (0, 1), value=1).double()
    found = torch.linalg.lstsq(known, colours.movedim(1, -1).flatten(0, 2).double()).solution.float()
    return found[:-1], found[-1]


def main() -> None:
    latents, colours = make_pairs(load_autoencoder())
    known, held_out = slice(None, -2 * HELD_OUT), slice(-2 * HELD_OUT, None)
    hidden = train_features(latents[known], colours[known])
    factors, bias = fit_factors(read_features(hidden, latents[known]), colours[known])
    shown = torch.einsum("nfhw,fc->nchw", read_features(hidden, latents[held_out]), factors) + bias[:, None, None]
    error = (shown.clamp(-1, 1) - colours[held_out]).abs().mean() / 2
    print(f"preview: off by {float(error):.3f} of 1 on {HELD_OUT} pictures that were not learned")
    state = {"weight": hidden.weight, "bias": hidden.bias, "factors": factors, "factors_bias": bias}
    save_file({name: value.contiguous() for name, value in state.items()}, FILES / "preview.safetensors")


if __name__ == "__main__":
    ARGS.work.mkdir(parents=True, exist_ok=True)
    main()
