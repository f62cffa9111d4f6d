"""The Saliency Fusion Guider beside nodes that keep state, sit in attention, copy guiders, or enter models."""
from __future__ import annotations

import copy
import gc
import math
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import comfy.context_windows
import comfy.hooks
import comfy.latent_formats
import comfy.patcher_extension
import comfy.samplers
import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_nag as nag
import nodes as core
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from company import lora_weights, make_controlnet
from fusion_rig import NEGATIVE, OTHER, POSITIVE, chain, check_step, fuser, one_step, run, spec
from mixology.host import demo, own_copies
from mixology.host.fusion import SaliencyGuider, show_maps

CAPTIONS = ("a striped red star on a blue background", "a dotted green heart on a white background")
MOMENTUM = "momentum_state"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.unet()


@pytest.fixture(scope="module")
def world(checkpoints: Any) -> dict[str, Any]:
    """The demo checkpoint, a copy of it in its own memory, two prompts and the empty one."""
    model, clip, _ = checkpoints("shapes")
    first, second, empty = (core.CLIPTextEncode().encode(clip, text)[0] for text in (*CAPTIONS, ""))
    return {"model": model, "copy": demo.load_checkpoint("shapes")[0], "first": first, "second": second,
            "empty": empty}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def with_momentum(model: Any, lengths: list[int]) -> Any:
    """Momentum guidance: a running mean that lives in transformer_options through a run."""
    def guide(arguments: dict[str, Any]) -> list[torch.Tensor]:
        options, (cond, uncond) = arguments["model_options"]["transformer_options"], arguments["conds_out"]
        count, mean = options.get(MOMENTUM, (0, 0.0))
        options[MOMENTUM] = count + 1, 0.5 * mean + (cond - uncond)
        lengths.append(count + 1)
        return [uncond + options[MOMENTUM][1], uncond]

    clone = model.clone()
    clone.set_model_sampler_pre_cfg_function(guide)
    return clone


def test_state_in_transformer_options_stays_with_each_expert(model: Any) -> None:
    latent, sigmas = tiny.latent(1, 12, 10), tiny.sigmas_of(model, "simple", 4)
    lengths: list[int] = []
    patched = with_momentum(model, lengths)
    plain = run(tiny.cfg_guider(patched, POSITIVE, NEGATIVE), latent, sigmas)
    assert lengths == [1, 2, 3, 4]
    assert not torch.allclose(plain, run(tiny.cfg_guider(model, POSITIVE, NEGATIVE), latent, sigmas), atol=1e-2)
    alone = fuser([spec(tiny.unet(seed=1), OTHER), spec(patched)], window=(0.0, 0.0), outside=1)
    assert torch.equal(run(alone, latent, sigmas), plain)
    for other in (with_momentum(tiny.unet(), lengths), patched):  # two checkpoints, and mates on one model
        lengths.clear()
        equal = fuser([spec(patched), spec(other, temperature=4.0)])
        for _ in range(2):
            assert torch.equal(run(equal, latent, sigmas), plain)
        assert lengths == [1, 1, 2, 2, 3, 3, 4, 4] * 2 and MOMENTUM not in repr(patched.model_options)


def scheduled(seed: int) -> Any:
    """A LoRA hook that comes in halfway."""
    g = torch.Generator().manual_seed(seed)
    weights = {key: value if key.endswith("alpha") else torch.randn(value.shape, generator=g)
               for key, value in lora_weights().items()}
    hooks, frames = comfy.hooks.create_hook_lora(weights, 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(0.0, 0.0))
    frames.add(comfy.hooks.HookKeyframe(1.0, 0.4))
    hooks.set_keyframes_on_hooks(frames)
    return hooks


def controlled(prompt: Any, empty: Any, hooks: Any) -> tuple[Any, Any]:
    """A ControlNet that brings hooks of its own."""
    network = make_controlnet()
    network.extra_hooks = hooks
    picture, _ = demo.draw_picture(CAPTIONS[0], 0, 128, 128)
    return core.ControlNetApplyAdvanced().apply_controlnet(prompt, empty, network, picture, 0.5, 0.0, 1.0)


