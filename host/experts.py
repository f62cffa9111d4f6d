"""The experts of a fusion: a model each with prompts of its own, as the host runs it, beside the others."""
from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from .conds import attention_patches, evaluate, keeps_state, run_pre_cfg, shown_as_pairs, wants_pairs
from .marks import Conds
from .own_copies import Copies, copy_cond
from .protocols import Patcher
from .run import noise_levels

KEY = "mixology_fusion"
MAX_EXPERTS = 256  # winners are kept as bytes
TOLERANCE = 1e-3  # between two models' noise levels
PREVIEW = ("latent_rgb_", "taesd_")
ROOM = 300  # frames of Python's call stack that the innermost run may need
PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device)
# All that makes two patched models of one checkpoint act unlike.
PATCHES = ("model_options", "object_patches", "weight_wrapper_patches", "wrappers", "callbacks", "injections",
           "attachments", "additional_models", "hook_patches")


@dataclass(frozen=True)
class Expert:
    """A model and its prompts: CONDITIONING, guidance scale and the k of the paper."""

    model: Patcher
    positive: Any
    negative: Any
    cfg: float
    temperature: float


def add_expert(
    model: Patcher, positive: Any, negative: Any, cfg: float, temperature: float, experts: Sequence[Expert] | None,
) -> tuple[Expert, ...]:
    """The experts and one more behind them.

    Raises:
        ValueError: on an empty conditioning, a cfg that is no number, a negative temperature, or another latent format
            or noise schedule than that of the experts before.
    """
    for name, conditioning in (("positive", positive), ("negative", negative)):
        if not conditioning:
            raise ValueError(
                f"{name} expects a prompt, got an empty conditioning; connect for instance CLIP Text Encode to it."
            )
    if not math.isfinite(cfg):
        raise ValueError(f"cfg expects a number such as 7.5, got {cfg}; correct it.")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature expects 0 or more (the paper uses 1 and 3), got {temperature:g}; "
            f"{'lower' if temperature > 0 else 'raise'} it."
        )
    before = tuple(experts or ())
    if before:
        check_fit(before[0].model, model, len(before))
    if len(before) == MAX_EXPERTS:
        raise ValueError(f"A fusion expects at most {MAX_EXPERTS} experts, got one more; remove one.")
    return (*before, Expert(model, positive, negative, cfg=cfg, temperature=temperature))


def check_fit(first: Patcher, other: Patcher, index: int) -> None:
    """Raises ValueError if model `index` reads latents or noise levels otherwise than the first."""
    check_formats(first, other, index)
    check_schedules(first, other, index)


def check_formats(first: Patcher, other: Patcher, index: int) -> None:
    """Raises ValueError if model `index` reads latents otherwise than the first."""
    formats = [model.get_model_object("latent_format") for model in (first, other)]
    if type(formats[0]) is not type(formats[1]) or not is_same(*(latent_fields(own) for own in formats)):
        names = [f"{type(kind).__name__} with {kind.latent_channels} channels" for kind in formats]
        raise ValueError(
            f"The experts expect one latent format, got {names[0]} of expert 0 and {names[1]} of expert {index}; use "
            f"models of one family, such as SD1.5 with SD1.5."
        )


def check_schedules(first: Patcher, other: Patcher, index: int) -> None:
    """Raises ValueError if model `index` reads noise levels otherwise than the first."""
    samplings = [model.get_model_object("model_sampling") for model in (first, other)]
    sigmas = torch.tensor([float(samplings[0].percent_to_sigma(step / 10)) for step in range(1, 10)])
    levels = [noise_levels(sampling, sigmas) for sampling in samplings]
    highest = [float(sampling.sigma_max) for sampling in samplings]
    if math.isclose(*highest, rel_tol=TOLERANCE) and all(
            math.isclose(getattr(a, part), getattr(b, part), rel_tol=TOLERANCE, abs_tol=1e-6)
            for a, b in zip(*levels) for part in ("signal", "noise")):
        return
    flows = [is_flow(sampling) for sampling in samplings]
    kinds = [f"{'flow' if flow else 'diffusion'} from sigma {top:g}" for flow, top in zip(flows, highest)]
    remedy = "models that start from the same noise, or set them alike with ModelSamplingDiscrete"
    if any(flows):
        remedy = "models of one kind, such as two flow models of one family"
    raise ValueError(
        f"The experts expect one noise schedule, got {kinds[0]} of expert 0 and {kinds[1]} of expert {index}; use "
        f"{remedy}."
    )


def latent_fields(latent_format: Any) -> dict[str, Any]:
    """What a latent format does to latents: all but how previews are drawn, which may differ in each object."""
    return {name: value for name, value in vars(latent_format).items() if not name.startswith(PREVIEW)}


