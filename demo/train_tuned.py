"""Teach the demo checkpoint more: other styles, and experts that know what the others do not.

    python demo/train_tuned.py --comfyui PATH --work FOLDER [--world drawings] --name NAME [--steps N]

Starts from the shipped checkpoint and learns a low-rank difference W + up @ down for its weights, nothing else. Every
run is seeded by its step number and resumes. Lessons of attention alone (`neon`, `chalk`)
are written as a LoRA in kohya's format, the others as differences that the pack adds to the shipped checkpoint when it
loads them. See demo/MODEL_CARD.md.
"""
from __future__ import annotations

import random

from train_base import ARGS, CONFIG, DEVICE, FILES, HERE, WORLD, Trainer, autocast, generator, scene_of

# isort: split
import torch
from comfy import ops, utils
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD
from safetensors.torch import load_file, save_file
from train import alphas_cumprod
from train_lessons import Lesson
from train_text import Text, identity_projection


def shipped(name: str, prefix: str) -> dict[str, torch.Tensor]:
    state = load_file(FILES / f"{name}.safetensors", device=str(DEVICE))
    return {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}


def load_unet() -> UNetModel:
    unet = UNetModel(**CONFIG["unet"], dtype=torch.float32, operations=ops.disable_weight_init)
    unet.load_state_dict(shipped(WORLD.NAME, "model.diffusion_model."))
    return unet.to(DEVICE).requires_grad_(False)


def load_text() -> Text:
    text = Text()
    text.model.transformer.load_state_dict(shipped("text", "cond_stage_model.transformer."), strict=False)
    identity_projection(text)
    text.model.train(False).requires_grad_(False)
    return text


def load_vae() -> TAESD:
    vae = TAESD()
    vae.load_state_dict(shipped("vae", "first_stage_model."), strict=False)
    return vae.to(DEVICE).train(False).requires_grad_(False)


# ---------------------------------------------------------------------------------------------- differences

class Difference(torch.nn.Module):
    """What a layer learns beside its weight: up @ down, added to its output."""

    def __init__(self, layer: torch.nn.Linear | torch.nn.Conv2d, rank: int):
        super().__init__()
        weight = layer.weight
        self.down = torch.nn.Parameter(torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5)
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], rank))
        layer.register_forward_hook(self.add)

    def add(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        if not isinstance(layer, torch.nn.Conv2d):
            return output + x @ self.down.T @ self.up.T
        inner = torch.nn.functional.conv2d(x, self.down, None, layer.stride, layer.padding)
        return output + torch.nn.functional.conv2d(inner, self.up[:, :, None, None])


def add_differences(unet: UNetModel, lesson: Lesson) -> torch.nn.ModuleDict:
    """Differences by layer name, with full stops as the bars that a ModuleDict allows."""
    torch.manual_seed(5)
    found = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            if lesson.attention_only and ".transformer_blocks." not in name:
                continue
            if min(layer.weight.shape[0], layer.weight[0].numel()) > lesson.rank:
                found[name.replace(".", "|")] = Difference(layer, lesson.rank)
    return torch.nn.ModuleDict(found).to(DEVICE)


# ----------------------------------------------------------------------------------------------------- data

@torch.no_grad()
def make_latents(name: str, lesson: Lesson, indices: list[int]) -> torch.Tensor:
    path = ARGS.work / f"{name}_latents.safetensors"
    if path.exists():
        return load_file(path)["latents"]
    vae, parts, pictures = load_vae(), [], WORLD.lesson_source(ARGS.work, ARGS.pictures)
    for start in range(0, len(indices), 50):
        drawn = WORLD.lesson_pictures(pictures, lesson, indices[start:start + 50])
        with autocast():
            parts.append(vae.taesd_encoder(drawn.to(DEVICE)).float().cpu())
    latents = torch.cat(parts).contiguous()
    save_file({"latents": latents}, path)
    return latents


def train(name: str, lesson: Lesson) -> Trainer:
    indices = WORLD.lesson_indices(lesson, ARGS.pictures)
    latents = make_latents(name, lesson, indices).to(DEVICE)
    unet, text, alphas = load_unet(), load_text(), alphas_cumprod().to(DEVICE)
    nothing = text.states(text.tokenise([""]))
    trainer = Trainer(name, add_differences(unet, lesson), 2e-3, 0.99)
    while trainer.step < ARGS.steps:
        g, rng = generator(7, trainer.step), random.Random(f"{name} {trainer.step}")
        rows = torch.randint(len(latents), (ARGS.batch,), generator=g)
        captions = ["" if rng.random() < 0.1 else WORLD.lesson_caption(lesson, scene_of(indices[row]), rng)
                    for row in rows.tolist()]
        tokens = text.tokenise(captions)
        with torch.no_grad(), autocast():
            context = text.states(tokens).float()
        after = (tokens == text.end) & (torch.rand(len(tokens), 1, generator=g) < 0.85).to(DEVICE)
        context = torch.where(after[..., None], nothing, context)  # as the shipped checkpoint was trained
        x0, t = latents[rows.to(DEVICE)], torch.randint(0, 1000, (ARGS.batch,), generator=g).to(DEVICE)
        noise = torch.randn(x0.shape, generator=g) + 0.2 * torch.randn(*x0.shape[:2], 1, 1, generator=g)
        noise, a = noise.to(DEVICE), alphas[t].view(-1, 1, 1, 1)
        with autocast():
            prediction = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, context)
        snr = (a / (1 - a)).flatten()
        error = (prediction.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (error * snr.clamp(max=5.0) / snr).mean()
        trainer.update(loss, max(min(1.0, (ARGS.steps - trainer.step) / (0.5 * ARGS.steps)), 0.01))
        trainer.report(ARGS.steps, loss=loss.item())
    return trainer


# --------------------------------------------------------------------------------------------------- export

def export(name: str, lesson: Lesson, average: dict[str, torch.Tensor]) -> None:
    """Write the difference in fp16: as a LoRA, or under the names of the weights it belongs to."""
    titles = {ours: theirs for theirs, ours in utils.unet_to_diffusers(CONFIG["unet"]).items()}
    state = {}
    for key, value in average.items():
        layer, part = key.replace("|", ".").rsplit(".", 1)
        value = value.half().cpu()
        if lesson.attention_only:
            title = "lora_unet_" + titles[f"{layer}.weight"].removesuffix(".weight").replace(".", "_")
            state[f"{title}.lora_{part}.weight"] = value.contiguous()
            state[f"{title}.alpha"] = torch.tensor(float(lesson.rank)).half()
        else:
            state[f"model.diffusion_model.{layer}.weight.{part}"] = value.contiguous()
    lora = HERE / f"loras/mixology-demo-{name}.safetensors"
    target = lora if lesson.attention_only else FILES / f"{name}.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_file(state, target, metadata={"format": CONFIG["format"]})
    print(f"{target.name}: {target.stat().st_size / 1e6:.2f} MB", flush=True)


def main() -> None:
    lesson = WORLD.LESSONS[ARGS.name]
    trainer = train(ARGS.name, lesson)
    export(ARGS.name, lesson, trainer.average)


if __name__ == "__main__":
    main()
