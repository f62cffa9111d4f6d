"""Dual style's cross-attention merge in the host: one conditioning that holds several texts and their masks."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..attention_patches.attention_merge import Area, MergedAttention, RowMerge, StyleMasks
from ..samplers.spatial import check_masks
from .marks import Row, chunk_rows, find_marks, hand_rows, mark_conditioning, read_marks
from .token_scale import KEY as SCALE_KEY
from .token_scale import OVERRIDE, TokenScale, patch_model

KEY = "mixology_attention_merge"


@dataclass(frozen=True)
class Style:
    """A text besides the conditioning's own: [1 or images, tokens, width], and the factors of its words."""

    text: Tensor
    scale: TokenScale | None


@dataclass(frozen=True)
class Merge:
    """What a conditioning carries: the styles after its own text, and a mask for each, its own first."""

    styles: tuple[Style, ...]
    masks: StyleMasks


@dataclass(frozen=True)
class RowStyles:
    """What a row of one step reads: its merge, the factors of each style's words, and where in the picture it is."""

    merge: Merge
    factors: list[Tensor | None]
    picture: tuple[int, int]
    area: Area | None


def merge_conditionings(model: Any, masks: Tensor, conditionings: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The model that reads merged conditionings, and the first conditioning with the texts of the others in it.

    A style whose mask is empty is left out; with none left besides the first the conditioning stays as it is.

    Args:
        masks: MASK [N, H, W], or N-1 where the last style takes the rest.
        conditionings: CONDITIONING of each style by input name, in order.

    Raises:
        ValueError: for another model family, masks that do not fit, a conditioning that is not one text or
            is merged already, a first one that was zeroed out, or texts of unequal width.
    """
    network = model.model.diffusion_model
    if not isinstance(network, UNetModel) or model.model.model_config.unet_config.get("use_temporal_attention"):
        raise ValueError(
            f"Cross-Attention Merge expected an SD1.x, SD2.x or SDXL model, got {type(model.model).__name__}; use "
            f"the Epsilon Merge Guider, which takes any model.")
    masks = check_masks(masks, len(conditionings))
    width = None
    for name, conditioning in conditionings.items():
        if len(conditioning) != 1:
            raise ValueError(
                f"Cross-Attention Merge expected one prompt at {name}, got {len(conditioning) or 'none'}; connect "
                f"a single CLIP Text Encode, or use the Epsilon Merge Guider for combined conditionings.")
        text, options = conditioning[0]
        if KEY in options:
            raise ValueError(
                f"Cross-Attention Merge expected a plain prompt at {name}, got one that is merged already; connect "
                f"all prompts to one node.")
        width = width or text.shape[-1]
        if text.shape[-1] != width:
            raise ValueError(
                f"Cross-Attention Merge expected texts {width} wide as the first, got {text.shape[-1]} at {name}; "
                f"encode all with the model's own text encoder.")
    first, *others = (conditioning[0] for conditioning in conditionings.values())
    if not bool(first[0].any()):
        raise ValueError(
            f"Cross-Attention Merge expected a prompt with text at {next(iter(conditionings))}, got a zeroed one; put "
            f"another prompt and its mask first.")
    if SCALE_KEY in first[1]:
        model = patch_model(model)
    model = read_marks(model, KEY, hand_out_styles, apply_styles)
    shown = [True, *masks[1:].flatten(1).any(1).tolist()]
    styles = tuple(Style(text, options.get(SCALE_KEY)) for (text, options), seen in zip(others, shown[1:]) if seen)
    if not styles:
        return model, [first]
    return model, mark_conditioning([first], KEY, Merge(styles, StyleMasks(masks[shown].cpu())))


def hand_out_styles(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
                    model_options: dict[str, Any]) -> Any:
    """Around `calc_cond_batch`: tells the model calls inside which rows have which styles."""
    areas = {(index, cond["uuid"]): cond.get("area") for index, group in enumerate(conds) for cond in group or []}
    table: dict[Row, RowStyles] = {}
    for row, (merge, _) in find_marks(conds, KEY).items():
        factors = [
            style.scale and style.scale.factors_at(model.model_sampling, timestep, len(x), style.text.shape[1])
            for style in merge.styles]
        table[row] = RowStyles(merge, factors, (x.shape[-2], x.shape[-1]), areas[row] and tuple(areas[row]))
    return executor(model, conds, x, timestep, hand_rows(model_options, KEY, table))


def apply_styles(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                 control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Around one call of the model: patches its cross-attention for this call if it holds rows with styles.

    Raises:
        ValueError: if another node replaces cross-attention, which would attend to all texts at once, or changed the
            batch.
    """
    options = transformer_options or {}
    table: dict[Row, RowStyles] = options.get(KEY, {})
    chunks = chunk_rows(options) if table else []
    merges = [
        place_styles(table[row], index, len(x), len(chunks), x.device, executor.class_obj.get_dtype_inference())
        for index, row in enumerate(chunks) if row in table]
    if merges:
        if options.get("patches_replace", {}).get("attn2"):
            raise ValueError(
                "Cross-Attention Merge expected the model's own cross-attention, got one that another node replaces "
                "(such as an IP adapter); remove that node, or use the Epsilon Merge Guider.")
        merged = MergedAttention(merges, len(x), options.get(OVERRIDE))
        patches = options.get("patches", {})
        # after those of other nodes, which may change the rows' own text
        listed = [*patches.get("attn2_patch", []), merged.lay_side_by_side]
        options = {**options, "patches": {**patches, "attn2_patch": listed}, OVERRIDE: merged.attend_each}
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def place_styles(styles: RowStyles, index: int, batch: int, chunks: int, device: Any, dtype: Any) -> RowMerge:
    """The styles of chunk `index` of a call's `chunks`, ready for its device.

    Raises:
        ValueError: if the batch is not one of that many equal chunks.
    """
    if batch % chunks:
        raise ValueError(
            f"Cross-Attention Merge expected a batch of {chunks} equal parts, got {batch} rows; remove the node that "
            f"changes the model's batch.")
    share = batch // chunks
    texts = [style.text.to(device, dtype) for style in styles.merge.styles]
    return RowMerge(
        slice(index * share, (index + 1) * share),
        [text if len(text) == 1 else repeat_to_batch_size(text, share) for text in texts],
        [factors if factors is None else factors.to(device, dtype) for factors in styles.factors],
        styles.merge.masks, styles.picture, styles.area)
