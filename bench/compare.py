"""Each technique beside the core graph and the peer that people would use instead: python3 bench/compare.py

They take turns on the same weights, steps, size and start, in one run; the peers on diffusers in a process of their
own. Seconds are those of the processor on a CPU, of one thread; ratios are medians over the rounds. The page is written
to docs/performance.md, or to --page.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from timing import ROOT, load_pack, make_parser, race

PAGE = ROOT / "docs" / "performance.md"
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TITLES = {  # a technique, and the peer's method with what it is
    "layout": ("MagicMix", "magicmix", "diffusers + own lines: MagicMix's community rule"),
    "token_scale": ("Token Attention Scale", "reweight", "diffusers + own lines: prompt-to-prompt's reweight"),
    "attention_merge": ("Cross-Attention Merge, two styles", "", ""),
    "epsilon_merge": ("Epsilon Merge, two styles", "merge", "diffusers + own lines: predictions merged by masks"),
    "cycle": ("Cycle Sampler", "cycle", "diffusers: CycleDiffusionPipeline"),
    "inversion": ("DDIM Inversion", "invert", "diffusers: DDIMInverseScheduler"),
    "injection": ("Feature Injection, at every step", "inject", "diffusers + own lines: plug-and-play injection"),
    "fusion": ("Saliency Fusion, two checkpoints", "fuse", "diffusers + own lines: MagicFusion's rule"),
    "fusion_of_loras": ("Saliency Fusion, two LoRA stacks on one checkpoint", "", ""),
    "mixer": ("Image Mixer, five tokens", "mix", "diffusers: five tokens as the prompt"),
}
HEAD = "|  | ms a step | of its bare sampler | of the pack | rows a step | MB at most |\n|---|---|---|---|---|---|"
SAME = 1e-3  # how far two implementations of a network part, of its largest value
GROWTH = {"steps": (2, 4, 8), "batch": (1, 2, 4), "side of the latent": (8, 16, 32), "styles": (2, 4, 8, 16),
          "experts": (2, 3, 4), "tokens / 77": (1, 2, 4, 8)}
GROWTH_STEPS, GROWTH_ROUNDS = 2, 2  # a slope over several points needs no more
Reading = Callable[[], float]
Growth = dict[str, dict[str, list[float]]]


@dataclass
class Peers:
    """The process with the peers."""

    process: subprocess.Popen[str]

    def ask(self, *words: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peers' process ended early; what it said stands above")
        return json.loads(line)


def main() -> int:
    parser = make_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, help="of the latent; the model's own without it")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--no-growth", action="store_true", help="without the tables of how costs grow")
    arguments = parser.parse_args()
    return compare(arguments) if "MIXOLOGY_HOST" in os.environ else start()


def start() -> int:
    """The same in the host's Python, with diffusers among the development tools."""
    sys.path.insert(0, str(ROOT / "tools"))
    import environment
    from commands import guarded

    def run() -> int:
        host = environment.prepare(dev=True)
        found = {"MIXOLOGY_HOST": str(host.path), "PYTHONPATH": str(host.extras or "")}
        return subprocess.run([host.python, "-s", __file__, *sys.argv[1:]], check=False,
                              env={**os.environ, **THREADS, **found}).returncode

    return guarded(run)


def compare(arguments: argparse.Namespace) -> int:
    load_pack()
    import comfy.utils
    import torch
    from contenders import open_stage

    comfy.utils.set_progress_bar_enabled(False)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    with torch.inference_mode():
        stage = open_stage(arguments)
        tables = []
        with open_peers(stage) as peers:
            for name in TITLES:
                tables.append(compare_technique(name, stage, peers, arguments.rounds))
                print(tables[-1] + "\n", flush=True)
        arguments.page.write_text(render(tables, "", stage, arguments), encoding="utf-8")
        if not arguments.no_growth:
            growth = measure_growth(replace(stage, steps=GROWTH_STEPS), arguments)
            draw_growth(growth, arguments.page.with_suffix(".svg"))
            arguments.page.write_text(render(tables, list_growth(growth), stage, arguments), encoding="utf-8")
    return 0


