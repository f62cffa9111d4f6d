"""Gradient masks, mask preparation and the merge of styles against references in float64."""
from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from mixology.samplers.masks import blend_styles, check_style_masks, make_resize_matrix, normalise_masks, resize_masks
from mixology.samplers.spatial import blend_guidance, draw_gradient_masks, parse_cfg_list
from toy import SIGMAS, eps_of, noise

SIZES = [(64, 64), (63, 41), (1, 7), (7, 1), (1, 1), (2, 3), (129, 65)]
ANGLES = [0, 17.5, 45, 90, 133, 180, -90, 270, 359]


def masks_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_linear_pair_is_the_public_ramp() -> None:
    masks = draw_gradient_masks(64, 5, "linear", 2, 0, 20, 1)
    assert masks.shape == (2, 5, 64) and masks.dtype == torch.float32
    ramp = torch.linspace(1, 0, 64, dtype=torch.float64)
    torch.testing.assert_close(masks[0].double(), ramp.expand(5, 64), rtol=0, atol=4e-8)
    assert masks[0, 0, 0] == 1 and masks[0, 0, -1] == 0


def test_logistic_pair_is_the_public_sigmoid() -> None:
    masks = draw_gradient_masks(64, 3, "logistic", 2, 0, 20, 1).double()
    assert masks[0, 0, :4].tolist() == pytest.approx([0.99995460, 0.99993764, 0.99991434, 0.99988234], abs=6e-8)
    assert float(masks[0, 0].sum()) == pytest.approx(32, abs=2e-6)
    public = torch.sigmoid(20 * (torch.linspace(1, 0, 64, dtype=torch.float64) - 0.5))
    torch.testing.assert_close(masks[0], public.expand(3, 64), rtol=0, atol=4e-8)


@pytest.mark.parametrize("profile", ["linear", "logistic"])
@pytest.mark.parametrize(("parts", "rows"), [(2, 1), (3, 1), (16, 1), (2, 2), (3, 5), (4, 4), (2, 8)])
def test_masks_are_a_partition_of_unity(profile: str, parts: int, rows: int) -> None:
    for width, height in SIZES:
        for angle in ANGLES:
            masks = draw_gradient_masks(width, height, profile, parts, angle, 20, rows)
            assert masks.shape == (parts * rows, height, width) and bool((masks >= 0).all())
            assert float((masks.sum(0) - 1).abs().max()) <= 1e-6


def test_parts_follow_their_definition() -> None:
    """Three parts at a slant, pixel by pixel."""
    width, height, angle, k = 11, 6, 30.0, 13.0
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    corners = [x * cos + y * sin for x in (0, width - 1) for y in (0, height - 1)]
    linear = draw_gradient_masks(width, height, "linear", 3, angle, k, 1)
    logistic = draw_gradient_masks(width, height, "logistic", 3, angle, k, 1)
    for y in range(height):
        for x in range(width):
            t = (x * cos + y * sin - min(corners)) / (max(corners) - min(corners))
            hats = [max(0.0, 1 - abs(2 * t - i)) for i in range(3)]
            passed = [1 / (1 + math.exp(-k * (t - j / 3))) for j in (1, 2)]
            steps = [1 - passed[0], passed[0] - passed[1], passed[1]]
            assert linear[:, y, x].tolist() == pytest.approx(hats, abs=1e-7)
            assert logistic[:, y, x].tolist() == pytest.approx(steps, abs=1e-7)


@pytest.mark.parametrize("angle", [10, 45, 80])
def test_corners_reach_both_ends_at_any_angle(angle: float) -> None:
    masks = draw_gradient_masks(37, 21, "linear", 2, angle, 20, 1)
    assert float(masks[0, 0, 0]) == pytest.approx(1, abs=1e-7)
    assert float(masks[1, -1, -1]) == pytest.approx(1, abs=1e-7)


def test_angles_turn_the_masks() -> None:
    right = draw_gradient_masks(9, 9, "logistic", 3, 0, 20, 1)
    torch.testing.assert_close(draw_gradient_masks(9, 9, "logistic", 3, 90, 20, 1), right.transpose(1, 2))
    torch.testing.assert_close(draw_gradient_masks(9, 9, "logistic", 3, 180, 20, 1), right.flip(2))
    torch.testing.assert_close(draw_gradient_masks(9, 9, "logistic", 2, 180, 20, 1),
                               draw_gradient_masks(9, 9, "logistic", 2, 0, 20, 1).flip(0))


def test_rows_come_one_after_another() -> None:
    four = draw_gradient_masks(8, 6, "linear", 2, 0, 20, 2)
    corners = [(0, 0), (0, -1), (-1, 0), (-1, -1)]
    for mask, (y, x) in zip(four, corners):
        assert float(mask[y, x]) == 1
    across, down = (draw_gradient_masks(8, 6, "linear", 2, angle, 20, 1) for angle in (0, 90))
    torch.testing.assert_close(four[2], down[1] * across[0])