def is_flow(sampling: Any) -> bool:
    """Whether noise takes the place of the picture, as in flow models, or is added to it: measured halfway."""
    middle = sampling.percent_to_sigma(0.5)
    return noise_levels(sampling, torch.tensor([float(middle)]))[0].signal < 1 - TOLERANCE


def is_same(a: Any, b: Any) -> bool:
    """Whether two things of the host hold the same: containers and tensors by content, other objects by identity."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(is_same(*pair) for pair in zip(a, b))
    if isinstance(a, comfy.conds.CONDRegular):
        return is_same(vars(a), vars(b))
    return (isinstance(a, PLAIN) or callable(a)) and a == b


def is_same_model(a: Any, b: Any) -> bool:
    """Whether two model patchers are one model with the same patches on weights and behaviour."""
    return a is b or (a.is_clone(b) and a.patches_uuid == b.patches_uuid and all(
        is_same(getattr(a, part), getattr(b, part)) for part in PATCHES))


def is_same_prompt(a: Conds, b: Conds) -> bool:
    """Whether two prompts, made ready for sampling, say the same to one model."""
    nameless = [[{key: value for key, value in cond.items() if key != "uuid"} for cond in conds] for conds in (a, b)]
    return is_same(*nameless)


@dataclass
class Prediction:
    """What an expert predicts at one state: clean estimates, [B, C, ..., H, W].

    Attributes:
        cond, uncond: as evaluated.
        shown_cond, shown_uncond: after the model's pre-CFG functions, as its CFG took them.
        guided: the prediction.
    """

    cond: torch.Tensor
    uncond: torch.Tensor
    shown_cond: torch.Tensor
    shown_uncond: torch.Tensor
    guided: torch.Tensor


class NestedRun(comfy.samplers.Sampler):
    """Stands for a sampler in an expert's run: notes the run's options, then starts the next run inside this one."""

    def __init__(self, proceed: Callable[[], torch.Tensor]):
        self.proceed = proceed
        self.result: torch.Tensor | None = None

    def sample(
        self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, denoise_mask: torch.Tensor | None = None, disable_pbar: bool = False,
    ) -> torch.Tensor:
        model_wrap.run_options = extra_args["model_options"]
        check_depth()
        self.result = self.proceed()
        return torch.zeros_like(noise)  # the host takes it out of model space; nobody reads it


def check_depth() -> None:
    """Raises ValueError if one more run inside the runs that are open would exceed Python's call depth."""
    depth, frame = 0, inspect.currentframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    if depth + ROOM > sys.getrecursionlimit():
        raise ValueError(
            "The Saliency Fusion Guider expects fewer experts, got so many that their runs, one inside the other, "
            "exceed Python's call depth; remove some experts, or nodes that wrap the runs of their models.")


