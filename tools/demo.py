"""Shows what Mixology does, set-up included: python3 tools/demo.py [--serve] [--checkpoint FILE] [--only NAME]

Starts a real ComfyUI with this pack, runs every show on the demo checkpoint and writes a gallery page; started again
after it was cut off, it goes on where it stopped. --only names one technique.
--serve opens the GUI instead and leaves it running. COMFYUI_PATH uses an install that is already there.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import environment
from commands import ROOT, WORK, Failure, guarded, say

SHOWS = ROOT / "tools" / "shows"
PAGE = WORK / "gallery" / "index.html"
INSIDE = "MIXOLOGY_DEMO_INSIDE"  # set where this file runs under the host's Python


def main() -> int:
    options = read_arguments()
    if os.environ.get(INSIDE):
        return serve(options) if options.serve else show(options)
    find_shows(options.only)
    host = environment.prepare()
    return host.start("script", Path(__file__).resolve(), sys.argv[1:], variables={INSIDE: "1"})


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="open the GUI with the pack and leave it running")
    parser.add_argument("--port", type=int, help="the GUI's port (default 8188 with --serve, else any free one)")
    parser.add_argument("--checkpoint", type=lambda text: Path(text).expanduser().resolve(), metavar="FILE",
                        help="run on this SD1.x or SDXL checkpoint")
    parser.add_argument("--only", metavar="NAME",
                        help="one technique: cocktail, dual_style, fusion, magicmix, mixer or token_scale")
    return parser.parse_args()


def find_shows(only: str | None) -> list[Path]:
    """The show files in the order of their names."""
    names = {path.stem: path for path in sorted(SHOWS.glob("*.py")) if path.stem != "__init__"}
    if only is not None and only not in names:
        raise Failure(f"There is no show {only!r}, there are: {', '.join(names)}.")
    return [names[only]] if only else list(names.values())


def load_show(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mixology_show_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Failure(f"The show {path.name} cannot be loaded.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def show(options: argparse.Namespace) -> int:
    """Runs the shows on a real server and writes the gallery."""
    from comfyui import Server
    from gallery import Section, write_page
    from kept_runs import KeptRuns
    from progress import Progress
    from stage import Stage, read_checkpoint

    checkpoint = read_checkpoint(options.checkpoint) if options.checkpoint else None
    shows = [load_show(path) for path in find_shows(options.only)]
    host = environment.current()
    started = time.monotonic()
    say(f"Starting ComfyUI {host.version} ...")
    paths_file = environment.paths_file(host, checkpoint.path if checkpoint else None)
    kept = KeptRuns(PAGE.parent / "runs", f"{host.version} {checkpoint.path if checkpoint else ''}")
    if len(kept):
        say(f"The last start was cut off: going on after {len(kept)} prompts that are done.")
    sections: list[Section] = []
    with Server(host, options.port, paths_file, name="demo") as server:
        definitions = server.object_info()
        require_pack(definitions, server.log)
        with Progress(sum(module.count_runs(checkpoint is not None) for module in shows)) as progress:
            for module in shows:
                sections += module.perform(Stage(server, definitions, progress, kept, checkpoint))
    model = f"{checkpoint.path.name} ({checkpoint.family})" if checkpoint else "the demo checkpoint"
    write_page(PAGE, "Mixology gallery", f"Made by ComfyUI {host.version} on {model} in "
               f"{time.monotonic() - started:.0f} seconds, set-up aside.", sections)
    kept.clear()
    say(f"The gallery is at {PAGE}")
    return 0


def serve(options: argparse.Namespace) -> int:
    """Starts the GUI and waits until it is closed."""
    from comfyui import Server

    host = environment.current()
    arguments: Sequence[str] = ("--preview-method", "auto")
    paths_file = environment.paths_file(host, options.checkpoint)
    with Server(host, options.port or 8188, paths_file, arguments, name="serve") as server:
        require_pack(server.object_info(), server.log)
        say(f"ComfyUI {host.version} with Mixology is at {server.address} (templates: Workflow, Browse Templates, "
            f"{environment.PACK}). Ctrl-C ends it.")
        server.wait()
        raise Failure(f"The server ended: {server.last_line()}. (Log: {server.log})")


def require_pack(definitions: dict[str, object], log: Path) -> None:
    if not any(name.startswith("Mixology") for name in definitions):
        raise Failure(f"ComfyUI started without this pack: see the lines about {environment.PACK} in {log}.")


if __name__ == "__main__":
    sys.exit(guarded(main))