def test_too_many_masks() -> None:
    assert len(draw_gradient_masks(4, 4, "linear", 8, 0, 20, 2)) == 16
    with pytest.raises(ValueError, match="at most 16, got 6 x 3 = 18; lower one of the two"):
        draw_gradient_masks(4, 4, "linear", 6, 0, 20, 3)


def area_by_loops(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mean over each cell's rectangle, its borders cutting through pixels."""
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            top, bottom = i * mask.shape[0] / height, (i + 1) * mask.shape[0] / height
            left, right = j * mask.shape[1] / width, (j + 1) * mask.shape[1] / width
            total = 0.0
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    overlap = max(0, min(bottom, y + 1) - max(top, y)) * max(0, min(right, x + 1) - max(left, x))
                    total += overlap * mask[y, x]
            result[i, j] = total / ((bottom - top) * (right - left))
    return result


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (7, 9), (1, 1), (12, 10)])
def test_resize_is_the_mean_over_each_cell(size: tuple[int, int]) -> None:
    masks = masks_of(2, 12, 10)
    masks[1] = 1 - masks[0]
    expected = area_by_loops(masks[0].double().numpy(), *size)
    np.testing.assert_allclose(resize_masks(masks, *size)[0].numpy(), expected, rtol=0, atol=5e-7)


