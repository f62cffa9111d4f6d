"""Saves trajectories to folders of a test's own, spoils their files, and tells what is refused."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from mixology.host.trajectory import Trajectory
from mixology.host.trajectory_file import find_fault, load_trajectory, save_trajectory
from safetensors import safe_open
from safetensors.torch import save_file


def use_folders(place: Path) -> Iterator[tuple[Path, Path]]:
    """Input and output folders below a place, for as long as a fixture lasts."""
    before = folder_paths.get_input_directory(), folder_paths.get_output_directory()
    ours = place / "input", place / "output"
    for folder in ours:
        folder.mkdir()
    folder_paths.set_input_directory(str(ours[0]))
    folder_paths.set_output_directory(str(ours[1]))
    yield ours
    folder_paths.set_input_directory(before[0])
    folder_paths.set_output_directory(before[1])


def saved(trajectory: Trajectory, prefix: str = "mixology/trajectory") -> str:
    """Its name in the list."""
    place = save_trajectory(trajectory, prefix)
    return "/".join(part for part in (place["subfolder"], place["filename"]) if part) + " [output]"


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        names: list[str] = file.keys()
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["mixology_trajectory"])


def spoil(trajectory: Trajectory, output: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> str:
    """The name of a file whose tensors and notes were changed after saving."""
    name = saved(trajectory, "spoilt")
    path = output / name.removesuffix(" [output]")
    tensors, notes = parts_of(path)
    changed = change(tensors, notes)
    save_file(tensors, path, {"mixology_trajectory": changed if isinstance(changed, str) else json.dumps(notes)})
    return name


def refuse(name: str, words: str, at_once: bool = True) -> None:
    """One sentence, from the header where that can tell."""
    fault = find_fault(name)
    assert (fault is not None) == at_once
    with pytest.raises(ValueError, match=words) as caught:
        load_trajectory(name)
    assert "\n" not in str(caught.value)
    assert fault is None or fault == str(caught.value)
