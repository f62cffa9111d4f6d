"""What the injections of a model know of the sampling run they act in, and how their source is read beside it.

A guider makes its own prompts ready with the picture, the noise mask and the seed of its run. A source is a prompt of
nobody's guider, so these are noted where a run begins, in the options of that run, and last as long as it does.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention_patches.injection import NODE
from .protocols import Guider

RUN = "mixology_injection_run"
OURS = "mixology"  # how the keys of this pack's wrappers begin
# What a model paints beside, by the host's names: a source without any of it is read with the target's.
PICTURES = ("concat_latent_image", "concat_mask", "concat_image", "noise_augmentation", "noise_concat")
Options = dict[str, Any]


@dataclass(eq=False)
class Run:
    """A sampling run, and what was worked out once for it.

    Attributes:
        picture: the latent that is sampled over, [B, C, ..., H, W] in model space; None if nobody said.
        denoise_mask, seed: as the guider has them.
        thresholds: sigmas by percent; prompts: sources made ready; states: copies of what other nodes keep, by key.
    """

    picture: Tensor | None = None
    denoise_mask: Tensor | None = None
    seed: int | None = None
    thresholds: dict[float, float] = field(default_factory=dict)
    prompts: dict[Any, Any] = field(default_factory=dict)
    states: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def threshold(self, sampling: Any, percent: float) -> float:
        """The sigma of a percent of the model's time axis; asking the model for it may wait for the device."""
        if percent not in self.thresholds:
            self.thresholds[percent] = float(sampling.percent_to_sigma(percent))
        return self.thresholds[percent]

    def prepare(self, model: Any, conditioning: Any, state: Tensor, conds: Sequence[Any]) -> dict[str, Any]:
        """A source of one entry made ready as the run's guider did with its own prompts, once for each size.

        Args:
            conds: the targets', whose pictures a source without its own is read with.

        Raises:
            ValueError: if the model paints beside a picture, and nobody said which.
        """
        key = id(conditioning), tuple(state.shape)
        if key not in self.prompts:
            cond, = comfy.sampler_helpers.convert_cond(conditioning)
            picture = state if self.picture is None else self.picture
            cond, = comfy.samplers.process_conds(
                model, state, {"positive": [borrow_pictures(cond, conds)]}, state.device, picture, self.denoise_mask,
                self.seed or 0, [state.shape])["positive"]
            if self.picture is None and "c_concat" in cond["model_conds"]:
                raise ValueError(
                    f"{NODE} expected a guider that starts the host's own sampler, to read a model that paints beside "
                    f"a picture as it does, got one that does not; use CFG Guider.")
            self.prompts[key] = cond
        return self.prompts[key]

    def options_for_reading(self, model_options: Options) -> Options:
        """Options of a source's call: what other nodes hang on the network acts in it, what they keep does not.

        Wrappers of other nodes around the prompts and around the network belong to the run that is sampled: they keep
        what they saw last (step caches), and a source's reading ends half way through the network. Objects in the
        options are shown as copies, one for the run, so that what a patch notes in them stays apart. Windows are the
        target's as well: it says itself what it sees.
        """
        options = model_options.get("transformer_options", {})
        wrappers = {
            kind: {key: calls for key, calls in named.items()
                   if kind not in (WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL) or str(key).startswith(OURS)}
            for kind, named in options.get("wrappers", {}).items()}
        own = {key: self.copy_state(key, value) for key, value in options.items()}
        return {**{key: value for key, value in model_options.items() if key != "context_handler"},
                "transformer_options": {**own, "wrappers": wrappers}}

    def copy_state(self, key: str, value: Any) -> Any:
        """An object's copy with containers of its own; what is no such object, as it is."""
        if not hasattr(value, "__dict__") or callable(value) or isinstance(
                value, Tensor | ModelPatcher | ModuleType | Run):
            return value
        if key not in self.states or self.states[key][0] is not value:
            twin = copy.copy(value)
            vars(twin).update({name: copy.copy(part) for name, part in vars(twin).items()
                               if isinstance(part, dict | list | set)})
            self.states[key] = value, twin
        return self.states[key][1]


def borrow_pictures(cond: dict[str, Any], conds: Sequence[Any]) -> dict[str, Any]:
    """A source's cond with what the model paints beside: its own, or that of the first target which has any."""
    if not any(cond.get(key) is not None for key in PICTURES):
        for target in (target for group in conds for target in group or []):
            found = {key: target[key] for key in PICTURES if target.get(key) is not None}
            if found:
                return {**cond, **found}
    return cond


def note_run(executor: Callable[..., Any], guider: Guider, sigmas: Tensor, extra_args: Options, callback: Any,
             noise: Tensor, latent_image: Any = None, denoise_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Around a sampler: notes in the options of this run what its guider prepared its prompts with."""
    model_options = extra_args["model_options"]
    run = Run(torch.zeros_like(noise) if latent_image is None else latent_image, denoise_mask, extra_args.get("seed"))
    options = {**model_options.get("transformer_options", {}), RUN: run}
    extra_args = {**extra_args, "model_options": {**model_options, "transformer_options": options}}
    return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)


def find_run(model_options: Options) -> Run:
    """The run that a call belongs to; one that knows nothing, for this call, beside a guider that noted none."""
    return model_options.get("transformer_options", {}).get(RUN) or Run()
