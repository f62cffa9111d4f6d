"""Ditail's content injection in the host: a model that reads a trajectory beside what it samples."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention_patches.injection import NODE, SKIPPED, Chunk, Part, Point, SourceTensors
from ..attention_patches.masks import LayerMasks
from ..attention_patches.rows import check_part
from ..samplers.levels import SIGMA_TOLERANCE
from ..samplers.masks import check_mask, check_mask_count
from . import injection_joint, injection_unet
from .conds import UNPREPARED, is_active
from .families.cross import find_cross
from .families.joint import find_joint
from .families.transformers import SUPPORTED
from .families.unet import is_unet
from .injection_run import RUN, Run, find_run, note_run
from .marks import Row, call_below, is_marked
from .networks import family_name, find_network, run_uncompiled
from .protocols import Patcher
from .run import Latent, find_cell, make_guider, output_latent, run_guider
from .trajectory import Trajectory, start_trajectory

KEY = "mixology_injection"
STEP_CACHE = "easycache"  # the host's own: it answers for the model at steps that it knows to be alike
# What would make of the source something else than the whole picture at every step.
PARTIAL = {"area": "an area", "mask": "a mask", "start_percent": "a time range", "end_percent": "a time range"}
Plan = dict[Row, Chunk]


@dataclass(frozen=True, eq=False)
class Injection:
    """What a model injects: what it reads, how far, and where.

    Attributes:
        conditioning: CONDITIONING of one entry that the trajectory is read with.
        attention_until, features_until: percents of the model's time axis; 0 injects nothing.
        region: injected inside it only; None for everywhere.
    """

    trajectory: Trajectory
    conditioning: Any
    attention_until: float
    features_until: float
    region: LayerMasks | None

    def points_at(self, model: Any, sigma: float, run: Run) -> list[Point]:
        """What is injected at a sigma, in the network's order."""
        attention, features = (
            sigma > run.threshold(model.model_sampling, until) * (1 + SIGMA_TOLERANCE)
            for until in (self.attention_until, self.features_until))
        return find_family(model).find_points(find_network(model), attention, features)

    def plan(self, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, sigma: float, points: Sequence[Point],
             model_options: dict[str, Any], run: Run) -> Plan:
        """Reads the source at this step and says what each row of a `calc_cond_batch` call gets of it.

        Args:
            sigma: timestep's, read from the device once.

        Raises:
            ValueError: for a state that the trajectory does not hold, a call that sees a part of the picture, masks
                that do not fit the images, or if another node kept the model from reading.
        """
        cell = find_cell(model)
        self.check_call(x, run, cell)
        time = timestep.new_tensor([sigma], device="cpu")
        picture = x.shape[-2], x.shape[-1]
        areas = {(index, cond["uuid"]): cond.get("area") and tuple(cond["area"])
                 for index, group in enumerate(conds) for cond in group or [] if is_active([cond], time)}
        if not areas:
            return {}
        parts = {area: Part(picture, flat_area(area, picture), len(x), cell) for area in areas.values()}
        readings = self.read(model, conds, x, timestep, sigma=sigma, points=points, parts=parts,
                             model_options=model_options, run=run)
        return {row: Chunk(readings[area], self.region, picture, parts[area].area, images=len(x), cell=cell)
                for row, area in areas.items()}

    def check_call(self, x: Tensor, run: Run, cell: int | None) -> None:
        """Raises ValueError unless a call is of the whole picture, all its frames and all images."""
        if run.picture is not None:
            whole = run.picture.shape
            check_part((x.shape[-2], x.shape[-1]), (whole[-2], whole[-1]), None, node=NODE, cell=cell)
            each = self.trajectory.states.shape[1] > 1 or (self.region is not None and len(self.region.mask) > 1)
            if x.shape[2:-2] != whole[2:-2] or (each and len(x) != whole[0]):
                raise ValueError(
                    f"{NODE} expected the model to see all images and frames at once, got a part of them; remove the "
                    f"node that hands the model parts of the batch (context windows).")
        if self.region is not None:
            check_mask_count(self.region.mask, len(x))

    def read(self, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, sigma: float,
             points: Sequence[Point], parts: dict[Any, Part], model_options: dict[str, Any], run: Run,
             ) -> dict[Any, SourceTensors]:
        """What the model reads at `points` in the trajectory's state, once for each area that the targets paint.

        A call of its own, without this injection.
        """
        state = self.read_state(conds, x, sigma)
        cond = run.prepare(model, self.conditioning, state, conds)
        sources = [[cond if area is None else {**cond, "area": area}] for area in parts]
        readings = [SourceTensors() for _ in parts]
        reader = find_family(model).SourceCall(
            find_network(model), readings, [replace(part, images=len(state)) for part in parts.values()], points)
        options = wrap_calls(run.options_for_reading(model_options), reader)
        comfy.samplers.calc_cond_batch(model, sources, state, timestep[:len(state)], options)
        if any(point not in reading for reading in readings for point in points):
            raise ValueError(SKIPPED)
        return dict(zip(parts, readings))

    def read_state(self, conds: Sequence[Any], x: Tensor, sigma: float) -> Tensor:
        """The state to read beside x, [1 or images, ...]: one of one picture, if nothing sets the images apart."""
        beside = any("c_concat" in cond["model_conds"] for group in conds for cond in group or [])
        each = beside or is_marked(self.conditioning[0][1])  # an image may have a picture, or factors, of its own
        one = self.trajectory.states.shape[1] == 1 and not each
        return self.trajectory.state_at(sigma, x[:1] if one else x)


