"""How a model reads factors for the words of a text: token attention scale inside a run.

The factors ride in the conditioning. The patched model looks for them in every call, so that any number of scaled
conditionings, guiders and samplers may share it, in any order of nodes.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention_patches.sequence import watch_blocks
from ..attention_patches.values import (
    SCALED,
    ScaledSequence,
    extend_factors,
    join_factors,
    make_value_patch,
    scaled_outputs,
)
from .families.cross import find_cross
from .families.joint import SECOND, find_joint, pads_in_front
from .families.transformers import SUPPORTED
from .families.unet import is_unet, reads_text_twice
from .marks import (
    Call,
    Found,
    call_with,
    find_images,
    find_rows,
    heed_marks,
    leave_out,
    note_read,
    report_unread,
    take_marks,
    watch_regions,
)
from .networks import OVERRIDE, family_name, find_network
from .protocols import Patcher

SCALE_KEY = "mixology_token_scale"



@dataclass(frozen=True)
class TokenScale:
    """What a conditioning carries: a factor for each of its tokens, and when it acts.

    Attributes:
        factors: [values, tokens]; one row for every image of the batch, or one for all.
        start_percent, end_percent: on the model's own time axis, 0 at pure noise.
        others: factors [values, tokens] for other texts that the model reads, by the option of the conditioning that
            holds them.
    """

    node: ClassVar[str] = "Token Attention Scale"
    factors: Tensor
    start_percent: float
    end_percent: float
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def factors_at(self, model_sampling: Any, timestep: Tensor, images: tuple[int, list[int]], made: dict[Any, Any],
                   option: str | None = None) -> Tensor:
        """Factors [1 or images, tokens] at sigma `timestep` [B]: ones outside the window, whose ends belong to it.

        Whether sigma is inside is left to the device, which is never waited for.

        Args:
            images: size of the whole batch, and which of its images the model sees.
            made: what this run has computed before.
            option: whose of `others`; the text's own without it.

        Raises:
            ValueError: if a phrase has another number of values than the batch has images.
        """
        total, shown = images
        factors = self.factors if option is None else self.others[option]
        if len(factors) not in (1, total):
            raise ValueError(
                f"Token Attention Scale got {len(factors)} values for a phrase and {total} images; give one "
                f"value, or one for each image of the batch.")
        factors = factors if len(factors) == 1 else factors[shown]
        window = self.start_percent, self.end_percent
        if window == (0.0, 1.0):
            return factors
        if window not in made:
            made[window] = tuple(model_sampling.percent_to_sigma(percent) for percent in window)
        start, end = made[window]
        inside = (timestep[:1] <= start) & (timestep[:1] >= end)
        return torch.where(inside.unsqueeze(1), factors.to(timestep.device), 1.0)


def patch_model(model: Patcher) -> Any:
    """A clone of the model that reads factors; a model that does so already stays as it is.

    Raises:
        ValueError: for a model family without a usable seam.
    """
    if not (is_unet(model.model) or find_joint(model.model) or find_cross(model.model)):
        raise ValueError(
            f"Token Attention Scale expected a model of {SUPPORTED}, got {family_name(model.model)}; its attention "
            f"gives no place to scale text tokens.")
    return heed_marks(model, SCALE_KEY, run=report_unread_scales, assign=assign_factors, apply=apply_factors)


def report_unread_scales(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a run: see `report_unread`."""
    return report_unread(partial(executor, *args, **kwargs), executor.class_obj, SCALE_KEY, TokenScale.node)


def assign_factors(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
                   model_options: dict[str, Any]) -> Any:
    """Around `calc_cond_batch`: tells the model calls inside which rows to scale."""
    conds, found = take_marks(conds, SCALE_KEY)
    if not found:
        return executor(model, conds, x, timestep, model_options)
    note_read(model_options, SCALE_KEY)
    images = find_images(x, model_options)
    rows = {}
    for one in found:
        given = {option: one.mark.factors_at(model.model_sampling, timestep, images, one.made, option=option)
                 for option in (None, *one.mark.others)}
        rows[one.row] = place_factors(given, one, model)
    return call_with(executor, model, conds, x, timestep=timestep, model_options=model_options, key=SCALE_KEY,
                     call=Call(found, rows, len(x)))


def place_factors(given: Mapping[str | None, Tensor], one: Found, model: Any) -> Tensor:
    """Factors of a mark for all the tokens that the model's attention reads of its prompt, [values, tokens].

    Args:
        given: [values, tokens] of the text, and of others by the option of the conditioning that holds them.

    Raises:
        ValueError: if the conditioning has become shorter.
    """
    cross, joint, conds = find_cross(model), find_joint(model), one.cond["model_conds"]
    read = one.read if cross is None else max(one.read, cross.context)
    words = extend_factors(given[None], read, max(0, one.read - one.own) if pads_in_front(model) else 0)
    second = next((name for name in SECOND if name in conds), None)
    if second is None or joint is None or joint.lay is None:
        return words
    more = extend_factors(given.get(SECOND[second], words[:, :0]), conds[second].cond.shape[-2])
    return joint.lay(find_network(model), words, more)


def count_text(model: Any, given: Mapping[str, Any]) -> int:
    """Tokens of the text in the attention of a call, whose arguments are given by name."""
    text, cross, joint = given["context"], find_cross(model), find_joint(model)
    if joint is not None and text is not None:
        return joint.sequence(find_network(model), given).text[1]
    tokens = 0 if text is None else text.shape[1]
    return max(tokens, 0 if cross is None else cross.context)


def apply_factors(executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
                  control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """Around one call of the model: patches its attention for this call if it holds rows to scale."""
    options = transformer_options or {}
    if is_unet(executor.class_obj):  # others call such patches in another way
        options = watch_regions(options, SCALE_KEY, len(x), TokenScale.node)
    chunks = find_rows(options, SCALE_KEY, len(x), TokenScale.node)
    options = leave_out(options, SCALE_KEY)
    if not chunks:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    model, given = executor.class_obj, {"x": x, "context": c_crossattn, **kwargs}
    factors = join_factors([part if part is None else part.to(x.device) for part in chunks], len(x),
                           count_text(model, given))
    factors = factors.to(model.get_dtype_inference())
    with scaled_attention(model, options, factors, given=given) as options:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


@contextmanager
def scaled_attention(model: Any, options: dict[str, Any], factors: Tensor, given: Mapping[str, Any],
                     ) -> Iterator[dict[str, Any]]:
    """A copy of `transformer_options` for one call with the attention scaled.

    The patch goes before those of other nodes, which may change the text's length; the override around the one found.

    Args:
        factors: [rows, tokens]; given: the call's arguments by name.
    """
    network, joint, cross = find_network(model), find_joint(model), find_cross(model)
    if joint is not None:
        with watch_blocks(joint.list_blocks(network)) as running:
            scaled = ScaledSequence(factors, joint.sequence(network, given), running, options.get(OVERRIDE))
            yield {**options, OVERRIDE: scaled.attend, SCALED: scaled}
            scaled.check_acted()
        return
    if cross is not None:
        with scaled_outputs(cross.list_values(network, given), factors):
            yield options
        return
    patches = options.get("patches", {})
    own = {"attn2_patch": [make_value_patch(factors), *patches.get("attn2_patch", [])]}
    if reads_text_twice(model):
        own["attn1_patch"] = [make_value_patch(factors, first_attention=True), *patches.get("attn1_patch", [])]
    yield {**options, "patches": {**patches, **own}}
