"""What other packs' nodes do to a model, a guider or a sampler, in a few lines each that change no picture.

Since a stranger alone changes nothing, a technique beside it must give what it gives alone, or refuse in one sentence.
"""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

Calls = list[str]


@dataclass(frozen=True)
class Stranger:
    """A node of another pack; each part tells `calls` when it is at work."""

    model: Callable[[Any, Calls], Any] = lambda model, calls: model
    guider: Callable[[Any, Calls], Any] = lambda guider, calls: guider
    solver: Callable[[Any, Calls], Any] = lambda solver, calls: solver


def wrapped(kind: str, make: Callable[[Calls], Callable[..., Any]]) -> Stranger:
    """A wrapper of the model's."""
    def patch(model: Any, calls: Calls) -> Any:
        clone = model.clone()
        clone.add_wrapper_with_key(kind, "stranger", make(calls))
        return clone

    return Stranger(model=patch)


def with_option(key: str, make: Callable[[Calls], Any]) -> Stranger:
    """An entry of model_options."""
    def patch(model: Any, calls: Calls) -> Any:
        clone = model.clone()
        clone.model_options[key] = make(calls)
        return clone

    return Stranger(model=patch)


def new_text(conds: list[Any]) -> list[Any]:
    """Conditionings whose texts are new tensors in new dicts."""
    def renew(cond: dict[str, Any]) -> dict[str, Any]:
        text = cond["model_conds"].get("c_crossattn")
        fresh = {} if text is None else {"c_crossattn": comfy.conds.CONDCrossAttn(text.cond.clone())}
        return {**cond, "model_conds": {**cond["model_conds"], **fresh}}

    return [None if group is None else [renew(cond) for cond in group] for group in conds]


def clone_texts(calls: Calls) -> Callable[..., Any]:
    """Exchanges every text for a copy, at every step."""
    def wrapper(executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any) -> Any:
        calls.append("texts")
        return executor(model, new_text(conds), x, timestep, options)

    return wrapper


def ask_pairs(calls: Calls) -> Callable[..., Any]:
    """A `sampler_calc_cond_batch_function` that knows a positive and a negative and no more, and renews their texts."""
    def function(arguments: dict[str, Any]) -> list[torch.Tensor]:
        calls.append("pair")
        cond, uncond = arguments["conds"]
        return comfy.samplers.calc_cond_batch(
            arguments["model"], new_text([cond, uncond]), arguments["input"], arguments["sigma"],
            arguments["model_options"])

    return function


def image_by_image(calls: Calls) -> Callable[..., Any]:
    """Evaluates the images of a batch one after another."""
    def wrapper(executor: Any, model: Any, conds: Any, x: Any, timestep: Any, options: Any) -> Any:
        calls.append("images")
        parts = [executor(model, conds, x[i:i + 1], timestep[i:i + 1], options) for i in range(len(x))]
        return [torch.cat(found) for found in zip(*parts)]

    return wrapper


def repeat_rows(value: Any, rows: int, times: int) -> Any:
    """The rows of a call once more behind themselves."""
    if isinstance(value, torch.Tensor) and len(value) == rows:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


