"""Several texts in a transformer's cross-attention, against sum_i M_i softmax(Q K_i^T / sqrt d) V_i in float64."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_merge_rig import cell_means
from mixology.attention_patches.attention_merge_cross import CrossMerge, FrameMasks, VideoTexts
from mixology.attention_patches.masks import StyleMasks
from torch import Tensor, nn

HEADS, WIDTH = 2, 8
GRID, PICTURE = (3, 2), (6, 4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def split(part: Tensor) -> Tensor:
    return part.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *, skip_reshape: bool = False,
           ) -> Tensor:
    """As the host's: heads split already or not, [rows, tokens, heads * d] out."""
    q, k, v = (q, k, v) if skip_reshape else (split(q), split(k), split(v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Reads tokens of pictures in front of the text apart from it, as Wan's image to video does."""

    def __init__(self, attend: Any, pictures: int = 0, *masks: None, **options: Any):
        super().__init__()
        self.attend, self.pictures, self.masks, self.options = attend, pictures, masks, options

    def read(self, x: Tensor, context: Tensor) -> Tensor:
        parts = x, context, 2 * context
        if self.options.get("skip_reshape"):
            parts = tuple(map(split, parts))
        return self.attend(kernel, *parts, HEADS, *self.masks, **self.options)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        if self.pictures:
            out = self.read(x, context[:, :self.pictures])
        return out + self.read(x, context[:, self.pictures:])


def exact(x: Tensor, context: Tensor, factors: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
    values = 2 * context * (1 if factors is None else factors.unsqueeze(-1))
    return kernel(x, context, values, HEADS, mask=hidden)


def soft(*shape: int, seed: int = 5) -> Tensor:
    return draw(*shape, seed=seed).softmax(0)


def run(merged: CrossMerge, layer: Layer, x: Tensor, own: Tensor, pictures: Tensor | None = None) -> Tensor:
    """As a network runs: texts joined where it takes them in, then its layers."""
    context = merged.join_texts(own)
    if pictures is not None:
        context = torch.cat([pictures, context], dim=1)
    with merged.watch([layer]):
        return layer(x, context)


@pytest.mark.parametrize("given", [(), (None,)], ids=["mask by name", "mask by position"])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("pictures", [0, 7, 21], ids=["no picture", "a picture", "as long as the texts"])
def test_rows_of_a_merge_read_every_text_and_others_their_own(skip_reshape: bool, pictures: int, given: Any) -> None:
    own, texts = draw(4, 7, WIDTH, seed=1), [draw(1, 5, WIDTH, seed=2), draw(2, 9, WIDTH, seed=3)]
    factors = [draw(1, 5, seed=4), None]
    hidden = [None, torch.where(torch.arange(9) < 6, 0.0, -torch.inf).reshape(1, 1, 1, 9)]
    masks, x = soft(3, *PICTURE), draw(4, 6, WIDTH)
    styles = VideoTexts(texts, factors, StyleMasks(masks), PICTURE, hidden=hidden)
    merged = CrossMerge([(slice(1, 3), styles)], 4, None, grid=GRID, side=2)
    picture = draw(4, pictures, WIDTH, seed=6) if pictures else None
    options = {"skip_reshape": True} if skip_reshape else {}
    ours = run(merged, Layer(merged.attend_each, pictures, *given, **options), x, own, picture)
    weights = cell_means(masks, *GRID).flatten(1)
    expected = exact(x, own)
    parts = [expected[1:3], exact(x[1:3], texts[0], factors[0]), exact(x[1:3], texts[1], hidden=hidden[1])]
    expected[1:3] = sum((weight[:, None] * part for weight, part in zip(weights, parts)), start=torch.zeros(()))
    if picture is not None:
        expected = expected + exact(x, picture)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [0, 4])
def test_frames_have_their_masks_and_references_the_whole_s(before: int) -> None:
    own, text, masks = draw(1, 7, WIDTH, seed=1), draw(1, 5, WIDTH, seed=2), soft(2, 3, *PICTURE)
    x = draw(1, before + 12 + 3, WIDTH)
    styles = VideoTexts([text], [None], StyleMasks(masks), PICTURE, hidden=[None], frames=[2, 0])
    merged = CrossMerge([(slice(0, 1), styles)], 1, None, grid=GRID, side=2)
    merged.before = before
    ours = run(merged, Layer(merged.attend_each), x, own)
    frames = torch.cat([cell_means(masks[:, frame], *GRID).flatten(1) for frame in (2, 0)], dim=1)
    whole = masks[:, [2, 0]].mean((1, 2, 3))[:, None]
    weights = torch.cat([whole.expand(-1, before), frames, whole.expand(-1, 3)], dim=1).unsqueeze(-1)
    torch.testing.assert_close(ours, weights[0] * exact(x, own) + weights[1] * exact(x, text), rtol=1e-12, atol=1e-12)


def test_an_override_found_in_the_slot_is_called_for_every_text_and_outside() -> None:
    calls: list[int] = []

    def inner(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *_: Any, **kwargs: Any) -> Tensor:
        calls.append(k.shape[1])
        return func(q, k, v, heads, **kwargs)

    own, text, x = draw(1, 7, WIDTH, seed=1), draw(1, 5, WIDTH, seed=2), draw(1, 6, WIDTH)
    styles = VideoTexts([text], [None], StyleMasks(soft(2, *PICTURE)), PICTURE, hidden=[None])
    merged = CrossMerge([(slice(0, 1), styles)], 1, inner, grid=GRID, side=2)
    run(merged, Layer(merged.attend_each), x, own)
    joined = draw(1, 12, WIDTH, seed=3)
    assert torch.equal(merged.attend_each(kernel, joined, joined, joined, HEADS),
                       kernel(joined, joined, joined, HEADS)), "of the picture to itself, as long as the texts"
    assert calls == [7, 5, 12]


def test_what_another_node_changed_is_an_error() -> None:
    own, text = draw(2, 7, WIDTH, seed=1), draw(1, 5, WIDTH, seed=2)
    styles = VideoTexts([text], [None], StyleMasks(soft(2, *PICTURE)), PICTURE, hidden=[None])
    merged = CrossMerge([(slice(0, 2), styles)], 2, None, grid=GRID, side=2)
    layer = Layer(merged.attend_each)
    with pytest.raises(ValueError, match="expected 2 rows of text inside the model, got 3; remove the node that"):
        merged.join_texts(draw(3, 7, WIDTH))
    with pytest.raises(ValueError, match="expected 6 picture tokens in a layer, got 5; remove the node that takes so"):
        run(merged, layer, draw(2, 5, WIDTH), own)
    with pytest.raises(ValueError, match="expected 9 tokens in a layer's picture, got 7; remove the node that changes"):
        run(merged, Layer(merged.attend_each, 7), draw(2, 6, WIDTH), own, draw(2, 9, WIDTH))
    with pytest.raises(ValueError, match="expected to compute the model's text attention, got a node that replaces it"):
        run(merged, Layer(lambda func, q, *_: q), draw(2, 6, WIDTH), own)


# --------------------------------------------------------------------------------------------------- masks of frames

@pytest.mark.parametrize(("frames", "ratio", "given"), [(3, 4, 3), (3, 4, 9), (2, 8, 9), (1, 4, 1), (5, 1, 5)])
@pytest.mark.parametrize("rest", [False, True])
def test_masks_of_frames_become_those_of_a_latent_s(frames: int, ratio: int, given: int, rest: bool) -> None:
    """The first picture alone, then as many as a latent frame holds; the last style takes what is left."""
    masks = soft(3, given, 4, 5).float()
    wired = masks[:2] if rest else masks
    found = FrameMasks(wired.flatten(0, 1), styles=3).at_frames(frames, ratio).mask
    groups = [list(range(given))[:1], *[range(1 + ratio * i, 1 + ratio * (i + 1)) for i in range(frames - 1)]]
    expected = masks if given == frames else torch.stack([masks[:, list(group)].mean(1) for group in groups], dim=1)
    assert found.shape == (3, frames, 4, 5)
    torch.testing.assert_close(found, expected)


def test_masks_of_other_numbers_of_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 masks, or that many for each of 3 latent or 9 video frames, .*8;"):
        FrameMasks(soft(8, 4, 5), styles=2).at_frames(3, 4)
