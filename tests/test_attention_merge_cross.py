"""Cross-attention merge on transformers with text cross-attention, against the merge written out on their modules."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.context_windows
import pytest
import tiny
import torch
from attention_merge_cross_rig import (
    NAMES,
    WITH_PICTURE,
    conditioning,
    error,
    family_of,
    merged_explicitly,
    sample,
    spread,
)
from attention_merge_rig import merge, soft_masks
from family import draw
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.marks import mark_conditioning
from torch import Tensor

pytestmark = pytest.mark.seam

TOLERANCE = 3e-5  # float32 rounding through two steps at cfg 3, over the picture's deviation
EFFECT = 0.1


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def model_of(models: dict[str, Any], name: str) -> Any:
    return models.setdefault(name, family_of(name).model())


def texts_of(name: str) -> list[list[Any]]:
    """A text, one three times as long, and a short one."""
    return [conditioning(name, seed, tokens) for seed, tokens in ((1, 11), (3, 33), (4, 5))]


# --------------------------------------------------------------------------------------------------- the equation

@pytest.mark.parametrize("tokens", [11, 6], ids=["in one call", "negative on its own"])
def test_soft_masks_are_the_weighted_sum(models: dict[str, Any], name: str, tokens: int) -> None:
    """Batch 2 at sizes that tokens do not divide; the negative stays as it is."""
    model, texts, masks = model_of(models, name), texts_of(name), soft_masks(3)
    negative = conditioning(name, 2, tokens)
    merged, positive = merge(model, masks, *texts)
    ours = sample(merged, name, positive, negative)
    with merged_explicitly(model, texts, spread(name, masks)) as seen:
        assert error(ours, sample(model, name, texts[0], negative)) < TOLERANCE
    assert set(seen) == {2}
    assert all(error(ours, sample(model, name, text, negative)) > EFFECT for text in texts)


def test_equal_prompts_and_one_style_alone_are_plain_runs(models: dict[str, Any], name: str) -> None:
    model, texts, negative = model_of(models, name), texts_of(name), conditioning(name, 2)
    plain = [sample(model, name, text, negative) for text in texts]
    merged, positive = merge(model, soft_masks(3), *[texts[0]] * 3)
    assert error(sample(merged, name, positive, negative), plain[0]) < 1e-6
    assert torch.equal(sample(merged, name, texts[0], negative), plain[0]), "a prompt that is not merged"
    for style, expected in enumerate(plain):
        masks = torch.zeros(3, 9, 9)
        masks[style] = 1
        _, positive = merge(model, masks, *texts)
        assert error(sample(merged, name, positive, negative), expected) < TOLERANCE


def test_merged_positive_and_negative(models: dict[str, Any], name: str) -> None:
    """Two marks in one call, of other masks and lengths."""
    model, masks = model_of(models, name), (soft_masks(2, seed=1), soft_masks(3, seed=2))
    first, second = texts_of(name)[:2], [conditioning(name, seed, tokens) for seed, tokens in ((2, 11), (6, 9), (7, 4))]
    merged, positive = merge(model, masks[0], *first)
    merged, negative = merge(merged, masks[1], *second)
    ours = sample(merged, name, positive, negative)
    with merged_explicitly(model, first, spread(name, masks[0])), merged_explicitly(
            model, second, spread(name, masks[1]), place=1):
        assert error(ours, sample(model, name, first[0], second[0])) < TOLERANCE


def test_no_evaluation_is_added(models: dict[str, Any], name: str) -> None:
    counted, calls = tiny.count_evaluations(model_of(models, name))
    merged, positive = merge(counted, soft_masks(3), *texts_of(name))
    sample(merged, name, positive, conditioning(name, 2))
    assert calls == [4, 4]


@pytest.mark.parametrize("name", ["wan21_t2v", "anima"], indirect=True)
def test_a_style_may_hold_a_text_for_each_image(models: dict[str, Any], name: str) -> None:
    model, (first, second, _), negative = model_of(models, name), texts_of(name), conditioning(name, 2)
    second = [[torch.cat([second[0][0], second[0][0].flip(2)]), second[0][1]]]
    merged, positive = merge(model, soft_masks(2), first, second)
    ours = sample(merged, name, positive, negative)
    with merged_explicitly(model, [first, second], spread(name, soft_masks(2))):
        assert error(ours, sample(model, name, first, negative)) < TOLERANCE


# --------------------------------------------------------------------------------------------------- scaled words

def scaled(text: list[Any], *words: int) -> tuple[list[Any], Tensor]:
    """A prompt with some words turned round, and the factors of its tokens as the network has them."""
    factors = torch.ones(1, text[0][0].shape[1])
    factors[:, list(words)] = -1.5
    padding = 512 - factors.shape[1] if "t5xxl_ids" in text[0][1] else 0
    return (mark_conditioning(text, SCALE_KEY, TokenScale(factors, 0.0, 1.0)),
            torch.nn.functional.pad(factors, (0, padding), value=1.0))


@pytest.mark.parametrize("first", [True, False], ids=["scale first", "merge first"])
def test_scaled_words_act(models: dict[str, Any], name: str, first: bool) -> None:
    """Of a style, of the prompt itself, and of the negative beside it, whichever node comes first."""
    model, masks = model_of(models, name), soft_masks(2)
    texts, plain_negative = texts_of(name)[:2], conditioning(name, 2)
    (own, own_factors), (other, factors) = scaled(texts[0], 2, 3), scaled(texts[1], 4, 20)
    negative, negative_factors = scaled(plain_negative, 1)
    merged, positive = merge(patch_model(model) if first else model, masks, own, other)
    ours = sample(patch_model(merged), name, positive, negative)
    with merged_explicitly(model, texts, spread(name, masks), factors=[own_factors, factors]), merged_explicitly(
            model, [plain_negative], torch.ones_like(spread(name, masks)[:1]), place=1, factors=[negative_factors]):
        assert error(ours, sample(model, name, texts[0], plain_negative)) < TOLERANCE
    merged, positive = merge(model, masks, *texts)
    assert error(ours, sample(merged, name, positive, plain_negative)) > EFFECT


# --------------------------------------------------------------------------------------------------- videos

VIDEO = "wan21_t2v"


def frame_weights(masks: Tensor) -> Tensor:
    """Masks [styles, frames, H, W] at a video's tokens."""
    return torch.cat([spread(VIDEO, frame, frames=1) for frame in masks.unbind(1)], dim=1)


