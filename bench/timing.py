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


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="an SD1.x or SDXL checkpoint; the demo checkpoint without it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
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


@dataclass(frozen=True)
class Race:
    """Seconds of every round, by contender."""

    spent: Mapping[str, list[float]]

    def fastest(self, name: str) -> float:
        return min(self.spent[name])

    def compare(self, name: str, other: str) -> str:
        """The ratio of the fastest rounds, and the median of the ratios within a round."""
        median = statistics.median(a / b for a, b in zip(self.spent[name], self.spent[other]))
        return f"{name} / {other}: {self.fastest(name) / self.fastest(other):.4f}, median {median:.4f}"


def race(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> Race:
    """Runs each once to warm up, then `rounds` times in changing order."""
    import torch

    names = list(contenders)
    spent: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for run in contenders.values():
            run()
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                spent[name].append(seconds(contenders[name]))
    return Race(spent)
