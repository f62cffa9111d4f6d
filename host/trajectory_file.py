"""Trajectories as safetensors files in the host's output folder, and back from there and from the input folder.

A file holds the tensors `sigmas`, `states`, `samples`, `end` and, if the latent has one, `noise_mask`; all else is JSON
under one key of the metadata. Everything is checked from the header before tensors are read, and nothing is unpickled.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..samplers.cycle import Level
from .inversion import Trajectory

KEY, VERSION = "mixology_trajectory", 1
SUFFIX, OUTPUT = ".safetensors", " [output]"  # the mark that the host itself gives to names of its output folder
LARGEST_HEADER = 1 << 20  # bytes; fifty steps need three thousand
LARGEST_FILE = 1 << 34  # bytes; fifty steps of a 1024 x 1024 picture need 13 million
LONGEST = 10_001  # states
FLOATS = ("F32", "F16", "BF16")

Layout = dict[str, tuple[str, tuple[int, ...]]]  # type and shape by name


# --------------------------------------------------------------------------------------------------- names

def folder_of(name: str) -> tuple[Path, str]:
    """The folder that a name of the list belongs to, and the name in it."""
    if name.endswith(OUTPUT):
        return Path(folder_paths.get_output_directory()), name.removesuffix(OUTPUT)
    return Path(folder_paths.get_input_directory()), name


def find_file(name: str) -> Path:
    """The file behind a name; no name, and no link behind one, leads out of the host's folders.

    Raises:
        ValueError: if there is none.
    """
    folder, file = folder_of(name)
    path = folder / file
    try:
        path, root = path.resolve(), folder.resolve()
        found = path.is_relative_to(root) and path.suffix == SUFFIX and path.is_file()
    except (OSError, ValueError, RuntimeError):  # no name of this system, or links in a circle
        found = False
    if not found:
        raise ValueError(
            f"Load Trajectory finds no trajectory '{name}' in the host's folders; choose one of its list, and refresh "
            f"the list (R) after saving one.")
    return path


def walk_files(folder: Path) -> Iterator[str]:
    """Names of the safetensors files below a folder, hidden folders and links to folders left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if file.endswith(SUFFIX):
                yield (Path(place) / file).relative_to(folder).as_posix()


def is_trajectory(name: str) -> bool:
    try:
        return KEY in read_header(find_file(name))[1]
    except (ValueError, OSError):  # damaged, foreign or gone: not for this list
        return False


def list_names() -> list[str]:
    """Trajectories in the input folder, then those in the output folder with the host's mark."""
    names = (f"{file}{mark}" for mark in ("", OUTPUT) for file in sorted(walk_files(folder_of(mark)[0])))
    return [name for name in names if is_trajectory(name)]


def find_fault(name: str) -> str | None:
    """What keeps `name` from loading as far as its header tells, in one sentence; None if nothing does."""
    try:
        read_plan(find_file(name))
    except ValueError as error:
        return str(error)
    return None


def fingerprint(name: str) -> str:
    """Changes when the file behind `name` changes, so that the host loads it again."""
    file = find_file(name).stat()
    return f"{file.st_mtime_ns}.{file.st_size}"


# --------------------------------------------------------------------------------------------------- reading

def read_header(path: Path) -> tuple[Layout, dict[str, str]]:
    """Types and shapes of the tensors, and the metadata. No tensor is read.

    Raises:
        ValueError: if it is no whole safetensors file of a trajectory's kind.
    """
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > LARGEST_HEADER or path.stat().st_size > LARGEST_FILE:
            raise ValueError(
                f"Load Trajectory expected a trajectory, but '{path.name}' is another kind of file; choose one that "
                f"Save Trajectory wrote.")
        with safe_open(path, framework="pt") as file:  # checks that the tensors fill the file without gap or overlap
            names: list[str] = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            layout = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            return layout, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Load Trajectory expected a whole safetensors file, but '{path.name}' is damaged ({error}); save the "
            f"trajectory again.") from error


def is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def is_sound(notes: dict[str, Any]) -> bool:
    """Whether the notes of this version hold what they should."""
    if set(notes) != {"version", "latent_format", "levels", "start", "batch_index"}:
        return False
    levels, index = notes["levels"], notes["batch_index"]
    if not isinstance(notes["latent_format"], str) or not isinstance(levels, list):
        return False
    pairs = all(isinstance(level, list) and len(level) == 2 and all(map(is_number, level))
                for level in (*levels, notes["start"]))
    return pairs and (index is None or isinstance(index, list) and all(type(item) is int for item in index))