def flat_area(area: tuple[int, ...] | None, picture: tuple[int, int]) -> tuple[int, ...] | None:
    """Height, width, y and x of an area, inside the picture; it may have frames as well: sizes come first."""
    if area is None:
        return None
    dims = len(area) // 2
    (height, width), (y, x) = area[dims - 2:dims], area[-2:]
    return min(height, picture[0] - y), min(width, picture[1] - x), y, x


def find_family(model: Any) -> ModuleType:
    """How a model's features are read and injected.

    Raises:
        ValueError: for a model family without a usable seam.
    """
    if is_unet(model):
        return injection_unet
    if find_joint(model) or find_cross(model):
        return injection_joint
    raise ValueError(
        f"{NODE} expected a model of {SUPPORTED}, got {family_name(model)}; sample from Start from Trajectory without "
        f"it, or use one of those.")


def wrap_calls(model_options: dict[str, Any], wrapper: Any) -> dict[str, Any]:
    """A copy of the options whose model calls run inside `wrapper`, which is the innermost of its kind."""
    options = model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {})
    own = {**{key: calls for key, calls in wrappers.get(wrapper.kind, {}).items() if key != KEY}, KEY: [wrapper]}
    return {**model_options, "transformer_options": {**options, "wrappers": {**wrappers, wrapper.kind: own}}}


def read_and_inject(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
                    model_options: dict[str, Any]) -> Any:
    """Around `calc_cond_batch`: reads the source of each injection of the model, then samples with it.

    What was read lives as long as this call. Injections act in the order of their nodes.
    """
    options, run = model_options.get("transformer_options", {}), find_run(model_options)
    injections = options.get(KEY, ())
    if not injections:
        return executor(model, conds, x, timestep, model_options)
    sigma = float(timestep[0])  # the one value that is waited for at a step
    if not math.isfinite(sigma):
        raise ValueError(f"{NODE} expected a noise level to read the trajectory at, got {sigma}; look at the sigmas.")
    acting = [(injection, injection.points_at(model, sigma, run)) for injection in injections]
    below = leave_out(model_options, KEY, RUN)
    if not any(points for _, points in acting):
        return call_below(executor, model, conds, x, timestep=timestep, below=below, options=options)
    with run_uncompiled(model, options, NODE):
        plans = [injection.plan(model, conds, x, timestep, sigma=sigma, points=points, model_options=below, run=run)
                 for injection, points in acting if points]
        if not any(plans):
            return call_below(executor, model, conds, x, timestep=timestep, below=below, options=options)
        inject = find_family(model).TargetCall(find_network(model), [plan for plan in plans if plan])
        result = call_below(
            executor, model, conds, x, timestep=timestep, below=wrap_calls(below, inject), options=options)
    if not inject.ran and STEP_CACHE not in options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {}):
        raise ValueError(SKIPPED)
    return result


