"""Feature Injection on the families that people use now, against queries and keys exchanged by hand."""
from __future__ import annotations

import inspect
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_base import LongCatImage
from families import MODERN
from injection_rig import OneReading, invert, run, source_arguments
from mixology.host.injection import inject_features
from modern_rig import CROSS, KNOWN, ORDERS, distance, injecting_by_hand, read_tokens

pytestmark = pytest.mark.seam

TOLERANCE, TOLERANCES = 2e-5, {"krea2": 2e-3}
NAMES = [name for name in (*ORDERS, *CROSS) if not MODERN[name].is_missing()]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


def model_of(name: str, models: dict[str, Any]) -> Any:
    if name not in models:
        models[name] = KNOWN[name].model()
    return models[name]


def sample(model: Any, trajectory: Any, positive: Any, negative: Any, cfg: float = 3.0,
           sampler: Any = "euler") -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    with torch.inference_mode():
        return run(guider, trajectory, sampler, sigmas=trajectory.sigmas.flip(0)[:2])


def invert_on(name: str, model: Any, source: Any, batch: int = 1) -> Any:
    family = KNOWN[name]
    with torch.inference_mode():
        return invert(model, source, {"samples": family.latent(batch, *family.size)}, 3)


@pytest.mark.parametrize("name", NAMES)
def test_as_exchanged_by_hand(models: dict[str, Any], name: str) -> None:
    """Own states change nothing, to the bit; another prompt's do what they do by hand."""
    model, family = model_of(name, models), KNOWN[name]
    source, prompts = family.conditioning(3), (family.conditioning(1), family.conditioning(2))
    trajectory = invert_on(name, model, source)
    injecting = inject_features(model, trajectory, source, 1.0, 0.0)
    start = OneReading(trajectory.states[-1])
    own, untouched = (sample(patched, trajectory, source, source, 1.0, start) for patched in (injecting, model))
    assert torch.equal(own, untouched)
    ours, plain = (sample(patched, trajectory, *prompts) for patched in (injecting, model))
    by_hand = sample(injecting_by_hand(name, model, trajectory, source, read_tokens(name)), trajectory, *prompts)
    tolerance = TOLERANCES.get(name, TOLERANCE)
    assert distance(ours, by_hand) < tolerance
    assert distance(ours, plain) > 20 * tolerance


# --------------------------------------------------------------------------------------------------- positions

Norms = list[tuple[Any, str, int]]  # of one joint attention: a norm before positions, what it makes, picture's first


def list_norms(name: str, network: Any, first: int) -> list[Norms]:
    """Of the later half of the joint attentions; `first` is the picture's first token where text stands before it."""
    if name == "longcat":
        return [[(block.norm, "both", first)] for block in network.single_blocks]
    if name == "omnigen2":
        return [[(layer.attn.norm_q, "q", first), (layer.attn.norm_k, "k", first)] for layer in network.layers[1:]]
    parts = [layer.attention for layer in network.layers[2:]]
    return [[(part.q_norm, "q", first), (part.k_norm, "k", first)] for part in parts]


def exchange(name: str, network: Any, first: int, kept: dict[Any, Any], replace: bool) -> list[Any]:
    """Hooks that keep the picture's queries and keys before positions are put in, or lay the kept over a call's."""
    tokens = KNOWN[name].image_tokens(*KNOWN[name].size)
    axis = 2 if name == "longcat" else 1

    def swap(tensor: torch.Tensor, key: Any) -> torch.Tensor:
        span = (slice(None),) * axis + (slice(first, first + tokens),)
        if not replace:
            kept[key] = tensor[span].clone()
            return tensor
        tensor = tensor.clone()
        tensor[span] = kept[key].repeat(len(tensor), *[1] * (tensor.ndim - 1))
        return tensor

    def make(key: Any) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return tuple(swap(part, (key, index)) for index, part in enumerate(output))
            return swap(output, key)
        return hook

    return [module.register_forward_hook(make((block, what)))
            for block, norms in enumerate(list_norms(name, network, first)) for module, what, _ in norms]


@pytest.mark.parametrize("name", [name for name in ("longcat", "lumina2", "z_image", "omnigen2") if name in NAMES])
def test_a_source_text_of_another_length_stands_where_its_picture_is(
        models: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These place the picture behind the text: queries and keys are turned to where the target's picture stands."""
    model, family, length = model_of(name, models), KNOWN[name], 43
    source, prompts = family.conditioning(3, length), (family.conditioning(1), family.conditioning(2))
    trajectory = invert_on(name, model, source)
    network = model.model.diffusion_model

    def wrapper(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        x, sigma, kept = arguments["input"], arguments["timestep"], {}
        state, options = trajectory.state_at(float(sigma[0]), x[:1]), arguments["c"]["transformer_options"]
        own = {key: value for key, value in source_arguments(model.model, source, 1, state).items()
               if value is not None}
        for call, text, replace in ((lambda: apply_model(state, sigma[:1], **own, transformer_options=options), length,
                                     False),
                                    (lambda: apply_model(x, sigma, **arguments["c"]), family.tokens, True)):
            hooks = exchange(name, network, -(-text // 32) * 32 if name == "z_image" else text, kept, replace)
            try:
                result = call()
            finally:
                for hook in hooks:
                    hook.remove()
        return result

    by_hand = model.clone()
    by_hand.set_model_unet_function_wrapper(wrapper)
    injecting = inject_features(model, trajectory, source, 1.0, 0.0)
    with monkeypatch.context() as patched:
        # else norms and positions are one kernel
        patched.setattr(comfy.model_management, "in_training", True, raising=False)
        expected = sample(by_hand, trajectory, *prompts)
    assert distance(sample(injecting, trajectory, *prompts), expected) < TOLERANCE
    if name != "longcat" or "pe_len" in inspect.getsource(LongCatImage):  # the oldest host fixes it
        raw = sample(injecting_by_hand(name, model, trajectory, source, length), trajectory, *prompts)
        assert distance(raw, expected) > 20 * TOLERANCE, "positions make no difference"
