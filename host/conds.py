"""Lists of conditionings as a guider with several prompts hands them to the host, and what other nodes see of them."""
from __future__ import annotations

import dis
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from .marks import Conds, ShownIndices, chunk_rows, list_rows

KEY = "mixology_pairs"
REPLACED = "sampler_calc_cond_batch_function"  # of a node that evaluates in the host's place
# What a guider prepares for its own conds only: loaded networks and patched weights.
UNPREPARED = {"control": "a ControlNet", "hooks": "hooks", "gligen": "GLIGEN", "additional_models": "extra models"}


def is_active(conds: Conds, sigma: torch.Tensor) -> bool:
    """Whether any cond covers this sigma. A style that is out of its time leaves its place to the others."""
    return any(
        ("timestep_start" not in cond or bool(sigma[0] <= cond["timestep_start"]))
        and ("timestep_end" not in cond or bool(sigma[0] >= cond["timestep_end"]))
        for cond in conds)


def check_sigmas(sigmas: torch.Tensor, node: str) -> None:
    """Raises ValueError on noise levels that are no numbers, or negative. Rising ones are fine (Flip Sigmas)."""
    if not bool((sigmas.isfinite() & (sigmas >= 0)).all()):
        raise ValueError(
            f"{node} expects sigmas that are numbers from 0 up, got some that are negative or no numbers (NaN or "
            f"infinite); look at the node that made them, or connect a scheduler.")


def evaluate(
    model: Any, conds: Sequence[Conds | None], x: torch.Tensor, timestep: torch.Tensor, *, options: dict[str, Any],
) -> list[torch.Tensor]:
    """Denoised of each list, as the host's sampling_function asks for them: of a node that evaluates in its place, if
    there is one. Such nodes expect two lists, cond and uncond."""
    if REPLACED in options:
        return options[REPLACED]({
            "conds": list(conds), "input": x, "sigma": timestep, "model": model, "model_options": options})
    return comfy.samplers.calc_cond_batch(model, list(conds), x, timestep, model_options=options)


def run_pre_cfg(
    model: Any, conds: Sequence[Conds | None], predictions: Sequence[torch.Tensor], cfg: float, *, x: torch.Tensor,
    timestep: torch.Tensor, options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions of cond and uncond as functions of other nodes make them, as in the host's sampling_function.

    Args:
        conds: cond and uncond, the latter None where CFG asks for none; predictions: their denoised.
    """
    shown = list(predictions)
    for function in options.get("sampler_pre_cfg_function", []):
        shown = function({
            "conds": list(conds), "conds_out": shown, "cond_scale": cfg, "timestep": timestep, "input": x,
            "sigma": timestep, "model": model, "model_options": options})
    return shown[0], shown[1]


def wants_pairs(options: dict[str, Any]) -> bool:
    """Whether a node acts on one positive and one negative at a time and would leave out all further ones: one that
    evaluates in the host's place, or an attention patch that works on the first positive row only."""
    return REPLACED in options or any(map(takes_first_positive, attention_patches(options)))


def attention_patches(options: dict[str, Any]) -> list[Any]:
    """Functions that nodes put into a model's layers."""
    inner = options.get("transformer_options", {})
    patches = [patch for listed in inner.get("patches", {}).values() for patch in listed]
    return patches + [patch for places in inner.get("patches_replace", {}).values() for patch in places.values()]


def code_of(function: Any) -> Any:
    """The code of a function, a method or an object that can be called; None of others."""
    function = getattr(function, "__func__", getattr(function, "func", function))  # of a method, of a partial
    called = function if hasattr(function, "__code__") or not callable(function) else type(function).__call__
    return getattr(called, "__code__", None)


def takes_first_positive(patch: Any) -> bool:
    """Whether a patch says `cond_or_uncond.index(0)`, as Normalized Attention Guidance does and its likes."""
    code = code_of(patch)
    if code is None or "cond_or_uncond" not in code.co_consts or "index" not in code.co_names:
        return False
    return any(first.argval == "index" and second.opname.startswith("LOAD") and second.argval == 0
               for first, second in pairwise(dis.get_instructions(code)))


def keeps_state(function: Any) -> bool:
    """Whether a function writes to the variables around it, as nodes do that remember earlier calls.

    One that does so for the sake of a `momentum` of 0 (Adaptive Projected Guidance) remembers nothing.
    """
    code = code_of(function)
    if code is None or not code.co_freevars:
        return False
    written = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
    cells = dict(zip(code.co_freevars, getattr(function, "__closure__", None) or ()))
    kept = written & set(code.co_freevars)
    return bool(kept) and ("momentum" not in cells or bool(cells["momentum"].cell_contents))


@contextmanager
def shown_as_pairs(
    options: dict[str, Any], conds: Sequence[Conds | None], negative: Sequence[bool],
) -> Iterator[dict[str, Any]]:
    """Show attention patches of other nodes 0 for a positive row and 1 for a negative one, as in a run of one prompt.

    Many read `cond_or_uncond` so and know no other index. The true indices stay beside them. The
    wrapper is put into the run's own options, where nodes keep their state, and taken out again. Calls with rows of
    other lists, which a node may make in between, stay as they are.

    Args:
        conds: the lists of the call; negative: of each, whether it is one.
    """
    if list(negative) == [False, True]:
        yield options
        return
    shown = {row: int(negative[row[0]]) for row, _ in list_rows(conds)}

    def show(executor: Callable[..., Any], x: torch.Tensor, t: torch.Tensor, c_concat: Any = None,
             c_crossattn: Any = None, control: Any = None, transformer_options: dict[str, Any] | None = None,
             **kwargs: Any) -> Any:
        given = transformer_options or {}
        rows = chunk_rows(given)
        if rows and all(row in shown for row in rows):
            indices = ShownIndices((shown[row] for row in rows), true=[index for index, _ in rows])
            given = {**given, "cond_or_uncond": indices}
        return executor(x, t, c_concat, c_crossattn, control, given, **kwargs)

    wrappers = options.setdefault("transformer_options", {}).setdefault("wrappers", {})
    placed = wrappers.setdefault(WrappersMP.APPLY_MODEL, {})
    placed[KEY] = [show]  # the last key: inside all others
    try:
        yield options
    finally:
        placed.pop(KEY, None)
