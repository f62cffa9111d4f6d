"""The Saliency Fusion Guider beside what people wire to its experts: LoRA, hooks, ControlNet, CFG nodes, our own."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.hooks
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_slg as slg
import nodes as core
import pytest
import tiny
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from company import (
    COMPANY,
    lora_weights,
    make_controlnet,
    with_controlnet,
    with_long_prompt,
    with_lora_hook,
    with_two_positives,
)
from fusion_rig import NEGATIVE, OTHER, POSITIVE, SEED, Spec, check_step, fuser, one_step, run, spec
from mixology.host import demo, own_copies
from mixology.host.attention_merge import merge_conditionings
from mixology.host.cycle import CycleSampler
from mixology.host.experts import ExpertGuider
from mixology.host.layout import LayoutMixSampler, Mix, make_layout
from mixology.host.token_scale import scale_tokens

pytestmark = pytest.mark.wide

CAPTIONS = ("a striped red star on a blue background", "a dotted green heart on a white background")


@pytest.fixture(scope="module")
def world(checkpoints: Any) -> dict[str, Any]:
    """The demo checkpoint, a copy of it in its own memory, two prompts and the empty one."""
    model, clip, _ = checkpoints("shapes")
    first, second, empty = (core.CLIPTextEncode().encode(clip, text)[0] for text in (*CAPTIONS, ""))
    return {"model": model, "copy": demo.load_checkpoint("shapes")[0], "clip": clip, "first": first,
            "second": second, "empty": empty}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("place", "company"), enumerate([*COMPANY, with_long_prompt]))
def test_company_acts_on_its_own_expert_only(world: dict[str, Any], company: Any, place: int) -> None:
    """As the printed fusion of plain runs, with the company in the plain runs of one expert."""
    place %= 2  # the first expert, the second, the first, ...
    latent = tiny.latent(1 + place, 16, 14)
    plain: list[Spec] = [(world["model"], world["first"], world["empty"], 4.0, 1.0),
                         (world["copy"], world["second"], world["empty"], 6.0, 2.0)]
    before = one_step(fuser(plain, 16.0), latent, 3.0)
    beside = list(plain)
    beside[place] = (*company(plain[place][:3]), *plain[place][3:])
    guider = check_step(beside, latent, 3.0)
    assert not torch.allclose(one_step(guider, latent, 3.0), before, atol=1e-3)
    assert torch.equal(one_step(fuser(plain, 16.0), latent, 3.0), before)


def test_company_on_one_shared_model(world: dict[str, Any]) -> None:
    """Recontextualisation: one model, two prompts, one of which has a ControlNet, a hook, or two texts."""
    model, empty, latent = world["model"], world["empty"], tiny.latent(1, 16, 14)
    for company in (with_lora_hook, with_controlnet, with_two_positives):
        parts = company((model, world["second"], empty))
        check_step([(model, world["first"], empty, 4.0, 1.0), (*parts, 5.0, 1.0)], latent, 3.0)


def test_controlnet_of_the_simple_node_reaches_its_own_negative(world: dict[str, Any]) -> None:
    picture, _ = demo.draw_picture(CAPTIONS[0], 0, 128, 128)
    simple = core.ControlNetApply().apply_controlnet(world["first"], make_controlnet(), picture, 0.5)[0]
    check_step([(world["copy"], world["second"], world["empty"], 4.0, 1.0),
                (world["model"], simple, world["empty"], 4.0, 1.0)], tiny.latent(1, 16, 14), 3.0)


def test_controlnet_in_several_experts(world: dict[str, Any]) -> None:
    """One prompt with two ControlNets in a row, for two checkpoints and twice for one: each model has its own state."""
    picture, _ = demo.draw_picture(CAPTIONS[0], 0, 128, 128)
    apply = core.ControlNetApplyAdvanced().apply_controlnet
    positive, negative = apply(world["first"], world["empty"], make_controlnet(1), picture, 0.5, 0.0, 1.0)
    positive, negative = apply(positive, negative, make_controlnet(2), picture, 0.4, 0.0, 1.0)
    patched = advanced.ModelSamplingDiscrete().patch(world["copy"], "v_prediction", False)[0]
    specs = [(world["model"], positive, negative, 4.0, 1.0), (patched, positive, negative, 5.0, 1.0)]
    guider = check_step(specs, tiny.latent(1, 16, 14), 3.0)
    states: list[Any] = []

    def look(*args: Any) -> None:
        for own in guider.experts:
            pair = [own.conds[name][0]["control"] for name in ("positive", "negative")]
            assert pair[0] is pair[1] and pair[0].previous_controlnet is not None
            states.append((pair[0].model_sampling_current, pair[0].previous_controlnet.model_sampling_current))

    run(guider, tiny.latent(1, 8, 8), torch.tensor([3.0, 0.0]), callback=look)
    assert [state[0] is own.get_model_object("model_sampling") for state, own in zip(
        states, (world["model"], patched))] == [True] * 2 and all(a is b for a, b in states)
    counted, calls = tiny.count_evaluations(patched)
    twice = fuser([*specs[:1], (counted, *specs[1][1:]), (counted, positive, negative, 6.0, 2.0)])
    one_step(twice, tiny.latent(1, 8, 8), 3.0)
    assert calls == [2]
    assert all((own.original_conds["positive"][0]["control"] is positive[0][1]["control"]) == (own is guider)
               for own in guider.experts)


def with_own_lora(model: Any, seed: int) -> Any:
    """Random LoRAs, another for each seed."""
    g = torch.Generator().manual_seed(seed)
    weights = {key: value if key.endswith("alpha") else torch.randn(value.shape, generator=g)
               for key, value in lora_weights().items()}
    return comfy.sd.load_lora_for_models(model, None, weights, 1.0, 1.0)[0]


def own_hook(prompt: Any, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    weights = {key: value if key.endswith("alpha") else torch.randn(value.shape, generator=g)
               for key, value in lora_weights().items()}
    return comfy.hooks.set_hooks_for_conditioning(prompt, comfy.hooks.create_hook_lora(weights, 1.0, 1.0))


def lora_pair(world: dict[str, Any], first: Any, second: Any) -> list[Spec]:
    return [(with_own_lora(first, 1), world["first"], world["empty"], 4.0, 1.0),
            (with_own_lora(second, 2), world["second"], world["empty"], 5.0, 1.0)]


def hook_pair(world: dict[str, Any], first: Any, second: Any) -> list[Spec]:
    return [(first, own_hook(world["first"], 1), world["empty"], 4.0, 1.0),
            (second, own_hook(world["second"], 2), world["empty"], 5.0, 1.0)]


def one_hook(world: dict[str, Any], first: Any, second: Any) -> list[Spec]:
    return [(first, world["first"], world["empty"], 4.0, 1.0),
            (second, own_hook(world["second"], 2), world["empty"], 5.0, 1.0)]


def sampling_pair(world: dict[str, Any], first: Any, second: Any) -> list[Spec]:
    """What a clone puts into the model instead of weights: here another parameterisation."""
    return [(first, world["first"], world["empty"], 4.0, 1.0),
            (advanced.ModelSamplingDiscrete().patch(second, "v_prediction", False)[0], world["second"],
             world["empty"], 5.0, 1.0)]


def cycle(world: dict[str, Any], latent: dict[str, Any]) -> Any:
    return CycleSampler(world["first"], 2.0, 0.3, 1, world["empty"])


def layout(world: dict[str, Any], latent: dict[str, Any]) -> Any:
    inner = comfy.samplers.sampler_object("dpmpp_2m")
    return LayoutMixSampler(inner, make_layout(latent, SEED, "shared"), Mix(0.5, 0.8, 0.3))


def solver(name: str) -> Callable[..., Any]:
    return lambda world, latent: comfy.samplers.sampler_object(name)


def test_clones_with_weights_of_their_own(world: dict[str, Any]) -> None:
    """Where memory allows; the test below has none."""
    latent, sigmas = tiny.latent(1, 8, 10), tiny.sigmas_of(world["model"], "normal", 4)
    apart, together = (fuser(lora_pair(world, world["model"], world[second])) for second in ("copy", "model"))
    euler = comfy.samplers.sampler_object("euler")
    close(run(together, latent, sigmas, euler), run(apart, latent, sigmas, euler), 2e-4)
    assert torch.equal(together.winners, apart.winners)


@pytest.mark.parametrize(("pair", "sampler", "window"), [
    (lora_pair, solver("heun"), (0.0, 1.0)), (lora_pair, solver("euler_ancestral_cfg_pp"), (0.3, 0.7)),
    (lora_pair, cycle, (0.3, 0.7)), (lora_pair, layout, (0.0, 1.0)), (hook_pair, solver("euler"), (0.0, 1.0)),
    (one_hook, cycle, (0.0, 1.0)), (sampling_pair, layout, (0.3, 0.7)),
])
def test_clones_of_one_checkpoint_never_see_each_other_s_weights(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, pair: Any, sampler: Any, window: tuple[float, float],
) -> None:
    """Against two checkpoints, loaded apart; and not so when the guider leaves the loading to the host."""
    latent, sigmas = tiny.latent(1, 8, 10), tiny.sigmas_of(world["model"], "normal", 4)
    options = {"window": window, "outside": 1}
    apart = fuser(pair(world, world["model"], world["copy"]), **options)
    expected = run(apart, latent, sigmas, sampler(world, latent))
    plain = tiny.cfg_guider(world["model"], world["first"], world["empty"])
    one_step(plain, latent, 1.0)
    before = {key: value.clone() for key, value in world["model"].model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(own_copies, "can_load_again", lambda *arguments: False)
        together = fuser(pair(world, world["model"], world["model"]), **options)
    close(run(together, latent, sigmas, sampler(world, latent)), expected, 2e-4)
    assert torch.equal(together.winners, apart.winners) and len(together.winners.unique()) == 2
    monkeypatch.setattr(ExpertGuider, "bring_weights", lambda self: None)
    left_out = run(together, latent, sigmas, sampler(world, latent))
    assert not torch.allclose(left_out, expected, atol=1e-2)
    monkeypatch.undo()
    one_step(plain, latent, 1.0)
    after = world["model"].model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def scaled(world: dict[str, Any]) -> Spec:
    model, prompt = scale_tokens(world["model"], world["clip"], CAPTIONS[0], "star = -2", 0.0, 1.0)
    return model, prompt, world["empty"], 4.0, 1.0


def merged(world: dict[str, Any]) -> Spec:
    masks = torch.zeros(2, 16, 14)
    masks[0, :, :7], masks[1, :, 7:] = 1, 1
    model, prompt = merge_conditionings(
        world["model"], masks, {"conditioning_0": world["first"], "conditioning_1": world["second"]})
    return model, prompt, world["empty"], 4.0, 1.0


@pytest.mark.parametrize("make", [scaled, merged])
def test_our_own_patches_act_on_their_expert(world: dict[str, Any], make: Any) -> None:
    latent = tiny.latent(2, 16, 14)
    patched = make(world)
    for other in ((world["copy"], world["second"], world["empty"], 5.0, 1.0),
                  (patched[0], world["second"], world["empty"], 5.0, 1.0)):  # one call: its rows are told apart
        guider = check_step([other, patched], latent, 3.0)
        without = fuser([other, (world["model"], world["first"], *patched[2:])], 16.0)
        assert not torch.allclose(one_step(guider, latent, 3.0), one_step(without, latent, 3.0), atol=1e-3)


CFG_NODES = [
    lambda m: advanced.RescaleCFG().patch(m, 0.7)[0],
    lambda m: pag.PerturbedAttentionGuidance.execute(m, 2.0).result[0],
    lambda m: slg.SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "0", "0", 0.0).result[0],
]


@pytest.mark.parametrize("patch", CFG_NODES)
def test_cfg_nodes_act_on_their_own_expert(models: dict[str, Any], patch: Any) -> None:
    other, latent = tiny.unet(seed=1), tiny.latent(2, 12, 10)
    for model in (patch(models["eps"]), patch(other.clone())):
        check_step([spec(models["v"], OTHER), spec(model, cfg=5.0)], latent, 2.0)
    check_step([spec(patch(models["eps"]), OTHER), spec(patch(models["eps"]), cfg=5.0)], latent, 2.0)


def test_functions_see_their_own_expert(model: Any) -> None:
    """Before and after CFG: its prompts, CFG, model and options, None for a negative that cfg 1 leaves out."""
    seen: list[tuple[Any, ...]] = []

    def before(arguments: dict[str, Any]) -> list[torch.Tensor]:
        seen.append((arguments["model"], arguments["cond_scale"], arguments["conds"][1] is None,
                     bool(arguments["conds_out"][1].any()), arguments["conds"][0][0]["cross_attn"]))
        return [arguments["conds_out"][0] + 1, arguments["conds_out"][1]]

    def replaced(arguments: dict[str, Any]) -> list[torch.Tensor]:
        seen.append((arguments["model"], len(arguments["conds"])))
        return comfy.samplers.calc_cond_batch(
            arguments["model"], arguments["conds"], arguments["input"], arguments["sigma"], arguments["model_options"])

    patched, second, latent = model.clone(), tiny.unet(seed=1), tiny.latent(1, 12, 10)
    patched.set_model_sampler_pre_cfg_function(before)
    second.set_model_sampler_calc_cond_batch_function(replaced)
    check_step([spec(second, cfg=2.0), spec(patched, OTHER, cfg=1.0)], latent, 2.0)
    inside = seen[-2:]
    assert inside[0] == (second.model, 2) and inside[1][:4] == (model.model, 1.0, True, False)
    assert inside[1][4] is OTHER[0][0]
    seen.clear()
    one_step(fuser([spec(second), spec(second, OTHER)]), latent, 2.0)  # a replaced evaluation wants pairs
    assert [entry[1] for entry in seen] == [2, 2]


KINDS = (WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE,
         WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL)
CALLS = (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_CLEANUP)


def listen(model: Any, heard: list[str]) -> Any:
    clone = model.clone()
    for kind in KINDS:
        def wrapper(executor: Any, *args: Any, kind: str = kind, **kwargs: Any) -> Any:
            heard.append(kind)
            return executor(*args, **kwargs)
        clone.add_wrapper(kind, wrapper)
    for call in CALLS:
        clone.add_callback(call, lambda *args, call=call: heard.append(call))
    return clone


def test_wrappers_and_callbacks_of_every_expert_run_as_in_plain_sampling(model: Any) -> None:
    latent, sigmas = tiny.latent(1, 12, 10), tiny.sigmas_of(model, "simple", 3)
    plain, first, second = [], [], []
    expected = run(tiny.cfg_guider(listen(model, plain), POSITIVE, NEGATIVE), latent, sigmas)
    pair = [listen(model, first), listen(tiny.unet(seed=1), second)]
    guider = fuser([spec(pair[0]), spec(pair[1], OTHER)])
    assert not torch.equal(run(guider, latent, sigmas), expected)
    assert first == plain == second and set(plain) == {*KINDS, *CALLS}


def test_wrapped_predictions_are_fused(model: Any) -> None:
    """What wraps an expert's prediction changes it alone, also where the wrapper skips the evaluation."""
    second, latent, sigmas = tiny.unet(seed=1), tiny.latent(1, 12, 10), tiny.sigmas_of(model, "simple", 6)

    def shift(executor: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return executor(*args, **kwargs) + 0.25

    shifted = [one.clone() for one in (model, second)]
    for one in shifted:
        one.add_wrapper(WrappersMP.PREDICT_NOISE, shift)
    for place in (0, 1):
        specs = [spec(model), spec(second, OTHER)]
        plain = one_step(fuser(specs), latent, 2.0)
        specs[place] = (shifted[place], *specs[place][1:])
        guider = fuser(specs)
        moved = (one_step(guider, latent, 2.0) - plain) * model.model.latent_format.scale_factor
        close(moved, 0.25 * (guider.winners[0] == place).float().unsqueeze(1).expand_as(moved))
    lazy = easycache.LazyCacheNode.execute(second, 10.0, 0.15, 0.95, False).result[0]
    counted, calls = tiny.count_evaluations(lazy)
    assert run(fuser([spec(model), spec(counted, OTHER)]), latent, sigmas).isfinite().all()
    assert 0 < len(calls) < len(sigmas) - 1

    def answer(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x

    silent = second.clone()
    silent.add_wrapper(WrappersMP.PREDICT_NOISE, answer)
    with pytest.raises(ValueError, match="experts whose prompts are evaluated, got one whose model was patched to ans"):
        one_step(fuser([spec(model), spec(silent, OTHER)]), latent, 2.0)
    ended = second.clone()
    ended.add_wrapper(WrappersMP.OUTER_SAMPLE, answer)
    with pytest.raises(ValueError, match="expects experts that run, got one whose model was patched to end its run"):
        one_step(fuser([spec(model), spec(ended, OTHER)]), latent, 2.0)
