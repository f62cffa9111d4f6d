"""Nodes of other packs that remember what they saw between model calls, a few lines each, named for what they do."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_easycache as easycache
import torch
from comfy.patcher_extension import WrappersMP


def remember_in_options(model: Any) -> Any:
    """Momentum whose last estimate is kept in the run's transformer_options."""
    def push(args: dict[str, Any]) -> torch.Tensor:
        kept = args["model_options"]["transformer_options"]
        kept["last_estimate"] = args["denoised"] + 0.4 * (args["denoised"] - kept.get("last_estimate", 0))
        return kept["last_estimate"]

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(push)
    return clone


def remember_in_variable(model: Any) -> Any:
    """Momentum whose last estimate is kept in a variable beside its function, and never reset."""
    last: Any = None

    def push(args: dict[str, Any]) -> torch.Tensor:
        nonlocal last
        last = args["denoised"] if last is None else args["denoised"] + 0.4 * (args["denoised"] - last)
        return last

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(push)
    return clone


def remember_in_list(model: Any) -> Any:
    """Momentum over all estimates so far."""
    history: list[torch.Tensor] = []

    def push(args: dict[str, Any]) -> torch.Tensor:
        history.append(args["denoised"])
        return args["denoised"] + 0.3 * (args["denoised"] - torch.stack(history).mean(0))

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(push)
    return clone


class Momentum:
    """An object that remembers in its attributes and in a dict of them."""

    def __init__(self) -> None:
        self.average: Any = None
        self.by_prompt: dict[Any, torch.Tensor] = {}

    def push(self, args: dict[str, Any]) -> list[torch.Tensor]:
        cond, *others = args["conds_out"]
        self.average = cond if self.average is None else 0.5 * (self.average + cond)
        self.by_prompt["cond"] = 0.2 * (cond - self.by_prompt.get("cond", cond)) + cond
        return [self.average + self.by_prompt["cond"] - cond, *others]


def remember_in_object(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_sampler_pre_cfg_function(Momentum().push)
    return clone


def remember_in_network(model: Any) -> Any:
    """What hangs on the network itself, out of reach, and starts anew at the schedule's first sigma."""
    def answer(apply_model: Callable[..., torch.Tensor], args: dict[str, Any]) -> torch.Tensor:
        out, options = apply_model(args["input"], args["timestep"], **args["c"]), args["c"]["transformer_options"]
        network = clone.model.diffusion_model
        if not float(options["sigmas"][0]) < float(options["sample_sigmas"][0]):
            network.kept = {}
        key = tuple(options["cond_or_uncond"])
        network.kept[key] = out + 0.4 * (out - network.kept.get(key, out))
        return network.kept[key]

    clone = model.clone()
    clone.set_model_unet_function_wrapper(answer)
    return clone


def skip_predictions(model: Any) -> Any:
    """A cache around predictions that calls the model at every other step and is made new for each run."""
    def begin(executor: Any, *args: Any, **kwargs: Any) -> Any:
        executor.class_obj.model_options["transformer_options"]["halves"] = Momentum()
        return executor(*args, **kwargs)

    def skip(executor: Any, x: torch.Tensor, timestep: torch.Tensor, options: Any, seed: Any) -> torch.Tensor:
        cache = options["transformer_options"]["halves"]
        if cache.average is None:
            cache.average = executor(x, timestep, options, seed) - x
            return cache.average + x
        change, cache.average = cache.average, None
        return x + change

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "halves", begin)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "halves", skip)
    return clone


def draw_from_all(model: Any) -> Any:
    """Draws from the global generator at every call."""
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] + 0.1 * torch.randn(args["denoised"].shape))
    return clone


def draw_from_own(model: Any) -> Any:
    """Draws from a generator of its own."""
    generator, clone = torch.Generator().manual_seed(5), model.clone()
    clone.set_model_sampler_post_cfg_function(
        lambda args: args["denoised"] + 0.1 * torch.randn(args["denoised"].shape, generator=generator))
    return clone


def core_easycache(model: Any) -> Any:
    return easycache.EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).result[0]


def core_lazycache(model: Any) -> Any:
    return easycache.LazyCacheNode.execute(model, 3.0, 0.0, 1.0, False).result[0]


def core_apg(model: Any) -> Any:
    return apg.APG.execute(model, 0.5, 2.0, -0.6).result[0]


def answer_in_float64(model: Any) -> Any:
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"].double())
    return clone


def tile(model: Any) -> Any:
    """Reads the picture in two halves."""
    def halves(apply_model: Callable[..., torch.Tensor], args: dict[str, Any]) -> torch.Tensor:
        x, options = args["input"], {**args["c"]}
        return torch.cat([apply_model(part, args["timestep"], **options) for part in x.chunk(2, dim=-1)], dim=-1)

    clone = model.clone()
    clone.set_model_unet_function_wrapper(halves)
    return clone


MEMORIES = [remember_in_options, remember_in_variable, remember_in_list, remember_in_object, skip_predictions,
            core_easycache, core_lazycache, core_apg, draw_from_own]
