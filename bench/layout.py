"""What MagicMix costs over a bare core sampler at equal model evaluations, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/layout.py [--checkpoint FILE] [--rounds N]

The wrapped and the bare sampler take turns on the same model, prompts, start and sigmas; the ratio of the fastest runs
is printed, with the median of the pairwise ratios beside it. Without a checkpoint the demo checkpoint is measured.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an SD1.x or SDXL checkpoint; the demo checkpoint without it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sampler", default="ddim")
    return parser.parse_args()


def load_pack() -> None:
    sys.path.insert(0, os.environ["MIXOLOGY_HOST"])
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    spec = importlib.util.spec_from_file_location(
        "mixology", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mixology"] = module
    spec.loader.exec_module(module)


def load_model(checkpoint: Path | None) -> tuple[Any, Any, int]:
    """model, clip and latent side."""
    if checkpoint is None:
        from mixology.host.demo import load_checkpoint

        model, clip, _ = load_checkpoint("shapes")
        return model, clip, 16
    import comfy.sd

    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)
    return model, clip, 128 if "xl" in type(model.model).__name__.lower() else 64


def seconds(run: Callable[[], Any]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    arguments = parse_arguments()
    load_pack()
    import comfy.sample
    import comfy.samplers
    import nodes
    import torch
    from mixology.host import layout as magicmix

    model, clip, side = load_model(arguments.checkpoint)
    positive, negative = (
        nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a striped red star on a blue background", ""))
    latent = {"samples": torch.randn(arguments.batch, 4, side, side, generator=torch.Generator().manual_seed(0))}
    sigmas = magicmix.full_sigmas(model, arguments.sampler, "ddim_uniform", 50)
    window = magicmix.sigma_window(model.model, sigmas, 0.6, 0.3)
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    bare = comfy.samplers.sampler_object(arguments.sampler)
    mixing = magicmix.LayoutMixSampler(bare, magicmix.make_layout(latent, 0, "shared"), 0.5, 0.6, 0.3)
    guider = magicmix.make_guider(model, positive, negative, 7.5)

    def sample(sampler: Any, grid: Any) -> Any:
        return magicmix.run_guider(guider, sampler, grid, {**latent, "noise_mask": None}, noise, 0)

    pairs: list[tuple[float, float]] = []
    with torch.inference_mode():
        sample(mixing, sigmas)
        for turn in range(arguments.rounds):
            runs = [lambda: sample(bare, sigmas[window.start:]), lambda: sample(mixing, sigmas)]
            first, second = (seconds(runs[turn % 2]), seconds(runs[1 - turn % 2]))
            pairs.append((second, first) if turn % 2 else (first, second))
    steps = len(sigmas) - 1 - window.start
    fastest = [min(column) for column in zip(*pairs)]
    median = statistics.median(mixed / plain for plain, mixed in pairs)
    print(f"{model.load_device} {arguments.sampler} batch {arguments.batch}: bare {fastest[0] / steps * 1000:.2f} ms, "
          f"mixed {fastest[1] / steps * 1000:.2f} ms a step; ratio {fastest[1] / fastest[0]:.4f}, median {median:.4f}")


if __name__ == "__main__":
    main()
