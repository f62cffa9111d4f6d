"""Trajectories as safetensors files in the host's output folder, and back from there and from the input folder.

A file holds the tensors `sigmas`, `states`, `samples`, `end` and, if the latent has one, `noise_mask`; all else is JSON
under one key of the metadata. Everything is checked from the header before tensors are read, and nothing is unpickled.
What is written is checked as it will be when it is read, before a file is there.
"""
from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..samplers.wording import legible
from .files import fingerprint_files, tell_fault
from .prefix import check_prefix
from .trajectory import Trajectory
from .trajectory_format import (
    LARGEST_FILE,
    LARGEST_HEADER,
    LONGEST_FAULT,
    VERSION,
    Parts,
    compose,
    describe,
    fits,
    is_sound,
)

KEY = "mixology_trajectory"
SUFFIX, OUTPUT = ".safetensors", " [output]"  # the mark that the host itself gives to names of its output folder
NO_FILE = "no trajectory yet: run Save Trajectory, then press R"  # in place of a list that is empty


# --------------------------------------------------------------------------------------------------- names

def folder_of(name: str) -> tuple[Path, str]:
    """The folder that a name of the list belongs to, and the name in it."""
    if name.endswith(OUTPUT):
        return Path(folder_paths.get_output_directory()), name.removesuffix(OUTPUT)
    return Path(folder_paths.get_input_directory()), name


def find_file(name: object) -> Path:
    """The file behind a name; no name, and no link behind one, leads out of the host's folders.

    Raises:
        ValueError: if there is none, or the name is no text.
    """
    if name == NO_FILE:
        raise ValueError(
            "Load Trajectory expects a saved trajectory, got none; run a workflow with Save Trajectory, press R to "
            "refresh this node's list, and choose the file there.")
    if isinstance(name, str):
        folder, file = folder_of(name)
        try:
            path, root = (folder / file).resolve(), folder.resolve()
            if path.is_relative_to(root) and path.suffix == SUFFIX and path.is_file():
                return path
        except (OSError, ValueError, RuntimeError):  # no name of this system, or links in a circle
            pass
    raise ValueError(
        f"Load Trajectory finds no trajectory '{legible(name)}' in the host's folders; choose one of its list, and "
        f"refresh the list (R) after saving one.")


def walk_files(folder: Path) -> Iterator[str]:
    """Names of the safetensors files below a folder, hidden folders and links to folders left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            if file.endswith(SUFFIX):
                yield (Path(place) / file).relative_to(folder).as_posix()


def is_trajectory(name: str) -> bool:
    folder, file = folder_of(name)
    path = folder / file
    try:
        found = path.stat()
        return (stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST_FILE
                and bears_key(str(path), found.st_mtime_ns, found.st_size) and find_file(name) is not None)
    except (ValueError, OSError, RuntimeError):  # foreign, gone or not to be read: not for this list
        return False


@lru_cache(maxsize=1 << 14)
def bears_key(path: str, changed: int, size: int) -> bool:
    """Whether a file is a whole one of this kind, told from its header: asked once for each age and size of a file,
    as the host wants the list several times a prompt and the output folder holds models as well."""
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if length > min(LARGEST_HEADER, size) or KEY.encode() not in raw.read(length):
            return False
    try:
        return KEY in read_header(Path(path))[1]
    except ValueError:
        return False


def list_names() -> list[str]:
    """Trajectories in the input folder, then those in the output folder with the host's mark."""
    names = (f"{file}{mark}" for mark in ("", OUTPUT) for file in sorted(walk_files(folder_of(mark)[0])))
    return [name for name in names if is_trajectory(name)]


def list_choices() -> list[str]:
    """What Load Trajectory offers: the trajectories, or what to do where there are none."""
    return list_names() or [NO_FILE]


def find_fault(name: object) -> str | None:
    """What keeps `name` from loading as far as its header tells, in one sentence; None if nothing does."""
    return tell_fault(lambda: read_plan(find_file(name)))


def fingerprint(name: object) -> str | float:
    """Changes when the file behind `name` changes; see `fingerprint_files`."""
    return fingerprint_files(name, lambda: [find_file(name)])


