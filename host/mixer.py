"""Image Mixer in the host: projected CLIP embeddings of pictures and texts, and the conditioning they make."""
from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy import sd1_clip

from ..samplers.mixer import Mixer, add_source, check_image, combine_sources, crop_image, is_trained
from ..samplers.wording import check_text
from .demo import reads_prompts, shipped_name
from .families.unet import NETWORK as UNET
from .mixer_files import PROMPTS, brings_prompts, read_names
from .mixer_graph import check_graph, describe_demo
from .networks import is_kind
from .notices import show_notice
from .protocols import Patcher

TOWERS = ("clip_l", "clip_h", "clip_g")  # CLIP text encoders of the host's classes; published mixers need the first
PROJECTIONS = ("text_projection", "text_projection.weight")  # in a text encoder's own file
LAYERS = {"clip_g": 30, "clip_h": 22, "clip_l": 0}  # that the ones after it lack: how the host tells files


def mix_image(clip_vision: Any, image: torch.Tensor, strength: float, box: tuple[float, float, float, float],
              mixer: Mixer | None) -> Mixer:
    """The mixer with pictures [B, H, W, C] in 0..1, or a crop of them, as one more source.

    Args:
        box: x, y, width and height of the crop in fractions of the picture.

    Raises:
        ValueError: for a vision model without a projection, pictures that are none, and embeddings that do not fit the
            mixer's others.
    """
    network = getattr(clip_vision, "model", None)
    projection = getattr(getattr(network, "visual_projection", None), "weight", None)
    if not is_trained(projection):
        raise ValueError(
            f"Mixer Image expected a CLIP vision model with its projection, got {type(network).__name__} without one; "
            f"load a CLIP vision file that holds visual_projection, such as CLIP ViT-L/14, with Load CLIP Vision.")
    embedding = clip_vision.encode_image(crop_image(check_image(image), *box))["image_embeds"]
    return add_source(mixer or (), embedding, strength)


def mix_text(clip: Any, text: str, strength: float, mixer: Mixer | None) -> Mixer:
    """The mixer with a text as one more source: the state of its end token, projected.

    Raises:
        ValueError: for a text encoder that is no CLIP or has no projection, a text over one chunk, and an embedding
            that does not fit the mixer's others.
    """
    if clip is None:
        raise ValueError(
            "Mixer Text expected a text encoder, got none; load a CLIP-L file that holds text_projection.weight with "
            "Load CLIP.")
    model = clip.cond_stage_model
    name = next((name for name in TOWERS if isinstance(getattr(model, name, None), sd1_clip.SDClipModel)), None)
    if name is None:
        raise ValueError(
            f"Mixer Text expected a CLIP text encoder, got {type(model).__name__}; load a CLIP-L file that holds "
            f"text_projection.weight with Load CLIP.")
    check_text(text, "text of Mixer Text")
    tokens = clip.tokenize(text)
    chunks = tokens[name.removeprefix("clip_")]
    if len(chunks) > 1:
        raise ValueError(
            f"Mixer Text expected a text that CLIP reads at once (75 tokens), got one that takes {len(chunks)} times; "
            f"shorten it, or split it into several Mixer Text nodes.")
    tower, device = getattr(model, name), clip.patcher.load_device
    absent = in_file(clip, name) is False
    if not absent:
        clip.load_model(tokens)
    if absent or not is_trained(tower.transformer.text_projection.weight):
        raise ValueError(
            "Mixer Text expected a text encoder with its projection, got one without (the CLIP of SD1.x checkpoints "
            "has none); load a CLIP-L file that holds text_projection.weight with Load CLIP.")
    model.reset_clip_options()
    tower.set_clip_options({"projected_pooled": True, "execution_device": device})
    try:
        with current_device(device):
            _, embedding = tower.encode_token_weights(chunks)[:2]
    finally:
        model.reset_clip_options()
    return add_source(mixer or (), embedding, strength)


def current_device(device: torch.device) -> AbstractContextManager[None]:
    """What the host encodes in, from the version on that knows several GPUs."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return nullcontext() if context is None else context(device)


def make_conditioning(mixer: Mixer, mode: str, slots: int, model: Patcher | None = None) -> tuple[list[Any], list[Any]]:
    """Positive and negative CONDITIONING of a mix; the negative is zeros of the same shape.

    Args:
        model: what will sample it, if it shall be checked; it is not changed.

    Raises:
        ValueError: for more sources than slots, for a model that cannot attend to the embeddings or is known not to
            understand them, and beside a prompt's text as negative.
    """
    context = combine_sources(mixer, mode, slots)
    check_graph()
    if model is not None:
        check_model(model, context.shape[2])
    return [[context, {}]], [[torch.zeros_like(context), {}]]


def check_model(model: Patcher, width: int) -> None:
    """Shows a notice of a model whose checkpoint seems to be made for prompts.

    Raises:
        ValueError: if the model does not attend to embeddings of this width, or is a demo checkpoint for prompts.
    """
    network = model.model.diffusion_model
    if not is_kind(network, UNET):
        raise ValueError(
            f"Mixer Conditioning expected an SD1.x model that was trained on image embeddings, got "
            f"{type(network).__name__}; load an image-mixer or image-variations checkpoint.")
    expected = model.model.model_config.unet_config.get("context_dim")
    if expected != width:
        raise ValueError(
            f"Mixer Conditioning expected embeddings of the model's width, {expected}, got {width}; load the CLIP that "
            f"the model was trained with (ViT-L/14 for the published ones).")
    name = shipped_name(model)
    if reads_prompts(name):
        raise ValueError(describe_demo(str(name)))
    files = files_of(model)
    if files and brings_prompts(files[0]):
        show_notice(PROMPTS)


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
