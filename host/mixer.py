"""Image Mixer in the host: projected CLIP embeddings of pictures and texts, and the conditioning they make."""
from __future__ import annotations

from typing import Any

import torch

from ..samplers.embeddings import check_image
from ..samplers.mixer import Mixer, add_source, combine_sources, crop_image
from ..samplers.wording import check_text
from .demo import reads_prompts, shipped_name
from .embeddings import Asker, check_projection, embed_tokens, files_of, find_towers, tokens_of
from .families.unet import NETWORK as UNET
from .mixer_files import PROMPTS, brings_prompts
from .mixer_graph import check_graph, describe_demo
from .networks import is_kind
from .notices import show_notice
from .protocols import Patcher

WHO = Asker("Mixer Text", "load a CLIP-L file that holds text_projection.weight with Load CLIP")


def mix_image(clip_vision: Any, image: torch.Tensor, strength: float, box: tuple[float, float, float, float],
              mixer: Mixer | None) -> Mixer:
    """The mixer with pictures [B, H, W, C] in 0..1, or a crop of them, as one more source.

    Args:
        box: x, y, width and height of the crop in fractions of the picture.

    Raises:
        ValueError: for a vision model without a projection, pictures that are none, and embeddings that do not fit the
            mixer's others.
    """
    check_projection(clip_vision, "Mixer Image")
    picture = crop_image(check_image(image, "Mixer Image"), *box)
    return add_source(mixer or (), clip_vision.encode_image(picture)["image_embeds"], strength)


def mix_text(clip: Any, text: str, strength: float, mixer: Mixer | None) -> Mixer:
    """The mixer with a text as one more source: the state of its end token, projected.

    Raises:
        ValueError: for a text encoder that is no CLIP or has no projection, a text over one chunk, and an embedding
            that does not fit the mixer's others.
    """
    tower = find_towers(clip, WHO)[0]
    check_text(text, "text of Mixer Text")
    tokens = clip.tokenize(text)
    chunks = tokens_of(tokens, tower)
    if len(chunks) > 1:
        raise ValueError(
            f"Mixer Text expected a text that CLIP reads at once (75 tokens), got one that takes {len(chunks)} times; "
            f"shorten it, or split it into several Mixer Text nodes.")
    return add_source(mixer or (), embed_tokens(clip, tower, tokens, WHO), strength)


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
