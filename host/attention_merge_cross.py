"""Cross-attention merge in the host's transformers that read text through cross-attention."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention_patches.attention_merge import StyleTexts
from ..attention_patches.attention_merge_cross import NODE, CrossMerge, FrameMasks, VideoTexts
from ..samplers.masks import check_style_masks
from .families.cross import CrossFamily, find_cross, makes_videos
from .marks import Found, find_shown
from .networks import OVERRIDE, NamedCall, find_network

KEY = "mixology_attention_merge_texts"
CROSS_NAMES = "Anima, Cosmos-Predict2, Wan (text, image, camera or VACE) or LTX-Video"
Area = tuple[int, ...]


def read_frame_masks(model: Any, masks: Tensor, styles: int) -> FrameMasks | None:
    """Masks for every frame; None where there is one for each style, or the model makes single pictures."""
    counts = styles, styles - 1
    if len(masks) in counts or masks.ndim != 3 or not makes_videos(model):
        return None
    if len(masks) < styles or all(len(masks) % count for count in counts):
        return None
    return FrameMasks(check_style_masks(masks, len(masks)).cpu(), styles=styles)


def prepare_texts(model: Any, texts: Sequence[Tensor], options: Sequence[Mapping[str, Any]], *, made: dict[Any, Any],
                  device: torch.device) -> Sequence[Tensor]:
    """Texts as a network reads them, made once in a run where that mixes their tokens (Anima).

    Args:
        options: what each text's conditioning carries besides; made: what this run has computed before.
    """
    family = find_cross(model)
    if family is None or not family.context:
        return texts
    if KEY not in made:
        made[KEY] = [adapt_text(model, text, given, device) for text, given in zip(texts, options)]
    return made[KEY]


def adapt_text(model: Any, text: Tensor, options: Mapping[str, Any], device: torch.device) -> Tensor:
    """As the host's `extra_conds` does it for a row's own text."""
    ids, weights = options.get("t5xxl_ids"), options.get("t5xxl_weights")
    if ids is None:
        return text
    network, dtype = find_network(model), model.get_dtype_inference()
    if weights is not None:
        weights = weights.unsqueeze(0).unsqueeze(-1).to(device, dtype)
    return network.preprocess_text_embeds(
        text.to(device, dtype), ids.unsqueeze(0).expand(len(text), -1).to(device), t5xxl_weights=weights)


def place_in_video(model: Any, family: CrossFamily, styles: StyleTexts, place: Found, *, x: Tensor,
                   model_options: dict[str, Any]) -> VideoTexts:
    """What rows of one marked conditioning read, by frames.

    Args:
        x: the latent in a `calc_cond_batch` call, [B, C, T, H, W].
    """
    total, shown = find_shown(x, model_options, 2) if x.ndim == 5 else (1, [0])
    masks, area = styles.masks, place.cond.get("area")
    if isinstance(masks, FrameMasks):
        if total not in place.made:
            place.made[total] = masks.at_frames(total, family.pictures)
        masks = place.made[total]
    if area is not None and len(area) == 6:  # frames first
        shown = shown[area[3]:area[3] + area[0]]
    dtype = model.get_dtype_inference()
    hidden = [hide_padding(given.get("attention_mask"), dtype) if family.hides else None
              for given in place.mark.options]
    return VideoTexts(styles.texts, styles.factors, masks, styles.picture, area=flatten_area(area), hidden=hidden,
                      frames=shown)


def flatten_area(area: Area | None) -> Area | None:
    """Height, width, y and x of an area, which in a video may have frames in front of each pair."""
    return None if area is None else (*area[len(area) // 2 - 2:len(area) // 2], *area[-2:])


def hide_padding(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What LTX-Video adds to the scores of a text's tokens, [1, 1, 1, tokens], of its conditioning's mask."""
    if mask is None:
        return None
    added = mask.to(dtype) if mask.is_floating_point() else (mask - 1).to(dtype) * torch.finfo(dtype).max
    return added[:1].reshape(1, 1, 1, -1)


@contextmanager
def merged_texts(model: Any, family: CrossFamily, options: dict[str, Any], merges: Sequence[tuple[slice, VideoTexts]],
                 *, x: Tensor) -> Iterator[dict[str, Any]]:
    """A copy of `transformer_options` for one call, whose rows read several texts.

    Args:
        x: the call's latent.

    Raises:
        ValueError: if it shows other frames than its conditioning paints.
    """
    network = find_network(model)
    sequence = family.sequence(network, {"x": x})
    for _, styles in merges:
        if len(styles.frames) != sequence.frames:
            raise ValueError(
                f"{NODE} expected the model to see {len(styles.frames)} latent frames at once, got {sequence.frames}; "
                f"remove the node that hands the model parts of the video.")
    side = family.find_side(network)
    merged = CrossMerge(merges, len(x), options.get(OVERRIDE), grid=sequence.grid, side=side)

    def join(executor: Any, *args: Any, **kwargs: Any) -> Any:
        call = NamedCall(executor, args, kwargs)
        merged.before = count_references(network, call.given)
        return call.run(executor, context=merged.join_texts(call.given["context"]))

    wrappers = options.get("wrappers", {})
    placed = {**wrappers.get(WrappersMP.DIFFUSION_MODEL, {}), KEY: [join]}  # the last: others see the rows' own text
    with merged.watch(family.list_readers(network)):
        yield {**options, OVERRIDE: merged.attend_each,
               "wrappers": {**wrappers, WrappersMP.DIFFUSION_MODEL: placed}}


def count_references(network: Any, given: Mapping[str, Any]) -> int:
    """Tokens of a reference picture that a Wan network puts in front of the frames."""
    latent = given.get("reference_latent")
    if latent is None or getattr(network, "ref_conv", None) is None:
        return 0
    side = network.patch_size[-1]
    return (latent.shape[-2] // side) * (latent.shape[-1] // side)
