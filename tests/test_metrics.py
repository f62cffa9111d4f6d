"""Image metrics against plain loops in float64."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mixology.metrics.image import (
    clip_similarity,
    directional_similarity,
    l2,
    lpips,
    psnr,
    seam,
    smoothness,
    ssim,
    total_variation,
)


def pictures(seed: int, batch: int = 2, height: int = 17, width: int = 23, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def ssim_by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """One picture [H, W, C], in 0..255 as printed: two-dimensional window, one position after another."""
    x, y = x.astype(np.float64) * 255, y.astype(np.float64) * 255
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    window = np.array([[math.exp(-(i * i + j * j) / (2 * 1.5 ** 2)) for j in range(-5, 6)] for i in range(-5, 6)])
    window /= window.sum()
    scores = []
    for channel in range(x.shape[2]):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                a = x[top:top + 11, left:left + 11, channel]
                b = y[top:top + 11, left:left + 11, channel]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                cov = (window * (a - mean_a) * (b - mean_b)).sum()
                scores.append((2 * mean_a * mean_b + c1) * (2 * cov + c2)
                              / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(scores))


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_the_definition(channels: int) -> None:
    x = pictures(0, channels=channels)
    y = (x + 0.2 * pictures(1, channels=channels)).clamp(0, 1)
    expected = [ssim_by_loops(a, b) for a, b in zip(x.numpy(), y.numpy())]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim(y, x).tolist() == pytest.approx(expected, abs=1e-10)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-9)


def test_ssim_of_flat_pictures() -> None:
    """No variance: only the means count."""
    dark, light = torch.full((1, 12, 12, 1), 0.25), torch.full((1, 12, 12, 1), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25 ** 2 + 0.75 ** 2 + 1e-4)
    assert float(ssim(dark, light)) == pytest.approx(expected, abs=1e-7)


def test_distances_equal_the_definition() -> None:
    x, y = pictures(0), pictures(1)
    a, b = x.double().numpy(), y.double().numpy()
    assert l2(x, y).tolist() == pytest.approx([float(np.linalg.norm((p - q).ravel())) for p, q in zip(a, b)], rel=1e-12)
    assert psnr(x, y).tolist() == pytest.approx(
        [10 * math.log10(1 / float(((p - q) ** 2).mean())) for p, q in zip(a, b)], rel=1e-12)
    assert l2(x, x).tolist() == [0, 0] and psnr(x, x).tolist() == [math.inf, math.inf]
    assert float(psnr(torch.zeros(1, 4, 4, 3), torch.full((1, 4, 4, 3), 0.1))) == pytest.approx(20.0, abs=1e-5)


def test_one_reference_serves_a_batch() -> None:
    x, y = pictures(0, batch=3), pictures(1, batch=1)
    for metric in (l2, psnr, ssim, smoothness):
        assert metric(x, y).tolist() == metric(x, y.repeat(3, 1, 1, 1)).tolist()
        assert metric(x, y).shape == (3,)


def test_total_variation_reads_the_middle_fifth() -> None:
    x = pictures(0, batch=1, height=9, width=40, channels=2)
    a, expected = x[0].double().numpy(), 0.0
    for channel in range(2):
        for row in range(9):
            for column in range(16, 24):
                if row < 8:
                    expected += math.sqrt((a[row + 1, column, channel] - a[row, column, channel]) ** 2 + 1e-6)
                if column < 23:
                    expected += math.sqrt((a[row, column + 1, channel] - a[row, column, channel]) ** 2 + 1e-6)
    assert float(total_variation(x)) == pytest.approx(expected, rel=1e-12)
    changed = x.clone()
    changed[:, :, :16], changed[:, :, 24:] = 0, 1
    assert total_variation(changed).tolist() == total_variation(x).tolist()


def test_smoothness_is_the_relative_difference() -> None:
    x, y = pictures(0), pictures(1) * 0.3
    expected = abs(total_variation(x) - total_variation(y)) / total_variation(y)
    assert smoothness(x, y).tolist() == expected.tolist() and bool((smoothness(x, y) > 0.5).all())
    assert smoothness(x, x).tolist() == [0, 0]


def halves(height: int = 16, width: int = 20) -> torch.Tensor:
    labels = torch.zeros(height, width, dtype=torch.long)
    labels[:, width // 2:] = 1
    return labels


def test_seam_of_a_step_on_an_even_slope() -> None:
    """Steps of 0.01 everywhere and one of 0.11 at the boundary."""
    row = torch.arange(20, dtype=torch.float64) * 0.01
    row[10:] += 0.1
    x = row.reshape(1, 1, 20, 1).expand(1, 16, 20, 3)
    assert float(seam(x, halves())) == pytest.approx((0.11 + 1e-3) / (0.01 + 1e-3), rel=1e-9)
    band = (0.11 + 4 * 0.01) / 5
    assert float(seam(x, halves(), reach=3)) == pytest.approx((band + 1e-3) / (0.01 + 1e-3), rel=1e-9)
    assert float(seam(x.transpose(1, 2), halves().T)) == pytest.approx(float(seam(x, halves())), rel=1e-9)


def test_seam_is_one_without_a_seam() -> None:
    assert float(seam(torch.full((1, 16, 20, 3), 0.4), halves())) == 1.0
    noise = pictures(3, 1, 200, 200)
    assert float(seam(noise, halves(200, 200))) == pytest.approx(1.0, abs=0.1)
    stripes = torch.zeros(1, 16, 20, 3)
    stripes[:, ::2] = 1  # strong steps downward, none to the right, on either side
    assert float(seam(stripes, halves())) == 1.0


def test_seam_sees_pasted_halves_over_blended_ones() -> None:
    left, right = 0.2 + 0.1 * pictures(1, 2, 64, 64), 0.7 + 0.1 * pictures(2, 2, 64, 64)
    share = torch.linspace(1, 0, 64).reshape(1, 1, 64, 1)
    pasted = torch.where(torch.arange(64).reshape(1, 1, 64, 1) < 32, left, right)
    blended = share * left + (1 - share) * right
    assert bool((seam(pasted, halves(64, 64)) > 5).all()) and bool((seam(blended, halves(64, 64)) < 1.5).all())


def test_seam_takes_masks_of_any_form() -> None:
    labels = torch.zeros(32, 32, dtype=torch.long)
    labels[:16, 16:], labels[16:, :16], labels[16:, 16:] = 1, 2, 3
    x = torch.tensor([0.1, 0.4, 0.6, 0.9])[labels].reshape(1, 32, 32, 1)
    masks = torch.nn.functional.one_hot(labels).permute(2, 0, 1) * 0.7 + 0.1
    assert torch.equal(seam(x, masks), seam(x, labels)) and float(seam(x, labels)) > 100
    ring = torch.zeros(32, 32, dtype=torch.long)
    ring[8:24, 8:24] = 1
    assert float(seam(ring.double().reshape(1, 32, 32, 1), ring)) == pytest.approx(1.001 / 0.001)


def network(seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, 3, 3, generator=g), torch.randn(7, 5, 3, 3, generator=g)]


def test_lpips_equals_the_definition() -> None:
    kernels, weights = network(0), [torch.rand(5), torch.rand(7)]
    seen = []

    def features(x: torch.Tensor) -> list[torch.Tensor]:
        seen.append((float(x.min()), float(x.max()), x.dtype, tuple(x.shape)))
        first = torch.relu(torch.nn.functional.conv2d(x, kernels[0]))
        return [first, torch.relu(torch.nn.functional.conv2d(first, kernels[1]))]

    x, y = pictures(0), pictures(1)
    result = lpips(x, y, features, weights)
    assert all(-1 <= low < -0.9 and 0.9 < high <= 1 and shape == (2, 3, 17, 23) for low, high, _, shape in seen)
    for item in range(2):
        expected = 0.0
        maps = [[m[item].double().numpy() for m in features(2 * p.movedim(-1, 1) - 1)] for p in (x, y)]
        for a, b, w in zip(*maps, weights):
            a, b = a / (np.linalg.norm(a, axis=0) + 1e-10), b / (np.linalg.norm(b, axis=0) + 1e-10)
            expected += ((a - b) ** 2 * w.double().numpy()[:, None, None]).sum(0).mean()
        assert float(result[item]) == pytest.approx(expected, rel=1e-9)
    assert lpips(x, x, features).tolist() == [0, 0]
    assert bool((lpips(x, y, features) > result).all())  # weights below 1 count less than none


def test_embeddings() -> None:
    image, text = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    assert clip_similarity(image, text).tolist() == pytest.approx([math.sqrt(0.5), 1.0])
    start, words = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert directional_similarity(image, start, text, words).tolist() == pytest.approx([1.0, math.sqrt(0.5)])
    assert directional_similarity(start, start, text, words).tolist() == [0.0]


def test_inputs_stay_as_they_were() -> None:
    x, y = pictures(0), pictures(1)
    copies = x.clone(), y.clone()
    for metric in (l2, psnr, ssim, smoothness):
        assert metric(x, y).dtype == torch.float64
    seam(x, halves(17, 23))
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


@pytest.mark.parametrize(("call", "text"), [
    (lambda: l2(pictures(0), pictures(1, height=9)), r"of one size .*, got 17x23x3 and 9x23x3; resize one"),
    (lambda: psnr(pictures(0, 3), pictures(1, 2)), r"each of the 3 pictures, got 2; make the two batches equally long"),
    (lambda: ssim(pictures(0, height=8), pictures(1, height=8)), "at least 11x11 pixels, got 23x8; use larger"),
    (lambda: seam(pictures(0), halves()), "pictures' size 23x17, got 20x16; draw the masks at that size"),
    (lambda: seam(pictures(0), torch.zeros(17, 23)), "at least two regions that touch, got one; give it the masks"),
    (lambda: seam(pictures(0), halves(17, 23), reach=23), "got nothing but boundary; use larger regions"),
])
def test_pictures_that_do_not_fit(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
