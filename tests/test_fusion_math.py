"""Saliency-aware noise blending in float64: the published blur, a reference written pixel by pixel, identities."""
from __future__ import annotations

import math

import pytest
import torch
from fusion_rig import Alone, box_matrix, printed_fusion
from mixology.samplers.fusion import (
    PALETTE,
    blend_experts,
    blur_response,
    box_side,
    check_settings,
    compare_saliency,
    draw_winners,
    measure_response,
    pick_winners,
    split_winners,
)
from toy import ALPHAS, SIGMAS, eps_of, noise

SHAPE = (2, 4, 12, 10)


def fuse(readings: list[tuple[torch.Tensor, torch.Tensor, float, float]], sigma: float, blur: float = 4.0,
         softness: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    levels = torch.full((len(readings[0][0]),), sigma, dtype=torch.float64)
    responses = [measure_response(c, u, levels, cfg) for c, u, cfg, _ in readings]
    saliency = compare_saliency(responses, [k for *_, k in readings], blur)
    guided = [u + cfg * (c - u) for c, u, cfg, _ in readings]
    return blend_experts(guided, saliency, softness), pick_winners(saliency)


def draw_readings(count: int, shape: tuple[int, ...] = SHAPE) -> list[tuple[torch.Tensor, torch.Tensor, float, float]]:
    return [(noise(shape, 2 * i), 0.8 * noise(shape, 2 * i + 1), 2.0 + i, 1.0 + 0.5 * i) for i in range(count)]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 64), (16, 16), (9, 13)])
def test_blur_of_four_is_the_published_one(height: int, width: int) -> None:
    """AvgPool2d(4, stride 1, padding 1) and the bilinear Resize of torchvision."""
    from torchvision.transforms.functional import resize

    response = noise((3, height, width), 4).abs()
    pooled = torch.nn.AvgPool2d(4, stride=1, padding=1)(response)
    assert pooled.shape == (3, height - 1, width - 1)
    published = resize(pooled, [height, width], antialias=True)
    torch.testing.assert_close(blur_response(response, 4), published, rtol=0, atol=1e-12)


def test_blur_counts_zeros_outside() -> None:
    ones = torch.ones(1, 64, 64, dtype=torch.float64)
    for side, corner, edge in ((4, 0.5625, 0.75), (3, 4 / 9, 2 / 3), (5, 9 / 25, 3 / 5)):
        blurred = blur_response(ones, side)[0]
        assert blurred[0, 0] == pytest.approx(corner, abs=1e-12) and blurred[-1, -1] == pytest.approx(corner, abs=1e-12)
        assert blurred[0, 32] == pytest.approx(edge, abs=1e-12) and blurred[32, 32] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 8, 9])
@pytest.mark.parametrize(("height", "width"), [(9, 13), (16, 10)])
def test_blur_of_any_side(side: int, height: int, width: int) -> None:
    response = noise((2, height, width), 1).abs()
    expected = box_matrix(height, side) @ response @ box_matrix(width, side).T
    torch.testing.assert_close(blur_response(response, side), expected, rtol=0, atol=1e-12)


def test_side_keeps_its_share_of_the_picture() -> None:
    assert [box_side(4.0, *size) for size in ((64, 64), (128, 128), (96, 64), (64, 200), (16, 16), (8, 8))] == [
        4, 8, 4, 4, 1, 0]
    assert box_side(0.0, 512, 512) == 0 and box_side(64.0, 7, 90) == 7
    response = noise((1, 8, 8), 0)
    assert blur_response(response, 0) is response and blur_response(response, 1) is response


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("softness", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("blur", [0.0, 16.0, 40.0])
def test_is_the_printed_fusion(count: int, softness: float, blur: float) -> None:
    readings = draw_readings(count)
    fused, winners = fuse(readings, 1.7, blur, softness)
    experts = [Alone(c, u, u + s * (c - u), s, k) for c, u, s, k in readings]
    expected, expected_winners = printed_fusion(experts, 1.7, blur, softness)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-9)
    assert torch.equal(winners, expected_winners) and len(winners.unique()) == count


