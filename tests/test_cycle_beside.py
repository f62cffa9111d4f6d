"""The Cycle Sampler beside nodes that remember, cache, draw or split, guiders that are copied, and partial prompts."""
from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import comfy_extras.nodes_context_windows as windows
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from cycle_rig import NEGATIVE, SOURCE, TARGET, cycle, grid, printed_cycle, run, two_runs
from memory_rig import MEMORIES, answer_in_float64, draw_from_all, draw_from_own, remember_in_network, tile
from mixology.host.spatial import EpsilonMergeGuider
from test_cycle_host import guiders

# ------------------------------------------------------------------------------------------ nodes that remember

@pytest.mark.parametrize("memory", [*MEMORIES, remember_in_network], ids=lambda node: node.__name__)
def test_each_reading_has_its_own_memory(model: Any, memory: Any) -> None:
    """As two sampling runs, each with a node of its own; what is drawn alike for both cancels."""
    latent, sigmas, source_cfg = tiny.latent(2), grid(model), 2.0
    expected = two_runs(tiny.cfg_guider(memory(model), SOURCE, NEGATIVE, source_cfg),
                        tiny.cfg_guider(memory(model), TARGET, NEGATIVE, 4.0), latent, sigmas, 0.3)
    plain = run(tiny.cfg_guider(model, TARGET, NEGATIVE, 4.0), cycle(source_cfg, 0.3), latent, sigmas)
    result = run(tiny.cfg_guider(memory(model), TARGET, NEGATIVE, 4.0), cycle(source_cfg, 0.3), latent, sigmas)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert torch.allclose(result, plain, atol=1e-3) == (memory is draw_from_own)


@pytest.mark.parametrize("memory", [*MEMORIES, remember_in_network, draw_from_all], ids=lambda node: node.__name__)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_same_prompts_return_the_picture_beside_them(model: Any, memory: Any, eta: float) -> None:
    latent, guider = tiny.latent(), tiny.cfg_guider(memory(model), SOURCE, NEGATIVE, 4.0)
    for _ in range(2):
        result = run(guider, cycle(4.0, eta), latent, grid(model))
        torch.testing.assert_close(result, latent["samples"], rtol=0, atol=1e-6)


def test_records_and_counts_of_both_readings_are_complete(model: Any) -> None:
    calls, seen, by_sigma, kinds = 0, [], {}, set()

    def note(args: dict[str, Any]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        seen.append(float(args["sigma"][0]))
        by_sigma[len(by_sigma), float(args["sigma"][0])] = args["denoised"]
        kinds.add((args["cond_scale"], float(args["sigma"][0])))
        return args["denoised"]

    patched, sigmas = model.clone(), grid(model)
    patched.set_model_sampler_post_cfg_function(note)
    run(tiny.cfg_guider(patched, TARGET, NEGATIVE, 4.0), cycle(2.0), tiny.latent(), sigmas)
    falling = sigmas[:-1].tolist()
    assert calls == 2 * len(falling) and sorted(seen) == sorted(falling * 2) and len(kinds) == 2 * len(falling)
    assert seen == falling * 2  # the source's first
    run(tiny.cfg_guider(patched, TARGET, NEGATIVE, 4.0), cycle(2.0), tiny.latent(), sigmas)
    assert calls == 4 * len(falling) and seen == falling * 4


def test_both_readings_show_progress_and_can_be_stopped(model: Any) -> None:
    told: list[tuple[int, int]] = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: told.append((value, total)))
    try:
        run(tiny.cfg_guider(model, TARGET, NEGATIVE), cycle(), tiny.latent(), grid(model))
        assert told[0] == (1, 7) and told[-1] == (7, 7)
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(tiny.cfg_guider(model, TARGET, NEGATIVE), cycle(), tiny.latent(), grid(model))
    finally:
        comfy.model_management.interrupt_current_processing(False)
        comfy.utils.set_progress_bar_global_hook(None)


# ------------------------------------------------------------------------------------------ guiders

def merge(model: Any) -> EpsilonMergeGuider:
    masks = torch.zeros(1, 8, 8)
    masks[..., :4] = 1
    return EpsilonMergeGuider(model, masks, {"style_0": TARGET, "style_1": SOURCE}, NEGATIVE, 4.0)