def moving_masks(frames: int) -> Tensor:
    """Two styles' masks for each frame, [2, frames, H, W]."""
    return torch.stack([soft_masks(2, seed=seed) for seed in range(frames)], dim=1)


def latent_frames(masks: Tensor) -> Tensor:
    """Masks of nine frames of a video as three of a latent see them: the first alone, then four at a time."""
    return torch.stack([masks[:, 0], masks[:, 1:5].mean(1), masks[:, 5:].mean(1)], dim=1)


def video(frames: int) -> Tensor:
    return draw(2, 16, frames, *family_of(VIDEO).size, seed=7)


@pytest.mark.parametrize(("frames", "rest"), [(3, False), (3, True), (9, False), (9, True)])
def test_masks_for_each_frame(models: dict[str, Any], frames: int, rest: bool) -> None:
    """As many as the latent or the video has frames, of each style or of all but the last."""
    model, texts, negative = model_of(models, VIDEO), texts_of(VIDEO)[:2], conditioning(VIDEO, 2)
    masks = moving_masks(frames)
    merged, positive = merge(model, masks[:1].flatten(0, 1) if rest else masks.flatten(0, 1), *texts)
    ours = sample(merged, VIDEO, positive, negative, latent=video(3))
    weights = frame_weights(masks if frames == 3 else latent_frames(masks))
    with merged_explicitly(model, texts, weights):
        assert error(ours, sample(model, VIDEO, texts[0], negative, latent=video(3))) < TOLERANCE
    _, still = merge(model, masks[:, 0], *texts)
    assert error(ours, sample(merged, VIDEO, still, negative, latent=video(3))) > EFFECT