@pytest.mark.parametrize("by_control", [False, True])
def test_hooks_with_keyframes_step_for_every_expert(
    world: dict[str, Any], monkeypatch: pytest.MonkeyPatch, by_control: bool,
) -> None:
    """One prompt for two experts, against a prompt with hooks of its own for each."""
    latent, sigmas = tiny.latent(1, 8, 10), tiny.sigmas_of(world["model"], "normal", 4)

    def hooked() -> tuple[Any, Any]:
        if by_control:
            return controlled(world["first"], world["empty"], scheduled(1))
        return comfy.hooks.set_hooks_for_conditioning(world["first"], scheduled(1)), world["empty"]

    shared, other = hooked(), hooked()
    apart = fuser([(world["model"], *shared, 4.0, 1.0), (world["copy"], *other, 5.0, 2.0)])
    expected = run(apart, latent, sigmas)
    specs = [(world["model"], *shared, 4.0, 1.0), (world["copy"], *shared, 5.0, 2.0)]
    for _ in range(2):
        assert torch.equal(run(fuser(specs), latent, sigmas), expected)
    monkeypatch.setattr(own_copies, "copy_hooks", lambda hooks, copies: hooks)
    assert not torch.allclose(run(fuser(specs), latent, sigmas), expected, atol=1e-3)


def entering_controlnet(entered: list[int]) -> Any:
    """Puts itself into the model's modules for a run and takes itself out, as a reference ControlNet does."""
    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        network = executor.class_obj.model_patcher.model.diffusion_model
        network.guest = entered
        entered.append(id(network))
        try:
            return executor(*args, **kwargs)
        finally:
            del network.guest

    wrappers: dict[str, Any] = {}
    comfy.patcher_extension.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "guest", around, wrappers)
    control, control_hooks = make_controlnet(), comfy.hooks.HookGroup()
    control_hooks.add(comfy.hooks.TransformerOptionsHook(wrappers))
    control.extra_hooks = control_hooks
    return control


def test_reference_controlnets(world: dict[str, Any]) -> None:
    picture, _ = demo.draw_picture(CAPTIONS[0], 0, 128, 128)
    entered: list[int] = []
    pair = core.ControlNetApplyAdvanced().apply_controlnet(
        world["first"], world["empty"], entering_controlnet(entered), picture, 0.5, 0.0, 1.0)
    latent, free = tiny.latent(1, 8, 8), (world["second"], world["empty"])
    for specs, runs in (([(world["model"], *pair), (world["copy"], *pair)], 2),
                        ([(world["model"], *pair), (world["model"], *free)], 1),
                        ([(world["model"], *free), (world["model"], *pair)], 1)):
        entered.clear()
        guider = fuser([(*one, 4.0, 1.0 + place) for place, one in enumerate(specs)])
        assert one_step(guider, latent, 3.0).isfinite().all() and len(set(entered)) == len(entered) == runs
    guider = fuser([(world["model"], *pair, 4.0, 1.0), (world["copy"], *free, 4.0, 1.0),
                    (world["model"].clone(), *pair, 4.0, 2.0)])
    with pytest.raises(ValueError, match=r"one expert of a checkpoint with a ControlNet that puts itself into the "
                                         r"model \(a reference\), got experts 0 and 2; load the checkpoint a sec"):
        one_step(guider, latent, 3.0)
    assert not hasattr(world["model"].model.diffusion_model, "guest") and guider.run is None


@pytest.fixture
def usual_depth() -> Iterator[None]:
    """Python's own limit of calls inside calls; compilers raise it for the rest of a process."""
    raised = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(raised)