def test_copied_guiders_restyle_alike(model: Any) -> None:
    """A copy made before, during and after a run of the original."""
    latent, sigmas = tiny.latent(1, 4, 4), grid(model, 4)
    for guider in (*guiders(model, TARGET, 4.0), merge(model)):
        copies = [copy.copy(guider)]

        def copy_now(*_: Any, guider: Any = guider, copies: list[Any] = copies) -> None:
            copies.append(copy.copy(guider))

        expected = run(guider, cycle(2.0, 0.3), latent, sigmas, callback=copy_now)
        copies.append(copy.copy(guider))
        for other in (copies[0], copies[1], copies[-1]):
            assert torch.equal(run(other, cycle(2.0, 0.3), latent, sigmas), expected)


def test_readings_are_made_by_guiders_of_the_host(model: Any) -> None:
    """What stands around predictions finds the real guider and one for the source, both to be copied and written to."""
    found: list[Any] = []

    def watch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        own = executor.class_obj
        found.append(own)
        twin = copy.copy(own)
        assert type(own) is comfy.samplers.CFGGuider and twin.conds is own.conds and twin.inner_model is model.model
        return executor(*args, **kwargs)

    patched, latent, sigmas = model.clone(), tiny.latent(), grid(model)
    patched.add_wrapper(WrappersMP.PREDICT_NOISE, watch)
    guider = tiny.cfg_guider(patched, TARGET, NEGATIVE, 4.0)
    run(guider, cycle(2.0), latent, sigmas)
    assert [own is guider for own in found] == [False] * 7 + [True] * 7 and len(set(map(id, found))) == 2

    def weaken(step: int, *_: Any) -> None:
        if step == 2:
            guider.cfg = 1.0

    changed = run(guider, cycle(2.0), latent, sigmas, callback=weaken)
    assert guider.cfg == 1.0
    full, off = (run(tiny.cfg_guider(model, TARGET, NEGATIVE, cfg), cycle(2.0), latent, sigmas) for cfg in (4.0, 1.0))
    assert not torch.allclose(changed, full, atol=1e-3) and not torch.allclose(changed, off, atol=1e-3)


# ------------------------------------------------------------------------------------------ around the model

def test_answers_in_float64_leave_the_state_s_type(model: Any) -> None:
    latent, sigmas, seen = tiny.latent(), grid(model), []
    plain = run(tiny.cfg_guider(model, TARGET, NEGATIVE), cycle(2.0, 0.3), latent, sigmas)
    result = run(tiny.cfg_guider(answer_in_float64(model), TARGET, NEGATIVE), cycle(2.0, 0.3), latent, sigmas,
                 callback=lambda i, denoised, x, n: seen.append((denoised.dtype, x.dtype)))
    assert set(seen) == {(torch.float32, torch.float32)} and torch.equal(result, plain)


def test_a_model_that_is_read_in_tiles(model: Any) -> None:
    latent, sigmas, tiled = tiny.latent(2, 8, 16), grid(model), tile(model)
    expected = printed_cycle(tiled, lambda: tiny.cfg_guider(tiled, TARGET, NEGATIVE, 4.0),
                             lambda: tiny.cfg_guider(tiled, SOURCE, NEGATIVE, 2.0), latent, sigmas, 0.3)
    result = run(tiny.cfg_guider(tiled, TARGET, NEGATIVE, 4.0), cycle(2.0, 0.3), latent, sigmas)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    whole = run(tiny.cfg_guider(model, TARGET, NEGATIVE, 4.0), cycle(2.0, 0.3), latent, sigmas)
    assert not torch.allclose(result, whole, atol=1e-3)


def window_frames(model: Any) -> Any:
    return windows.ContextWindowsManualNode.execute(
        model, 2, 1, "standard_static", 1, False, "pyramid", 2, False).result[0]


