"""Keeps what a gallery's prompts made until its page is written, so that a run that was cut off goes on from there."""
from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from comfyui import Prompt, Run
from commands import ROOT

SHIPPED = ("__init__.py", "attention_patches", "demo", "host", "metrics", "nodes", "samplers")


class KeptRuns:
    """Runs by prompt, of one state of the pack on one host.

    Args:
        folder: where they lie; runs of another state in it are removed.
        state: the host and the checkpoint, in words; the pack's own files are added.
    """

    def __init__(self, folder: Path, state: str) -> None:
        digest = hashlib.sha256(state.encode())
        for path in _shipped_files():
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_mtime_ns} {path.stat().st_size}".encode())
        self.folder = folder / digest.hexdigest()[:16]
        for other in folder.glob("*"):
            if other != self.folder:
                shutil.rmtree(other, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(list(self.folder.glob("*.json")))

    def find(self, prompt: Prompt) -> Run | None:
        """What this prompt made, or None; an unreadable file counts as none."""
        try:
            kept = json.loads(self._path(prompt).read_text(encoding="utf-8"))
            images = {node: [base64.b64decode(file) for file in files] for node, files in kept["images"].items()}
            return Run(**{**kept, "images": images})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, prompt: Prompt, run: Run) -> None:
        """Stores a run that came to its end."""
        if run.status != "success":
            return
        images = {node: [base64.b64encode(file).decode() for file in files] for node, files in run.images.items()}
        fresh = self._path(prompt).with_suffix(".part")
        fresh.write_text(json.dumps({**asdict(run), "images": images}), encoding="utf-8")
        fresh.replace(fresh.with_suffix(".json"))

    def clear(self) -> None:
        """Forgets all: the page is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, prompt: Prompt) -> Path:
        words = json.dumps(prompt, sort_keys=True)
        return self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.json"


def _shipped_files() -> Iterator[Path]:
    for name in SHIPPED:
        path = ROOT / name
        yield from sorted(file for file in (path.rglob("*") if path.is_dir() else [path])
                          if file.is_file() and "__pycache__" not in file.parts)