def test_resize_up_is_bilinear() -> None:
    masks = masks_of(1, 5, 7)
    masks = torch.cat([masks, 1 - masks])
    expected = torch.nn.functional.interpolate(masks[None].double(), size=(13, 16), mode="bilinear")[0]
    torch.testing.assert_close(resize_masks(masks, 13, 16).double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(make_resize_matrix(6, 6), torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("size", [(64, 64), (13, 77), (100, 3), (33, 65), (8, 8)])
@pytest.mark.parametrize("count", [2, 5, 16])
def test_partition_of_unity_stays_one(size: tuple[int, int], count: int) -> None:
    masks = draw_gradient_masks(65, 33, "logistic", count, 30, 20, 1)
    assert float((resize_masks(masks, *size).sum(0) - 1).abs().max()) <= 5e-7
    raw = masks_of(count, 33, 65)
    assert float((resize_masks(raw, *size).sum(0) - 1).abs().max()) <= 5e-7


def test_one_mask_of_ones_stays_exact() -> None:
    masks = torch.stack([torch.ones(511, 333), torch.zeros(511, 333)])
    for size in ((64, 42), (63, 41), (600, 400)):
        assert torch.equal(resize_masks(masks, *size)[0], torch.ones(size))
        assert not resize_masks(masks, *size)[1].any()


def test_last_style_takes_the_rest() -> None:
    masks = torch.zeros(2, 4, 4)
    masks[0, :, 0], masks[1, :, :2] = 1, 0.5
    full = check_style_masks(masks, 3)
    assert full[:, 0].T.tolist() == [[1, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1]]
    ready = resize_masks(check_style_masks(masks, 3), 4, 4)
    assert ready[:, 0, 0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    single = masks_of(6, 6)
    assert torch.equal(check_style_masks(single, 2), torch.stack([single, 1 - single]))
    assert torch.equal(check_style_masks(single, 1), single[None])


def test_first_style_fills_in_and_overlaps_are_shared() -> None:
    masks = torch.zeros(3, 1, 4)
    masks[1, 0, 0], masks[2, 0, 0] = 1, 3
    masks[2, 0, 1] = 0.2
    ready = resize_masks(check_style_masks(masks, 3), 1, 4)[:, 0]
    assert ready.T.tolist() == [pytest.approx([0, 0.25, 0.75]), [0, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert torch.equal(normalise_masks(torch.zeros(2, 3)), torch.tensor([[1.0] * 3, [0.0] * 3]))


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_masks_of_any_type(kind: torch.dtype) -> None:
    masks = torch.zeros(2, 4, 6, dtype=kind)
    masks[0, :, :3], masks[1, :, 3:] = 1, 1
    ready = resize_masks(check_style_masks(masks, 2), 4, 6)
    assert ready.dtype == torch.float32 and torch.equal(ready, masks.float())


def test_masks_are_left_as_they_were() -> None:
    masks = masks_of(2, 9, 9)
    copy = masks.clone()
    resize_masks(check_style_masks(masks, 2), 4, 4)
    resize_masks(check_style_masks(masks, 3), 4, 4)
    assert torch.equal(masks, copy)


@pytest.mark.parametrize(("masks", "styles", "text"), [
    (torch.ones(4, 8, 8), 2, "^2 styles expect 2 masks, or 1 where the last style takes the rest, got 4; connect as"),
    (torch.ones(2, 8, 8), 4, "^4 styles expect 4 masks, or 3 .*, got 2; connect as many prompts as there are masks.$"),
    (torch.zeros(2, 8, 8), 2, "at least one painted area, got empty masks only; paint them or use Gradient Masks"),
    (torch.zeros(1, 8, 8), 2, "at least one painted area, got empty masks only"),
    (torch.full((2, 8, 8), -0.1), 2, "values from 0 to 1, got negative or undefined ones; clamp the masks"),
    (torch.full((2, 8, 8), float("nan")), 2, "got negative or undefined ones"),
    (torch.full((2, 8, 8), float("inf")), 2, "got negative or undefined ones"),
    (torch.ones(2, 1, 8, 8), 2, r"\(count x height x width\), got the shape 2x1x8x8; use Gradient Masks, or join"),
    (torch.ones(2, 0, 8), 2, "got the shape 2x0x8"),
    (torch.ones(8), 2, "got the shape 8;"),
])
def test_masks_that_do_not_fit(masks: torch.Tensor, styles: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_style_masks(masks, styles)


def predictions(count: int, *shape: int) -> list[torch.Tensor]:
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 5, 7), (2, 16, 3, 6, 4)])
@pytest.mark.parametrize("count", [2, 3, 16])
def test_blend_is_the_weighted_sum(shape: tuple[int, ...], count: int) -> None:
    values, weights = predictions(count, *shape), normalise_masks(masks_of(count, *shape[-2:]))
    expected = sum(weight.double() * value.double() for weight, value in zip(weights, values))
    torch.testing.assert_close(blend_styles(values, weights).double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_blend_is_exact_where_it_can_be(count: int) -> None:
    values, weights = predictions(count, 2, 4, 9, 9), normalise_masks(masks_of(count, 9, 9))
    assert torch.equal(blend_styles([values[0]] * count, weights), values[0])
    for i in range(count):  # hard masks give back each style's own values, whatever the others are
        only = torch.zeros(count, 9, 9)
        only[i] = 1
        assert torch.equal(blend_styles(values, only), values[i])
    assert torch.equal(blend_styles(values, torch.zeros(count, 9, 9)), values[0])


def test_blend_does_not_depend_on_the_order() -> None:
    values, weights = predictions(4, 1, 4, 8, 8), normalise_masks(masks_of(4, 8, 8))
    first = blend_styles(values, weights)
    for order in permutations(range(4)):
        other = blend_styles([values[i] for i in order], weights[list(order)])
        torch.testing.assert_close(other, first, rtol=0, atol=1e-6)


def test_merge_of_eps_is_merge_of_denoised() -> None:
    """The printed formula in VP variables, and ours on denoised in sigma space, on the toy model."""
    shape, t, scales = (1, 4, 8, 8), 481, [7.5, 3.0, 12.0]
    sigma, y = SIGMAS[t], SIGMAS[t] * noise(shape, 5) + 0.7 * noise(shape, 3)
    x = y / (1 + sigma ** 2).sqrt()
    weights = normalise_masks(masks_of(3, 8, 8).double())
    u, cs = eps_of(x, t, 0.0), [eps_of(x, t, c) for c in (1.0, -2.0, 0.4)]
    printed = sum(m * (u + s * (c - u)) for m, s, c in zip(weights, scales, cs))
    plain, conds = y - sigma * u, [y - sigma * c for c in cs]
    ours = plain + blend_guidance(conds, [plain] * 3, weights, scales)
    torch.testing.assert_close((y - ours) / sigma, printed, rtol=0, atol=1e-12)
    guided = plain + 7.5 * (blend_styles(conds, weights) - plain)
    split = guided + blend_guidance(conds, [plain] * 3, weights, [s - 7.5 for s in scales])
    torch.testing.assert_close(split, ours, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("text", "expected"), [
    ("", []), ("  ", []), ("5, 7.5", [5.0, 7.5]), ("1;2 3", [1.0, 2.0, 3.0]), ("0,100", [0.0, 100.0])])
def test_scales(text: str, expected: list[float]) -> None:
    assert parse_cfg_list(text, 3) == expected


@pytest.mark.parametrize(("text", "error"), [
    ("5, strong", "such as '5, 7.5', got 'strong'; correct that entry or leave"),
    ("-1", "between 0 and 100 .* got '-1'"),
    ("101", "got '101'"),
    ("nan", "got 'nan'"),
    ("1 2 3 4", "at most one number per style, got 4 numbers for 3 styles; shorten the list or connect more prompts"),
])
def test_unreadable_scales(text: str, error: Any) -> None:
    with pytest.raises(ValueError, match=error):
        parse_cfg_list(text, 3)
