"""Dual style's cross-attention merge in the host: one conditioning that holds several texts and their masks."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from comfy.hooks import EnumHookType
from comfy.patcher_extension import WrappersMP
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..attention_patches.attention_merge import MergedAttention, RowMerge
from ..attention_patches.masks import Area, StyleMasks
from ..attention_patches.rows import check_part
from ..attention_patches.values import extend_factors
from ..samplers.masks import check_style_masks
from .factors import SCALE_KEY, TokenScale, patch_model
from .families.unet import is_unet, reads_text_twice
from .marks import (
    Call,
    call_with,
    find_images,
    find_rows,
    keep_text,
    leave_out,
    mark_conditioning,
    read_mark,
    read_marks,
    take_marks,
    watch_regions,
)
from .networks import OVERRIDE, family_name

KEY = "mixology_attention_merge"
PICTURE = "mixology_picture"  # height and width of the latent that a run samples


@dataclass(frozen=True)
class Style:
    """A text besides the conditioning's own: [1 or images, tokens, width], and the factors of its words."""

    text: Tensor
    scale: TokenScale | None


@dataclass(frozen=True)
class Merge:
    """What a conditioning carries: the styles after its own text, and a mask for each, its own first."""

    node: ClassVar[str] = "Cross-Attention Merge"
    styles: tuple[Style, ...]
    masks: StyleMasks


@dataclass(frozen=True)
class RowStyles:
    """What a row of one step reads: its merge, texts of its styles, factors of their words, and where it is."""

    merge: Merge
    texts: list[Tensor]
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
    if not is_unet(model.model):
        raise ValueError(
            f"Cross-Attention Merge expected an SD1.x, SD2.x or SDXL model, got {family_name(model.model)}; use the "
            f"Epsilon Merge Guider, which takes any model.")
    masks = check_style_masks(masks, len(conditionings))
    width = None
    for name, conditioning in conditionings.items():
        if len(conditioning) != 1:
            raise ValueError(
                f"Cross-Attention Merge expected one prompt at {name}, got {len(conditioning) or 'none'}; connect "
                f"a single CLIP Text Encode, or use the Epsilon Merge Guider for combined conditionings.")
        text, options = conditioning[0]
        if read_mark(options, KEY) is not None:
            raise ValueError(
                f"Cross-Attention Merge expected a plain prompt at {name}, got one that is merged already; connect "
                f"all prompts to one node.")
        if couples_prompts(options):
            raise ValueError(
                f"Cross-Attention Merge expected a plain prompt at {name}, got one whose regions another node couples "
                f"inside attention; connect the prompts of the regions instead, or use that node alone.")
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
    if read_mark(first[1], SCALE_KEY) is not None:
        model = patch_model(model)
    model = read_marks(model, KEY, hand_out_styles, apply_styles)
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, note_picture)
    shown = [True, *masks[1:].flatten(1).any(1).tolist()]
    styles = tuple(
        Style(text, read_mark(options, SCALE_KEY)) for (text, options), seen in zip(others, shown[1:]) if seen)
    if not styles:
        return model, [first]
    merge = Merge(styles, StyleMasks(masks[shown].cpu()))
    keep_text(model, KEY, merge, first[0])
    return model, mark_conditioning([first], KEY, merge)


def couples_prompts(options: Mapping[str, Any]) -> bool:
    """Whether hooks of a conditioning bring prompts of their own into text attention."""
    hooks = options.get("hooks")
    found = [] if hooks is None else hooks.get_type(EnumHookType.TransformerOptions)
    return any("attn2_patch" in hook.transformers_dict.get("patches", {}) for hook in found)


def note_picture(executor: Any, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Around a run: notes the size of what is sampled, since other nodes may hand the model parts of it."""
    executor.class_obj.model_options["transformer_options"][PICTURE] = tuple(latent_image.shape[-2:])
    return executor(noise, latent_image, *args, **kwargs)


def hand_out_styles(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
                    model_options: dict[str, Any]) -> Any:
    """Around `calc_cond_batch`: tells the model calls inside which rows have which styles.

    Raises:
        ValueError: if only a part of the picture is sampled here.
    """
    conds, found = take_marks(conds, KEY)
    if not found:
        return executor(model, conds, x, timestep, model_options)
    seen = (x.shape[-2], x.shape[-1])
    picture = model_options["transformer_options"].get(PICTURE, seen)
    if seen[0] < picture[0] or seen[1] < picture[1]:
        check_part(seen, picture, None, Merge.node)
    images = total, shown = find_images(x, model_options)
    rows = {}
    for one in found:
        styles = one.mark.styles
        factors = [style.scale and extend_factors(
            style.scale.factors_at(model.model_sampling, timestep, images, one.made), style.text.shape[1])
            for style in styles]
        texts = [style.text if len(style.text) == 1 else repeat_to_batch_size(style.text, total)[shown]
                 for style in styles]
        area = one.cond.get("area")
        rows[one.row] = RowStyles(one.mark, texts, factors, seen, area and tuple(area))
    call = Call(found, rows, len(x))
    return call_with(executor, model, conds, x, timestep, model_options, KEY, call)


def apply_styles(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                 control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Around one call of the model: patches its text attention for this call if it holds rows with styles.

    Raises:
        ValueError: if another node replaces text attention, which would attend to all texts at once, changed the batch,
            or hands the model parts of the picture.
    """
    options = watch_regions(transformer_options or {}, KEY, len(x), Merge.node)
    found: list[RowStyles | None] = find_rows(options, KEY, len(x), Merge.node)
    options = leave_out(options, KEY, PICTURE)
    if not found:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    model, share = executor.class_obj, len(x) // len(found)
    slots = ("attn1", "attn2") if reads_text_twice(model) else ("attn2",)
    if any(options.get("patches_replace", {}).get(slot) for slot in slots):
        raise ValueError(
            "Cross-Attention Merge expected the model's own cross-attention, got one that another node replaces "
            "(such as an IP adapter); remove that node, or use the Epsilon Merge Guider.")
    merges = []
    for index, styles in enumerate(found):
        if styles is not None:
            check_part((x.shape[-2], x.shape[-1]), styles.picture, styles.area, Merge.node)
            rows = slice(index * share, (index + 1) * share)
            merges.append(place_styles(styles, rows, x.device, model.get_dtype_inference()))
    patches = options.get("patches", {})
    # after those of other nodes, which may change the rows' own text
    listed = patches.get("attn2_patch", [])
    merged = MergedAttention(merges, len(x), options.get(OVERRIDE), listed, c_crossattn.shape[1])
    own = {"attn2_patch": [*listed, merged.lay_side_by_side]}
    if "attn1" in slots:
        own["attn1_patch"] = [merged.tell_text, *patches.get("attn1_patch", []), merged.lay_text]
    options = {**options, "patches": {**patches, **own}, OVERRIDE: merged.attend_each}
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def place_styles(styles: RowStyles, rows: slice, device: Any, dtype: Any) -> RowMerge:
    """The styles of some rows of a call, ready for its device."""
    return RowMerge(
        rows, [text.to(device, dtype) for text in styles.texts],
        [factors if factors is None else factors.to(device, dtype) for factors in styles.factors],
        styles.merge.masks, styles.picture, styles.area)
