"""What the training stages share: arguments, the world, the host on the path, and a trainer that resumes."""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STAGES = ("pictures", "vae", "text", "latents", "unet", "export")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI install")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, latents and checkpoints")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--world", choices=("shapes", "drawings"), default="shapes")
    parser.add_argument("--pictures", type=int)
    parser.add_argument("--vae-steps", type=int)
    parser.add_argument("--text-steps", type=int)
    parser.add_argument("--steps", type=int, help="denoiser steps")
    parser.add_argument("--cooldown", type=int, help="last denoiser steps, with falling learning rate")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--name", default="", help="what train_tuned.py teaches")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; all of them if 0")
    parser.add_argument("--minutes", type=float, default=5, help="between two saves")
    parser.add_argument("--sheet-minutes", type=float, default=0, help="between two sheets of samples; none if 0")
    parser.add_argument("--pause", type=Path, help="a file that stops the training for as long as it is there")
    return parser.parse_args()


def complete_arguments(arguments: argparse.Namespace, usual: dict[str, int]) -> None:
    """What was left unsaid is as the world's shipped weights were made."""
    for name, value in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


ARGS = parse_arguments()
sys.path.insert(0, str(ARGS.comfyui))
sys.path.insert(1, str(HERE))
sys.argv = [sys.argv[0]] + (["--cpu"] if ARGS.device == "cpu" else [])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402
import train_drawings  # noqa: E402
import train_shapes  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

WORLD: Any = train_drawings if ARGS.world == "drawings" else train_shapes
complete_arguments(ARGS, WORLD.USUAL)
FILES = WORLD.FILES  # where the shipped files lie
CONFIG = json.loads((FILES / "config.json").read_text(encoding="utf-8"))
DEVICE = torch.device(ARGS.device)
ATTRIBUTES = WORLD.ATTRIBUTES
random_scene, scene_of, caption_of = WORLD.random_scene, WORLD.scene_of, WORLD.caption_of
if ARGS.threads:
    torch.set_num_threads(ARGS.threads)


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) & 0x7FFFFFFF)


def initialise(module: torch.nn.Module, seed: int) -> None:
    """The host's layers skip initialisation; draw PyTorch's own, seeded."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            if layer.bias is not None:
                bound = 1 / math.sqrt(layer.weight[0].numel())
                torch.nn.init.uniform_(layer.bias, -bound, bound)
        elif isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=0.02)
    module.train().requires_grad_(True)


class Trainer:
    """One network with Adam, an average of its weights, and files to resume from."""

    def __init__(self, name: str, network: torch.nn.Module, rate: float, decay: float):
        self.path = ARGS.work / f"{name}.safetensors"
        self.network, self.rate, self.decay = network.to(DEVICE), rate, decay
        self.parameters = {key: value for key, value in network.named_parameters() if value.requires_grad}
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
        self.average = {key: value.detach().clone() for key, value in self.parameters.items()}
        self.step, self.started, self.saved = 0, time.time(), time.time()
        self.heard: list[dict[str, float]] = []
        (ARGS.work / "pid").write_text(f"{os.getpid()}\n", encoding="utf-8")
        if self.path.exists():
            self.resume()

    def resume(self) -> None:
        state = load_file(self.path, device=str(DEVICE))
        self.step = int(state["step"])
        for key, parameter in self.parameters.items():
            parameter.data.copy_(state[f"weight.{key}"])
            self.average[key].copy_(state[f"average.{key}"])
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state[f"first.{key}"],
                "exp_avg_sq": state[f"second.{key}"],
            }
        print(f"{self.path.stem}: resumes at step {self.step}", flush=True)

    def save(self) -> None:
        state = {"step": torch.tensor(self.step)}
        for key, parameter in self.parameters.items():
            moments = self.optimiser.state[parameter]
            state[f"weight.{key}"] = parameter.data
            state[f"average.{key}"] = self.average[key]
            state[f"first.{key}"], state[f"second.{key}"] = moments["exp_avg"], moments["exp_avg_sq"]
        part = self.path.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in state.items()}, part)
        part.replace(self.path)

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """One Adam step at `factor` times the rate, with warm-up."""
        while ARGS.pause is not None and ARGS.pause.exists():
            time.sleep(1)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * factor * min(1.0, (self.step + 1) / 200)
        self.optimiser.step()
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    def report(self, total: int, **values: float) -> None:
        """Tells the means of every 50 steps, and saves every 500 and every few minutes."""
        self.heard.append(values)
        if self.step % 50 == 0:
            text = " ".join(f"{key} {sum(part[key] for part in self.heard) / len(self.heard):.4f}" for key in values)
            self.heard = []
            line = f"{self.path.stem} {self.step}/{total} {text} {time.time() - self.started:.0f}s"
            print(line, flush=True)
            with self.path.with_suffix(".log").open("a", encoding="utf-8") as log:
                log.write(line + "\n")
        if self.step % 500 == 0 or self.step == total or time.time() - self.saved > 60 * ARGS.minutes:
            self.save()
            self.saved = time.time()