def test_a_video_that_is_read_in_windows() -> None:
    model, generator = tiny.video(), torch.Generator().manual_seed(3)
    source, target, negative = (tiny.conditioning(seed, 8) for seed in (1, 2, 3))
    latent = {"samples": torch.randn(1, 16, 5, 4, 4, generator=generator)}
    windowed, sigmas = window_frames(model), tiny.sigmas_of(model, "simple", 4)[1:]
    expected = printed_cycle(windowed, lambda: tiny.cfg_guider(windowed, target, negative, 4.0),
                             lambda: tiny.cfg_guider(windowed, source, negative, 2.0), latent, sigmas, 0.3)
    sampler = cycle(2.0, 0.3, source=source, negative=negative)
    result = run(tiny.cfg_guider(windowed, target, negative, 4.0), sampler, latent, sigmas)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    whole = run(tiny.cfg_guider(model, target, negative, 4.0), sampler, latent, sigmas)
    assert not torch.allclose(result, whole, atol=1e-4)


# ------------------------------------------------------------------------------------------ prompts with gaps

def limit(prompt: Any, **options: Any) -> Any:
    return [[text, {**own, **options}] for text, own in prompt]


HALF = torch.zeros(1, 64, 64)
HALF[..., :32] = 1
EARLY, LATE = {"start_percent": 0.0, "end_percent": 0.5}, {"start_percent": 0.5, "end_percent": 1.0}


@pytest.mark.parametrize(("prompt", "words"), [
    (limit(SOURCE, **EARLY), "a time range that leaves part of it out at sigma 1.277"),
    (limit(SOURCE, **LATE), "a time range that leaves part of it out at sigma 6.678"),
    ([*limit(SOURCE, **EARLY), *limit(TARGET, start_percent=0.7, end_percent=1.0)], "a time range that leaves part"),
    (limit(SOURCE, area=(4, 8, 0, 0)), "an area that leaves"),
    (limit(SOURCE, area=("percentage", 0.5, 1.0, 0.5, 0.0), strength=1.0), "an area and a strength that leaves"),
    (limit(SOURCE, mask=HALF), "a mask that leaves"),
    (limit(SOURCE, mask=HALF * float("nan")), "a mask that leaves"),
    (limit(SOURCE, mask=torch.ones(1, 64, 64), mask_strength=0.0), "a mask that leaves"),
    (limit(SOURCE, strength=0.0), "a strength that leaves part of it out"),
    ([*limit(SOURCE, mask=HALF), *limit(TARGET, **LATE)], "a mask and a time range that leaves"),
])
def test_prompts_with_gaps_are_refused_before_anything_is_read(model: Any, prompt: Any, words: str) -> None:
    counted, calls = tiny.count_evaluations(model)
    text = f"prompt of the Cycle Sampler expects to say something of the whole picture at every step, got {words}"
    for name, sampler in (("source", cycle(1.0, source=prompt)), ("negative", cycle(2.0, negative=prompt))):
        with pytest.raises(ValueError, match=f"The {name} {text}"):
            run(tiny.cfg_guider(counted, TARGET, NEGATIVE), sampler, tiny.latent(), grid(model))
    assert calls == []
    run(tiny.cfg_guider(counted, TARGET, NEGATIVE), cycle(1.0, negative=prompt), tiny.latent(), grid(model))  # not read


@pytest.mark.parametrize("prompt", [
    [*limit(SOURCE, **EARLY), *limit(TARGET, **LATE)],
    [*limit(SOURCE, mask=HALF), *limit(TARGET, mask=1 - HALF)],
    [*limit(SOURCE, area=(4, 8, 0, 0)), *limit(TARGET, area=(4, 8, 4, 0))],
    [*limit(TARGET, mask=HALF), *SOURCE],
    limit(SOURCE, strength=0.3), limit(SOURCE, start_percent=0.0, end_percent=1.0),
], ids=["time", "masks", "areas", "one whole", "weak", "all the time"])
def test_prompts_that_cover_the_picture_together_are_read(model: Any, prompt: Any) -> None:
    latent, sigmas = tiny.latent(), grid(model)
    expected = printed_cycle(model, lambda: tiny.cfg_guider(model, TARGET, NEGATIVE, 4.0),
                             lambda: tiny.cfg_guider(model, prompt, NEGATIVE, 2.0), latent, sigmas, 0.3)
    result = run(tiny.cfg_guider(model, TARGET, NEGATIVE, 4.0), cycle(2.0, 0.3, source=prompt), latent, sigmas)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
