"""Trajectories as the other nodes use them: states at a sigma, the models they fit, and sampling from their end."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import tiny
import torch
from inversion_rig import OTHER, PROMPT, invert
from mixology.host.inversion import blend_prompts
from mixology.host.trajectory import Trajectory, start_trajectory
from mixology.samplers.levels import Level


@pytest.fixture(scope="module")
def found(model: Any) -> Trajectory:
    return invert(model, tiny.latent(1, 7, 10), 4)


# ------------------------------------------------------------------------------------------ start

def start_of(model: Any, trajectory: Trajectory, latent: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that a core sampler starts at under SamplerCustomAdvanced, and what comes out at once."""
    seen: list[torch.Tensor] = []

    def stay(model_k: Any, x: torch.Tensor, sigmas: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(x.clone())
        return model_k(x, sigmas[:1].expand(len(x)), **_["extra_args"])

    noise, sigmas, own = start_trajectory(trajectory)
    out, _ = custom.SamplerCustomAdvanced.execute(
        noise, tiny.cfg_guider(model, PROMPT, OTHER), comfy.samplers.KSAMPLER(stay), sigmas, latent or own)[:2]
    return seen[0], out["samples"]


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("scheduler", ["ddim_uniform", "normal"])
def test_sampling_starts_at_the_last_state(models: dict[str, Any], kind: str, scheduler: str) -> None:
    """`normal` starts at the model's first sigma, where the host scales the noise otherwise and flow drops the
    picture."""
    trajectory = invert(models[kind], tiny.latent(3, 5, 8), 4, scheduler)
    last = trajectory.states[-1]
    x, _ = start_of(models[kind], trajectory)
    torch.testing.assert_close(x, last, rtol=0, atol=1e-6 * float(last.abs().max()))
    noise, sigmas, latent = start_trajectory(trajectory)
    assert torch.equal(sigmas, tiny.sigmas_of(models[kind], scheduler, 4))
    drawn = noise.generate_noise(latent)
    assert drawn.shape == latent["samples"].shape and drawn.dtype == torch.float32 and noise.seed == 0


def test_a_noise_mask_keeps_the_picture(model: Any) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    latent = {**tiny.latent(), "noise_mask": mask, "batch_index": [5]}
    trajectory = invert(model, latent, 4)
    _, _, start = start_trajectory(trajectory)
    assert start["noise_mask"] is mask and start["batch_index"] == [5] and start is not trajectory.latent
    _, out = start_of(model, trajectory)
    torch.testing.assert_close(out[..., 4:], latent["samples"][..., 4:], rtol=0, atol=1e-6)
    assert not torch.allclose(out[..., :4], latent["samples"][..., :4], atol=1e-2)


def test_one_picture_for_a_batch_and_no_other_picture(model: Any, found: Trajectory) -> None:
    noise, _, latent = start_trajectory(found)
    three = noise.generate_noise({"samples": latent["samples"].repeat(3, 1, 1, 1)})
    assert three.shape[0] == 3 and torch.equal(three[2:], noise.generate_noise(latent))
    three.zero_()
    assert float(noise.generate_noise(latent).abs().max()) > 0
    with pytest.raises(ValueError, match="the trajectory's own picture as latent_image, got another latent; connect"):
        noise.generate_noise({"samples": torch.zeros_like(latent["samples"])})
    with pytest.raises(ValueError, match="of its size, 80x56 pixels, got 64x64 pixels; sample the latent of Start"):
        noise.generate_noise(tiny.latent())


# ------------------------------------------------------------------------------------------ states

def test_states_are_exact_at_recorded_sigmas_and_linear_between(found: Trajectory) -> None:
    like = torch.empty(1, 4, 7, 10)
    for sigma, state in zip(found.sigmas.tolist(), found.states):
        assert torch.equal(found.state_at(sigma, like), state)
    a, b = found.sigmas[1:3].tolist()
    for sigma, i, weight in ((a / 2, 0, 0.5), (a + 0.25 * (b - a), 1, 0.25)):
        expected = (1 - weight) * found.states[i] + weight * found.states[i + 1]
        torch.testing.assert_close(found.state_at(sigma, like), expected)


def test_states_take_the_form_of_what_they_go_beside(found: Trajectory) -> None:
    sigma = float(found.sigmas[2])
    many = found.state_at(sigma, torch.empty(3, 4, 7, 10, dtype=torch.float16))
    assert many.dtype == torch.float16 and many.shape == (3, 4, 7, 10)
    own, before = found.state_at(sigma, torch.empty(1, 4, 7, 10)), found.states[2].clone()
    own += 1
    assert torch.equal(found.states[2], before)


@pytest.mark.parametrize(("shape", "words"), [
    ((1, 4, 8, 8), "its size, 80x56 pixels, got 64x64 pixels; sample the latent of Start from Trajectory as it is"),
    ((1, 16, 7, 10), "expects latents of 4 channels like its own, got 16 channels; sample with a model of the same"),
    ((1, 4, 1, 7, 10), "expects latents of 4 channels like its own"),
])
def test_states_of_another_shape(found: Trajectory, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        found.state_at(0.0, torch.empty(shape))


def test_states_of_another_batch_and_beyond_the_end(model: Any, found: Trajectory) -> None:
    two = invert(model, tiny.latent(2), 2)
    assert two.state_at(0.0, torch.empty(2, 4, 8, 8)).shape[0] == 2
    with pytest.raises(ValueError, match="expects a batch of 2 like its own, got 3; sample the latent of Start from T"):
        two.state_at(0.0, torch.empty(3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"has no state at 99; sample with the sigmas of Start from Trajectory"):
        found.state_at(99.0, torch.empty(1, 4, 7, 10))


def test_models_that_fit(models: dict[str, Any], found: Trajectory) -> None:
    for model in (models["eps"], models["v"], tiny.unet("eps", seed=4)):
        found.check_model(model)
    with pytest.raises(ValueError, match="of its own kind, an eps or v model .*, got a flow model .*; eps and v"):
        found.check_model(models["flow"])
    with pytest.raises(ValueError, match="of the latent format SD15, got Wan21; use source and target models of one"):
        found.check_model(tiny.video())
    invert(models["flow"], tiny.latent(), 2).check_model(models["flow"])


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: {"sigmas": t.sigmas.flip(0)}, "reaches 0 at its end and repeats no sigma"),
    (lambda t: {"states": t.states[1:]}, r"one state for each of its 5 sigmas, of its picture's size, got \(4, 1, 4"),
    (lambda t: {"end": t.end[..., 1:]}, "one state for each of its 5 sigmas"),
    (lambda t: {"latent": tiny.latent()}, "one state for each of its 5 sigmas"),
    (lambda t: {"states": t.states / 0}, "expects finite states, got numbers beyond all bounds"),
    (lambda t: {"latent": {"samples": t.latent["samples"] / 0}}, "expects finite states, got numbers beyond all"),
    (lambda t: {"sigmas": t.sigmas * 1.1}, "sigmas and noise levels that belong together, got some that no eps, v or"),
    (lambda t: {"levels": (*t.levels[:-1], Level(1.0, 9.0))}, "sigmas and noise levels that belong together"),
    (lambda t: {"levels": tuple(Level(0.5, level.noise) for level in t.levels)}, "levels that belong together"),
    (lambda t: {"levels": (Level(1.0, 0.5), *t.levels[1:])}, "levels that belong together"),
    (lambda t: {"levels": tuple(Level(float("nan"), level.noise) for level in t.levels)}, "levels that belong togeth"),
    (lambda t: {"start": Level(0.0, t.start.noise)}, "sigmas and noise levels that belong together"),
    (lambda t: {"start": Level(1.0, 1e30)}, "sigmas and noise levels that belong together"),
    (lambda t: {"sigmas": t.sigmas * float("nan")}, "reaches 0 at its end and repeats no sigma"),
    *((lambda t, index=index: {"latent": {**t.latent, "batch_index": index}}, "a batch_index of one number .* 1 i")
      for index in ([0, 1], [], [-1], [2 ** 40], [0.5], "0")),
])
def test_trajectories_that_do_not_fit_together(found: Trajectory, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(found, **change(found))


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_every_scheduler_s_levels_belong_together(models: dict[str, Any], kind: str, scheduler: str) -> None:
    trajectory = invert(models[kind], tiny.latent(1, 4, 4), 3, scheduler)
    again = replace(trajectory, latent={**trajectory.latent, "batch_index": [7]})
    assert again.start == trajectory.start and again.latent["batch_index"] == [7]


def test_numbers_of_other_pictures_are_dropped(model: Any) -> None:
    """A batch_index that a node left behind; the inversion does not end for it after all its work."""
    for index in ([0, 1], [-3], "none"):
        assert "batch_index" not in invert(model, {**tiny.latent(), "batch_index": index}, 1).latent


# ------------------------------------------------------------------------------------------ prompts

def entry(seed: int, tokens: int = 77, **options: Any) -> list[Any]:
    pooled = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    return [tiny.conditioning(seed, tokens)[0][0], {"pooled_output": pooled, **options}]


def test_blend_keeps_the_positives_options_and_touches_nothing() -> None:
    positive = [entry(1, start_percent=0.2, attention_mask=torch.tensor([[1] * 70 + [0] * 7]))]
    negative = [entry(2, 154, end_percent=0.5)]
    (text, options), = blend_prompts(positive, negative, 2.0, 0.5)
    assert torch.equal(text, 2 * positive[0][0].repeat(1, 2, 1) - 0.5 * negative[0][0])
    pooled = [prompt[0][1]["pooled_output"] for prompt in (positive, negative)]
    assert torch.equal(options["pooled_output"], 2 * pooled[0] - 0.5 * pooled[1])
    assert options["start_percent"] == 0.2 and "end_percent" not in options
    assert options["attention_mask"].shape == (1, 154) and int(options["attention_mask"][0, 77:].sum()) == 70
    assert torch.equal(positive[0][0], entry(1)[0]) and torch.equal(pooled[0], entry(1)[1]["pooled_output"])
    assert positive[0][1]["attention_mask"].shape == (1, 77)


def test_blend_one_zero_is_the_positive_bit_for_bit() -> None:
    positive = [entry(1), entry(3, 154)]
    for (text, options), (own, own_options) in zip(blend_prompts(positive, [entry(2)], 1.0, 0.0), positive):
        assert torch.equal(text, own) and torch.equal(options["pooled_output"], own_options["pooled_output"])


def test_blend_of_several_entries() -> None:
    positive, negative = [entry(1), entry(3)], [entry(2), entry(4)]
    pairs = blend_prompts(positive, negative, 3.0, 1.0)
    assert [torch.equal(pairs[i][0], 3 * positive[i][0] - negative[i][0]) for i in range(2)] == [True, True]
    one = blend_prompts(positive, negative[:1], 3.0, 1.0)
    assert torch.equal(one[1][0], 3 * positive[1][0] - negative[0][0])
    for others in ([], [*negative, *negative]):
        with pytest.raises(ValueError, match=rf"entry or as many as the positive has, 2, got {len(others)}; blend"):
            blend_prompts(positive, others, 3.0, 1.0)


def test_blend_of_nothing_and_by_no_number() -> None:
    with pytest.raises(ValueError, match="positive expects a prompt, got an empty conditioning; connect"):
        blend_prompts([], [entry(2)], 2.0, 0.5)
    for alpha, beta, words in ((float("nan"), 0.5, "alpha expects a number, got nan"),
                               (2.0, float("inf"), "beta expects a number, got inf"),
                               (1e38, 0.0, "expects weights that keep .* lower alpha and beta")):
        with pytest.raises(ValueError, match=words):
            blend_prompts([[entry(1)[0] * 100, {}]], [entry(2)], alpha, beta)


def test_blend_without_pooled_vectors() -> None:
    bare, other = tiny.conditioning(1), [entry(2)]
    assert blend_prompts(bare, other, 2.0, 0.5)[0][1]["pooled_output"] is None
    pooled = blend_prompts(other, bare, 2.0, 0.5)[0][1]["pooled_output"]
    assert torch.equal(pooled, 2 * other[0][1]["pooled_output"])


def test_blend_runs_in_a_sampler(model: Any) -> None:
    """Halfway between two prompts, and repeated to the longer of unequal ones."""
    latent = tiny.latent()
    for negative in (OTHER, tiny.conditioning(2, 154)):
        middle = invert(model, latent, 3, prompt=blend_prompts(PROMPT, negative, 0.5, -0.5))
        assert not torch.allclose(middle.states[-1], invert(model, latent, 3).states[-1], atol=1e-4)
    long = [[PROMPT[0][0].repeat(1, 2, 1), {}]]
    once, twice = (invert(model, latent, 3, prompt=blend_prompts(text, OTHER, 2.0, 0.5)) for text in (PROMPT, long))
    torch.testing.assert_close(once.states, twice.states, rtol=0, atol=1e-4)