def test_blending_denoised_is_blending_eps() -> None:
    """One step of the toy network in VP variables, two experts with other prompts; t = 601."""
    t, s, k = 601, 10.0, (1.0, 2.0)
    x = noise((1, 4, 8, 8), 9)
    y, sigma = x / ALPHAS[t].sqrt(), float(SIGMAS[t])
    eps = [(eps_of(x, t, c), eps_of(x, t, 0.0) * scale) for c, scale in ((1.0, 1.0), (-2.0, 0.7))]
    maps = [torch.softmax((k[i] * (s * (c - u)).abs().mean(1)).flatten(), 0).reshape(8, 8)
            for i, (c, u) in enumerate(eps)]
    mask = (maps[0] >= maps[1]).double()
    guided = [u + s * (c - u) for c, u in eps]
    printed = y - sigma * (mask * guided[0] + (1 - mask) * guided[1])
    readings = [(y - sigma * c, y - sigma * u, s, k[i]) for i, (c, u) in enumerate(eps)]
    fused, winners = fuse(readings, sigma, 0.0)
    torch.testing.assert_close(fused, printed, rtol=0, atol=1e-9)
    assert torch.equal(winners[0], 1 - mask.long()) and 0 < float(mask.mean()) < 1


def test_saliency_is_a_distribution_over_pixels_of_each_item() -> None:
    for shape in (SHAPE, (2, 4, 3, 6, 5)):  # a video's frames share it
        saliency = compare_saliency([noise(shape, i).abs().mean(1) for i in range(3)], [1.0, 2.0, 0.5], 8.0)
        assert saliency.shape == (3, shape[0], *shape[2:])
        total = saliency.exp().flatten(2).sum(2)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


