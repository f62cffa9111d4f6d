"""Dual style's cross-attention merge in the host: one conditioning that holds several texts and their masks."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from comfy.hooks import EnumHookType
from comfy.utils import repeat_to_batch_size
from torch import Tensor

from ..attention_patches.attention_merge import MergedAttention, StyleTexts
from ..attention_patches.masks import StyleMasks
from ..attention_patches.rows import check_part
from ..attention_patches.values import extend_factors
from ..samplers.masks import check_style_masks
from .attention_merge_cross import (
    CROSS_NAMES,
    flatten_area,
    merged_texts,
    place_in_video,
    prepare_texts,
    read_frame_masks,
)
from .attention_merge_joint import can_share, merged_sequence
from .factors import SCALE_KEY, TokenScale, patch_model
from .families.cross import find_cross
from .families.joint import pad_text
from .families.unet import is_unet, reads_text_twice
from .marks import (
    Call,
    Found,
    call_with,
    find_images,
    find_rows,
    heed_marks,
    keep_text,
    leave_out,
    mark_conditioning,
    note_read,
    read_mark,
    report_unread,
    take_marks,
    warn_of_unwired,
    watch_regions,
)
from .networks import OVERRIDE, family_name
from .protocols import Patcher
from .run import find_cell

KEY = "mixology_attention_merge"
FAMILIES = ("SD1.x, SD2.x, SDXL, SD3, AuraFlow, Flux, Flux.2, Chroma, Qwen-Image, Krea 2, Z-Image, Lumina 2, "
            f"LongCat-Image, OmniGen2, {CROSS_NAMES}")
PICTURE = "mixology_picture"  # height and width of the latent that a run samples


@dataclass(frozen=True)
class Merge:
    """What a conditioning carries: the texts of the styles after its own, and a mask for each, its own first.

    Attributes:
        texts: [1 or images, tokens, width]; scales: the factors of their words, None where nothing is scaled.
        fronts: tokens that a model puts in front of each; options: what the conditioning of each carries besides.
    """

    node: ClassVar[str] = "Cross-Attention Merge"
    texts: tuple[Tensor, ...]
    scales: tuple[TokenScale | None, ...]
    masks: StyleMasks
    fronts: tuple[int, ...]
    options: tuple[Mapping[str, Any], ...]

    def read_at(self, place: Found, x: Tensor, images: tuple[int, list[int]], model: Any, *, timestep: Tensor,
                ) -> StyleTexts:
        """What the rows of one marked conditioning read at sigma `timestep`.

        Args:
            x: the latent in this call; images: of the whole batch, and which of them it holds.
        """
        total, shown = images
        given = prepare_texts(model, self.texts, self.options, made=place.made, device=x.device)
        texts = [text if len(text) == 1 else repeat_to_batch_size(text, total)[shown] for text in given]
        factors = [scale and extend_factors(
            scale.factors_at(model.model_sampling, timestep, images, place.made), text.shape[1], front)
            for scale, text, front in zip(self.scales, texts, self.fronts)]
        return StyleTexts(texts, factors, self.masks, picture=(x.shape[-2], x.shape[-1]),
                          area=flatten_area(place.cond.get("area")))


def merge_conditionings(model: Patcher, masks: Tensor, conditionings: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The model that reads merged conditionings, and the first conditioning with the texts of the others in it.

    A style whose mask is empty is left out; with none left besides the first the conditioning stays as it is.

    Args:
        masks: MASK [N, H, W], or N-1 where the last style takes the rest.
        conditionings: CONDITIONING of each style by input name, in order.

    Raises:
        ValueError: for another model family, masks that do not fit, a conditioning that is not one text or
            is merged already, a first one that was zeroed out, or texts of unequal width.
    """
    if not (is_unet(model.model) or can_share(model.model) or find_cross(model.model) is not None):
        raise ValueError(
            f"Cross-Attention Merge expected a model of {FAMILIES}, got {family_name(model.model)}; use the Epsilon "
            f"Merge Guider, which takes any model.")
    shared, painted = share_masks(model, masks, len(conditionings))
    check_prompts(conditionings)
    if can_share(model.model):
        check_masks(conditionings)
    first, *others = (conditioning[0] for conditioning in conditionings.values())
    model = read_merges(patch_model(model) if read_mark(first[1], SCALE_KEY) is not None else model)
    styles = [style for style, is_painted in zip(others, painted[1:]) if is_painted]
    if not styles:
        return model, [first]
    texts, options = zip(*styles)
    texts, fronts = zip(*(pad_text(model.model, text) for text in texts))
    scales = tuple(read_mark(given, SCALE_KEY) for given in options)
    merge = Merge(texts, scales, shared, fronts=fronts, options=options)
    keep_text(model, KEY, merge, first[0])
    warn_of_unwired(merge.node)
    return model, mark_conditioning([first], KEY, merge)


def share_masks(model: Patcher, masks: Tensor, styles: int) -> tuple[StyleMasks, list[bool]]:
    """Masks of the styles that are painted and of the first, and which are; with masks for every frame all count."""
    frames = read_frame_masks(model.model, masks, styles)
    if frames is not None:
        return frames, [True] * styles
    masks = check_style_masks(masks, styles)
    painted = masks.flatten(1).any(1).tolist()
    return StyleMasks(masks[[True, *painted[1:]]].cpu()), painted


