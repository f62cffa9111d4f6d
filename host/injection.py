"""Ditail's content injection in the host: a model that reads a trajectory beside what it samples."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention_patches.injection import Chunk, Point, Reading, RegionMask
from ..samplers.layout import SIGMA_TOLERANCE
from . import injection_joint, injection_unet
from .cycle import UNPREPARED
from .inversion import Trajectory, start_trajectory
from .layout import Latent, make_guider, output_latent, run_guider
from .marks import Row
from .spatial import is_active

KEY = "mixology_injection"
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
    region: RegionMask | None

    def plan(self, model: Any, conds: Sequence[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any],
             ) -> Plan:
        """Reads the source at this step and says what each row of a `calc_cond_batch` call gets of it.

        Empty, with nothing read, where nothing is injected.

        Raises:
            ValueError: for a state that the trajectory does not hold, or if another node kept the model from reading.
        """
        sigma = float(timestep[0])
        attention, features = (sigma > float(model.model_sampling.percent_to_sigma(until)) * (1 + SIGMA_TOLERANCE)
                               for until in (self.attention_until, self.features_until))
        family = find_family(model)
        points = family.find_points(model.diffusion_model, attention, features)
        areas = {(index, cond["uuid"]): tuple(cond["area"]) if "area" in cond else None
                 for index, group in enumerate(conds) for cond in group or [] if is_active([cond], timestep)}
        if not points or not areas:
            return {}
        readings = self.read(model, list(dict.fromkeys(areas.values())), x, timestep, model_options, points)
        height, width = x.shape[-2:]
        return {row: Chunk(readings[area], self.region, (height, width), flat_area(area))
                for row, area in areas.items()}

    def read(self, model: Any, areas: Sequence[Any], x: Tensor, timestep: Tensor, model_options: dict[str, Any],
             points: Sequence[Point]) -> dict[Any, Reading]:
        """What the model reads at `points` in the trajectory's state, once for each area that the targets paint.

        A call of its own through all that other nodes hang on the model, save this injection.
        """
        one = self.trajectory.states.shape[1] == 1
        state = self.trajectory.state_at(float(timestep[0]), x[:1] if one else x)
        cond, = comfy.sampler_helpers.convert_cond(self.conditioning)
        cond, = comfy.samplers.process_conds(
            model, state, {"positive": [cond]}, x.device, latent_shapes=[state.shape])["positive"]
        sources = [[cond if area is None else {**cond, "area": area}] for area in areas]
        readings: list[Reading] = [{} for _ in areas]
        options = wrap_calls(model_options, find_family(model).Read(readings, points))
        options["transformer_options"][KEY] = ()
        comfy.samplers.calc_cond_batch(model, sources, state, timestep[:len(state)], options)
        if any(point not in reading for reading in readings for point in points):
            raise ValueError(
                "Feature Injection expected the model to read the trajectory at every step, got one of which another "
                "node skips parts; remove the node that caches steps or skips blocks.")
        return dict(zip(areas, readings))


def flat_area(area: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Height, width, y and x of an area that may have frames as well: sizes come first, then starts."""
    if area is None:
        return None
    dims = len(area) // 2
    return (*area[dims - 2:dims], *area[-2:])


def find_family(model: Any) -> ModuleType:
    """How a model's features are read and injected.

    Raises:
        ValueError: for a model family without a usable seam.
    """
    network = model.diffusion_model
    for family in (injection_unet, injection_joint):
        if isinstance(network, family.FAMILY) and not model.model_config.unet_config.get("use_temporal_attention"):
            return family
    raise ValueError(
        f"Feature Injection expected an SD1.x, SD2.x, SDXL, SD3, Flux or Qwen-Image model, got "
        f"{type(model).__name__}; sample from Start from Trajectory without it, or use one of those.")


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
    injections = model_options.get("transformer_options", {}).get(KEY, ())
    plans = [injection.plan(model, conds, x, timestep, model_options) for injection in injections]
    if any(plans):
        model_options = wrap_calls(model_options, find_family(model).Inject([plan for plan in plans if plan]))
    return executor(model, conds, x, timestep, model_options)


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


def inject_features(model: Any, trajectory: Trajectory, conditioning: Any, attention_until: float,
                    features_until: float, mask: Tensor | None = None) -> Any:
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
    family = find_family(model.model)
    trajectory.check_model(model)
    check_conditioning(conditioning)
    if attention_until <= 0.0 < features_until and not family.HAS_FEATURES:
        raise ValueError(
            f"Feature Injection expected attention_until above 0 for {type(model.model).__name__}, which has no "
            f"residual features, got 0; raise attention_until, or set features_until to 0 as well.")
    if not family.find_points(model.model.diffusion_model, True, False):
        raise ValueError(
            f"Feature Injection expected a model with several self-attentions, got {type(model.model).__name__} with "
            f"too few; sample from Start from Trajectory without it.")
    region = None if mask is None else RegionMask(make_region(mask))
    if max(attention_until, features_until) <= 0.0 or (region is not None and not bool(region.mask.any())):
        return model
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    options[KEY] = (*options.get(KEY, ()),
                    Injection(trajectory, conditioning, attention_until, features_until, region))
    clone.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, read_and_inject)
    return clone


def make_region(mask: Tensor) -> Tensor:
    """A MASK as [N, H, W] in float32 on the CPU."""
    return mask.reshape(-1, *mask.shape[-2:]).float().clamp(0.0, 1.0).cpu()


def sample_cocktail(model: Any, trajectory: Trajectory, source_conditioning: Any, positive: Any, negative: Any,
                    cfg: float, attention_until: float, features_until: float, mask: Tensor | None = None) -> Latent:
    """KSampler (Cocktail): Feature Injection, Start from Trajectory and the host's DDIM (euler). Returns a LATENT."""
    injecting = inject_features(model, trajectory, source_conditioning, attention_until, features_until, mask)
    noise, sigmas, latent = start_trajectory(trajectory)
    guider = make_guider(injecting, positive, negative, cfg)
    samples, _ = run_guider(
        guider, comfy.samplers.sampler_object("euler"), sigmas, latent, noise.generate_noise(latent), noise.seed)
    return output_latent(latent, samples)
