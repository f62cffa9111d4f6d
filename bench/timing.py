"""What the benchmarks share: a model of the demo or of a file, and contenders that take turns in one process."""
from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = ("a striped red star on a blue background", "a dotted green heart on a white background")
SD15: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True, "context_dim": 768,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1, "use_linear_in_transformer": False, "adm_in_channels": None,
    "use_temporal_attention": False,
}
Encode = Callable[[str], Any]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an SD1.x or SDXL checkpoint; the demo checkpoint without it")
    parser.add_argument("--real-size", action="store_true", help="SD1.5's network with random weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    return parser


def load_pack() -> None:
    """The pack as `mixology`, in the host that MIXOLOGY_HOST names."""
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


def patch_slightly(model: Any) -> Any:
    """A clone with a patch on every attention projection, as a LoRA has."""
    import torch

    clone = model.clone()
    names = {name: weight.shape for name, weight in model.model.state_dict().items() if ".attn" in name
             and name.endswith("weight")}
    clone.add_patches({name: (torch.full(shape, 1e-4),) for name, shape in names.items()})
    return clone


def load_model(arguments: argparse.Namespace) -> tuple[Any, Encode, int]:
    """The model, what makes a CONDITIONING of a text, and the latent's side."""
    if arguments.real_size:
        return build_real_size(), draw_conditioning, 64
    import nodes

    if arguments.checkpoint is None:
        from mixology.host.demo import load_checkpoint

        model, clip, _ = load_checkpoint("shapes")
        side = 16
    else:
        import comfy.sd

        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint), output_vae=False)
        side = 128 if "xl" in type(model.model).__name__.lower() else 64
    return model, lambda text: nodes.CLIPTextEncode().encode(clip, text)[0], side


def build_real_size() -> Any:
    """SD1.5's network, in half precision on a GPU; random weights that keep activations finite cost what others do."""
    import comfy.model_management
    import comfy.model_patcher
    import torch
    from comfy import supported_models

    config = supported_models.SD15(dict(SD15))
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


def draw_conditioning(text: str) -> Any:
    """77 random tokens of SD1.5's width, the same for the same text."""
    import torch

    generator = torch.Generator().manual_seed(sum(text.encode()))
    return [[torch.randn(1, 77, SD15["context_dim"], generator=generator), {}]]


def seconds(run: Callable[[], Any]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Race:
    """Seconds of every round, by contender."""

    spent: Mapping[str, list[float]]

    def fastest(self, name: str) -> float:
        return min(self.spent[name])

    def ratio(self, name: str, other: str) -> float:
        """The median of the ratios within a round."""
        return statistics.median(a / b for a, b in zip(self.spent[name], self.spent[other]))

    def compare(self, name: str, other: str) -> str:
        """The ratio of the fastest rounds, and the median of the ratios within a round."""
        return (f"{name} / {other}: {self.fastest(name) / self.fastest(other):.4f}, "
                f"median {self.ratio(name, other):.4f}")


def race(contenders: Mapping[str, Callable[[], Any]], rounds: int,
         measure: Callable[[Callable[[], Any]], float] = seconds, warm: bool = False) -> Race:
    """Runs each once to warm up, unless it is `warm`, then `rounds` times in changing order."""
    import torch

    names = list(contenders)
    spent: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for run in () if warm else contenders.values():
            run()
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                spent[name].append(measure(contenders[name]))
    return Race(spent)


def race_guiders(guiders: Mapping[str, Any], arguments: argparse.Namespace, side: int, title: str) -> Race:
    """Guiders of one model on the same start and sigmas; prints what a step of each takes."""
    import comfy.sample
    import comfy.samplers
    import torch
    from mixology.host.run import full_sigmas, run_guider

    model = next(iter(guiders.values())).model_patcher
    latent = {"samples": torch.zeros(arguments.batch, 4, side, side)}
    sigmas = full_sigmas(model, "euler", "simple", arguments.steps)
    noise, sampler = comfy.sample.prepare_noise(latent["samples"], 0), comfy.samplers.sampler_object("euler")
    result = race({name: lambda guider=guider: run_guider(guider, sampler, sigmas, latent, noise=noise, seed=0)
                   for name, guider in guiders.items()}, arguments.rounds)
    print(f"{model.load_device} {title} batch {arguments.batch}: "
          + ", ".join(f"{name} {result.fastest(name) / arguments.steps * 1000:.2f} ms a step" for name in guiders))
    return result
