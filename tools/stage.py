"""What a show is given: the running server, the checkpoint, the templates and the progress bar."""
from __future__ import annotations

import importlib
import io
import json
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from comfyui import Event, Run, Server
from commands import ROOT, Failure
from kept_runs import KeptRuns
from progress import Progress
from titles import template_path
from workflow import Workflow

if TYPE_CHECKING:
    import torch

HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file of a published model, and the size of the pictures it makes."""

    path: Path
    family: str
    side: int


@dataclass(frozen=True)
class Stage:
    """Shows load templates from it and run them on it."""

    server: Server
    definitions: dict[str, Any]
    progress: Progress
    kept: KeptRuns
    checkpoint: Checkpoint | None = None

    @property
    def side(self) -> int:
        """Width and height of the pictures."""
        return self.checkpoint.side if self.checkpoint else 128

    def load(self, template: str) -> Workflow:
        """A template of this pack by its short name, wired to the checkpoint that the shows run on."""
        workflow = Workflow.load(template_path(template), self.definitions)
        if self.checkpoint is None:
            workflow.use_demo_checkpoint()
        else:
            for name in workflow.ids("CheckpointLoaderSimple"):
                workflow.set_inputs(name, ckpt_name=self.checkpoint.path.name)
        workflow.fit_pictures(self.side)
        return workflow

    def run(self, workflow: Workflow, label: str) -> Run:
        """Runs a prompt under the progress bar, unless an earlier start that was cut off had done so."""
        self.progress.begin(label)

        def follow(event: Event) -> None:
            if event.kind == "progress" and event.data.get("max"):
                self.progress.move(event.data["value"] / event.data["max"])

        run = self.kept.find(workflow.prompt)
        if run is None:
            run = self.server.post(workflow.prompt, follow)
            self.kept.keep(workflow.prompt, run)
        self.progress.end()
        return run


def pure_room(name: str) -> ModuleType:
    """A module of the pack that needs no host, such as "demo.judge" or "metrics.image"."""
    package = sys.modules.setdefault("mixology_pure", ModuleType("mixology_pure"))
    package.__path__ = [str(ROOT)]
    return importlib.import_module(f"mixology_pure.{name}")


def read_pictures(files: Sequence[bytes]) -> torch.Tensor:
    """Image files of one size as the judge wants them: [B, H, W, 3], 0 to 1."""
    import numpy
    import torch
    from PIL import Image

    pictures = [numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype="float32") for data in files]
    return torch.from_numpy(numpy.stack(pictures) / 255.0)


def read_checkpoint(path: Path) -> Checkpoint:
    """Tells SD1.x from SDXL by the names in a safetensors header; anything else is refused."""
    path = path.expanduser().resolve()
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            names = json.loads(file.read(length)) if length < HEADER_LIMIT else {}
    except OSError as error:
        raise Failure(f"The checkpoint {path} cannot be read ({error.strerror}).") from error
    except (struct.error, ValueError):
        names = {}
    if "model.diffusion_model.label_emb.0.0.weight" in names and any(
            name.startswith("conditioner.embedders.1.") for name in names):
        return Checkpoint(path, "SDXL", 1024)
    context = names.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", {})
    if context.get("shape", [0, 0])[-1] == 768:
        return Checkpoint(path, "SD1.x", 512)
    raise Failure(f"{path.name} is no SD1.x or SDXL checkpoint: give a .safetensors file that holds "
                  "the model, its text encoder and its VAE.")