# --------------------------------------------------------------------------------------------------- reading

def read_header(path: Path) -> tuple[Parts, dict[str, str]]:
    """Types and shapes of the tensors, and the metadata. No tensor is read.

    Raises:
        ValueError: if it is no whole safetensors file of a trajectory's kind.
    """
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > LARGEST_HEADER or path.stat().st_size > LARGEST_FILE:
            raise other_kind(path)
        with safe_open(path, framework="pt") as file:  # checks that the tensors fill the file without gap or overlap
            names: list[str] = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            parts = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            return parts, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Load Trajectory expected a whole safetensors file, but '{legible(path.name)}' is damaged "
            f"({legible(error)}); save the trajectory again.") from None


def other_kind(path: Path) -> ValueError:
    return ValueError(
        f"Load Trajectory expected a trajectory, but '{legible(path.name)}' is another kind of file; choose one that "
        f"Save Trajectory wrote.")


def read_plan(path: Path) -> tuple[Parts, dict[str, Any]]:
    """What the file holds, checked from its header.

    Raises:
        ValueError: if it is damaged, foreign or of another version.
    """
    parts, metadata = read_header(path)
    if KEY not in metadata:
        raise other_kind(path)
    try:
        notes = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        notes = None
    if isinstance(notes, dict) and notes.get("version") != VERSION:
        raise ValueError(
            f"Load Trajectory reads files of version {VERSION}, but '{legible(path.name)}' is of another; update "
            f"Mixology or save the trajectory again.")
    if not isinstance(notes, dict) or not is_sound(notes) or not fits(parts, notes):
        raise ValueError(
            f"Load Trajectory expected tensors and notes that belong together, but those of '{legible(path.name)}' do "
            f"not; save the trajectory again.")
    return parts, notes


def load_trajectory(name: str) -> Trajectory:
    """The trajectory behind a name of the list, bit for bit as it was saved.

    Raises:
        ValueError: if there is no such file, or it is damaged, foreign or hostile.
    """
    path = find_file(name)
    parts, notes = read_plan(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in parts}  # the file may change below a mapped tensor
        return compose(tensors, notes)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"Load Trajectory cannot use '{legible(path.name)}': {legible(error, LONGEST_FAULT)}") from None


# --------------------------------------------------------------------------------------------------- writing

def save_trajectory(trajectory: Trajectory, filename_prefix: str) -> dict[str, str]:
    """Write a trajectory to the output folder under the host's own numbering, or nothing at all.

    Returns:
        filename, subfolder and type, as the host's saving nodes tell the interface.

    Raises:
        ValueError: if the prefix leads out of the output folder, Load Trajectory would not bring the trajectory back,
            or the system takes no such file.
    """
    prefix = check_prefix(filename_prefix)
    tensors, notes = describe(trajectory)
    try:
        folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, os.path.abspath(folder_paths.get_output_directory()))
        file = f"{filename}_{counter:05}_{SUFFIX}"
        write_whole(Path(folder) / file, tensors, {KEY: json.dumps(notes)})
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Save Trajectory cannot write '{legible(prefix)}' ({legible(error)}); make room on the disk, or choose "
            f"another filename_prefix.") from None
    return {"filename": file, "subfolder": subfolder, "type": "output"}


def describe_saved(saved: dict[str, str], trajectory: Trajectory) -> str:
    """What Save Trajectory shows: the name under which Load Trajectory lists the file, and what is in it."""
    name = "/".join(part for part in (saved["subfolder"].replace(os.sep, "/"), saved["filename"]) if part)
    return f"{name}{OUTPUT}\n{describe_length(trajectory)}"


def describe_length(trajectory: Trajectory) -> str:
    """Steps and pictures of a trajectory, in words."""
    steps, pictures = len(trajectory.sigmas) - 1, len(trajectory.end)
    return f"{steps} step{'s' * (steps != 1)}, {pictures} picture{'s' * (pictures != 1)}"


def write_whole(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file under a passing name beside its place, and move it there when it is whole."""
    passing = path.with_name(f".{uuid4().hex}.part")
    try:
        save_file(tensors, passing, metadata)
        os.replace(passing, path)
    finally:
        passing.unlink(missing_ok=True)