def with_windows(model: Any) -> Any:
    """The host's Context Windows over the frames."""
    windows, clone = comfy.context_windows, model.clone()
    clone.model_options["context_handler"] = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD),
        fuse_method=windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID),
        context_length=2, context_overlap=1, dim=2)
    return clone


def test_windows_of_a_video_see_their_frames_masks(models: dict[str, Any]) -> None:
    model, texts, negative = model_of(models, VIDEO), texts_of(VIDEO)[:2], conditioning(VIDEO, 2)
    masks = moving_masks(3)
    merged, positive = merge(model, masks.flatten(0, 1), *texts)
    latent = video(3)[:1]  # the host's windows over frames hold one video
    ours = sample(with_windows(merged), VIDEO, positive, negative, latent=latent)

    def seen(options: dict[str, Any]) -> Tensor:
        window = options["context_window"]
        before = getattr(window, "causal_anchor_index", None)  # newer hosts show a frame before the window
        return frame_weights(masks[:, [*([] if before is None else [before]), *window.index_list]])

    with merged_explicitly(model, texts, seen):
        expected = sample(with_windows(model), VIDEO, texts[0], negative, latent=latent)
    assert error(ours, expected) < TOLERANCE


@pytest.mark.parametrize("area", [(5, 4, 3, 2), (2, 5, 4, 1, 3, 2)], ids=["of every frame", "of some frames"])
def test_an_area_sees_its_part_of_the_masks(models: dict[str, Any], area: tuple[int, ...]) -> None:
    model, texts, negative = model_of(models, VIDEO), texts_of(VIDEO)[:2], conditioning(VIDEO, 2)
    masks, other = moving_masks(3), conditioning(VIDEO, 8)
    merged, positive = merge(model, masks.flatten(0, 1), *texts)
    ours, plain = ([[text[0][0], {**text[0][1], "area": area}], *other] for text in (positive, texts[0]))
    cells, first, count = (*area[-4:-2], *area[-2:]), 0, 3
    if len(area) == 6:
        cells, first, count = (area[1], area[2], area[4], area[5]), area[3], area[0]
    weights = torch.cat([spread(VIDEO, masks[:, frame], frames=1, area=cells) for frame in range(first, first + count)],
                        dim=1)
    result = sample(merged, VIDEO, ours, negative, latent=video(3))
    with merged_explicitly(model, texts, weights) as seen:
        assert error(result, sample(model, VIDEO, plain, negative, latent=video(3))) < TOLERANCE
    assert seen


def test_one_conditioning_for_two_models_one_after_the_other(models: dict[str, Any]) -> None:
    """Wan 2.2's experts: the steps at high noise on the one, the rest on the other."""
    experts = model_of(models, VIDEO), family_of(VIDEO).model(seed=1)
    texts, negative, masks = texts_of(VIDEO), conditioning(VIDEO, 2), soft_masks(3)
    (high, positive), (low, _) = (merge(model, masks, *texts) for model in experts)
    sigmas = tiny.sigmas_of(experts[0], "simple", 4)

    def run(first: Any, then: Any, prompt: list[Any]) -> Tensor:
        between = sample(first, VIDEO, prompt, negative, sigmas=sigmas[:3])
        return sample(then, VIDEO, prompt, negative, latent=between, noise=torch.zeros_like(between), sigmas=sigmas[2:])

    ours = run(high, low, positive)
    with merged_explicitly(experts[0], texts, spread(VIDEO, masks)), merged_explicitly(
            experts[1], texts, spread(VIDEO, masks)):
        assert error(ours, run(*experts, texts[0])) < TOLERANCE
    with merged_explicitly(experts[0], texts, spread(VIDEO, masks)):
        assert error(ours, run(*experts, texts[0])) > EFFECT


