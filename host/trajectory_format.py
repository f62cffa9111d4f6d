"""What a trajectory's file holds: a trajectory as tensors and notes, and both held against each other.

Reading and writing ask the same questions, so that nothing is written which would not be read.
"""
from __future__ import annotations

import json
import math
from typing import Any

import torch

from ..samplers.levels import Level
from ..samplers.trajectory import LARGEST_INDEX, check_noise_mask
from ..samplers.wording import format_size, legible
from .trajectory import Trajectory

VERSION = 1
LARGEST_HEADER = 1 << 20  # bytes; fifty steps need three thousand
LARGEST_FILE = 1 << 32  # bytes; fifty steps of a 1024 x 1024 picture need 13 million, of 81 frames at 720p one billion
LONGEST = 10_001  # states
DEEPEST = 8  # lists in lists of a latent's further entries
LONGEST_FAULT = 400  # letters of a sentence of ours in another
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
         torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
FLOATS = ("F64", "F32", "F16", "BF16")
NOTES = {"version", "latent_format", "levels", "start", "batch_index"}
MORE = "more"  # the note of a latent's further entries; only in files that have any
FOREMOST = ("samples", "noise_mask", "batch_index")  # entries of a latent with a place of their own

Parts = dict[str, tuple[str, tuple[int, ...]]]  # of a file: type and shape by name


# --------------------------------------------------------------------------------------------------- rules

def is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and value.isascii()


def is_level(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def is_index(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= LARGEST_INDEX for item in value)


def is_plain(value: Any, depth: int = DEEPEST) -> bool:
    """Whether JSON gives a value back as it was."""
    if isinstance(value, list | dict):
        items = value if isinstance(value, list) else [*value, *value.values()]
        keys = isinstance(value, list) or all(type(key) is str for key in value)
        return depth > 0 and keys and all(is_plain(item, depth - 1) for item in items)
    return value is None or type(value) in (bool, int, str) or is_number(value)


def is_sound(notes: dict[str, Any]) -> bool:
    """Whether the notes of this version hold what they should."""
    if set(notes) - {MORE} != NOTES:
        return False
    levels, index, more = notes["levels"], notes["batch_index"], notes.get(MORE, {})
    return (is_name(notes["latent_format"])
            and isinstance(levels, list) and all(map(is_level, (*levels, notes["start"])))
            and (index is None or is_index(index))
            and isinstance(more, dict) and is_plain(more, DEEPEST + 1) and not set(more) & set(FOREMOST))


def fits(parts: Parts, notes: dict[str, Any]) -> bool:
    """Whether tensors and notes belong together."""
    names = {"sigmas", "states", "samples", "end"}
    if not names <= set(parts) <= names | {"noise_mask"}:
        return False
    return fit_types({name: kind for name, (kind, _) in parts.items()}) and fit_shapes(
        {name: shape for name, (_, shape) in parts.items()}, notes)


def fit_types(types: dict[str, str]) -> bool:
    """Whether the tensors of a file, by name, are of types that a trajectory has."""
    return (types["sigmas"] == types["states"] == "F32" and types["samples"] in FLOATS and types["end"] in FLOATS
            and types.get("noise_mask", "F32") in TYPES.values())


def fit_shapes(shapes: dict[str, tuple[int, ...]], notes: dict[str, Any]) -> bool:
    """Whether the tensors of a file, by name, are of one grid and one picture, as its notes are."""
    count, states, mask = len(notes["levels"]), shapes["states"], shapes.get("noise_mask", (1, 1))
    return (2 <= count <= LONGEST and shapes["sigmas"] == (count,)
            and len(states) in (4, 5, 6) and states[0] == count and min(states) > 0
            and shapes["samples"] == shapes["end"] == states[1:]
            and len(notes["batch_index"] or ()) in (0, states[1])
            and len(mask) in (2, 3, 4, 5) and min(mask) > 0)


# --------------------------------------------------------------------------------------------------- reading

def compose(tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> Trajectory:
    """The trajectory of a file's tensors and notes, which fit together.

    Raises:
        ValueError: if their numbers do not.
    """
    latent = {"samples": tensors["samples"], **notes.get(MORE, {})}
    if "noise_mask" in tensors:
        latent["noise_mask"] = tensors["noise_mask"]
    if notes["batch_index"] is not None:
        latent["batch_index"] = notes["batch_index"]
    levels, start = tuple(Level(*level) for level in notes["levels"]), Level(*notes["start"])
    trajectory = Trajectory(
        tensors["sigmas"], tensors["states"], latent, tensors["end"],
        latent_format=notes["latent_format"], levels=levels, start=start)
    check_noise_mask(latent.get("noise_mask"))
    return trajectory


# --------------------------------------------------------------------------------------------------- writing

def describe(trajectory: Trajectory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A trajectory as a file's tensors and notes, held against all that Load Trajectory asks of them.

    Raises:
        ValueError: if it would not come back.
    """
    latent = trajectory.latent
    tensors = {"sigmas": trajectory.sigmas, "states": trajectory.states, "samples": latent["samples"].clone(),
               "end": trajectory.end.clone()}  # a file takes no tensors that share memory
    if latent.get("noise_mask") is not None:
        tensors["noise_mask"] = latent["noise_mask"].clone()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    index = latent.get("batch_index")
    more = {key: value for key, value in latent.items() if key not in FOREMOST}
    strange = next((key for key, value in more.items() if not is_plain({key: value}, DEEPEST + 1)), None)
    if strange is not None:
        raise ValueError(
            f"Save Trajectory expects a latent of samples, noise_mask, batch_index and plain values, got "
            f"'{legible(strange)}', which the file cannot hold; invert the latent that VAE Encode makes.")
    notes = {"version": VERSION, "latent_format": trajectory.latent_format,
             "levels": [[level.signal, level.noise] for level in trajectory.levels],
             "start": [trajectory.start.signal, trajectory.start.noise],
             "batch_index": None if index is None else [int(item) for item in index],
             **({MORE: more} if more else {})}
    check_whole(tensors, notes)
    return tensors, notes


def check_whole(tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> None:
    """Raises ValueError if a file of these would be refused when it is read."""
    size = sum(tensor.nbytes for tensor in tensors.values()) + LARGEST_HEADER
    if size > LARGEST_FILE:
        raise ValueError(
            f"Save Trajectory expects a trajectory of at most {LARGEST_FILE / 1e9:.1f} GB, got {size / 1e9:.1f} GB; "
            f"invert fewer pictures at once or with fewer steps.")
    header = len(json.dumps(json.dumps(notes)))
    if header > LARGEST_HEADER * 3 // 4:
        raise ValueError(
            f"Save Trajectory expects at most {LARGEST_HEADER * 3 // 4} letters beside the pictures, got {header}; "
            f"invert the latent that VAE Encode makes, or with fewer steps.")
    parts = {name: (TYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
              for name, tensor in tensors.items()}
    if not is_sound(notes) or not fits(parts, notes):
        found = ", ".join(f"{name} of {kind} {format_size(shape)}" for name, (kind, shape) in parts.items())
        raise ValueError(
            f"Save Trajectory expects a picture and a noise mask of common types and dimensions, got {found}; invert "
            f"the latent that VAE Encode makes.")
    try:
        compose(tensors, notes)
    except ValueError as error:
        raise ValueError(
            f"Save Trajectory cannot keep this trajectory: {legible(error, LONGEST_FAULT)}; mend the latent and invert "
            f"it again.") from None