def check_masks(conditionings: Mapping[str, Any]) -> None:
    """Raises ValueError if a style after the first hides some of its tokens, or weighs them otherwise."""
    for name in list(conditionings)[1:]:
        mask = conditionings[name][0][1].get("attention_mask")
        if mask is None:
            continue
        alike = bool((mask == mask.flatten()[:1]).all()) and (mask.is_floating_point() or bool(mask.any()))
        if not alike:
            raise ValueError(
                f"Cross-Attention Merge expected a plain prompt at {name}, got one with an attention mask (such as "
                f"Apply Style Model's attn_bias); put it first, or use strength_type multiply.")


def check_prompts(conditionings: Mapping[str, Any]) -> None:
    """Raises ValueError unless each is one plain text, as wide as the first, which is none that was zeroed out."""
    names, width = list(conditionings), None
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
    if not bool(conditionings[names[0]][0][0].any()):
        raise ValueError(
            f"Cross-Attention Merge expected a prompt with text at {names[0]}, got a zeroed one; put another prompt "
            f"and its mask first.")


def read_merges(model: Patcher) -> Any:
    """A clone of the model that reads merged conditionings."""
    return heed_marks(model, KEY, run=note_picture, assign=assign_styles, apply=apply_styles)


def couples_prompts(options: Mapping[str, Any]) -> bool:
    """Whether hooks of a conditioning bring prompts of their own into text attention."""
    hooks = options.get("hooks")
    found = [] if hooks is None else hooks.get_type(EnumHookType.TransformerOptions)
    return any("attn2_patch" in hook.transformers_dict.get("patches", {}) for hook in found)


def note_picture(executor: Any, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Around a run: notes the size of what is sampled, since other nodes may hand the model parts of it.

    As well reports merges that nothing read.
    """
    executor.class_obj.model_options["transformer_options"][PICTURE] = tuple(latent_image.shape[-2:])
    proceed = partial(executor, noise, latent_image, *args, **kwargs)
    return report_unread(proceed, executor.class_obj, KEY, Merge.node)


def assign_styles(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
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
        check_part(seen, picture, None, node=Merge.node, cell=find_cell(model))
    note_read(model_options, KEY)
    if any(scale is not None for one in found for scale in one.mark.scales):
        note_read(model_options, SCALE_KEY)
    images = find_images(x, model_options)
    rows = {one.row: one.mark.read_at(one, x, images, model, timestep=timestep) for one in found}
    family = find_cross(model)
    if family is not None:
        rows = {one.row: place_in_video(
            model, family, rows[one.row], one, x=x, model_options=model_options) for one in found}
    return call_with(executor, model, conds, x, timestep=timestep, model_options=model_options, key=KEY,
                     call=Call(found, rows, len(x)))


def apply_styles(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                 control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Around one call of the model: patches its text attention for this call if it holds rows with styles.

    Raises:
        ValueError: if another node replaces text attention, which would attend to all texts at once, changed the batch,
            or hands the model parts of the picture.
    """
    model, options = executor.class_obj, transformer_options or {}
    family = find_cross(model)
    if family is None:
        options = watch_regions(options, KEY, len(x), Merge.node)
    found: list[StyleTexts | None] = find_rows(options, KEY, len(x), Merge.node)
    options = leave_out(options, KEY, PICTURE)
    within: AbstractContextManager[Any] = nullcontext(options)
    if found:
        merges = place_styles(model, found, x)
        if family is not None:
            within = merged_texts(model, family, options, merges, x=x)
        elif is_unet(model):
            within = nullcontext(merge_attention(model, options, merges, len(x), tokens=c_crossattn.shape[1]))
        else:
            within = merged_sequence(model, merges, len(x))
    with within as changed:
        return executor(x, t, c_concat, c_crossattn, control, changed or options, **kwargs)


def merge_attention(model: Any, options: dict[str, Any], merges: Sequence[tuple[slice, StyleTexts]], rows: int, *,
                    tokens: int) -> dict[str, Any]:
    """A copy of `transformer_options` with the text attention of this call to a UNet merged.

    Args:
        merges: rows of the call and what they read; rows: of the call; tokens: of its text.
    """
    slots = ("attn1", "attn2") if reads_text_twice(model) else ("attn2",)
    if any(options.get("patches_replace", {}).get(slot) for slot in slots):
        raise ValueError(
            "Cross-Attention Merge expected the model's own cross-attention, got one that another node replaces "
            "(such as an IP adapter); remove that node, or use the Epsilon Merge Guider.")
    patches = options.get("patches", {})
    # after those of other nodes, which may change the rows' own text
    listed = patches.get("attn2_patch", [])
    merged = MergedAttention(merges, rows, options.get(OVERRIDE), edits=listed, given=tokens)
    own = {"attn2_patch": [*listed, merged.join_texts]}
    if "attn1" in slots:
        own["attn1_patch"] = [merged.note_text, *patches.get("attn1_patch", []), merged.join_noted_text]
    return {**options, "patches": {**patches, **own}, OVERRIDE: merged.attend_each}


def place_styles(model: Any, found: Sequence[Any], x: Tensor) -> list[tuple[slice, Any]]:
    """The rows of a call with styles, and the styles on its device.

    Args:
        found: of each chunk of the call, in order; x: its latent, [rows, channels, (frames,) height, width].
    """
    share, merges, dtype, cell = len(x) // len(found), [], model.get_dtype_inference(), find_cell(model)
    for index, styles in enumerate(found):
        if styles is not None:
            check_part((x.shape[-2], x.shape[-1]), styles.picture, styles.area, node=Merge.node, cell=cell)
            merges.append((slice(index * share, (index + 1) * share), styles.to(x.device, dtype)))
    return merges
