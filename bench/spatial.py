"""What the Epsilon Merge Guider costs a step, as ratios in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/spatial.py [--checkpoint FILE] [--styles N] [--rounds N]

Three guiders take turns on the same model, start and sigmas: plain CFG (2 rows a step), the core's masked conditioning
(N + 1 rows, the bare cost of that many evaluations) and the Epsilon Merge Guider (N + 1 rows). The ratios of the
fastest runs are printed, with the medians of the paired ratios beside them. Without a checkpoint the demo checkpoint
is measured.
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
CAPTIONS = ("a striped red star on a blue background", "a dotted green heart on a white background")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an SD1.x or SDXL checkpoint; the demo checkpoint without it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--styles", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
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
    from mixology.host.layout import full_sigmas, make_guider, run_guider
    from mixology.host.spatial import EpsilonMergeGuider
    from mixology.samplers.spatial import draw_gradient_masks

    model, clip, side = load_model(arguments.checkpoint)
    texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(arguments.styles)]
    *styles, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (*texts, ""))
    latent = {"samples": torch.zeros(arguments.batch, 4, side, side)}
    sigmas = full_sigmas(model, "euler", "simple", arguments.steps)
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    masks = draw_gradient_masks(side, side, "logistic", arguments.styles, 0.0, 20.0, 1)
    masked: list[Any] = []
    for mask, style in zip(masks, styles):
        masked += nodes.ConditioningSetMask().append(style, mask, "default", 1.0)[0]
    guiders = {
        "plain": make_guider(model, styles[0], negative, 7.5),
        "masked": make_guider(model, masked, negative, 7.5),
        "merged": EpsilonMergeGuider(
            model, masks, {f"positive_{i}": style for i, style in enumerate(styles)}, negative, 7.5),
    }
    sampler = comfy.samplers.sampler_object("euler")
    spent: dict[str, list[float]] = {name: [] for name in guiders}
    with torch.inference_mode():
        for turn in range(arguments.rounds + 1):
            order = list(guiders)[turn % 3:] + list(guiders)[:turn % 3]
            for name in order:
                elapsed = seconds(lambda guider=guiders[name]: run_guider(guider, sampler, sigmas, latent, noise, 0))
                if turn > 0:  # the first turn warms up
                    spent[name].append(elapsed / arguments.steps * 1000)
    fastest = {name: min(times) for name, times in spent.items()}
    print(f"{model.load_device} {arguments.styles} styles batch {arguments.batch}: "
          + ", ".join(f"{name} {value:.2f} ms a step" for name, value in fastest.items()))
    for other, rows in (("masked", "equal evaluations"), ("plain", f"{arguments.styles + 1} rows against 2")):
        median = statistics.median(a / b for a, b in zip(spent["merged"], spent[other]))
        print(f"merged / {other} ({rows}): {fastest['merged'] / fastest[other]:.4f}, median {median:.4f}")


if __name__ == "__main__":
    main()
