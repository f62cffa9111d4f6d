"""LPIPS in the host: its networks from files in a folder of the models directory, and the distance of pictures."""
from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError

from ..metrics.image import lpips
from ..metrics.lpips import Network, join_network, make_features, read_convolution, read_stage
from ..samplers.wording import legible

FOLDER = "lpips"
KINDS = (".safetensors", ".pth", ".pt")
BYTES_A_PIXEL = 64 * 4 * 4  # of the first maps of both pictures and what is made of them
UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, EOFError, UnpicklingError, SafetensorError)


def find_folders() -> list[str]:
    """Where the files may lie: the folder of the models directory, and what the user's extra paths add."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    return folder_paths.get_folder_paths(FOLDER)


def find_files() -> list[Path]:
    """Files that may hold a network or its weights, by name."""
    folders = [Path(folder) for folder in find_folders()]
    return sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir()
                  if path.suffix.lower() in KINDS and path.is_file())


def fingerprint_network() -> str:
    """Changes when a file comes, goes or changes."""
    found: list[str] = []
    for path in find_files():
        file = path.stat()
        found.append(f"{path} {file.st_mtime_ns} {file.st_size}")
    return "\n".join(found)


def find_network() -> Network | str:
    """The network that the folder's files hold together; else the sentence that says what to put where."""
    states: list[dict[str, torch.Tensor]] = []
    for path in find_files():
        try:
            state: Any = comfy.utils.load_torch_file(str(path), safe_load=True)
        except UNREADABLE:
            state = None
        if not isinstance(state, dict):
            return f"LPIPS is not measured: '{legible(path.name)}' in models/{FOLDER} is no readable file; get it anew."
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        states.append({name: value for name, value in tensors.items()
                       if read_convolution(name) is not None or read_stage(name) is not None})
    found = join_network(states)
    if not isinstance(found, str):
        return found
    return (
        f"LPIPS is not measured: it needs {found} in models/{FOLDER}; put torchvision's vgg16-397923af.pth and the "
        f"lpips package's weights/v0.1/vgg.pth there, under any names (AlexNet's two files do as well).")


def measure_lpips(images: torch.Tensor, references: torch.Tensor, network: Network | str) -> tuple[list[float], str]:
    """LPIPS of each picture [B, H, W, 3], and what the report says of it; no figures without a network.

    Args:
        references: one picture, or one for each.
        network: or why there is none.
    """
    if isinstance(network, str):
        return [], network
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(BYTES_A_PIXEL * images.shape[1] * images.shape[2] * 2, device)
    features = make_features(network, device)
    distances: list[float] = []
    try:
        for place, picture in enumerate(images):
            comfy.model_management.throw_exception_if_processing_interrupted()
            reference = references[place % len(references)]
            distances.append(float(lpips(picture[None], reference[None], features, network.weights)))
    except ValueError as error:  # too small
        return [], f"LPIPS is not measured: {legible(error, 200)}"
    return distances, f"LPIPS by {network.trunk.name}, version 0.1."
