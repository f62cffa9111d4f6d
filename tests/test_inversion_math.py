"""The inversion's arithmetic against the printed one, closed forms and orders of convergence, in float64."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixology.samplers.inversion import RULES, blend_embeddings, reading_index, rescale, sample_inversion
from mixology.samplers.levels import Level, solve_noise
from mixology.samplers.trajectory import check_grid, check_levels, find_span
from toy import ALPHAS, SIGMAS, ddim_runner, ddim_timesteps, eps_of, guided_eps, noise

SHAPE = (1, 4, 8, 8)
TIMESTEPS = ddim_timesteps(50)[::-1]
X0 = 0.7 * noise(SHAPE, 3)
PROMPT = 1.5
MEAN, SPREAD = 0.4, 0.6  # of the analytic data


def vp_levels(sigmas: list[float]) -> list[Level]:
    return [Level(1.0, sigma) for sigma in sigmas]


def flow_levels(sigmas: list[float]) -> list[Level]:
    return [Level(1.0 - sigma, sigma) for sigma in sigmas]


def states_of(predict: Callable[[torch.Tensor, int], torch.Tensor], x: torch.Tensor, sigmas: list[float],
              levels: list[Level], rule: str) -> list[torch.Tensor]:
    states = [x]
    end = sample_inversion(predict, x, sigmas, levels, rule, lambda i, denoised, state: states.append(state))
    assert torch.equal(end, states[-1]) and len(states) == len(sigmas)
    return states


def toy_states(first: float, x: torch.Tensor, rule: str) -> list[torch.Tensor]:
    """The toy network on the SD1.x grid after a first sigma of one's own."""
    sigmas, times = [first, *(float(SIGMAS[t]) for t in TIMESTEPS)], [0, *TIMESTEPS]
    return states_of(lambda y, i: y - sigmas[i] * guided_eps(y, times[i], PROMPT, 1.0), x, sigmas, vp_levels(sigmas),
                     rule)