@contextmanager
def open_peers(stage: Any) -> Iterator[Peers]:
    """The peers' process with this stage's weights and tensors, whose network sees the same noise."""
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), stage.model.model.model_config.unet_config
        names = comfy.utils.unet_to_diffusers(config)
        for file, patcher in (("network", stage.model), ("other", stage.other)):
            weights = patcher.model.diffusion_model.state_dict()
            save_file({theirs: weights[ours].contiguous() for theirs, ours in names.items() if ours in weights},
                      folder / f"{file}.safetensors")
        (mix, nothing), latent = (cond[0][0] for cond in stage.mix()), stage.latent["samples"]
        save_file({key: value.clone().contiguous() for key, value in {
            "first": stage.first[0][0], "second": stage.second[0][0], "negative": stage.negative[0][0], "mix": mix,
            "nothing": nothing, "picture": latent, "noise": stage.noise, "masks": stage.masks(2),
            "factors": stage.factors[0]}.items()}, folder / "tensors.safetensors")
        (folder / "settings.json").write_text(json.dumps({"unet": config, "steps": stage.steps}, default=str),
                                              encoding="utf-8")
        command = [sys.executable, "-s", str(Path(__file__).with_name("peers.py")), name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            peers = Peers(process)
            try:
                check_network(stage, torch.tensor(peers.hear()["noise"]))
                yield peers
            finally:
                process.kill()


def check_network(stage: Any, theirs: Any) -> None:
    """Both processes must run the same network, or nothing here could be compared."""
    import comfy.model_management
    import torch

    comfy.model_management.load_models_gpu([stage.model])
    network, device = stage.model.model.diffusion_model, stage.model.load_device
    dtype = stage.model.model.get_dtype()
    ours = network(stage.latent["samples"].to(device, dtype), torch.tensor([500.0], device=device).to(dtype),
                   context=stage.first[0][0].to(device, dtype).expand(stage.batch, -1, -1)).float().cpu()
    apart = float((ours - theirs).abs().max() / ours.abs().max())
    if apart > (SAME if dtype == torch.float32 else 30 * SAME):
        raise SystemExit(f"the networks of the two processes part by {apart:.2g} of their largest value")


def compare_technique(name: str, stage: Any, peers: Peers, rounds: int) -> str:
    """A technique's table."""
    from watch import step_seconds, watch

    title, method, label = TITLES[name]
    runs: dict[str, Any] = {**getattr(stage, name)(), "core: bare KSampler": stage.bare()}
    remote = {label: method, "diffusers: bare DDIM loop": "bare"} if method else {}
    readings: dict[str, Reading] = {key: lambda run=run: step_seconds(run) for key, run in runs.items()}
    for key, words in remote.items():
        readings[key] = lambda words=words: peers.ask("time", words)
    seen = {key: watch(run, stage.networks) for key, run in runs.items()}
    seen.update({key: peers.ask("watch", words) for key, words in remote.items()})
    result, lines = race(readings, rounds, lambda reading: reading(), warm=True), []
    for key in readings:
        bare = "diffusers: bare DDIM loop" if key in remote else "core: bare KSampler"
        rows, peak = seen[key]
        lines.append(f"| {key} | {statistics.median(result.spent[key]) * 1000:.1f} | {result.ratio(key, bare):.2f} "
                     f"| {result.ratio(key, 'pack'):.2f} | {rows:.2f} | {peak:.1f} |")
    return "\n".join([f"### {title}\n", HEAD, *lines])


def measure_growth(stage: Any, arguments: argparse.Namespace) -> Growth:
    """Milliseconds by what grows and what runs, a figure for each of GROWTH's values."""
    found: Growth = {}
    for axis, values in GROWTH.items():
        for value in values:
            for key, milliseconds in measure_at(axis, value, stage, arguments).items():
                found.setdefault(axis, {}).setdefault(key, []).append(milliseconds)
        print(f"{axis}: {found[axis]}", flush=True)
    return found


def list_growth(growth: Growth) -> str:
    """The table of growth, with the exponent of the power that fits best."""
    lines = [f"| {axis}: {', '.join(map(str, GROWTH[axis]))} | {key} | {', '.join(f'{ms:.1f}' for ms in times)} | "
             f"{fit_exponent(GROWTH[axis], times):.2f} |"
             for axis, runs in growth.items() for key, times in runs.items()]
    return "\n".join(["| what grows | what runs | ms | exponent |", "|---|---|---|---|", *lines])


def draw_growth(growth: Growth, path: Path) -> None:
    """The same as curves; where both axes double alike, a power is a straight line and its exponent the slope."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (axis, runs) in zip(figure.subplots(2, 3).flat, growth.items()):
        for key, times in runs.items():
            axes.plot(GROWTH[axis], times, "o-", label=f"{key}: {fit_exponent(GROWTH[axis], times):.2f}", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel=axis, ylabel="ms a run" if axis == "steps" else "ms a step", xticks=GROWTH[axis])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, title="exponent")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def measure_at(axis: str, value: int, stage: Any, arguments: argparse.Namespace) -> Mapping[str, float]:
    """Milliseconds a step at one point, or those of a whole run where the steps grow."""
    from timing import load_model
    from watch import step_seconds

    if axis == "experts":
        models = [stage.model, stage.other, *(load_model(arguments)[0] for _ in range(value - 2))]
        runs = {"fusion of checkpoints": stage.fuse(*zip(models, stage.styles(value)))}
    elif axis == "styles":
        runs = {"attention merge": stage.attention_merge(value)["pack"],
                "epsilon merge": stage.epsilon_merge(value)["pack"]}
    else:
        field = {"steps": "steps", "batch": "batch", "side of the latent": "side", "tokens / 77": "chunks"}[axis]
        changed = replace(stage, **{field: value})
        runs = {"bare sampler": changed.bare(), "token scale": changed.token_scale()["pack"],
                "injection": changed.injection()["pack"]}
        if axis == "steps":
            runs["MagicMix"] = changed.layout()["pack"]
    times = race(runs, min(arguments.rounds, GROWTH_ROUNDS), partial(step_seconds, whole=axis == "steps")).spent
    return {key: statistics.median(times[key]) * 1000 for key in runs}


def fit_exponent(values: tuple[int, ...], times: list[float]) -> float:
    """The slope of the least-squares line through the logarithms."""
    return statistics.linear_regression([math.log(value) for value in values],
                                        [math.log(time) for time in times]).slope


def render(tables: list[str], growth: str, stage: Any, arguments: argparse.Namespace) -> str:
    import torch
    from comfyui_version import __version__ as host

    network = "SD1.5's network with random weights" if arguments.real_size else (
        arguments.checkpoint.name if arguments.checkpoint else "the demo checkpoint")
    gpu = torch.cuda.is_available()
    command = " ".join(["python3 bench/compare.py", *sys.argv[1:]])
    device = torch.cuda.get_device_name() if gpu else f"one thread of a CPU ({platform.machine()})"
    from importlib.metadata import version

    text = f"""# What it costs

Written by `{command}`. {network[0].upper()}{network[1:]}, {stage.steps} steps of DDIM, batch
{stage.batch}, latents of {stage.side} x {stage.side}, cfg 7.5, on {device}; ComfyUI {host},
PyTorch {torch.__version__}, diffusers {version("diffusers")}.
{arguments.rounds} rounds, in each of which all of a table take turns.

- **ms a step**: the median; {"by the clock" if gpu else "of the processor's time, which leaves out other programs"}.
- **of its bare sampler**: plain sampling with a prompt and a negative is 1, in the same process. Only this column
  compares methods without the frameworks that they run in.
- **of the pack**: seconds beside those of this pack, the median of the ratios within a round. Below 1 is faster.
- **rows a step**: pictures that the network reads in a step; a bare step reads 2. A row of *Feature Injection* that is
  read only as far as it is needed counts as one.
- **MB at most**: tensors alive at once beside those from before the run, so without the weights. A fusion of LoRA
  stacks keeps a second copy of the network as well, where memory allows.

The runs of the table of LoRA stacks begin by patching weights that the run before them patched otherwise, its bare
sampler's as well, which is slower there than elsewhere.

*KSampler, nothing injected* is *bare KSampler* a second time: what lies between the two came by chance. On a machine
that does other things as well, a tenth is within that; for a percent, take more rounds on an idle one.

Peers on diffusers run in their own process, with the same weights (both networks see the same noise, which is checked
first), prompts, start and steps. What diffusers ships is named as such. Its community pipelines and other people's
nodes are no packages: **own lines** are their method in few lines of ours, in `bench/peers.py` and
`bench/contenders.py`. A core graph is the one that comes nearest. It is no equal: *KSampler, denoise 0.6* keeps a
layout less, and the core injects nothing.

## Side by side

"""
    text += "\n\n".join(tables) + "\n"
    if growth:
        text += f"""
## How it grows

Milliseconds a step, and of a whole run where the steps grow. The exponent is that of the power that fits best: 1 is in
proportion, 2 is fourfold for twice as much. A latent of twice the side has four times the pixels. A point is the median
of {GROWTH_ROUNDS} rounds: on a busy machine single points, and with them exponents, are rough.

![Milliseconds over what grows]({arguments.page.stem}.svg)

{growth}
"""
    return text


if __name__ == "__main__":
    sys.exit(main())