def leave_out(model_options: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A copy of the options without some of `transformer_options`: a network that was compiled beside them crashes
    when it is used without, since nothing checks its options again."""
    options = model_options.get("transformer_options", {})
    return {**model_options, "transformer_options": {
        key: value for key, value in options.items() if key not in keys}}


def check_untils(**untils: float) -> None:
    """Raises ValueError for a share of the time that is none, as it may come over the API."""
    for name, until in untils.items():
        if not 0.0 <= until <= 1.0:
            raise ValueError(f"{name} expects a number from 0 to 1, got {until:g}; correct it.")


def check_conditioning(conditioning: Any) -> None:
    """Raises ValueError unless it is one prompt for the whole picture, with nothing that only a guider prepares."""
    if len(conditioning) != 1:
        raise ValueError(
            f"Feature Injection expected one prompt to read the trajectory with, got {len(conditioning) or 'none'}; "
            f"connect a single CLIP Text Encode, for instance of an empty text.")
    options = conditioning[0][1]
    found = [words for key, words in {**UNPREPARED, **PARTIAL}.items() if options.get(key) is not None]
    if found:
        raise ValueError(
            f"Feature Injection expected a plain prompt to read the trajectory with, got {' and '.join(found)} in it; "
            f"apply that to the sampler's prompts, and connect the prompt before it was applied.")


def inject_features(model: Patcher, trajectory: Trajectory, conditioning: Any, attention_until: float,
                    features_until: float, mask: Tensor | None = None) -> Patcher:
    """Ditail's content injection (arXiv 2312.08873) as a MODEL; the caller's own where nothing would be injected.

    Args:
        trajectory: of the picture whose structure is kept.
        conditioning: CONDITIONING of one entry that the picture is read with; the paper's is the empty prompt.
        attention_until, features_until: how long queries and keys, and residual features, are injected, in percents
            of the model's own time axis.
        mask: MASK [N, H, W] or [H, W], one for all images or one for each; nothing is injected outside.

    Raises:
        ValueError: for a model family without a usable seam, a trajectory of another latent format or other noise
            levels, or a conditioning that is not one plain prompt.
    """
    check_untils(attention_until=attention_until, features_until=features_until)
    family = find_family(model.model)
    trajectory.check_model(model)
    check_conditioning(conditioning)
    if attention_until <= 0.0 < features_until and not family.HAS_FEATURES:
        raise ValueError(
            f"Feature Injection expected attention_until above 0 for {family_name(model.model)}, which has no "
            f"residual features, got 0; raise attention_until, or set features_until to 0 as well.")
    if not family.find_points(find_network(model.model), True, False):
        raise ValueError(
            f"Feature Injection expected a model with several self-attentions, got {family_name(model.model)} with "
            f"too few; sample from Start from Trajectory without it.")
    region = None if mask is None else LayerMasks(check_mask(mask).cpu())
    if max(attention_until, features_until) <= 0.0 or (region is not None and not bool(region.mask.any())):
        return model
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    options[KEY] = (*options.get(KEY, ()),
                    Injection(trajectory, conditioning, attention_until=attention_until, features_until=features_until,
                              region=region))
    for kind, wrapper in ((WrappersMP.CALC_COND_BATCH, read_and_inject), (WrappersMP.SAMPLER_SAMPLE, note_run)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def sample_cocktail(model: Patcher, trajectory: Trajectory, *, source_conditioning: Any, positive: Any, negative: Any,
                    cfg: float, attention_until: float, features_until: float, mask: Tensor | None = None) -> Latent:
    """KSampler (Cocktail): Feature Injection, Start from Trajectory and the host's DDIM (euler). Returns a LATENT.

    Raises:
        ValueError: for what Feature Injection refuses, or a cfg that is no number.
    """
    if not math.isfinite(cfg):
        raise ValueError(f"cfg expects a number such as 7.5, got {cfg}; correct it.")
    injecting = inject_features(model, trajectory, source_conditioning, attention_until=attention_until,
                                features_until=features_until, mask=mask)
    noise, sigmas, latent = start_trajectory(trajectory)
    guider = make_guider(injecting, positive, negative, cfg)
    samples, _ = run_guider(
        guider, comfy.samplers.sampler_object("euler"), sigmas, latent, noise=noise.generate_noise(latent),
        seed=noise.seed)
    return output_latent(latent, samples)