def test_temperature_sharpens_and_scale_acts_like_it() -> None:
    place = torch.linspace(-2, 2, 64, dtype=torch.float64)
    spot = 3 * torch.exp(-(place ** 2 + place[:, None] ** 2))[None]  # what expert 0 knows
    responses = [spot, 1 + 0.5 * torch.cos(2 * place).expand(1, 64, 64)]
    areas = [float((pick_winners(compare_saliency(responses, [k, 1.0], 4.0)) == 0).double().mean())
             for k in (0.5, 1.0, 2.0, 4.0, 8.0)]
    assert areas == sorted(areas, reverse=True) and areas[0] > areas[-1] + 0.05
    cond, uncond, level = noise(SHAPE, 0), noise(SHAPE, 1), torch.tensor([2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(
        compare_saliency([measure_response(cond, uncond, level, 6.0)], [1.0], 0.0),
        compare_saliency([measure_response(cond, uncond, level, 1.0)], [6.0], 0.0), rtol=0, atol=1e-10)
    flat = compare_saliency(responses, [0.0, 0.0], 4.0)
    assert float(flat.max()) == pytest.approx(-math.log(64 * 64)) and not pick_winners(flat).any()  # ties: the first


def test_large_responses_stay_finite() -> None:
    responses = [1e4 * noise((1, 16, 16), i).abs() for i in (0, 1)]
    saliency = compare_saliency([r.float() for r in responses], [1000.0, 1000.0], 16.0)
    assert saliency.isfinite().all()
    values = [torch.zeros(1, 4, 16, 16), torch.ones(1, 4, 16, 16)]
    for softness in (0.0, 1e-4, 1.0, 1e6):
        assert blend_experts(values, saliency, softness).isfinite().all()


def test_softness_runs_from_the_winner_to_the_average() -> None:
    readings = draw_readings(3)
    guided = [u + cfg * (c - u) for c, u, cfg, _ in readings]
    hard, winners = fuse(readings, 2.0)
    torch.testing.assert_close(fuse(readings, 2.0, softness=1e-6)[0], hard, rtol=0, atol=1e-6)
    torch.testing.assert_close(fuse(readings, 2.0, softness=1e9)[0], sum(guided) / 3, rtol=0, atol=1e-6)
    for i, value in enumerate(guided):
        chosen = (winners == i).unsqueeze(1).expand_as(value)
        assert torch.equal(hard[chosen], value[chosen])  # the winner's own bits


def test_identities() -> None:
    a, b, c = draw_readings(3)
    for softness in (0.0, 0.7):
        same, winners = fuse([a, a, a], 1.5, softness=softness)
        assert torch.equal(same, a[1] + a[2] * (a[0] - a[1])) and not winners.any()
        first, one = fuse([a, b, c], 1.5, softness=softness)
        turned, other = fuse([c, a, b], 1.5, softness=softness)
        torch.testing.assert_close(turned, first, rtol=0, atol=1e-12)
        assert torch.equal(torch.tensor([2, 0, 1])[other], one)
    never = (b[1], b[1], 1.0, 1.0)  # no response: uniform saliency, beaten at every pixel by one of two opposites
    left = torch.zeros(SHAPE, dtype=torch.float64)
    left[..., :5] = 3
    pair = [(left, 0 * left, 1.0, 1.0), (3 - left, 0 * left, 1.0, 1.0)]
    two, three = fuse(pair, 1.0, 0.0), fuse([*pair, never], 1.0, 0.0)
    assert torch.equal(two[0], three[0]) and torch.equal(two[1], three[1])


def test_items_of_a_batch_are_independent() -> None:
    readings = draw_readings(2)
    fused, winners = fuse(readings, 1.3)
    for i in range(SHAPE[0]):
        alone, won = fuse([(c[i:i + 1], u[i:i + 1], cfg, k) for c, u, cfg, k in readings], 1.3)
        assert torch.equal(alone[0], fused[i]) and torch.equal(won[0], winners[i])


def test_sigma_of_each_item_and_kept_inputs() -> None:
    cond, uncond, level = noise(SHAPE, 0), noise(SHAPE, 1), torch.tensor([1.0, 4.0])
    copies = cond.clone(), uncond.clone(), level.clone()
    response = measure_response(cond, uncond, level, -2.0)
    for i in range(2):
        expected = (2 * (cond[i] - uncond[i]).abs().sum(0) / 4) / float(level[i])
        torch.testing.assert_close(response[i], expected, rtol=0, atol=1e-12)
    values = [cond.float(), uncond.float()]
    result = blend_experts(values, compare_saliency([response.float(), response.float() * 2], [1.0, 1.0], 4.0), 0.5)
    assert result.dtype == torch.float32 and response.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(copies, (cond, uncond, level)))


def test_pictures_of_winners() -> None:
    winners = torch.tensor([[[[0, 1, 2]], [[9, 1, 0]]]], dtype=torch.uint8)  # one step, a batch of two, 1 x 3
    image = draw_winners(winners, 8)
    assert image.shape == (2, 8, 24, 3) and image.dtype == torch.float32
    torch.testing.assert_close(image[0, 7, 8:16], torch.tensor(PALETTE[1]).expand(8, 3))
    torch.testing.assert_close(image[1, 0, 0], 0.6 * torch.tensor(PALETTE[1]))  # the second round, darker
    assert len(image.flatten(0, 2).unique(dim=0)) == 4
    masks = split_winners(winners, 10)
    assert masks.shape == (20, 1, 3) and torch.equal(masks.reshape(10, 2, 1, 3).sum(0), torch.ones(2, 1, 3))
    assert torch.equal(masks[2], torch.tensor([[0.0, 1.0, 0.0]]))  # expert 1, the first image
    video = torch.zeros(4, 2, 3, 5, 6, dtype=torch.uint8)
    assert draw_winners(video, 8).shape == (24, 40, 48, 3) and split_winners(video, 2).shape == (48, 5, 6)


@pytest.mark.parametrize(("settings", "text"), [
    ((-1.0, 0.0, 0.0, 1.0), r"^blur expects 0 \(no blur\) or more, got -1; raise it\.$"),
    ((math.nan, 0.0, 0.0, 1.0), r"^blur expects 0 \(no blur\) or more, got nan; raise it\.$"),
    ((4.0, -0.5, 0.0, 1.0), r"^softness expects 0 \(the winner alone\) or more, got -0\.5; raise it\.$"),
    ((4.0, 0.0, 0.6, 0.4), "start_percent at or below end_percent, both from 0 to 1, got 0.6 and 0.4; swap or correct"),
    ((4.0, 0.0, -0.1, 0.4), "both from 0 to 1, got -0.1 and 0.4; swap or correct them"),
])
def test_bad_settings(settings: tuple[float, float, float, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_settings(*settings)
