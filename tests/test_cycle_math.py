"""CycleDiffusion's arithmetic against the printed encoder and decoder, and closed forms, in float64."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixology.samplers.cycle import (
    ancestral_step,
    check_levels,
    check_settings,
    correct_denoised,
    sample_cycle,
    take_step,
)
from mixology.samplers.levels import Level
from toy import ALPHAS, SIGMAS, ddim_timesteps, guided_eps, noise

SHAPE = (1, 4, 8, 8)
TIMESTEPS = ddim_timesteps(50)[10:]
X0, START = 0.7 * noise(SHAPE, 3), noise(SHAPE, 5)
GRID = [float(SIGMAS[t]) for t in TIMESTEPS]
Reader = Callable[[torch.Tensor, int], torch.Tensor]


def ve(sigmas: list[float]) -> list[Level]:
    return [Level(1.0, sigma) for sigma in sigmas]


def toy_reader(c: float, cfg: float) -> Reader:
    return lambda y, i: y - GRID[i] * guided_eps(y, TIMESTEPS[i], c, cfg)


def cycle(target: Reader, source: Reader, sigmas: list[float], eta: float, x0: torch.Tensor = X0,
          n: torch.Tensor = START, **options: Any) -> torch.Tensor:
    options = {"draw": lambda i: noise(tuple(x0.shape), 20 + i), "report": lambda *_: None, **options}
    return sample_cycle(target, source, x0 + sigmas[0] * n, x0, ve(sigmas), eta, **options)


def encode_and_decode(eta: float, source: tuple[float, float], target: tuple[float, float], official_end: bool,
                      ) -> list[torch.Tensor]:
    """The paper as printed, in its VP variables: first every z', then the target's DDIM steps with them.

    The grid ends at t = 0. With `official_end` x0 itself is that state, as in the authors' code; without it the state
    is drawn like all others. Returns the target's states, the start left out.
    """
    alphas = [ALPHAS[t] for t in TIMESTEPS] + [ALPHAS[0]]
    steps = range(len(TIMESTEPS))

    def predict(x: torch.Tensor, i: int, prompt: tuple[float, float]) -> torch.Tensor:
        return guided_eps(x / alphas[i].sqrt(), TIMESTEPS[i], *prompt)

    def mean(x: torch.Tensor, i: int, eps: torch.Tensor) -> torch.Tensor:
        clean = (x - (1 - alphas[i]).sqrt() * eps) / alphas[i].sqrt()
        return alphas[i + 1].sqrt() * clean + (1 - alphas[i + 1] - deviation(i) ** 2).sqrt() * eps

    def deviation(i: int) -> torch.Tensor:
        now, after = alphas[i], alphas[i + 1]
        return eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).sqrt()

    x = start = alphas[0].sqrt() * X0 + (1 - alphas[0]).sqrt() * START
    codes = []
    for i in steps:
        direction = (x - alphas[i].sqrt() * X0) / (1 - alphas[i]).sqrt()
        after = (alphas[i + 1].sqrt() * X0 + (1 - alphas[i + 1] - deviation(i) ** 2).sqrt() * direction
                 + deviation(i) * noise(SHAPE, 20 + i))
        if official_end and i == steps[-1]:
            after = X0
        codes.append((after - mean(x, i, predict(x, i, source))) / deviation(i))
        x = after
    x, states = start, []
    for i in steps:
        x = mean(x, i, predict(x, i, target)) + deviation(i) * codes[i]
        states.append(x)
    return states


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("prompts", [((0.3, 1.0), (1.5, 7.5)), ((1.0, 1.0), (-1.0, 20.0)), ((0.5, 2.0), (1.0, 3.0))])
def test_without_z_it_is_the_printed_encoder_and_decoder(eta: float, prompts: Any) -> None:
    """At eta 0 the printed form divides by zero; its limit is met at eta 1e-7."""
    source, target = prompts
    sigmas = [*GRID, float(SIGMAS[0])]
    states: list[torch.Tensor] = []
    last = cycle(toy_reader(*target), toy_reader(*source), sigmas, eta, report=lambda i, d, x: states.append(x))
    states = [*states[1:], last]
    printed = encode_and_decode(eta or 1e-7, source, target, official_end=False)
    tolerance = 1e-5 if eta == 0 else 1e-10
    for state, expected, sigma in zip(states, printed, sigmas[1:], strict=True):
        torch.testing.assert_close(state, expected * math.sqrt(1 + sigma ** 2), rtol=0, atol=tolerance)


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_the_authors_last_step_is_the_only_difference(eta: float) -> None:
    """Their code takes x0 for the state at t = 0, this one steps to sigma 0: a small difference in the last step."""
    prompts = (0.3, 1.0), (1.5, 7.5)
    states: list[torch.Tensor] = []
    last = cycle(toy_reader(*prompts[1]), toy_reader(*prompts[0]), [*GRID, 0.0], eta,
                 report=lambda i, d, x: states.append(x))
    printed = encode_and_decode(eta, *prompts, official_end=True)
    for state, expected, sigma in zip(states[1:], printed[:-1], GRID[1:], strict=True):
        torch.testing.assert_close(state, expected * math.sqrt(1 + sigma ** 2), rtol=0, atol=1e-10)
    difference = (last - printed[-1]).square().mean().sqrt()
    assert 0.001 < float(difference) < 0.05
    assert float((last - X0).square().mean().sqrt()) > 10 * float(difference)


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [SHAPE, (3, 4, 7, 5), (2, 16, 3, 5, 9)])
def test_equal_readings_return_the_picture(eta: float, shape: tuple[int, ...]) -> None:
    reader, x0 = toy_reader(1.0, 7.5), 0.7 * noise(shape, 3)
    result = cycle(reader, reader, [*GRID, 0.0], eta, x0, noise(shape, 5))
    assert torch.equal(result, x0)


def test_equal_readings_cancel_exactly_in_low_precision() -> None:
    x0, reading = noise(SHAPE, 1).half(), 1000 * noise(SHAPE, 2).half()
    assert torch.equal(correct_denoised(x0, reading, reading), x0)
    assert not torch.equal((x0 + reading) - reading, x0)


def gaussian_reader(mean: float, width: float, sigmas: list[float]) -> Reader:
    """The exact denoiser of data drawn from N(mean, width^2)."""
    return lambda y, i: (y * width ** 2 + mean * sigmas[i] ** 2) / (width ** 2 + sigmas[i] ** 2)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_worlds_in_closed_form(eta: float) -> None:
    """y - src obeys d' = (1 + eta^2) (d - D_target + D_source) / sigma, so a picture of N(m, w^2) ends up shifted by
    (m' - m) (1 - (w^2 / (w^2 + sigma_0^2))^((1 + eta^2) / 2)), whatever the noise; the error is of first order, and
    none at eta 1, where the step is the posterior itself."""
    width, shift = 0.6, 1.3
    expected = X0 + shift * (1 - (width ** 2 / (width ** 2 + 2.0 ** 2)) ** ((1 + eta ** 2) / 2))

    def error(steps: int) -> float:
        sigmas = torch.linspace(2.0, 0.0, steps + 1, dtype=torch.float64).tolist()
        result = cycle(gaussian_reader(0.2 + shift, width, sigmas), gaussian_reader(0.2, width, sigmas), sigmas, eta)
        assert float((result - X0).std()) < 1e-12
        return float((result - expected).abs().max())

    assert error(400) < 0.003
    assert error(100) < 1e-12 if eta == 1 else error(100) / error(400) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_flow_model_takes_the_same_steps(eta: float) -> None:
    """A flow state is (1 - s) times the eps state of sigma s / (1 - s): the same picture at every eta."""
    flow = [*(sigma / (1 + sigma) for sigma in GRID), 0.0]

    def in_flow(reader: Reader) -> Reader:
        return lambda y, i: reader(y / (1 - flow[i]), i)

    states: list[torch.Tensor] = []
    flow_states: list[torch.Tensor] = []
    target, source = toy_reader(1.5, 7.5), toy_reader(0.3, 1.0)
    result = cycle(target, source, [*GRID, 0.0], eta, report=lambda i, d, x: states.append(x))
    again = sample_cycle(
        in_flow(target), in_flow(source), (1 - flow[0]) * X0 + flow[0] * START, X0, [Level(1 - s, s) for s in flow],
        eta, lambda i: noise(SHAPE, 20 + i), lambda i, d, x: flow_states.append(x))
    torch.testing.assert_close(again, result, rtol=0, atol=1e-11)
    for i in range(len(GRID)):
        torch.testing.assert_close(flow_states[i], (1 - flow[i]) * states[i], rtol=0, atol=1e-11)


def test_eta_one_draws_from_the_posterior() -> None:
    """q(x_s | x_t, x0) of the VP process, written from its Gaussian products."""
    now, after = ALPHAS[601], ALPHAS[541]
    ratio = now / after
    variance = (1 - after) / (1 - now) * (1 - ratio)
    clean, keep = after.sqrt() * (1 - ratio) / (1 - now), ratio.sqrt() * (1 - after) / (1 - now)
    step = ancestral_step(Level(float(now.sqrt()), float((1 - now).sqrt())),
                          Level(float(after.sqrt()), float((1 - after).sqrt())), 1.0)
    assert (step.clean, step.keep, step.fresh) == pytest.approx((float(clean), float(keep), float(variance.sqrt())))


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize(("now", "end"), [
    (Level(1, 14.6), Level(1, 0.7)), (Level(0.0, 1.0), Level(0.2, 0.8)), (Level(0.3, 0.7), Level(0.31, 0.69)),
    (Level(0.4, 0.6), Level(1.0, 0.0)), (Level(0.5, 0.5), Level(0.5, 0.5)), (Level(0.0, 1.0), Level(0.0, 1.0))])
def test_a_step_keeps_the_marginal(now: Level, end: Level, eta: float) -> None:
    """With D = x0 the state stays signal * x0 + noise * n with unit n: also from pure noise, to none, and in place."""
    step = ancestral_step(now, end, eta)
    assert step.clean + step.keep * now.signal == pytest.approx(end.signal)
    assert math.hypot(step.keep * now.noise, step.fresh) == pytest.approx(end.noise)
    assert (step.fresh == 0) == (eta == 0 or end.noise == 0 or now == end)


def test_step_onto_the_picture_is_the_estimate() -> None:
    step = ancestral_step(Level(0.3, 0.7), Level(1.0, 0.0), 1.0)
    denoised = noise(SHAPE, 4)
    assert torch.equal(take_step(denoised, noise(SHAPE, 5), None, step), denoised)


def test_both_paths_share_one_noise_and_draw_it_once_a_step() -> None:
    drawn: list[int] = []

    def draw(i: int) -> torch.Tensor:
        drawn.append(i)
        return noise(SHAPE, 20 + i)

    cycle(toy_reader(1.0, 3.0), toy_reader(0.0, 1.0), [*GRID, 0.0], 0.1, draw=draw)
    assert drawn == list(range(len(GRID) - 1))
    drawn.clear()
    cycle(toy_reader(1.0, 3.0), toy_reader(0.0, 1.0), [*GRID, 0.0], 0.0, draw=draw)
    assert drawn == []


def test_batch_items_are_independent_and_inputs_stay() -> None:
    x0, n = 0.7 * noise((3, 4, 5, 7), 3), noise((3, 4, 5, 7), 5)
    kept = x0.clone(), n.clone()
    target, source, sigmas = toy_reader(1.5, 7.5), toy_reader(0.3, 1.0), [*GRID, 0.0]
    together = cycle(target, source, sigmas, 0.5, x0, n, draw=lambda i: noise((3, 4, 5, 7), i))
    for k in range(3):
        alone = cycle(target, source, sigmas, 0.5, x0[k:k + 1], n[k:k + 1],
                      draw=lambda i, k=k: noise((3, 4, 5, 7), i)[k:k + 1])
        torch.testing.assert_close(alone, together[k:k + 1], rtol=0, atol=1e-13)
    assert torch.equal(x0, kept[0]) and torch.equal(n, kept[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_type_is_kept(dtype: torch.dtype) -> None:
    x0 = X0.to(dtype)
    result = cycle(lambda y, i: y * 0.5, lambda y, i: y * 0.4, [2.0, 1.0, 0.5, 0.0], 0.5, x0, START.to(dtype),
                   draw=lambda i: START.to(dtype))
    assert result.dtype == dtype and result.isfinite().all()


@pytest.mark.parametrize(("eta", "skip", "text"), [
    (-0.1, 0, r"eta expects a value between 0 .* got -0.1; set it in that range"),
    (1.5, 0, r"eta expects .* and 1 .* got 1.5; set"),
    (float("nan"), 0, "eta expects .* got nan"),
    (0.1, -1, "skip expects 0 or more sigmas to drop, got -1; set it to 0"),
])
def test_settings_out_of_range(eta: float, skip: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_settings(eta, skip)


def test_levels_without_noise() -> None:
    check_levels(ve([2.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="noise at the start of every step, got none at step 2; use a model that"):
        check_levels(ve([1.0, 0.0, 0.0]))
