"""Cross-attention merge on the demo checkpoint beside LoRA, LoRA hooks, ControlNet, regions and token scale."""
from __future__ import annotations

from typing import Any

import nodes as core
import pytest
import tiny
import torch
from attention_merge_rig import Expected, merge, merge_explicitly, sample
from company import CAPTION, COMPANY, Parts
from mixology.host.token_scale import scale_tokens
from mixology.samplers.spatial import draw_gradient_masks
from torch import Tensor

OTHER = "a dotted green heart on a white background"
MASKS = draw_gradient_masks(112, 128, "logistic", 2, 30, 20, 1)  # the size of the picture, slanted


@pytest.fixture(scope="module")
def loaded(checkpoints: Any) -> Parts:
    return checkpoints("shapes")


def encode(clip: Any, text: str) -> Any:
    return core.CLIPTextEncode().encode(clip, text)[0]


def draw(parts: Parts, batch: int = 1) -> Tensor:
    return sample(tiny.cfg_guider(*parts, 3.0), batch, 16, 14, steps=2)


def strip(conditioning: Any) -> Any:
    return [[text, {key: value for key, value in options.items() if key != "model_conds"}]
            for text, options in conditioning]


def region_of(conditioning: Any) -> tuple[int, int, int, int] | None:
    return next((options["area"] for _, options in conditioning if "area" in options), None)


@pytest.mark.parametrize("company", COMPANY)
@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_company_acts_on_the_merged_prompt_as_on_any(loaded: Parts, company: Any, batch: int) -> None:
    """Equal to the merge written out wherever this text is read (float32 rounding); afterwards nothing is left."""
    model, clip, _ = loaded
    first, other, negative = (encode(clip, text) for text in (CAPTION, OTHER, ""))
    merged, positive = merge(model, MASKS, first, other)
    before = draw((merged, positive, negative), batch)
    parts = company((merged, positive, negative))
    ours = draw(parts, batch)
    expected = [Expected([first[0][0], other[0][0]], MASKS)]
    by_hand = company((model, first, negative))
    area = region_of(parts[1])
    if area is not None:  # the region and the whole picture hold the same text
        with merge_explicitly(by_hand[0], *expected, of_shape=(16, 14)), merge_explicitly(
                by_hand[0], Expected(expected[0].texts, MASKS, area=area, picture=(16, 14)), of_shape=area[:2]):
            reference = draw(by_hand, batch)
    else:
        with merge_explicitly(by_hand[0], *expected):
            reference = draw(by_hand, batch)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, draw(by_hand, batch), atol=1e-2)
    assert not torch.allclose(ours, before, atol=1e-3)
    assert torch.equal(draw((merged, positive, negative), batch), before)
    assert torch.equal(draw((merged, strip(positive), negative), batch), draw((model, first, negative), batch))


def test_a_scaled_prompt_on_each_side(loaded: Parts) -> None:
    """Words of the first and the other prompt, one s for each image of the batch there."""
    model, clip, _ = loaded
    negative = encode(clip, "")
    scaled, first = scale_tokens(model, clip, CAPTION, "red = -1.5", 0.0, 1.0)
    scaled, other = scale_tokens(scaled, clip, OTHER, "green = [-1, 0, 2]", 0.0, 1.0)
    merged, positive = merge(scaled, MASKS, first, other)
    own = []
    scales = (first, CAPTION, "red", [-1.5]), (other, OTHER, "green", [-1.0, 0.0, 2.0])
    for conditioning, text, phrase, values in scales:
        factors = torch.ones(len(values), conditioning[0][0].shape[1])
        factors[:, text.split().index(phrase) + 1] = torch.tensor(values)
        own.append(lambda sigma, factors=factors: factors)
    with merge_explicitly(model, Expected([first[0][0], other[0][0]], MASKS, own)):
        expected = draw((model, encode(clip, CAPTION), negative), 3)
    torch.testing.assert_close(draw((merged, positive, negative), 3), expected, rtol=1e-4, atol=1e-4)