def fits(layout: Layout, notes: dict[str, Any]) -> bool:
    """Whether tensors and notes belong together."""
    names = {"sigmas", "states", "samples", "end"}
    if not names <= set(layout) <= names | {"noise_mask"}:
        return False
    (sigma_type, sigmas), (state_type, states) = layout["sigmas"], layout["states"]
    types = sigma_type == state_type == "F32" and all(kind in FLOATS for kind, _ in layout.values())
    count = len(notes["levels"])
    return (types and 2 <= count <= LONGEST and sigmas == (count,) and len(states) in (4, 5, 6) and states[0] == count
            and min(states) > 0 and layout["samples"][1] == layout["end"][1] == states[1:]
            and len(notes["batch_index"] or ()) in (0, states[1])
            and len(layout.get("noise_mask", ("", (1, 1)))[1]) in (2, 3, 4, 5))


def read_plan(path: Path) -> tuple[Layout, dict[str, Any]]:
    """What the file holds, checked from its header.

    Raises:
        ValueError: if it is damaged, foreign or of another version.
    """
    layout, metadata = read_header(path)
    if KEY not in metadata:
        raise ValueError(
            f"Load Trajectory expected a trajectory, but '{path.name}' is another kind of file; choose one that Save "
            f"Trajectory wrote.")
    try:
        notes = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        notes = None
    if isinstance(notes, dict) and notes.get("version") != VERSION:
        raise ValueError(
            f"Load Trajectory reads files of version {VERSION}, but '{path.name}' is of another; update Mixology or "
            f"save the trajectory again.")
    if not isinstance(notes, dict) or not is_sound(notes) or not fits(layout, notes):
        raise ValueError(
            f"Load Trajectory expected tensors and notes that belong together, but those of '{path.name}' do not; "
            f"save the trajectory again.")
    return layout, notes


def load_trajectory(name: str) -> Trajectory:
    """The trajectory behind a name of the list, bit for bit as it was saved.

    Raises:
        ValueError: if there is no such file, or it is damaged, foreign or hostile.
    """
    path = find_file(name)
    layout, notes = read_plan(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in layout}  # the file may change below a mapped tensor
        latent = {"samples": tensors["samples"]}
        if "noise_mask" in tensors:
            latent["noise_mask"] = tensors["noise_mask"]
        if notes["batch_index"] is not None:
            latent["batch_index"] = notes["batch_index"]
        return Trajectory(
            tensors["sigmas"], tensors["states"], latent, tensors["end"], notes["latent_format"],
            tuple(Level(*level) for level in notes["levels"]), Level(*notes["start"]))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"Load Trajectory cannot use '{path.name}': {error}") from error


# --------------------------------------------------------------------------------------------------- writing

def save_trajectory(trajectory: Trajectory, filename_prefix: str) -> dict[str, str]:
    """Write a trajectory to the output folder under the host's own numbering.

    Returns:
        filename, subfolder and type, as the host's saving nodes tell the interface.

    Raises:
        ValueError: if the prefix leads out of the output folder.
    """
    output = Path(folder_paths.get_output_directory())
    if not (output / filename_prefix).parent.resolve().is_relative_to(output.resolve()):
        raise ValueError(
            f"filename_prefix expects a name inside the output folder, got '{filename_prefix}'; leave out '..' and "
            f"leading slashes.")
    folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, str(output))
    latent = trajectory.latent
    tensors = {"sigmas": trajectory.sigmas, "states": trajectory.states, "samples": latent["samples"],
               "end": trajectory.end}
    if latent.get("noise_mask") is not None:
        tensors["noise_mask"] = latent["noise_mask"]
    index = latent.get("batch_index")
    notes = {"version": VERSION, "latent_format": trajectory.latent_format,
             "levels": [[level.signal, level.noise] for level in trajectory.levels],
             "start": [trajectory.start.signal, trajectory.start.noise],
             "batch_index": None if index is None else [int(item) for item in index]}
    file = f"{filename}_{counter:05}_{SUFFIX}"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(folder) / file,
              {KEY: json.dumps(notes)})
    return {"filename": file, "subfolder": subfolder, "type": "output"}
