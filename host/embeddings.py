"""CLIP in the host: projected embeddings of pictures and of texts, in the space that both share."""
from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy import sd1_clip
from safetensors import SafetensorError, safe_open

from ..samplers.embeddings import is_trained
from .protocols import Patcher

TOWERS = ("clip_l", "clip_h", "clip_g")  # CLIP text encoders of the host's classes
PROJECTIONS = ("text_projection", "text_projection.weight")  # in a text encoder's own file
LAYERS = {"clip_g": 30, "clip_h": 22, "clip_l": 0}  # that the ones after it lack: how the host tells files


@dataclass(frozen=True)
class Asker:
    """Which node asks for a text encoder, and what to load where it got none."""

    node: str
    remedy: str


def check_projection(clip_vision: Any, node: str) -> int:
    """The width of a vision model's projected embeddings.

    Raises:
        ValueError: if it has no projection.
    """
    network = getattr(clip_vision, "model", None)
    projection = getattr(getattr(network, "visual_projection", None), "weight", None)
    if projection is None or not is_trained(projection):
        raise ValueError(
            f"{node} expected a CLIP vision model with its projection, got {type(network).__name__} without one; load "
            f"a CLIP vision file that holds visual_projection, such as CLIP ViT-L/14, with Load CLIP Vision.")
    return projection.shape[0]


def find_towers(clip: Any, who: Asker) -> list[str]:
    """The CLIP text encoders in a CLIP.

    Raises:
        ValueError: if there is none.
    """
    if clip is None:
        raise ValueError(f"{who.node} expected a text encoder, got none; {who.remedy}.")
    model = clip.cond_stage_model
    names = [name for name in TOWERS if isinstance(getattr(model, name, None), sd1_clip.SDClipModel)]
    if not names:
        raise ValueError(f"{who.node} expected a CLIP text encoder, got {type(model).__name__}; {who.remedy}.")
    return names


def tokens_of(tokens: dict[str, Any], tower: str) -> list[Any]:
    """A tower's tokens in what a CLIP's tokenizer gave, in pieces of what it reads at once."""
    return tokens[tower.removeprefix("clip_")]


def embed_tokens(clip: Any, tower: str, tokens: dict[str, Any], who: Asker) -> torch.Tensor:
    """The state of a text's end token, projected [1, C]; of its first piece where it has several.

    Args:
        tokens: of the CLIP's tokenizer.

    Raises:
        ValueError: if the tower has no projection.
    """
    model, device = clip.cond_stage_model, clip.patcher.load_device
    network = getattr(model, tower)
    absent = in_file(clip, tower) is False
    if not absent:
        clip.load_model(tokens)
    if absent or not is_trained(network.transformer.text_projection.weight):
        raise ValueError(
            f"{who.node} expected a text encoder with its projection, got one without (the CLIP of SD1.x checkpoints "
            f"has none); {who.remedy}.")
    model.reset_clip_options()
    network.set_clip_options({"projected_pooled": True, "execution_device": device})
    try:
        with current_device(device):
            _, embedding = network.encode_token_weights(tokens_of(tokens, tower))[:2]
    finally:
        model.reset_clip_options()
    return embedding


def current_device(device: torch.device) -> AbstractContextManager[None]:
    """What the host encodes in, from the version on that knows several GPUs."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return nullcontext() if context is None else context(device)


def in_file(clip: Any, tower: str) -> bool | None:
    """Whether the file of a text encoder brought the tower's projection; None if that cannot be known."""
    files = files_of(clip.patcher)
    if not files:
        return None
    if clip.patcher.cached_patcher_init[0].__name__.startswith("load_checkpoint"):
        return in_checkpoint(files[0], clip.cond_stage_model, tower)
    own = next((names for names in map(read_names, files) if find_tower(names or ()) == tower), None)
    return None if own is None else any(name in own for name in PROJECTIONS)


def in_checkpoint(path: str, encoder: Any, tower: str) -> bool | None:
    """As `in_file`, for a text encoder from a checkpoint."""
    if type(encoder) is sd1_clip.SD1ClipModel:
        return False  # whatever an SD1.x checkpoint holds, the host reads no projection from it
    names = read_names(path)
    if names is None:
        return None
    endings = [f".{tower}.transformer.text_projection.weight"]
    if tower != "clip_l":
        endings += [f".model.{name}" for name in PROJECTIONS]
    return any(name.endswith(tuple(endings)) for name in names)


def find_tower(names: Collection[str]) -> str | None:
    """Which CLIP text encoder a file of its own holds."""
    return next((tower for tower, layer in LAYERS.items() if (
        f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in names
        or f"transformer.resblocks.{layer}.mlp.c_fc.weight" in names)), None)


def files_of(patcher: Patcher) -> list[str]:
    """The files from which the host's own loader made a model; none if another one did."""
    if patcher.cached_patcher_init is None:
        return []
    loader, (files, *_) = patcher.cached_patcher_init[:2]
    if loader.__module__ != comfy.sd.__name__:
        return []
    return [files] if isinstance(files, str) else list(files)


def read_names(path: str) -> set[str] | None:
    """Names of a safetensors file's tensors; None for an older format, and for a file that has moved since."""
    try:
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except (SafetensorError, OSError):
        return None