class ExpertGuider(comfy.samplers.CFGGuider):
    """An expert as the host's own guider: its hooks, wrappers, ControlNets and callbacks are the host's business.

    Patched clones of one checkpoint share its weights, and the host patches them for the clone it loaded last. Every
    evaluation with this guider's options therefore asks for its own weights first, which also brings back a model that
    was moved away to make room.

    Args:
        expert: the model, prompts and settings.
        shares_model: whether another expert has the same model object.
    """

    def __init__(self, expert: Expert, shares_model: bool = False):
        self.source = expert.model
        self.shares_model = shares_model  # what a patch of it waits for may be in another's prompts
        self.has_hooks = any(comfy.sampler_helpers.cond_has_hooks(c) for c in (expert.positive, expert.negative))
        delegated = self.has_hooks and self.source.is_dynamic()  # then the host swaps in an object of this guider's
        alone = not shares_model and not self.has_hooks  # a run registers hooks on the object
        super().__init__(self.source if alone or delegated else self.source.clone())
        self.inner_set_conds({"positive": expert.positive, "negative": expert.negative})
        self.set_cfg(expert.cfg)
        self.temperature = expert.temperature
        self.own_patcher, self.own_conds = self.model_patcher, self.original_conds  # nodes exchange those of a copy
        self.followers: Sequence[ExpertGuider] = ()  # evaluated with this one's weights, during a run
        self.run_options: dict[str, Any] = {}  # during a run
        self.prediction: Prediction | None = None  # the latest
        self.shape: torch.Size | None = None

    def inner_set_conds(self, conds: dict[str, Any]) -> None:
        """Other nodes give prompts to a copy of a guider; those of the original stay."""
        self.original_conds = dict(self.original_conds)
        super().inner_set_conds(conds)

    def copy_prompts(self, copies: Copies) -> None:
        """Use ControlNets and hooks of its own.

        Args:
            copies: those of the experts that are evaluated together, whose equal prompts stay equal.
        """
        self.original_conds = {
            name: [copy_cond(cond, copies) for cond in conds] for name, conds in self.own_conds.items()}

    def run_around(
        self, proceed: Callable[[], torch.Tensor], noise: torch.Tensor, latent_image: torch.Tensor,
        sigmas: torch.Tensor, *, denoise_mask: torch.Tensor | None, seed: int | None,
    ) -> torch.Tensor:
        """Run `proceed` with this expert loaded and its prompts ready, as the host runs a sampler; returns its result.

        The host ends the run in every outcome.
        """
        nested = NestedRun(proceed)
        try:
            self.sample(noise, latent_image, nested, sigmas, denoise_mask=denoise_mask, disable_pbar=True, seed=seed)
        finally:
            self.run_options, self.prediction = {}, None
        if nested.result is None:
            raise ValueError(
                "The Saliency Fusion Guider expects experts that run, got one whose model was patched to end its run "
                "at once; remove that patch."
            )
        return nested.result

    def outer_sample(self, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        def load_first(executor: Callable[..., Any], *call: Any) -> Any:
            self.bring_weights()
            return executor(*call)

        self.shape = noise.shape
        comfy.patcher_extension.add_wrapper_with_key(
            WrappersMP.CALC_COND_BATCH, KEY, load_first, self.model_options, is_model_options=True)
        return super().outer_sample(noise, *args, **kwargs)

    def is_present(self) -> bool:
        """Whether the host holds this expert's patched weights, and its ControlNets, ready for use."""
        loaded = {id(model) for model in comfy.model_management.loaded_models()}
        needed = [self.model_patcher, *(model for own in (self, *self.followers) for model in own.loaded_models)]
        return all(id(model) in loaded for model in needed)

    def bring_weights(self) -> None:
        """Have the host load this expert's weights, if they are not there."""
        if not self.is_present():
            together = enumerate((self, *self.followers))
            conds = {f"{name} {i}": conds for i, own in together for name, conds in own.conds.items()}
            comfy.sampler_helpers.prepare_sampling(self.model_patcher, self.shape, conds, self.model_options)
        self.inner_model.current_patcher = self.model_patcher

    def evaluate(
        self, rows: list[Conds], negative: list[bool], x: torch.Tensor, timestep: torch.Tensor, *,
        options: dict[str, Any],
    ) -> list[torch.Tensor]:
        """Denoised of each prompt by this expert's model, from one call of the host."""
        with shown_as_pairs(options, rows, negative):
            return evaluate(self.inner_model, rows, x, timestep, options=options)

    def guide(
        self, cond: torch.Tensor, uncond: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, *,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """The guided denoised of an evaluated pair, as the host's sampling_function makes it, other nodes' functions
        included; kept as `prediction`."""
        skip = math.isclose(self.cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
        positive, negative = self.conds["positive"], None if skip else self.conds["negative"]
        shown = run_pre_cfg(
            self.inner_model, [positive, negative], [cond, torch.zeros_like(uncond) if skip else uncond], self.cfg,
            x=x, timestep=timestep, options=options)
        guided = comfy.samplers.cfg_function(
            self.inner_model, *shown, self.cfg, x=x, timestep=timestep, model_options=options, cond=positive,
            uncond=negative)
        self.prediction = Prediction(cond, uncond, shown_cond=shown[0], shown_uncond=shown[1], guided=guided)
        return guided

    def latest(self) -> Prediction:
        """Raises ValueError if the prompts were not evaluated in this run."""
        if self.prediction is None:
            raise ValueError(
                "The Saliency Fusion Guider expects experts whose prompts are evaluated, got one whose model was "
                "patched to answer otherwise; remove that patch."
            )
        return self.prediction

    def wrap(self, predict: Callable[..., torch.Tensor], x: torch.Tensor, timestep: torch.Tensor, *,
             options: dict[str, Any], seed: int | None) -> torch.Tensor:
        """`predict(x, timestep, options, seed)` inside the wrappers that other nodes hung around its predictions."""
        wrappers = comfy.patcher_extension.get_all_wrappers(WrappersMP.PREDICT_NOISE, options, is_model_options=True)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(predict, self, wrappers)
        return executor.execute(x, timestep, options, seed)


def may_share(a: ExpertGuider, b: ExpertGuider) -> bool:
    """Whether two experts may be evaluated in one call: one model, and nothing that wants a pair of its own."""
    models = [own.source if own.model_patcher is own.own_patcher else own.model_patcher for own in (a, b)]
    if any(own.has_hooks or own.model_options is not own.model_patcher.model_options for own in (a, b)):
        return False  # the latter where a node exchanged the options of a guider's copy
    wrappers = [models[0].get_all_wrappers(WrappersMP.PREDICT_NOISE), comfy.patcher_extension.get_all_wrappers(
        WrappersMP.PREDICT_NOISE, models[0].model_options, is_model_options=True)]
    options = models[0].model_options  # a patch that records (self-attention guidance) does so of one negative
    return not (any(wrappers) or wants_pairs(options) or any(map(keeps_state, attention_patches(options)))) and (
        is_same_model(*models))
