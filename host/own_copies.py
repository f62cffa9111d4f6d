"""What keeps state through a run and may not be shared by models that paint one picture.

Prompts get copies of their ControlNets and of hooks with keyframes; what cannot be copied is refused.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.hooks
import comfy.sampler_helpers
from comfy.patcher_extension import WrappersMP

from ..samplers.wording import legible
from .conds import keeps_state

CFG_FUNCTIONS = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")

Cond = dict[str, Any]
Copies = dict[int, Any]  # by id of the original, so that what was one thing stays one thing


def copy_cond(cond: Cond, copies: Copies) -> Cond:
    """A prompt whose ControlNets and hooks are its own; all else is shared."""
    own = dict(cond)
    if cond.get("control") is not None:
        own["control"] = copy_control(cond["control"], copies)
    if cond.get("hooks") is not None:
        own["hooks"] = copy_hooks(cond["hooks"], copies)
    return own


def copy_control(control: Any, copies: Copies) -> Any:
    """A ControlNet keeps state of the model that it ran with (a ControlLoRA, weights)."""
    if control is None:
        return None
    if id(control) not in copies:
        previous = copy_control(control.previous_controlnet, copies)
        own = copies[id(control)] = control.copy().set_previous_controlnet(previous)
        if control.extra_hooks is not None:
            own.extra_hooks = copy_hooks(control.extra_hooks, copies)
    return copies[id(control)]


def copy_hooks(hooks: Any, copies: Copies) -> Any:
    """Keyframes step once per noise level, for whoever asks first; the host's own clone shares them."""
    if id(hooks) not in copies:
        own = copies[id(hooks)] = hooks.clone()
        for hook in own.hooks:
            frames = hook.hook_keyframe
            if id(frames) not in copies:
                copies[id(frames)] = frames.clone()
            hook.hook_keyframe = copies[id(frames)]
    return copies[id(hooks)]


def enters_model(conds: list[Cond]) -> bool:
    """Whether something in a prompt wraps the whole run to put itself into the model, as a reference ControlNet."""
    hooks = comfy.sampler_helpers.get_hooks_from_cond(
        [{name: cond[name] for name in ("hooks", "control") if cond.get(name) is not None} for cond in conds],
        comfy.hooks.HookGroup())
    return any((hook.transformers_dict or {}).get("wrappers", {}).get(WrappersMP.OUTER_SAMPLE)
               for hook in hooks.get_type(comfy.hooks.EnumHookType.TransformerOptions))


def cfg_functions(model_options: dict[str, Any]) -> list[Any]:
    """Functions that nodes hang on CFG."""
    found = [model_options.get(name, []) for name in CFG_FUNCTIONS]
    return [function for own in found for function in (own if isinstance(own, list) else [own])]


def check_shared(experts: Sequence[Any]) -> None:
    """Raises ValueError where two experts share what keeps state and cannot be copied.

    That is a node on CFG that remembers earlier calls in itself (Adaptive Projected Guidance with momentum), and the
    model object that reference ControlNets put themselves into.
    """
    holders: dict[int, int] = {}
    for n, own in enumerate(experts):
        for function in filter(keeps_state, cfg_functions(own.model_options)):
            other = holders.setdefault(id(function), n)
            if other != n:
                name = legible(getattr(function, "__qualname__", "a function").split(".")[0])
                raise ValueError(
                    f"The Saliency Fusion Guider expects each expert's guidance nodes to be its own, got one ({name}) "
                    f"that keeps a running mean for experts {other} and {n}; put that node behind the model once for "
                    f"each expert.")
    entering = [n for n, own in enumerate(experts) if any(map(enters_model, own.original_conds.values()))]
    for n in entering:
        other = next(i for i in entering if experts[i].model_patcher.model is experts[n].model_patcher.model)
        if other != n:
            raise ValueError(
                f"The Saliency Fusion Guider expects at most one expert of a checkpoint with a ControlNet that puts "
                f"itself into the model (a reference), got experts {other} and {n}; load the checkpoint a second time "
                f"for one of them.")
