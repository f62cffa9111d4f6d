"""MagicMix's arithmetic against the paper's algorithm in float64."""
from __future__ import annotations

import pytest
import torch
from mixology.samplers.layout import (
    Window,
    check_range,
    find_window,
    make_nu_map,
    mix_model_input,
    mix_states,
    parse_nu_list,
    record_trajectory,
    sample_layout_mix,
    spread_nu,
)
from toy import ALPHAS, SIGMAS, ddim_runner, ddim_timesteps, eps_of, noise

SHAPE = (1, 4, 8, 8)
TIMESTEPS = ddim_timesteps(50)
GRID = [float(SIGMAS[t]) for t in TIMESTEPS] + [float(SIGMAS[0])]  # diffusers ends at t = 0, not at sigma 0
WINDOW = Window(20, 35)


def magicmix(nu: float, cfg: float = 7.5, c: float = 1.0) -> torch.Tensor:
    x0, n = 0.7 * noise(SHAPE, 3), noise(SHAPE, 5)
    return sample_layout_mix(
        ddim_runner(TIMESTEPS, GRID, c, cfg), lambda i: x0 + GRID[i] * n, GRID, WINDOW,
        torch.tensor(nu, dtype=torch.float64))


def magicmix_as_printed(nu: float) -> torch.Tensor:
    """Algorithm 1 of the paper, in its own VP variables, written independently of the pack."""
    x0, n = 0.7 * noise(SHAPE, 3), noise(SHAPE, 5)
    levels = [ALPHAS[t] for t in TIMESTEPS] + [ALPHAS[0]]

    def layout(i: int) -> torch.Tensor:
        return levels[i].sqrt() * x0 + (1 - levels[i]).sqrt() * n

    x, steps = layout(20), 50
    for i in range(20, 50):
        uncond = eps_of(x, TIMESTEPS[i], 0.0)
        eps = uncond + 7.5 * (eps_of(x, TIMESTEPS[i], 1.0) - uncond)
        clean = (x - (1 - levels[i]).sqrt() * eps) / levels[i].sqrt()
        x = levels[i + 1].sqrt() * clean + (1 - levels[i + 1]).sqrt() * eps
        remaining = steps - (i + 1)
        if remaining >= 0.3 * steps:
            x = nu * x + (1 - nu) * layout(i + 1)
    return x


@pytest.mark.parametrize(("nu", "total"), [(0.0, -186.277254), (0.5, -194.891480), (1.0, -308.852439)])
def test_published_vectors(nu: float, total: float) -> None:
    result = magicmix(nu)
    assert float(result.sum()) == pytest.approx(total, abs=2e-6)
    if nu == 0.5:
        assert result.flatten()[:2].tolist() == pytest.approx([-1.345352403, -0.911332901], abs=1e-9)