def tile_by_tile(calls: Calls) -> Callable[..., Any]:
    """Two tiles in one call, [c, u, c, u] where the host says [c, u]; each tile is the whole picture."""
    def wrapper(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        calls.append("tiles")
        x, rows = arguments["input"], len(arguments["input"])
        c = {key: repeat_rows(value, rows, 2) for key, value in arguments["c"].items()}
        out = apply_model(repeat_rows(x, rows, 2), repeat_rows(arguments["timestep"], rows, 2), **c)
        return out[:rows] / 2 + out[rows:] / 2

    return wrapper


def chunk_by_chunk(calls: Calls) -> Callable[..., Any]:
    """One call for each conditioning, said as the host says it."""
    def wrapper(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        calls.append("chunks")
        x, c, count = arguments["input"], arguments["c"], len(arguments["cond_or_uncond"])
        share, out = len(x) // count, []
        for i in range(count):
            part = slice(i * share, (i + 1) * share)
            said = {key: c["transformer_options"][key][i:i + 1] for key in ("cond_or_uncond", "uuids")}
            own = {key: value[part] if isinstance(value, torch.Tensor) and len(value) == len(x) else value
                   for key, value in c.items()}
            own["transformer_options"] = {**c["transformer_options"], **said}
            out.append(apply_model(x[part], arguments["timestep"][part], **own))
        return torch.cat(out)

    return wrapper


def index_pair(model: Any, calls: Calls) -> Any:
    """A patch with something for the positive and something for the negative, picked by the host's index."""
    def patch(n: Any, context: Any, value: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
        calls.append("pair patch")
        factors = torch.tensor([(1.0, 1.0)[index] for index in options["cond_or_uncond"]])
        factors = factors.repeat_interleave(len(n) // len(factors)).reshape(-1, 1, 1)
        return n * factors.to(n), context, value

    clone = model.clone()
    clone.set_model_attn2_patch(patch)
    return clone


def fill_slot(model: Any, calls: Calls) -> Any:
    """Takes the one slot of the attention override, and calls what it finds there."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    inner = options.get("optimized_attention_override")

    def attend(func: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("override")
        return func(*args, **kwargs) if inner is None else inner(func, *args, **kwargs)

    options["optimized_attention_override"] = attend
    return clone


def copy_options(calls: Calls) -> Callable[..., Any]:
    """Hands the model's call on with copies of all dicts."""
    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("options")
        copied = [dict(arg) if isinstance(arg, dict) else arg for arg in args]
        return executor(*copied, **{key: dict(value) if isinstance(value, dict) else value
                                    for key, value in kwargs.items()})

    return wrapper


def read_cfg(calls: Calls) -> list[Callable[..., Any]]:
    """A post-CFG function that reads all that the host hands to one."""
    def function(arguments: dict[str, Any]) -> torch.Tensor:
        calls.append("cfg")
        assert {"denoised", "cond", "uncond", "cond_scale", "model", "uncond_denoised", "cond_denoised", "sigma",
                "model_options", "input"} <= set(arguments)
        return arguments["denoised"]

    return [function]


def copy_guider(guider: Any, calls: Calls) -> Any:
    calls.append("copied")
    return copy.copy(guider)


def in_double(solver: Any, calls: Calls) -> Any:
    """A solver that works and answers in float64."""
    if solver is None:
        return None
    inner = solver.sampler_function

    def sample_double(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: Any = None, callback: Any = None,
                      disable: Any = None, **options: Any) -> torch.Tensor:
        calls.append("double")
        return inner(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options).double()

    return comfy.samplers.KSAMPLER(sample_double, solver.extra_options, solver.inpaint_options)


def write_cfg(solver: Any, calls: Calls) -> Any:
    """A solver that writes to the guider that it samples with."""
    if solver is None:
        return None
    inner = solver.sampler_function

    def sample_writing(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append("written")
        guider = model.inner_model
        before, guider.cfg = guider.cfg, 1.0
        assert guider.cfg == 1.0, "the write went nowhere"
        guider.cfg = before
        return inner(model, x, sigmas, **options)

    return comfy.samplers.KSAMPLER(sample_writing, solver.extra_options, solver.inpaint_options)


def compile_network(model: Any, calls: Calls) -> Any:
    """torch.compile by the host's own helper; the backend leaves the graph as it is."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return graph.forward

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend=backend)
    return clone


STRANGERS = {
    "clones texts": wrapped(WrappersMP.CALC_COND_BATCH, clone_texts),
    "asks for pairs": with_option("sampler_calc_cond_batch_function", ask_pairs),
    "evaluates image by image": wrapped(WrappersMP.CALC_COND_BATCH, image_by_image),
    "batches tiles": with_option("model_function_wrapper", tile_by_tile),
    "calls chunk by chunk": with_option("model_function_wrapper", chunk_by_chunk),
    "indexes a pair": Stranger(model=index_pair),
    "fills the override's slot": Stranger(model=fill_slot),
    "copies options": wrapped(WrappersMP.APPLY_MODEL, copy_options),
    "reads CFG": with_option("sampler_post_cfg_function", read_cfg),
    "copies the guider": Stranger(guider=copy_guider),
    "solves in float64": Stranger(solver=in_double),
    "writes to the guider": Stranger(solver=write_cfg),
    "compiles": Stranger(model=compile_network),
}