def test_tokens_of_reference_pictures_read_all_styles(models: dict[str, Any]) -> None:
    """Frames that a Wan model reads behind the video's (Phantom) have no place in the masks."""
    model, texts, masks = model_of(models, VIDEO), texts_of(VIDEO)[:2], soft_masks(2)
    reference = {"time_dim_concat": draw(1, 16, 1, *family_of(VIDEO).size, seed=9)}
    texts = [[[text[0][0], {**text[0][1], **reference}]] for text in texts]
    merged, positive = merge(model, masks, *texts)
    ours = sample(merged, VIDEO, positive, conditioning(VIDEO, 2))
    weights = spread(VIDEO, masks)
    share = spread(VIDEO, masks.mean((1, 2), keepdim=True).expand_as(masks), frames=1)
    with merged_explicitly(model, texts, torch.cat([weights, share], dim=1)) as seen:
        assert error(ours, sample(model, VIDEO, texts[0], conditioning(VIDEO, 2))) < TOLERANCE
    assert seen


# --------------------------------------------------------------------------------------------------- refusals

def test_masks_for_other_frames_are_refused(models: dict[str, Any]) -> None:
    model, texts = model_of(models, VIDEO), texts_of(VIDEO)[:2]
    merged, positive = merge(model, moving_masks(4).flatten(0, 1), *texts)
    with pytest.raises(ValueError, match="expected 2 masks, or that many for each of 3 latent or 9 video frames, all "
                                         "of one style behind one another .*, got 8; join whole mask videos with B"):
        sample(merged, VIDEO, positive, conditioning(VIDEO, 2), latent=video(3))


@pytest.mark.parametrize(("name", "masks", "styles"), [("anima", 6, 2), (VIDEO, 7, 3)])
def test_masks_that_fit_no_frames_are_refused_at_once(models: dict[str, Any], name: str, masks: int, styles: int,
                                                      ) -> None:
    with pytest.raises(ValueError, match=f"^{styles} styles expect {styles} masks, or {styles - 1} where the last"):
        merge(model_of(models, name), soft_masks(masks), *texts_of(name)[:styles])


@contextmanager
def replaced_attention(model: Any) -> Iterator[None]:
    """A node that computes a layer's text attention by itself."""
    layer = model.model.diffusion_model.blocks[0].cross_attn
    layer.forward = lambda x, *_, **__: x
    try:
        yield
    finally:
        del layer.forward


def test_a_node_that_replaces_the_attention_is_refused(models: dict[str, Any]) -> None:
    merged, positive = merge(model_of(models, VIDEO), soft_masks(2), *texts_of(VIDEO)[:2])
    with replaced_attention(merged), pytest.raises(ValueError, match="expected to compute the model's text attention"):
        sample(merged, VIDEO, positive, conditioning(VIDEO, 2))
    assert sample(merged, VIDEO, positive, conditioning(VIDEO, 2)).isfinite().all(), "nothing is left behind"


def test_a_picture_beside_the_text_is_left_alone(models: dict[str, Any]) -> None:
    """Also where it has as many tokens as all texts together."""
    model, masks, negative = model_of(models, WITH_PICTURE), soft_masks(2), conditioning(WITH_PICTURE, 2)
    texts = [conditioning(WITH_PICTURE, seed, tokens) for seed, tokens in ((1, 11), (3, 246))]
    merged, positive = merge(model, masks, *texts)
    ours = sample(merged, WITH_PICTURE, positive, negative)
    with merged_explicitly(model, texts, spread(WITH_PICTURE, masks)):
        assert error(ours, sample(model, WITH_PICTURE, texts[0], negative)) < TOLERANCE
