"""The judge of demo pictures: what it reads on fresh drawings, on spoilt ones and where there is nothing to read."""
from __future__ import annotations

import io
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixology.demo.judge import VALUES, Verdict, judge_pictures, judge_region, silhouette_overlap
from mixology.demo.world import COLOURS, SHAPES, TEXTURES, Scene, draw_scene
from PIL import Image

FRESH = 10_000_000  # training draws its seeds below
COUNT = 256


def random_scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    scenes = []
    for _ in range(count):
        colour, background = rng.sample(list(COLOURS), 2)
        scenes.append(Scene(rng.choice(SHAPES), colour, rng.choice(TEXTURES), background))
    return scenes


def draw(scenes: list[Scene], seed: int, width: int = 128, height: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = [draw_scene(scene, seed + i, width, height) for i, scene in enumerate(scenes)]
    return torch.stack([image for image, _ in drawn]), torch.stack([mask for _, mask in drawn])


def blur(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of [1, C, H, W]."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(picture.shape[1], 1, 1, -1)
    padded = F.pad(picture, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel, groups=picture.shape[1])
    return F.conv2d(across, kernel.transpose(2, 3), groups=picture.shape[1])


def compress(image: torch.Tensor, quality: int) -> torch.Tensor:
    """One image [H, W, C] through JPEG."""
    stream = io.BytesIO()
    Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save(stream, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(stream))).float() / 255


def spoil(images: torch.Tensor, masks: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What generated pictures suffer from: wobble, blur, wrong tints, uneven light, noise and JPEG."""
    generator = torch.Generator().manual_seed(seed)
    spoilt, wobbled = [], []
    for image, mask in zip(images, masks):
        height, width = mask.shape
        picture = torch.cat([image, mask[..., None]], dim=2).permute(2, 0, 1)[None]  # HWC -> BCHW
        wobble = F.interpolate(torch.randn(1, 2, 7, 7, generator=generator) * 2.0 * 2 / 128, size=(height, width),
                               mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        grid = F.affine_grid(torch.eye(2, 3)[None], list(picture.shape), align_corners=False) + wobble
        picture = F.grid_sample(picture, grid, padding_mode="border", align_corners=False)
        sigma, *slopes = torch.rand(3, generator=generator).tolist()
        light = (slopes[0] - 0.5) * torch.linspace(-1, 1, width) + (slopes[1] - 0.5) * torch.linspace(
            -1, 1, height)[:, None]
        tint = 1 + 0.1 * (2 * torch.rand(1, 3, 1, 1, generator=generator) - 1)
        colours = blur(picture[:, :3], 0.3 + 1.2 * sigma) * tint + 0.1 * light
        colours = (colours + 0.04 * torch.randn(colours.shape, generator=generator)).clamp(0, 1)
        spoilt.append(compress(colours[0].permute(1, 2, 0), quality=60))
        wobbled.append(picture[0, 3])
    return torch.stack(spoilt), torch.stack(wobbled)


def wanted(scenes: list[Scene], attribute: str) -> list[str]:
    return [getattr(scene, attribute) for scene in scenes]


def assert_reads(verdict: Verdict, scenes: list[Scene], share: float) -> None:
    found = {name: verdict.recognised(name, wanted(scenes, name)).float().mean().item() for name in VALUES}
    assert min(found.values()) >= share, found


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return random_scenes(COUNT, seed=3)


@pytest.fixture(scope="module")
def drawings(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(scenes, FRESH)


@pytest.fixture(scope="module")
def spoilt(drawings: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return spoil(*drawings, seed=4)


@pytest.fixture(scope="module")
def verdict(drawings: tuple[torch.Tensor, torch.Tensor]) -> Verdict:
    return judge_pictures(drawings[0])


@pytest.fixture(scope="module")
def spoilt_verdict(spoilt: tuple[torch.Tensor, torch.Tensor]) -> Verdict:
    return judge_pictures(spoilt[0])


@pytest.mark.slow
def test_reads_fresh_drawings(verdict: Verdict, scenes: list[Scene]) -> None:
    assert_reads(verdict, scenes, 0.98)


@pytest.mark.slow
def test_reads_spoilt_drawings(spoilt_verdict: Verdict, scenes: list[Scene]) -> None:
    assert_reads(spoilt_verdict, scenes, 0.95)


@pytest.mark.slow
def test_finds_the_silhouette(verdict: Verdict, drawings: tuple[torch.Tensor, torch.Tensor], spoilt_verdict: Verdict,
                              spoilt: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert verdict.present.all() and spoilt_verdict.present.all()
    assert silhouette_overlap(verdict.mask, drawings[1]).mean() >= 0.93
    assert silhouette_overlap(spoilt_verdict.mask, spoilt[1]).mean() >= 0.93
    torch.testing.assert_close(verdict.presence, drawings[1].mean(dim=(1, 2)), rtol=0, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("attribute", list(VALUES))
def test_each_value_is_told_from_all_others(attribute: str, verdict: Verdict, spoilt_verdict: Verdict,
                                            scenes: list[Scene]) -> None:
    truth = wanted(scenes, attribute)
    for judged in (verdict, spoilt_verdict):
        names = judged.names(attribute)
        for value in VALUES[attribute]:
            true = torch.tensor([name == value for name in truth])
            score = judged.score(attribute, value)
            assert score[true].mean() > 0.85, value
            assert score[~true].mean() < 0.02, value
            assert sum(name == value for name, is_true in zip(names, true) if is_true) >= 0.9 * true.sum(), value


@pytest.mark.slow
@pytest.mark.parametrize("attribute", list(VALUES))
def test_a_wrong_caption_is_not_recognised(attribute: str, verdict: Verdict, spoilt_verdict: Verdict,
                                           scenes: list[Scene]) -> None:
    values = VALUES[attribute]
    for step in range(1, len(values)):
        wrong = [values[(values.index(value) + step) % len(values)] for value in wanted(scenes, attribute)]
        assert verdict.recognised(attribute, wrong).float().mean() <= 0.01
        assert spoilt_verdict.recognised(attribute, wrong).float().mean() <= 0.02


def test_scores_are_shares() -> None:
    verdict = judge_pictures(draw(random_scenes(8, seed=5), FRESH + 1000)[0])
    assert set(verdict.scores) == set(VALUES)
    for attribute, scores in verdict.scores.items():
        assert scores.shape == (8, len(VALUES[attribute]))
        assert scores.min() >= 0 and scores.sum(dim=1).max() <= 1 + 1e-5


@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_an_empty_picture_shows_only_its_background(noise: float) -> None:
    images = draw([Scene(background=name) for name in COLOURS], FRESH + 2000)[0]
    verdict = judge_pictures(images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(6)))
    assert not verdict.present.any() and verdict.presence.max() < 0.01
    assert verdict.names("background") == list(COLOURS)
    for attribute in ("shape", "colour", "texture"):
        assert verdict.names(attribute) == [""] * len(COLOURS)
        assert not verdict.scores[attribute].any()


def test_what_the_world_does_not_know_is_no_value() -> None:
    images = torch.full((2, 128, 128, 3), 0.95)
    images[0, 55:70, 10:118] = torch.tensor([0.85, 0.15, 0.17])  # a bar
    images[1, 30:100, 30:100] = torch.tensor([0.4, 0.9, 0.9])  # a cyan square
    verdict = judge_pictures(images)
    assert verdict.present.all()
    assert verdict.names("shape") == ["", "square"]
    assert verdict.names("colour") == ["red", ""]


def test_a_shape_at_the_border_is_still_read() -> None:
    scene = Scene("square", "yellow", "dotted", "purple")
    images, masks = draw([scene], FRESH + 3000, 128, 220)
    top = int((masks[0].sum(dim=1) > 0).nonzero()[0]) + 4  # cuts the upper corner off
    verdict = judge_pictures(images[:, top:top + 128])
    assert images[:, top:top + 128].shape[1] == 128 and verdict.mask[0, 0].sum() > 5
    for attribute in VALUES:
        assert verdict.names(attribute) == [getattr(scene, attribute)]


@pytest.mark.parametrize("size", [(192, 192), (96, 96), (160, 96), (131, 203)], ids=str)
def test_other_sizes(size: tuple[int, int]) -> None:
    scenes = random_scenes(24, seed=7)
    images, masks = draw(scenes, FRESH + 4000, *size)
    verdict = judge_pictures(images)
    assert verdict.mask.shape == masks.shape
    assert_reads(verdict, scenes, 0.95)
    assert silhouette_overlap(verdict.mask, masks).mean() >= 0.93


def test_pictures_are_judged_independently_and_left_alone() -> None:
    images = draw(random_scenes(6, seed=8), FRESH + 5000)[0]
    before = images.clone()
    verdict, order = judge_pictures(images), torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled, alone = judge_pictures(images[order]), judge_pictures(images[2:3])
    assert torch.equal(images, before)
    for attribute in VALUES:
        torch.testing.assert_close(shuffled.scores[attribute], verdict.scores[attribute][order], rtol=0, atol=1e-4)
        torch.testing.assert_close(alone.scores[attribute], verdict.scores[attribute][2:3], rtol=0, atol=1e-4)
    torch.testing.assert_close(shuffled.mask, verdict.mask[order])
    torch.testing.assert_close(alone.presence, verdict.presence[2:3])


def test_a_fourth_channel_is_ignored() -> None:
    images = draw(random_scenes(2, seed=9), FRESH + 6000)[0]
    with_alpha = torch.cat([images, torch.rand(2, 128, 128, 1, generator=torch.Generator().manual_seed(1))], dim=3)
    assert torch.equal(judge_pictures(with_alpha).scores["shape"], judge_pictures(images).scores["shape"])


@pytest.mark.parametrize("shape", ["circle", "square", "heart"])
def test_a_region_has_its_own_texture_and_colour(shape: str) -> None:
    scenes = [Scene(shape, "green", "striped", background) for background in ("white", "purple", "yellow")]
    left, masks = draw(scenes, FRESH + 7000)
    right, _ = draw([replace(scene, texture="dotted", colour="red") for scene in scenes], FRESH + 7000)
    columns = torch.arange(128)
    middle = (masks.sum(dim=1) * columns).sum(dim=1) / masks.sum(dim=(1, 2))
    on_left = (columns < middle[:, None])[:, None, :].expand(-1, 128, -1)
    images = torch.where(on_left[..., None], left, right)
    for region, texture, colour in ((on_left, "striped", "green"), (~on_left, "dotted", "red")):
        verdict = judge_region(images, region)
        assert verdict.names("texture") == [texture] * 3
        assert verdict.names("colour") == [colour] * 3
        assert set(verdict.scores) == {"texture", "colour"}
        assert verdict.present.all()


def test_a_whole_region_is_the_picture_and_an_outer_region_is_empty() -> None:
    images = draw(random_scenes(3, seed=10), FRESH + 8000)[0]
    verdict, whole = judge_pictures(images), judge_region(images, torch.ones(128, 128, dtype=torch.bool))
    for attribute in ("texture", "colour"):
        torch.testing.assert_close(whole.scores[attribute], verdict.scores[attribute])
    torch.testing.assert_close(whole.presence, verdict.presence)
    corner = torch.zeros(128, 128)
    corner[:6, :6] = 1
    outer = judge_region(images, corner)
    assert not outer.present.any() and outer.names("texture") == [""] * 3
    assert not judge_region(images, torch.zeros(128, 128)).present.any()


def test_a_border_of_four_colours_is_judged_too() -> None:
    """No background is near the border's median, so that none of its pixels counts as evidence."""
    picture = torch.zeros(1, 64, 64, 3)
    for index, name in enumerate(("red", "orange", "purple", "green")):
        rows, columns = slice(32 * (index // 2), 32 * (index // 2) + 32), slice(32 * (index % 2), 32 * (index % 2) + 32)
        picture[:, rows, columns] = torch.tensor(COLOURS[name]) / 255
    verdict = judge_pictures(picture)
    assert torch.isfinite(verdict.score("colour", "red")).all() and torch.isfinite(verdict.mask.float()).all()


def test_silhouette_overlap_is_intersection_over_union() -> None:
    half, whole, none = torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.zeros(1, 8, 8)
    half[:, :4] = 1
    a, b = torch.cat([half, half, whole, none, none]), torch.cat([half, whole, 1 - half, half, none])
    expected = torch.tensor([1.0, 0.5, 0.5, 0.0, 1.0])
    torch.testing.assert_close(silhouette_overlap(a, b), expected)
    torch.testing.assert_close(silhouette_overlap(b > 0, a > 0), expected)


def test_mistakes_are_named() -> None:
    images = draw([Scene("ring", "red", "plain", "white")], FRESH + 9000)[0]
    verdict = judge_pictures(images)
    with pytest.raises(ValueError, match=r"Pictures must be \[B, H, W, C\] with at least 3 channels, got \(128, 128"):
        judge_pictures(images[0])
    with pytest.raises(ValueError, match="The shape must be one of circle, .*, got 'cube'"):
        verdict.score("shape", "cube")
    with pytest.raises(ValueError, match="The colour must be one of red, .*, got 'pink'"):
        verdict.recognised("colour", ["pink"])
    with pytest.raises(ValueError, match="Expected one texture for each of the 1 pictures, got 2"):
        verdict.recognised("texture", ["plain", "plain"])
    with pytest.raises(ValueError, match="This verdict knows colour, texture, got 'shape'"):
        judge_region(images, torch.ones(128, 128)).names("shape")
    with pytest.raises(ValueError, match=r"The region must be as large as the pictures, .*got \(64, 64\)"):
        judge_region(images, torch.ones(64, 64))
