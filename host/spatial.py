"""Dual style in the host: a guider that gives each region of the picture a prompt and a CFG of its own."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import node_helpers
import torch

from ..samplers.masks import blend_styles, check_style_masks, normalise_masks, resize_masks
from ..samplers.spatial import blend_guidance, parse_cfg_list
from .conds import check_sigmas, evaluate, is_active, run_pre_cfg, shown_as_pairs, wants_pairs
from .marks import Conds
from .protocols import Patcher, Sampler

STYLE = "mixology_style"  # own key in a cond: which style it belongs to
POST_CFG = "sampler_post_cfg_function"


@dataclass(frozen=True)
class Shown:
    """The styles that a step paints.

    Attributes:
        styles: conds of each; negatives: those of the negative for each.
        weights: their masks, [N, H, W], summing to 1; scales: CFG of each.
    """

    styles: list[Conds]
    negatives: list[Conds]
    weights: torch.Tensor
    scales: list[float]

    @property
    def is_even(self) -> bool:
        """Whether all have one CFG."""
        return len(set(self.scales)) == 1

    @property
    def is_unguided(self) -> bool:
        """Whether none needs its negative."""
        return all(math.isclose(scale, 1.0) for scale in self.scales)


class EpsilonMergeGuider(comfy.samplers.CFGGuider):
    """eps = sum_i M_i (u + s_i (c_i - u)) with one u for all styles: N + 1 evaluations a step in one batched call.

    The styles live side by side in the host's "positive" list, each cond marked with its style, so that the host
    treats them as it treats combined prompts: a ControlNet that is meant for the negative too is handed to it, and
    none to another style. Areas, masks, hooks and ControlNets of a style act in it alone, as in a plain run of it.

    Functions that other nodes hang on CFG run once a step, as in a plain run: before and at CFG they get the merged
    prediction sum_i M_i c_i as cond, u as uncond, and cfg; what they change in cond changes every style alike. A
    style's own CFG adds M_i (s_i - cfg)(c_i - u) before the post-CFG functions see the result.

    Nodes that know one positive and one negative only (`wants_pairs`) are asked for each style with its negative, as in
    a plain run of it: 2 N evaluations, and a u of its own for each style.

    Args:
        model: the patched model.
        masks: MASK [N, H, W] or [N-1, H, W]; see `check_style_masks`.
        positives: CONDITIONING of each style by input name, in order.
        negative: CONDITIONING shared by all styles.
        cfg: guidance scale; cfg_per_style: "5, 7.5", scales of the first styles.

    Raises:
        ValueError: on an empty conditioning, masks that do not fit, a cfg that is no number, or an unreadable
            cfg_per_style.
    """

    def __init__(
        self, model: Patcher, masks: torch.Tensor, positives: Mapping[str, Any], negative: Any, cfg: float,
        cfg_per_style: str = "",
    ):
        super().__init__(model)
        for name, conditioning in [*positives.items(), ("negative", negative)]:
            if not conditioning:
                raise ValueError(
                    f"{name} expects a prompt, got an empty conditioning; connect for instance CLIP Text Encode to it."
                )
        if not math.isfinite(cfg):
            raise ValueError(f"cfg expects a number such as 7.5, got {cfg}; correct it.")
        self.masks = check_style_masks(masks, len(positives))
        self.own_scales = parse_cfg_list(cfg_per_style, len(positives))
        self.weights: torch.Tensor | None = None  # the masks at the latent's size, during a run
        self.painted: list[bool] = []  # which of them hold anything; the others need no evaluation
        marked = [
            entry for i, conditioning in enumerate(positives.values())
            for entry in node_helpers.conditioning_set_values(conditioning, {STYLE: i})]
        self.inner_set_conds({"positive": marked, "negative": negative})
        self.set_cfg(cfg)

    def inner_set_conds(self, conds: dict[str, Any]) -> None:
        """Other nodes give prompts to a copy of a guider; those of the original stay."""
        self.original_conds = dict(self.original_conds)
        super().inner_set_conds(conds)
        found = {cond.get(STYLE) for cond in self.original_conds["positive"]}
        if found != set(range(len(self.masks))):
            raise ValueError(
                "The Epsilon Merge Guider expects the prompts of its own styles, got another prompt from a node that "
                "exchanges a guider's prompts; remove that node, or use CFG Guider with it.")

    def sample(self, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Sampler, sigmas: torch.Tensor,
               *args: Any, **kwargs: Any) -> torch.Tensor:
        check_sigmas(sigmas, "The Epsilon Merge Guider")
        return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def inner_sample(self, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if noise.ndim < 4:
            raise ValueError(
                "The Epsilon Merge Guider expects an image or video latent, got one without height and width; use CFG "
                "Guider for this model."
            )
        try:
            return super().inner_sample(noise, *args, **kwargs)
        finally:
            self.weights, self.painted = None, []

    def _weights_for(self, x: torch.Tensor) -> torch.Tensor:
        """The masks at the size of `x`, [N, H, W]; some samplers ask for another size than the latent's."""
        if self.weights is None or self.weights.shape[1:] != x.shape[-2:]:
            weights = resize_masks(self.masks, *x.shape[-2:])
            self.painted = weights.flatten(1).any(1).tolist()
            self.weights = weights.to(x)
        return self.weights

    def _split_conds(self) -> tuple[list[Conds], list[Conds]]:
        """Conds of each style, and the negative's for each style: one list for all, save for styles with areas.

        The host's CFG reads an area of one side on the other side too; it adds these twins for both sides as a whole,
        which would carry an area from style to style. Here each style gets its own.
        """
        shared = [cond for cond in self.conds["negative"] if STYLE not in cond]
        styles = [[cond for cond in self.conds["positive"] if cond.get(STYLE) == i] for i in range(len(self.masks))]
        negatives = []
        for style in styles:
            own, areas = list(shared), list(style)
            for cond in areas:
                comfy.samplers.create_cond_with_same_area_if_none(own, cond)
            for cond in shared:
                comfy.samplers.create_cond_with_same_area_if_none(style, cond)
            negatives.append(shared if len(own) == len(shared) else own)
        return styles, negatives

    def _choose_styles(self, x: torch.Tensor, timestep: torch.Tensor) -> Shown:
        """The styles that are painted and in their time at this sigma; all of them where none is."""
        styles, negatives = self._split_conds()
        weights = self._weights_for(x)
        chosen = [i for i, style in enumerate(styles) if self.painted[i] and is_active(style, timestep)]
        chosen = chosen or list(range(len(styles)))
        if len(chosen) < len(styles):
            styles, negatives = [styles[i] for i in chosen], [negatives[i] for i in chosen]
            weights = normalise_masks(torch.stack([weights[i] for i in chosen]))
        scales = [self.own_scales[i] if i < len(self.own_scales) else self.cfg for i in chosen]
        return Shown(styles, negatives, weights, scales)

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> torch.Tensor:
        """The guided denoised, [B, C, ..., H, W]."""
        options = model_options or {}
        shown = self._choose_styles(x, timestep)
        cfg = shown.scales[0] if shown.is_even else self.cfg
        skip = shown.is_unguided and not options.get("disable_cfg1_optimization", False)
        conds, unconds = self._evaluate(shown.styles, None if skip else shown.negatives, x, timestep, options=options)
        merged, plain = blend_styles(conds, shown.weights), blend_styles(unconds, shown.weights)
        cond_list = [entry for style, weight in zip(shown.styles, shown.weights) for entry in confine(style, weight, x)]
        uncond_list = None if skip else self.conds["negative"]
        cond, uncond = run_pre_cfg(
            self.inner_model, [cond_list, uncond_list], [merged, plain], cfg, x=x, timestep=timestep, options=options)
        if not shown.is_even:
            shift = (cond - uncond) - (merged - plain)  # what the functions changed, in every style alike
            own = blend_guidance(
                [value + shift for value in conds], unconds, shown.weights, [scale - cfg for scale in shown.scales])
            options = add_first(options, own)
        return comfy.samplers.cfg_function(
            self.inner_model, cond, uncond, cfg, x=x, timestep=timestep, model_options=options, cond=cond_list,
            uncond=uncond_list)

    def _evaluate(
        self, styles: list[Conds], negatives: list[Conds] | None, x: torch.Tensor, timestep: torch.Tensor, *,
        options: dict[str, Any],
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Predictions c_i and u_i of each style, from one call of the host; u_i is zero without `negatives`."""
        if wants_pairs(options):
            pairs = [evaluate(self.inner_model, [style, own], x, timestep, options=options)
                     for style, own in zip(styles, negatives or [None] * len(styles))]
            return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        distinct, which = find_distinct(negatives) if negatives is not None else ([None], [0] * len(styles))
        # cond, uncond, more: patches of other packs read position 0 as cond and 1 as uncond
        more = len(styles) - 1
        lists = [styles[0], distinct[0], *styles[1:], *distinct[1:]]
        with shown_as_pairs(options, lists, [False, True, *[False] * more, *[True] * (len(distinct) - 1)]):
            first, second, *rest = evaluate(self.inner_model, lists, x, timestep, options=options)
        unconds = [second, *rest[more:]]
        return [first, *rest[:more]], [unconds[k] for k in which]


def find_distinct(lists: Sequence[Conds]) -> tuple[list[Conds], list[int]]:
    """The lists without those that come again, and for each list its place among them; told apart by identity."""
    distinct = [conds for i, conds in enumerate(lists) if not any(conds is before for before in lists[:i])]
    return distinct, [next(k for k, conds in enumerate(distinct) if conds is own) for own in lists]


def add_first(options: dict[str, Any], guidance: torch.Tensor) -> dict[str, Any]:
    """Options whose post-CFG functions of other nodes see a prediction with `guidance` added."""
    return {**options, POST_CFG: [lambda args: args["denoised"] + guidance, *options.get(POST_CFG, [])]}


def confine(conds: Conds, weight: torch.Tensor, like: torch.Tensor) -> Conds:
    """A style's conds inside its mask: the host merges lists of them as this guider merges predictions.

    For the functions of other nodes that evaluate cond once more (perturbed attention, skipped layers).
    """
    weight = weight.expand(1, *like.shape[2:])
    return [{**cond, "mask": cond["mask"] * weight if "mask" in cond else weight} for cond in conds]
