"""What models that paint one picture may not share, or had better not.

What keeps state through a run: prompts get copies of their ControlNets and of hooks with keyframes; what cannot be
copied is refused. And weights that are patched unlike, which the host would patch anew between two evaluations.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sampler_helpers
import torch
from comfy.patcher_extension import WrappersMP

from ..samplers.wording import legible
from .conds import keeps_state
from .protocols import Patcher

CFG_FUNCTIONS = ("sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function")
ROOM = 0.8  # of a device's memory, which two models may fill

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


def separate_weights(models: Sequence[Patcher]) -> list[Patcher]:
    """The models, of which each that shares weights with an earlier one, and patches them unlike, has its own.

    Where memory allows, and the host can load the checkpoint once more as it does for several cards; else the model
    stays as it is, and the host patches the weights anew between the two. Equal patches keep sharing.
    """
    found: list[Patcher] = []
    loaded: dict[Any, Patcher] = {}  # by the patches of what was loaded once more
    for n, model in enumerate(models):
        earlier = next((found[i] for i in range(n) if models[i] is model), None)
        if earlier is not None:
            found.append(earlier)
            continue
        unlike = any(other.is_clone(model) and other.patches_uuid != model.patches_uuid for other in found)
        key = id(model.model), model.patches_uuid
        if unlike and key in loaded:
            found.append(model.clone(model_override=loaded[key].get_clone_model_override()))
        elif unlike and can_load_again(model, len(loaded) + 1):
            loaded[key] = model.deepclone_multigpu()
            found.append(loaded[key])
        else:
            found.append(model)
    return found


def can_load_again(model: Patcher, times: int = 1) -> bool:
    """Whether the host knows how to load this checkpoint again, nothing hangs on its present weights, and memory holds
    so many more of them."""
    if not hasattr(model, "deepclone_multigpu") or model.cached_patcher_init is None or model.is_dynamic():
        return False
    if model.hook_patches or any(name.startswith("diffusion_model") for name in model.object_patches):
        return False
    size, device = model.model_size(), model.load_device
    if size > ROOM * comfy.model_management.get_free_memory(torch.device("cpu")):
        return False
    # of the other checkpoints in a fusion nothing is known here; the host makes room if need be
    return size * (times + 1) <= ROOM * comfy.model_management.get_total_memory(device)


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
