"""Image Mixer in the host: projected CLIP embeddings of pictures and texts, and the conditioning they make."""
from __future__ import annotations

import logging
from typing import Any

import comfy.sd
import torch
from comfy import sd1_clip
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors import SafetensorError, safe_open

from ..samplers.mixer import Mixer, add_source, combine_sources, crop_image, is_trained

TOWERS = ("clip_l", "clip_h", "clip_g")  # CLIP text encoders of the host's classes; published mixers need the first
PROJECTIONS = ("text_projection", "text_projection.weight")  # in a text encoder's own file
PROMPT_TOWERS = ("cond_stage_model.transformer.", "conditioner.embedders.", "text_encoders.")


def mix_image(clip_vision: Any, image: torch.Tensor, strength: float, box: tuple[float, float, float, float],
              mixer: Mixer | None) -> Mixer:
    """The mixer with pictures [B, H, W, C] in 0..1, or a crop of them, as one more source.

    Args:
        box: x, y, width and height of the crop in fractions of the picture.

    Raises:
        ValueError: for a vision model without a projection, and for embeddings that do not fit the mixer's others.
    """
    network = getattr(clip_vision, "model", None)
    projection = getattr(getattr(network, "visual_projection", None), "weight", None)
    if not is_trained(projection):
        raise ValueError(
            f"Mixer Image expected a CLIP vision model with its projection, got {type(network).__name__} without one; "
            f"load a CLIP vision file that holds visual_projection, such as CLIP ViT-L/14, with Load CLIP Vision.")
    embedding = clip_vision.encode_image(crop_image(image, *box))["image_embeds"]
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
    tokens = clip.tokenize(text)
    chunks = tokens[name.removeprefix("clip_")]
    if len(chunks) > 1:
        raise ValueError(
            f"Mixer Text expected a text that CLIP reads at once (75 tokens), got {len(chunks)} times as much; shorten "
            f"it, or split it into several Mixer Text nodes.")
    tower = getattr(model, name)
    clip.load_model(tokens)
    if in_file(clip, name) is False or not is_trained(tower.transformer.text_projection.weight):
        raise ValueError(
            "Mixer Text expected a text encoder with its projection, got one without (the CLIP of SD1.x checkpoints "
            "has none); load a CLIP-L file that holds text_projection.weight with Load CLIP.")
    model.reset_clip_options()
    tower.set_clip_options({"projected_pooled": True, "execution_device": clip.patcher.load_device})
    try:
        _, embedding = tower.encode_token_weights(chunks)[:2]
    finally:
        model.reset_clip_options()
    return add_source(mixer or (), embedding, strength)


def make_conditioning(mixer: Mixer, mode: str, slots: int, model: Any = None) -> tuple[list[Any], list[Any]]:
    """Positive and negative CONDITIONING of a mix; the negative is zeros of the same shape.

    Args:
        model: what will sample it, if it shall be checked; it is not changed.

    Raises:
        ValueError: for more sources than slots, and for a model that cannot attend to the embeddings.
    """
    context = combine_sources(mixer, mode, slots)
    if model is not None:
        check_model(model, context.shape[2])
    return [[context, {}]], [[torch.zeros_like(context), {}]]


def check_model(model: Any, width: int) -> None:
    """Warns of a model whose checkpoint was made for prompts.

    Raises:
        ValueError: if the model does not attend to embeddings of this width.
    """
    network = model.model.diffusion_model
    if not isinstance(network, UNetModel):
        raise ValueError(
            f"Mixer Conditioning expected an SD1.x model that was trained on image embeddings, got "
            f"{type(network).__name__}; load an image-mixer or image-variations checkpoint.")
    expected = model.model.model_config.unet_config.get("context_dim")
    if expected != width:
        raise ValueError(
            f"Mixer Conditioning expected embeddings of the model's width, {expected}, got {width}; load the CLIP that "
            f"the model was trained with (ViT-L/14 for the published ones).")
    names = read_names(model)
    if any(name.startswith(PROMPT_TOWERS) for name in names or ()):
        logging.warning(
            "Mixer Conditioning: this model's checkpoint brings a text encoder, so it was trained on prompts and will "
            "not understand image embeddings; load an image-mixer or image-variations checkpoint.")


def in_file(clip: Any, tower: str) -> bool | None:
    """Whether the file of a text encoder brought the tower's projection; None if the host does not tell."""
    names = read_names(clip.patcher)
    if names is None:
        return None
    if not clip.patcher.cached_patcher_init[0].__name__.startswith("load_checkpoint"):
        return any(name in PROJECTIONS for name in names)
    endings = [f".{tower}.transformer.text_projection.weight"]
    if tower != "clip_l":  # an image-mixer checkpoint has one by this name too, where the host looks for CLIP-L
        endings += [f".model.{name}" for name in PROJECTIONS]
    return any(name.endswith(tuple(endings)) for name in names)


def read_names(patcher: Any) -> list[str] | None:
    """Names of the tensors in the files that the host's own loader read a model from; None if they cannot be known."""
    if patcher.cached_patcher_init is None:
        return None
    loader, (files, *_) = patcher.cached_patcher_init[:2]
    if loader.__module__ != comfy.sd.__name__:
        return None
    found: list[str] = []
    for path in [files] if isinstance(files, str) else files:
        try:
            with safe_open(path, framework="numpy") as file:
                found += file.keys()
        except (SafetensorError, OSError):  # an older format, or moved since
            return None
    return found