def test_ditail_vector() -> None:
    """The authors start at t = 0 and not at sigma 0; their y is sqrt(1 + s^2) times their latent."""
    end = toy_states(float(SIGMAS[0]), X0 / ALPHAS[0].sqrt(), "ditail")[-1]
    assert float(end.sum()) == pytest.approx(1524.867972, abs=1e-6)
    assert end.flatten()[:2].tolist() == pytest.approx([6.751112011, 0.338595520], abs=1e-9)
    back = [*TIMESTEPS[::-1], 0]
    again = ddim_runner(back, [float(SIGMAS[t]) for t in back], PROMPT, 1.0)(end, 0, 50) * ALPHAS[0].sqrt()
    assert float((again - X0).square().mean().sqrt()) == pytest.approx(0.0303, abs=5e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", [0.0, float(SIGMAS[0])])
def test_every_state_is_the_printed_ones(rule: str, start: float) -> None:
    """In VP variables: `ditail` hands the network the lower latent as it is and the upper time step; `euler` the lower
    time step, at the very first the lowest there is."""
    alphas = [1 / (1 + start ** 2), *(float(ALPHAS[t]) for t in TIMESTEPS)]
    z, printed = X0, [X0]
    for i, t in enumerate(TIMESTEPS):
        eps = eps_of(z, t if rule == "ditail" else TIMESTEPS[max(i - 1, 0)], PROMPT)
        now, after = alphas[i], alphas[i + 1]
        z = math.sqrt(after / now) * (z - math.sqrt(1 - now) * eps) + math.sqrt(1 - after) * eps
        printed.append(z)
    for y, z, alpha in zip(toy_states(start, X0 / math.sqrt(alphas[0]), rule), printed, alphas):
        torch.testing.assert_close(y * math.sqrt(alpha), z, rtol=0, atol=1e-12)


def test_rules_agree_on_the_first_step_only() -> None:
    ours = {rule: toy_states(0.0, X0, rule) for rule in RULES}
    assert torch.equal(ours["ditail"][1], ours["euler"][1])
    assert not torch.allclose(ours["ditail"][2], ours["euler"][2], atol=1e-6)
    assert [reading_index(i, "ditail") for i in range(3)] == [1, 2, 3]
    assert [reading_index(i, "euler") for i in range(3)] == [1, 1, 2]


# ------------------------------------------------------------------------------------------ analytic model

def gaussian(kind: str, sigmas: list[float]) -> tuple[Callable[[torch.Tensor, int], torch.Tensor], list[Level]]:
    """Exact clean estimates of data ~ N(MEAN, SPREAD^2)."""
    levels = flow_levels(sigmas) if kind == "flow" else vp_levels(sigmas)

    def predict(x: torch.Tensor, i: int) -> torch.Tensor:
        signal, n = levels[i].signal, levels[i].noise
        gain = signal * SPREAD ** 2 / (signal ** 2 * SPREAD ** 2 + n ** 2)
        return MEAN + gain * (x - signal * MEAN)

    return predict, levels


def grid(kind: str, steps: int) -> list[float]:
    end = 1.0 if kind == "flow" else 10.0
    return [end * (i / steps) ** (1 if kind == "flow" else 2) for i in range(steps + 1)]


def exact_end(level: Level) -> torch.Tensor:
    spread = math.sqrt(level.signal ** 2 * SPREAD ** 2 + level.noise ** 2)
    return level.signal * MEAN + (X0 - MEAN) * spread / SPREAD


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_first_order_convergence_of_the_way_there_and_of_the_round_trip(kind: str, rule: str) -> None:
    there, back = [], []
    for steps in (100, 200, 400):
        sigmas = grid(kind, steps)
        predict, levels = gaussian(kind, sigmas)
        x = states_of(predict, X0, sigmas, levels, rule)[-1]
        there.append(float((x - exact_end(levels[-1])).abs().max()))
        for i in range(steps, 0, -1):  # the host's euler
            x = x + (sigmas[i - 1] - sigmas[i]) * (x - predict(x, i)) / sigmas[i]
        back.append(float((x - X0).abs().max()))
    for errors in (there, back):
        assert errors[0] > 1e-5
        for coarse, fine in zip(errors, errors[1:]):
            assert 1.8 < coarse / fine < 2.2


def test_exact_slopes_are_followed_exactly() -> None:
    """A network whose noise does not depend on where it is read is inverted without error, at any size of step."""
    n, sigmas = noise(SHAPE, 5), [0.0, 0.7, 3.0]
    for rule in RULES:
        states = states_of(lambda y, i: y - sigmas[i] * n, X0, sigmas, vp_levels(sigmas), rule)
        for state, sigma in zip(states, sigmas):
            torch.testing.assert_close(state, X0 + sigma * n, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.99, 1.0])
def test_rescaling_is_the_unchanged_latent_of_a_variance_preserving_path(sigma: float) -> None:
    """Also for a flow model seen as one: its state over hypot(1 - s, s)."""
    now, end = Level(1 - sigma, sigma), Level(0.25, 0.75)
    assert rescale(now, end) * math.hypot(1 - sigma, sigma) == pytest.approx(math.hypot(0.25, 0.75), rel=1e-14)
    assert rescale(Level(1, sigma), Level(1, 2.0)) == pytest.approx(math.sqrt(5 / (1 + sigma ** 2)), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_and_dtype_are_kept(dtype: torch.dtype) -> None:
    x, sigmas = torch.randn(3, 4, 5, 7, dtype=dtype, generator=torch.Generator().manual_seed(0)), [0.0, 0.5, 2.0]
    before = x.clone()
    predict, levels = gaussian("vp", sigmas)
    for rule in RULES:
        together = states_of(predict, x, sigmas, levels, rule)
        assert together[-1].dtype == dtype and torch.equal(x, before)
        assert torch.equal(states_of(predict, x[1:2], sigmas, levels, rule)[-1], together[-1][1:2])


# ------------------------------------------------------------------------------------------ small parts

def test_span_is_exact_at_recorded_sigmas_and_linear_between() -> None:
    sigmas = [0.0, 0.5, 2.0]
    assert [find_span(sigmas, sigma) for sigma in sigmas] == [(0, 0.0), (1, 0.0), (2, 0.0)]
    assert find_span(sigmas, 2.0 * (1 + 5e-6)) == (2, 0.0) and find_span(sigmas, 0.5 * (1 - 5e-6)) == (1, 0.0)
    assert find_span(sigmas, 1.25) == (1, 0.5) and find_span(sigmas, 0.125) == (0, 0.25)


@pytest.mark.parametrize("sigma", [-0.1, 2.1, math.nan, math.inf])
def test_span_outside(sigma: float) -> None:
    with pytest.raises(ValueError, match="reaches from sigma 0 to 2 and has no state at .*; sample with the sigmas of"):
        find_span([0.0, 0.5, 2.0], sigma)


@pytest.mark.parametrize("level", [Level(1.0, 14.6), Level(1.0, 0.03), Level(0.0, 1.0), Level(0.2, 0.8)])
def test_noise_is_solved_for_the_state(level: Level) -> None:
    state, picture = noise(SHAPE, 5).float() * 5, X0.float()
    n = solve_noise(state, picture, level)
    assert n.dtype == torch.float32
    torch.testing.assert_close(n.double() * level.noise + level.signal * picture, state.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigmas", [[0.0], [0.1, 1.0], [0.0, 0.0, 1.0], [0.0, 2.0, 1.0], [0.0, math.nan],
                                    [0.0, math.inf], []])
