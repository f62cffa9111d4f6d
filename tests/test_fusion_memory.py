"""Loading and failure of fused experts: once per run, evicted and brought back, interrupted, freed at the end."""
from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import pytest
import tiny
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection
from fusion_rig import NEGATIVE, OTHER, POSITIVE, fuser, one_step, run, spec
from mixology.host.fusion import SaliencyGuider, show_maps

pytestmark = pytest.mark.seam

LATENT = tiny.latent(1, 12, 10)


def nudge(model: Any, seed: int) -> Any:
    """A clone with other weights in one layer, as a LoRA gives it."""
    key, clone = "diffusion_model.out.2.weight", model.clone()
    shape = model.model.state_dict()[key].shape
    clone.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3,)})
    return clone


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are asked for by `prepare_sampling`, in order."""
    asked: list[Any] = []
    original = comfy.sampler_helpers.prepare_sampling

    def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(model)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(comfy.sampler_helpers, "prepare_sampling", prepare)
    return asked


def test_checkpoints_are_loaded_once_a_run(model: Any, loads: list[Any]) -> None:
    experts, loaded = [one.clone() for one in (model, tiny.unet(seed=1), tiny.unet("v", seed=2))], []
    for i, expert in enumerate(experts):
        expert.add_callback(CallbacksMP.ON_LOAD, lambda *args, i=i: loaded.append(i))
    comfy.model_management.unload_all_models()
    guider = fuser([spec(experts[0]), spec(experts[1], OTHER), spec(experts[2])])
    run(guider, LATENT, tiny.sigmas_of(model, "simple", 5))
    assert loaded == [2, 1, 0] and loads == experts[::-1]
    run(guider, LATENT, tiny.sigmas_of(model, "simple", 5))
    assert loaded == [2, 1, 0] and loads == experts[::-1] * 2  # they stay until the host needs the room


def test_clones_change_places_once_a_step(model: Any, loads: list[Any]) -> None:
    first, second, sigmas = nudge(model, 1), nudge(model, 2), tiny.sigmas_of(model, "simple", 6)
    run(fuser([spec(first), spec(second, OTHER)]), LATENT, sigmas)
    assert loads == [second, first, second, first, second, first, second, first]  # two to open, then 1 a step
    loads.clear()
    run(fuser([spec(first), spec(second, OTHER)], window=(0.0, 0.5), outside=1), LATENT, sigmas)
    assert loads[2:] == [second, first, second]  # stays with the one outside
    loads.clear()
    run(fuser([spec(first), spec(first, OTHER), spec(first.clone(), POSITIVE, OTHER)]), LATENT, sigmas)
    assert len(loads) == 3  # one model, nothing to change


def test_what_the_host_moves_away_is_brought_back(model: Any, loads: list[Any]) -> None:
    """Low memory: everything is unloaded at every step, and between two experts."""
    first, second, sigmas = nudge(model, 1), nudge(tiny.unet(seed=1), 2), tiny.sigmas_of(model, "simple", 4)
    expected = run(fuser([spec(first), spec(second, OTHER)]), LATENT, sigmas)
    loads.clear()
    unload = comfy.model_management.unload_all_models
    evicted = run(fuser([spec(first), spec(second, OTHER)]), LATENT, sigmas, callback=lambda *args: unload())
    assert torch.equal(evicted, expected) and loads == [second, first] + [first, second] * 3
    crowded = first.clone()

    def evaluate(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        result = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        unload()
        return result

    crowded.set_model_unet_function_wrapper(evaluate)
    assert torch.equal(run(fuser([spec(crowded), spec(second, OTHER)]), LATENT, sigmas), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("error", [
    comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION, Stop])
def test_failure_in_the_middle_leaves_the_host_usable(model: Any, place: int, error: type[Exception]) -> None:
    """While an expert is evaluated, in the second step: every run that was opened is closed."""
    cleaned: list[int] = []
    pair = [nudge(model, 1), nudge(model, 2)]
    failing, calls = pair[place].clone(), []

    def evaluate(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
        calls.append(len(arguments["input"]))
        if len(calls) == 2:
            raise error("no memory" if error is comfy.model_management.OOM_EXCEPTION else "")
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    failing.set_model_unet_function_wrapper(evaluate)
    pair[place] = failing
    for i, expert in enumerate(pair):
        expert.add_callback(CallbacksMP.ON_CLEANUP, lambda *args, i=i: cleaned.append(i))
    sigmas = tiny.sigmas_of(model, "simple", 3)
    modes = [expert.hook_mode for expert in pair]
    guider = fuser([spec(pair[0]), spec(pair[1], OTHER)])
    with pytest.raises(error):
        run(guider, LATENT, sigmas)
    assert cleaned == [0, 1] and model.model.current_patcher is None
    assert guider.run is None and all(own.prediction is None and not own.run_options for own in guider.experts)
    assert [expert.hook_mode for expert in pair] == modes
    assert all(own.model_options is own.model_patcher.model_options for own in guider.experts)
    with pytest.raises(ValueError, match="got one without a finished run"):
        show_maps(guider, LATENT)
    again = run(guider, LATENT, sigmas)
    fresh = fuser([spec(nudge(tiny.unet(), 1)), spec(nudge(tiny.unet(), 2), OTHER)])
    torch.testing.assert_close(again, run(fresh, LATENT, sigmas), rtol=1e-4, atol=1e-4)
    assert torch.equal(guider.winners, fresh.winners)
    comfy.model_management.unload_all_models()
    base, clean = model.model.state_dict(), tiny.unet().model.state_dict()
    assert all(torch.equal(value, clean[key]) for key, value in base.items())


def test_interrupt_from_the_callback(model: Any) -> None:
    guider = fuser([spec(model), spec(tiny.unet(seed=1), OTHER)])
    sigmas = tiny.sigmas_of(model, "simple", 4)
    expected = run(guider, LATENT, sigmas)

    def interrupt(step: int, *rest: Any) -> None:
        if step == 1:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(guider, LATENT, sigmas, callback=interrupt)
    assert guider.winners is None and torch.equal(run(guider, LATENT, sigmas), expected)


def test_injections_are_in_place_for_their_own_expert_only(model: Any) -> None:
    """Some packs put things into the model while a patched clone of it is loaded."""
    def put(patcher: Any) -> None:
        patcher.model.guest = True

    def take(patcher: Any) -> None:
        del patcher.model.guest

    seen: list[tuple[int, bool]] = []

    def watch(clone: Any, index: int) -> Any:
        def evaluate(apply_model: Any, arguments: dict[str, Any]) -> torch.Tensor:
            seen.append((index, hasattr(model.model, "guest")))
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        clone.set_model_unet_function_wrapper(evaluate)
        return clone

    host = watch(model.clone(), 1)
    host.set_injections("guest", [PatcherInjection(inject=put, eject=take)])
    run(fuser([spec(watch(model.clone(), 0)), spec(host, OTHER)]), LATENT, tiny.sigmas_of(model, "simple", 3))
    assert sorted(set(seen)) == [(0, False), (1, True)]
    one_step(tiny.cfg_guider(model, POSITIVE, NEGATIVE), LATENT, 1.0)
    assert not hasattr(model.model, "guest")


def test_the_guider_of_one_run_serves_the_next(model: Any) -> None:
    """The host caches it: other sizes, schedules and samplers, one after the other, leave nothing behind."""
    guider, fresh = (fuser([spec(nudge(model, 1)), spec(nudge(model, 2), OTHER)]) for _ in range(2))
    assert isinstance(guider, SaliencyGuider)
    one_step(guider, tiny.latent(3, 8, 14), 5.0)
    run(guider, tiny.latent(1, 7, 9), tiny.sigmas_of(model, "karras", 3), "dpmpp_2m")
    sigmas = tiny.sigmas_of(model, "simple", 3)
    assert torch.equal(run(guider, LATENT, sigmas), run(fresh, LATENT, sigmas))
    assert torch.equal(guider.winners, fresh.winners)


def sample(guider: Any) -> None:
    run(guider, LATENT, tiny.sigmas_of(guider.model_patcher, "simple", 3))


def sample_a_copy(guider: Any) -> None:
    sample(copy.copy(guider))


def fail(guider: Any) -> None:
    def stop(*args: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        run(guider, LATENT, tiny.sigmas_of(guider.model_patcher, "simple", 3), callback=stop)


@pytest.mark.parametrize("use", [None, sample, sample_a_copy, fail])
def test_what_nobody_holds_is_freed_at_once(model: Any, use: Callable[[Any], None] | None) -> None:
    """A checkpoint's gigabytes do not wait for the garbage collector: guider and models are in no circle."""
    first, second = nudge(model, 1), nudge(tiny.unet(seed=1), 2)
    guider = fuser([spec(first), spec(second, OTHER), spec(second, POSITIVE, OTHER)])  # two in one call
    held = [weakref.ref(thing) for thing in (*guider.experts, first, second, second.model)]
    gc.collect()
    gc.disable()
    try:
        if use is not None:
            use(guider)
        comfy.model_management.unload_all_models()
        del guider, first, second
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()
