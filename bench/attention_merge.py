"""What cross-attention merge costs a step over plain CFG, as a ratio in one run.

    MIXOLOGY_HOST=path/to/ComfyUI python bench/attention_merge.py [--checkpoint FILE | --real-size] [--styles N]

Plain CFG and CFG with a merged positive prompt take turns on the same model, start and sigmas, both with 2 rows a step.
The ratio of the fastest runs is printed, with the median of the paired ratios beside it. Without a checkpoint the demo
checkpoint is measured; --real-size measures an SD1.5 network of random weights, whose cost is that of a trained one.
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
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True, "context_dim": 768,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1, "use_linear_in_transformer": False, "adm_in_channels": None,
    "use_temporal_attention": False,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an SD1.x or SDXL checkpoint; the demo checkpoint without it")
    parser.add_argument("--real-size", action="store_true", help="SD1.5 with random weights")
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


def build_real_size() -> Any:
    """SD1.5's network in half precision on a GPU, with random weights that keep activations finite."""
    import comfy.model_management
    import comfy.model_patcher
    import torch
    from comfy import supported_models

    config = supported_models.SD15(SD15)
    device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(torch.float32 if device.type == "cpu" else torch.float16, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return comfy.model_patcher.ModelPatcher(
        model.train(False), load_device=device, offload_device=torch.device("cpu"))


def load_parts(arguments: argparse.Namespace) -> tuple[Any, list[Any], int]:
    """model, the styles' prompts with the negative after them, and the latent's side."""
    import torch

    if arguments.real_size:
        generator = torch.Generator().manual_seed(1)
        return build_real_size(), [
            [[torch.randn(1, 77, 768, generator=generator), {}]] for _ in range(arguments.styles + 1)], 64
    import nodes

    if arguments.checkpoint is None:
        from mixology.host.demo import load_checkpoint

        model, clip, _ = load_checkpoint("shapes")
        side = 16
    else:
        import comfy.sd

        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint), output_vae=False)
        side = 128 if "xl" in type(model.model).__name__.lower() else 64
    texts = [CAPTIONS[i % len(CAPTIONS)] for i in range(arguments.styles)]
    return model, [nodes.CLIPTextEncode().encode(clip, text)[0] for text in (*texts, "")], side


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
    import torch
    from mixology.host.attention_merge import merge_conditionings
    from mixology.host.layout import full_sigmas, make_guider, run_guider
    from mixology.samplers.spatial import draw_gradient_masks

    model, (*styles, negative), side = load_parts(arguments)
    latent = {"samples": torch.zeros(arguments.batch, 4, side, side)}
    sigmas = full_sigmas(model, "euler", "simple", arguments.steps)
    noise = comfy.sample.prepare_noise(latent["samples"], 0)
    masks = draw_gradient_masks(side * 8, side * 8, "logistic", arguments.styles, 0.0, 20.0, 1)
    prompts = {f"conditioning_{i}": style for i, style in enumerate(styles)}
    merging, merged = merge_conditionings(model, masks, prompts)
    guiders = [make_guider(model, styles[0], negative, 7.5), make_guider(merging, merged, negative, 7.5)]
    sampler = comfy.samplers.sampler_object("euler")
    spent: list[list[float]] = [[], []]
    with torch.inference_mode():
        for turn in range(arguments.rounds + 1):
            for which in (turn % 2, 1 - turn % 2):
                elapsed = seconds(lambda guider=guiders[which]: run_guider(guider, sampler, sigmas, latent, noise, 0))
                if turn > 0:  # the first turn warms up
                    spent[which].append(elapsed / arguments.steps * 1000)
    plain, ours = (min(times) for times in spent)
    median = statistics.median(b / a for a, b in zip(*spent))
    print(f"{model.load_device} {arguments.styles} styles batch {arguments.batch}: plain {plain:.2f} ms, merged "
          f"{ours:.2f} ms a step; ratio {ours / plain:.4f}, median {median:.4f}")


if __name__ == "__main__":
    main()