def test_as_many_experts_as_python_can_nest(model: Any, usual_depth: None) -> None:
    many = [spec(model, cfg=1.0 + place / 100) for place in range(120)]
    latent, sigmas = tiny.latent(1, 4, 4), torch.tensor([2.0, 0.0])
    with pytest.raises(ValueError, match="expects fewer experts, got so many that their runs, one inside the other, e"):
        run(fuser(many), latent, sigmas)
    assert run(fuser(many[:32]), latent, sigmas).isfinite().all()
    wrapped = [(listening(model, 6), *one[1:]) for one in many[:32]]
    with pytest.raises(ValueError, match="or nodes that wrap the runs of their models"):
        run(fuser(wrapped), latent, sigmas)


def listening(model: Any, count: int) -> Any:
    clone = model.clone()
    for _ in range(count):
        clone.add_wrapper(WrappersMP.OUTER_SAMPLE, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    return clone


def in_format(model: Any, latent_format: Any) -> Any:
    clone = model.clone()
    clone.add_object_patch("latent_format", latent_format)
    return clone


def test_latent_formats_are_compared_by_what_they_do_to_latents(model: Any) -> None:
    """Flux2's holds a function for previews that is another in each object."""
    first, second = comfy.latent_formats.Flux2(), comfy.latent_formats.Flux2()
    assert first.latent_rgb_factors_reshape != second.latent_rgb_factors_reshape
    assert len(chain([spec(in_format(model, one)) for one in (first, second)])) == 2
    scaled = comfy.latent_formats.SD15(scale_factor=0.5)
    with pytest.raises(ValueError, match="^The experts expect one latent format, got SD15 with 4 channels of expert 0"):
        chain([spec(model), spec(in_format(model, scaled))])


def test_kinds_of_noise_are_named(models: dict[str, Any]) -> None:
    for pair, names in ((("eps", "flow"), "diffusion from sigma 14.6146 of expert 0 and flow from sigma 1 of expert 1"),
                        (("flow", "v"), "flow from sigma 1 of expert 0 and diffusion from sigma 14.6146 of expert 1")):
        with pytest.raises(ValueError, match=f"got {names}; use models of one kind, such as two flow models of one "):
            chain([spec(models[kind]) for kind in pair])


def pair_patch(seen: list[Any]) -> Any:
    """Indexes a pair by `cond_or_uncond`, as image prompt adapters do."""
    def patch(out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        indices = options["cond_or_uncond"]
        seen.append((tuple(indices), tuple(getattr(indices, "true", indices))))
        factors = torch.tensor([(1.5, 0.25)[index] for index in indices]).repeat_interleave(len(out) // len(indices))
        return out * factors.reshape(-1, 1, 1)
    return patch


def test_attention_patches_act_on_every_expert_of_a_model(model: Any) -> None:
    seen: list[Any] = []
    counted, calls = tiny.count_evaluations(model)
    patched, latent = counted.clone(), tiny.latent(1, 12, 10)
    patched.set_model_attn2_output_patch(pair_patch(seen))
    specs = [spec(patched), spec(patched, OTHER), spec(patched, tiny.conditioning(4), tiny.conditioning(6), 5.0)]
    check_step(specs, latent, 2.0)
    assert calls[-1] == 5 and set(zip(*seen[-1])) == {(0, 0), (1, 1), (0, 2), (0, 3), (1, 4)}
    calls.clear()
    guided = nag.NAGuidance.execute(counted, 5.0, 0.5, 1.5).result[0]  # the first positive of a call only: pairs
    guider = check_step([spec(guided), spec(guided, OTHER, cfg=5.0)], latent, 2.0)
    assert calls[-2:] == [2, 2]
    assert not torch.equal(one_step(guider, latent, 2.0), one_step(fuser([spec(model), spec(model, OTHER, cfg=5.0)],
                                                                         16.0), latent, 2.0))


CACHES = [
    lambda m: easycache.EasyCacheNode.execute(m, 3.0, 0.2, 0.95, False).result[0],
    lambda m: easycache.LazyCacheNode.execute(m, 3.0, 0.2, 0.95, False).result[0],
    lambda m: apg.APG.execute(m, 0.5, 2.0, 0.3).result[0],
]


@pytest.mark.parametrize("patch", CACHES)
def test_nodes_that_remember_do_so_for_each_expert(model: Any, patch: Any) -> None:
    """Two loaded copies of one checkpoint, each with the node: as a plain run with it."""
    latent, sigmas = tiny.latent(1, 16, 16), tiny.sigmas_of(model, "simple", 8)
    pair = [patch(model), patch(tiny.unet())]
    plain = run(tiny.cfg_guider(pair[0], POSITIVE, NEGATIVE), latent, sigmas)
    guider = fuser([spec(one, temperature=1.0 + 3.0 * place) for place, one in enumerate(pair)])
    for _ in range(2):
        assert torch.equal(run(guider, latent, sigmas), plain)
    assert not torch.allclose(plain, run(tiny.cfg_guider(model, POSITIVE, NEGATIVE), latent, sigmas), atol=1e-2)


def test_a_running_mean_that_two_experts_would_share(model: Any) -> None:
    patched, latent = apg.APG.execute(model, 0.5, 2.0, 0.3).result[0], tiny.latent(1, 12, 10)
    with pytest.raises(ValueError, match=r"guidance nodes to be its own, got one \(APG\) that keeps a running mean for "
                                         "experts 0 and 1; put that node behind the model once for each expert"):
        one_step(fuser([spec(patched), spec(patched, OTHER)]), latent, 2.0)
    apart = [spec(patched), spec(apg.APG.execute(model, 0.5, 2.0, 0.3).result[0], OTHER)]
    assert one_step(fuser(apart), latent, 2.0).isfinite().all()
    without = apg.APG.execute(model, 0.5, 2.0, 0.0).result[0]
    check_step([spec(without), spec(without, OTHER)], latent, 2.0)


def test_context_windows_of_the_core() -> None:
    texts = [tiny.conditioning(seed, 8) for seed in range(3)]
    latent = {"samples": torch.randn(1, 16, 6, 6, 8, generator=torch.Generator().manual_seed(3))}
    models = [tiny.video(), tiny.video(seed=1)]
    specs = [spec(models[0], texts[0], texts[2]), spec(models[1], texts[1], texts[2], temperature=2.0)]
    plain = one_step(fuser(specs, 22.0), latent, 0.6)
    for place, one in enumerate(models):
        patched = one.clone()
        patched.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
            context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
            fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
            context_length=3, context_overlap=1, context_stride=1, closed_loop=False, dim=2)
        specs[place] = (patched, *specs[place][1:])
    assert not torch.allclose(one_step(check_step(specs, latent, 0.6, blur=22.0), latent, 0.6), plain, atol=1e-4)


def test_copies_of_a_guider(model: Any) -> None:
    """Nodes of other packs copy a guider and give the copy prompts, a model or options of its own."""
    latent, sigmas, third = tiny.latent(1, 12, 10), tiny.sigmas_of(model, "simple", 3), tiny.conditioning(4)
    specs = [spec(model), spec(model, OTHER, cfg=5.0), spec(tiny.unet(seed=1), third)]
    guider = fuser(specs)
    expected, twin = run(guider, latent, sigmas), copy.copy(guider)
    assert isinstance(twin, SaliencyGuider) and twin.experts[0] is twin
    assert torch.equal(run(twin, latent, sigmas), expected) and torch.equal(twin.winners, guider.winners)
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"] * 0.5)
    twin.model_patcher, twin.model_options = patched, patched.model_options
    twin.set_conds(third, NEGATIVE)
    result = run(twin, latent, sigmas)
    close(result, run(fuser([spec(patched, third), *specs[1:]]), latent, sigmas), 1e-5)
    assert torch.equal(run(guider, latent, sigmas), expected)
    assert torch.equal(show_maps(guider, {"samples": result})[1], show_maps(twin, {"samples": result})[1])
    optioned = copy.copy(guider)
    optioned.model_options = {**guider.model_options, "sampler_post_cfg_function": [
        lambda arguments: arguments["denoised"] * 0.5]}
    close(run(optioned, latent, sigmas), run(fuser([spec(patched), *specs[1:]]), latent, sigmas), 1e-5)
    assert torch.equal(run(guider, latent, sigmas), expected)


def test_nothing_refers_to_itself(model: Any) -> None:
    """A guider that is let go frees its models at once, also after a run that failed."""
    other = tiny.unet(seed=1)
    guider = fuser([spec(model), spec(other, OTHER), spec(other, POSITIVE, OTHER)])
    run(guider, tiny.latent(1, 12, 10), tiny.sigmas_of(model, "simple", 2))
    parts = [weakref.ref(own) for own in guider.experts]
    gc.collect()
    gc.disable()
    try:
        del guider
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()


def test_nodes_that_draw_from_the_global_generator(model: Any) -> None:
    """The draws of equal experts are those of a plain run, in its order."""
    drawn: list[float] = []

    def draw(out: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        drawn.append(float(torch.rand(1)))
        return out * (0.5 + drawn[-1])

    patched, latent, sigmas = model.clone(), tiny.latent(), tiny.sigmas_of(model, "simple", 3)
    patched.set_model_attn1_output_patch(draw)
    plain = run(tiny.cfg_guider(patched, POSITIVE, NEGATIVE), latent, sigmas)
    expected = drawn[:]
    drawn.clear()
    assert torch.equal(run(fuser([spec(patched), spec(patched)]), latent, sigmas), plain) and drawn == expected
    drawn.clear()
    run(fuser([spec(patched), spec(tiny.unet(seed=1), OTHER)]), latent, sigmas)
    assert drawn == expected  # the other expert draws nothing


def test_flipped_sigmas(model: Any) -> None:
    """As the core's Flip Sigmas leaves them; equal checkpoints unsample as a plain run does."""
    sigmas, latent = tiny.sigmas_of(model, "simple", 4).flip(0), tiny.latent(1, 12, 10)
    sigmas[0] = 1e-4
    guider = fuser([spec(model), spec(tiny.unet(), temperature=4.0)])
    assert torch.equal(run(guider, latent, sigmas), run(tiny.cfg_guider(model, POSITIVE, NEGATIVE), latent, sigmas))


BAD = [
    (lambda m: chain([spec(m, cfg=math.nan)]), "^cfg expects a number such as 7.5, got nan; correct it.$"),
    (lambda m: chain([spec(m, temperature=math.nan)]), "^temperature expects 0 or more .*, got nan; raise it.$"),
    (lambda m: chain([spec(m, temperature=math.inf)]), "^temperature expects 0 or more .*, got inf; lower it.$"),
    (lambda m: fuser([spec(m)] * 2, blur=math.nan), "^blur expects 0 .*, got nan"),
    (lambda m: fuser([spec(m)] * 2, blur=1e12), r"^blur expects at most 64, got 1e\+12; lower it.$"),
    (lambda m: fuser([spec(m)] * 2, softness=math.nan), "^softness expects 0 .*, got nan"),
    (lambda m: fuser([spec(m)] * 2, softness=math.inf), "^softness expects a finite number, got inf"),
    (lambda m: fuser([spec(m)] * 2, window=(math.nan, 1.0)), "start_percent at or below end_percent, .* got nan and 1"),
    (lambda m: fuser([spec(m)] * 2, window=(0.0, math.nan)), "start_percent at or below end_percent, .* got 0 and nan"),
    (lambda m: fuser([spec(m)] * 2, uncond="neither"), "^saliency_uncond expects own or first, got neither; pick one"),
    (lambda m: run(fuser([spec(m)] * 2), tiny.latent(), torch.tensor([2.0, math.nan, 0.0])),
     "^The Saliency Fusion Guider expects sigmas that are numbers from 0 up, got some that are negative or no numbers"),
]


@pytest.mark.parametrize(("act", "text"), BAD)
def test_numbers_that_are_none(model: Any, act: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text) as caught:
        act(model)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