@pytest.mark.parametrize("nu", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_equals_the_algorithm_as_printed(nu: float) -> None:
    torch.testing.assert_close(magicmix(nu) / (1 + SIGMAS[0] ** 2).sqrt(), magicmix_as_printed(nu), rtol=0, atol=1e-11)


def test_window_of_the_paper() -> None:
    """N = 50: start at grid index 20, 15 mixed steps, ending at indices 21 to 35."""
    assert find_window([*GRID[:-1], 0.0], _sigma_at(0.6), _sigma_at(0.3)) == WINDOW


def _sigma_at(k: float) -> float:
    return float(torch.exp(torch.lerp(SIGMAS.log()[int(k * 999)], SIGMAS.log()[int(k * 999) + 1], k * 999 % 1)))


def test_window_edges() -> None:
    grid = [4.0, 3.0, 2.0, 1.0, 0.0]
    assert find_window(grid, 1e9, 0.0) == Window(0, 4)  # k 1 to 0: everything
    assert find_window(grid, 2.0, 2.0) == Window(2, 2)  # equal: nothing mixed
    assert find_window(grid, 2.5, 1.5) == Window(2, 3)
    assert find_window(grid, 0.0, 0.0) == Window(4, 4)  # k_max 0: the layout itself
    assert find_window([4.0, 3.0, 2.0], 1.0, 0.5) == Window(2, 2)  # below the last sigma
    single = torch.tensor([0.6, 0.3, 0.0]).tolist()  # float32 grids carry 0.6 as 0.60000002
    assert find_window(single, 0.6, 0.3) == Window(0, 1)


def test_nu_zero_is_sampling_from_k_min() -> None:
    x0, n = 0.7 * noise(SHAPE, 3), noise(SHAPE, 5)
    late = ddim_runner(TIMESTEPS, GRID, 1.0, 7.5)(x0 + GRID[35] * n, 35, 50)
    assert torch.equal(magicmix(0.0), late)


def test_nu_one_is_sampling_from_k_max() -> None:
    x0, n = 0.7 * noise(SHAPE, 3), noise(SHAPE, 5)
    plain = ddim_runner(TIMESTEPS, GRID, 1.0, 7.5)(x0 + GRID[20] * n, 20, 50)
    assert torch.equal(magicmix(1.0), plain)


@pytest.mark.parametrize("nu", [0.0, 0.3, 0.77, 1.0])
def test_recorded_trajectory_under_its_own_prompt_changes_nothing(nu: float) -> None:
    run = ddim_runner(TIMESTEPS, GRID, 1.0, 7.5)
    states, finished = record_trajectory(run, GRID[0] * noise(SHAPE, 5), WINDOW, 50)
    assert sorted(states) == list(range(20, 36))
    mixed = sample_layout_mix(run, states.__getitem__, GRID, WINDOW, torch.tensor(nu, dtype=torch.float64))
    assert torch.equal(mixed, finished)


def test_mix_is_exact_at_its_ends_and_where_states_agree() -> None:
    own, layout = torch.randn(3, 4, 5, 7), torch.randn(3, 4, 5, 7)
    assert torch.equal(mix_states(own, layout, torch.tensor(1.0)), own)
    assert torch.equal(mix_states(own, layout, torch.tensor(0.0)), layout)
    assert torch.equal(mix_states(own, own.clone(), torch.rand(3, 1, 1, 1)), own)
    weights = torch.tensor([0.0, 0.25, 1.0]).reshape(3, 1, 1, 1)
    expected = weights.double() * own.double() + (1 - weights.double()) * layout.double()
    torch.testing.assert_close(mix_states(own, layout, weights).double(), expected, rtol=0, atol=5e-7)


def test_mix_leaves_its_inputs_and_keeps_dtype() -> None:
    own, layout = torch.randn(1, 4, 3, 3, dtype=torch.float16), torch.randn(1, 4, 3, 3, dtype=torch.float16)
    copies = own.clone(), layout.clone()
    assert mix_states(own, layout, torch.tensor(0.3)).dtype == torch.float16
    assert torch.equal(own, copies[0]) and torch.equal(layout, copies[1])


def test_model_input_rule_steps_the_unmixed_state() -> None:
    """denoised' = x - sigma * eps, where eps is the noise predicted at the mixed state."""
    x, mixed, eps = torch.randn(3, 1, 4, 5, 5, dtype=torch.float64).unbind(0)
    sigma = 3.0
    torch.testing.assert_close(mix_model_input(mixed - sigma * eps, x, mixed), x - sigma * eps)


def test_nu_map() -> None:
    plain = make_nu_map([0.1, 0.9], None, 4)
    assert plain.shape == (2, 1, 1, 1)
    mask = torch.zeros(2, 4, 3, 5)
    mask[..., :2] = 1
    mapped = make_nu_map([0.1, 0.9], mask, 4)
    assert torch.equal(mapped[..., 2:], torch.ones(2, 4, 3, 3))
    torch.testing.assert_close(mapped[:, 0, 0, 0], torch.tensor([0.1, 0.9]))
    assert make_nu_map([0.5], None, 5).shape == (1, 1, 1, 1, 1)


def test_nu_lists() -> None:
    assert parse_nu_list("") == []
    assert parse_nu_list(" 0.1,0.3 ; 1\n0") == [0.1, 0.3, 1.0, 0.0]
    assert spread_nu([0.2], 0.5, 3) == [0.2, 0.5, 0.5]


@pytest.mark.parametrize("text", ["0.1, half", "1.5", "-0.1", "nan", "inf"])
def test_unreadable_nu_list(text: str) -> None:
    with pytest.raises(ValueError, match=r"nu_per_image expects numbers between 0 and 1.*got '.*'; correct that entry"):
        parse_nu_list(text)


def test_more_values_than_images() -> None:
    with pytest.raises(ValueError, match=r"at most one value per image, got 3 values for 2 image\(s\); shorten"):
        spread_nu([0.1, 0.2, 0.3], 0.5, 2)


@pytest.mark.parametrize(("nu", "k_max", "k_min", "text"), [
    (1.2, 0.6, 0.3, "nu expects a value between 0"),
    (-0.1, 0.6, 0.3, "nu expects a value between 0"),
    (float("nan"), 0.6, 0.3, "nu expects a value between 0"),
    (0.5, 0.3, 0.6, "expects 0 <= k_min <= k_max <= 1, got k_min 0.6 and k_max 0.3; make k_max the larger"),
    (0.5, 1.1, 0.6, "expects 0 <= k_min <= k_max <= 1"),
])
def test_values_out_of_order(nu: float, k_max: float, k_min: float, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_range(nu, k_max, k_min)