def test_grids_that_cannot_be_climbed(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match=r"reaches 0 at its end and repeats no sigma, got \d sigma\(s\) down to"):
        check_grid(sigmas)
    check_grid([0.0, 1.0])


def test_levels_without_noise() -> None:
    with pytest.raises(ValueError, match="samples from noise, got one that starts from a picture; use a text to image"):
        check_levels([Level(1, 0), Level(1, 1), Level(1, 0)])
    check_levels([Level(1, 0), Level(0, 1)])


# ------------------------------------------------------------------------------------------ prompts

def text(seed: int, tokens: int, batch: int = 1, channels: int = 6) -> torch.Tensor:
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attend(query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, context, context)


def test_blend_is_the_weighted_difference() -> None:
    pos, neg = text(1, 77), text(2, 77)
    assert torch.equal(blend_embeddings(pos, neg, 2.0, 0.5), 2 * pos - 0.5 * neg)
    torch.testing.assert_close(blend_embeddings(pos, neg, 0.5, -0.5), torch.lerp(pos, neg, 0.5))
    assert torch.equal(blend_embeddings(pos, neg, 1.0, 0.0), pos)
    assert torch.equal(blend_embeddings(pos, text(2, 154), 1.0, 0.0), pos)
    assert torch.equal(blend_embeddings(pos, pos, 1.0, 1.0), torch.zeros_like(pos))
    assert torch.equal(blend_embeddings(pos, None, 3.0, 0.5), 3 * pos)
    assert torch.equal(blend_embeddings(text(1, 77, 3), neg, 1.0, 1.0), text(1, 77, 3) - neg)


@pytest.mark.parametrize(("lengths", "total"), [((77, 154), 154), ((154, 77), 154), ((154, 231), 462)])
def test_unequal_lengths_are_repeated(lengths: tuple[int, int], total: int) -> None:
    """What attention makes of either text alone stays; zeros in place of repeats would change it."""
    pos, neg = text(1, lengths[0]), text(2, lengths[1])
    blend = blend_embeddings(pos, neg, 1.0, 0.5)
    assert blend.shape[1] == total
    for i in (0, 76, 77, total - 1):
        if i < total:
            torch.testing.assert_close(blend[:, i], pos[:, i % lengths[0]] - 0.5 * neg[:, i % lengths[1]])
    query = text(3, 9)
    near = blend_embeddings(pos, neg, 1.0, 1e-12)
    torch.testing.assert_close(attend(query, near), attend(query, pos), rtol=0, atol=1e-10)
    padded = torch.cat([pos, torch.zeros(1, total, 6, dtype=torch.float64)], 1)
    assert not torch.allclose(attend(query, padded), attend(query, pos), atol=1e-3)


@pytest.mark.parametrize(("positive", "negative", "words"), [
    (text(1, 77), text(2, 77, channels=8), "both prompts from one text encoder, got embeddings of 6 and 8 channels"),
    (text(1, 77), text(2, 77)[0], "both prompts from one text encoder"),
    (text(1, 77, 3), text(2, 77, 2), "one for each of the batch of 3, got 2; encode one negative"),
    (text(1, 255), text(2, 256), "token counts fit into each other, got 255 and 256; word both about equally"),
])
def test_prompts_that_do_not_blend(positive: Any, negative: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        blend_embeddings(positive, negative, 2.0, 0.5)
