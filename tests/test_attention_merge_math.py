"""Cross-attention merge against out = sum_i M_i softmax(Q K_i^T / sqrt d) V_i, written out in float64."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from mixology.attention_patches.attention_merge import MergedAttention, StyleTexts, expand_rows
from mixology.attention_patches.masks import StyleMasks
from mixology.samplers.spatial import draw_gradient_masks
from torch import Tensor

HEADS, WIDTH, INNER = 2, 12, 8


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


TO_Q, TO_K, TO_V = (draw(WIDTH, INNER, seed=seed) for seed in (1, 2, 3))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *_: Any, **__: Any) -> Tensor:
    """[B, tokens, heads * d], one head after another."""
    outputs = []
    for q_h, k_h, v_h in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v))):
        scores = q_h @ k_h.transpose(1, 2) / q_h.shape[-1] ** 0.5
        outputs.append(scores.softmax(dim=-1) @ v_h)
    return torch.cat(outputs, dim=-1)


def layer(merged: MergedAttention, n: Tensor, context: Tensor, size: tuple[int, int], value: Tensor | None = None,
          func: Any = softmax_attention) -> Tensor:
    """What the host's block does: the list patch, the projections, the override."""
    options = {"activations_shape": [len(n), INNER, *size]}
    n, keys, values = merged.join_texts(n, context, context if value is None else value, options)
    dtype = n.dtype
    return merged.attend_each(func, n @ TO_Q.to(dtype), keys @ TO_K.to(dtype), values @ TO_V.to(dtype), HEADS, None)


def plain(n: Tensor, context: Tensor, factors: Tensor | None = None) -> Tensor:
    """One text's attention, its token values scaled after the softmax."""
    values = context if factors is None else context * factors.unsqueeze(-1)
    return softmax_attention(n @ TO_Q, context @ TO_K, values @ TO_V, HEADS)


def cell_means(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks [N, H, W] averaged over the area of each cell by refining pixels until cells are whole ones."""
    fine = masks.double().repeat_interleave(height, 1).repeat_interleave(width, 2)
    rows, columns = masks.shape[1:]
    return fine.reshape(len(masks), height, rows, width, columns).mean((2, 4))


def masks_of(count: int, height: int = 12, width: int = 20, seed: int = 5) -> Tensor:
    """Random soft masks that sum to 1."""
    return draw(count, height, width, seed=seed).softmax(dim=0)


def merge_of(rows: slice, contexts: list[Tensor], masks: Tensor, factors: list[Tensor | None] | None = None,
             picture: tuple[int, int] = (6, 10)) -> tuple[slice, StyleTexts]:
    return rows, StyleTexts(contexts, factors or [None] * len(contexts), StyleMasks(masks), picture)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    """Weights are float32, so results agree to that even in float64."""
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lengths", [(77, 77), (77, 154), (154, 77, 5), (3, 1, 7, 231)])
@pytest.mark.parametrize("size", [(6, 10), (3, 5), (2, 3), (1, 1)])
def test_equals_the_weighted_sum_of_each_text_s_attention(lengths: tuple[int, ...], size: tuple[int, int]) -> None:
    """Every row in the merge; layers at the latent's size, a half of it, sizes that do not divide it, one token."""
    n = draw(2, size[0] * size[1], WIDTH)
    texts = [draw(2, tokens, WIDTH, seed=10 + i) for i, tokens in enumerate(lengths)]
    masks = masks_of(len(texts))
    merged = MergedAttention([merge_of(slice(0, 2), texts[1:], masks)], 2, None)
    weights = cell_means(cell_means(masks, 6, 10), *size)
    expected = sum(
        (weight.reshape(1, -1, 1) * plain(n, text) for weight, text in zip(weights, texts)), start=torch.zeros(()))
    ours = layer(merged, n, texts[0], size)
    close(ours, expected)
    assert not torch.allclose(ours, plain(n, texts[0]), atol=1e-2)


def test_is_not_one_softmax_over_all_texts() -> None:
    n, first, second = draw(1, 60, WIDTH), draw(1, 7, WIDTH, seed=1), draw(1, 7, WIDTH, seed=2)
    merged = MergedAttention([merge_of(slice(0, 1), [second], torch.full((2, 6, 10), 0.5))], 1, None)
    assert not torch.allclose(layer(merged, n, first, (6, 10)), plain(n, torch.cat([first, second], 1)), atol=1e-2)


def test_unmarked_rows_and_other_merges_are_untouched() -> None:
    """Rows 0 and 3..4 of six have no styles, 1..2 have two texts and 5 has three: bit for bit and by reference."""
    n, context = draw(6, 15, WIDTH), draw(6, 9, WIDTH, seed=1)
    pair, triple = draw(1, 4, WIDTH, seed=2), [draw(1, 6, WIDTH, seed=3), draw(1, 5, WIDTH, seed=4)]
    masks = masks_of(2), masks_of(3)
    merged = MergedAttention([
        merge_of(slice(1, 3), [pair], masks[0]), merge_of(slice(5, 6), triple, masks[1])], 6, None)
    ours = layer(merged, n, context, (3, 5))
    untouched = [0, 3, 4]
    assert torch.equal(ours[untouched], plain(n, context)[untouched])
    for rows, texts, own in ((slice(1, 3), [pair], masks[0]), (slice(5, 6), triple, masks[1])):
        weights = cell_means(own, 3, 5)
        all_texts = [context[rows], *(text.expand(rows.stop - rows.start, -1, -1) for text in texts)]
        expected = sum((weight.reshape(1, -1, 1) * plain(n[rows], text)
                        for weight, text in zip(weights, all_texts)), start=torch.zeros(()))
        close(ours[rows], expected)


def test_factors_act_on_one_style_s_values_only() -> None:
    """Text 1 has a factor for each row, text 2 none, text 3 one for all; the rows' own values come scaled already."""
    rows = slice(1, 4)
    n, context = draw(4, 15, WIDTH), draw(4, 9, WIDTH, seed=1)
    own = draw(4, 9, seed=9)
    texts = [draw(1, tokens, WIDTH, seed=tokens) for tokens in (4, 5, 6)]
    factors = [draw(3, 4, seed=7), None, draw(1, 6, seed=8)]
    masks = masks_of(4)
    merged = MergedAttention([merge_of(rows, texts, masks, factors)], 4, None)
    ours = layer(merged, n, context, (3, 5), value=context * own.unsqueeze(-1))
    expected = [plain(n[rows], context[rows], own[rows])]
    for text, factor in zip(texts, factors):
        expected.append(plain(n[rows], text.expand(3, -1, -1), factor))
    weights = cell_means(masks, 3, 5).reshape(4, 1, -1, 1)
    close(ours[rows], sum((w * part for w, part in zip(weights, expected)), start=torch.zeros(())))
    close(ours[:1], plain(n[:1], context[:1], own[:1]))


def test_one_text_for_each_image() -> None:
    """A conditioning may hold a batch of texts, one for each row of the merge."""
    n, context, texts = draw(3, 15, WIDTH), draw(3, 9, WIDTH, seed=1), draw(2, 4, WIDTH, seed=2)
    masks = masks_of(2)
    ours = layer(MergedAttention([merge_of(slice(1, 3), [texts], masks)], 3, None), n, context, (3, 5))
    for row, text in ((1, texts[:1]), (2, texts[1:])):
        single = MergedAttention([merge_of(slice(0, 1), [text], masks)], 1, None)
        close(ours[row:row + 1], layer(single, n[row:row + 1], context[row:row + 1], (3, 5)), 1e-12)


def test_expand_rows() -> None:
    part = draw(2, 3, 4)
    expanded = expand_rows(part, slice(1, 3), 5)
    assert torch.equal(expanded, part[[0, 0, 1, 0, 0]]) and expanded.shape == (5, 3, 4)
    assert torch.equal(expand_rows(part[:1], slice(0, 5), 5), part[[0] * 5])


# --------------------------------------------------------------------------------------------------- masks

def weights_of(masks: StyleMasks, *place: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [N, tokens] that blending by the shares amounts to."""
    shares = masks.weights(*place).to(dtype)
    weights = [torch.ones_like(shares[0])]
    for share in shares:
        weights = [*(weight * (1 - share) for weight in weights), share]
    return torch.stack(weights).squeeze(-1)


@pytest.mark.parametrize("layer_size", [(7, 11), (4, 6), (3, 5), (2, 3), (1, 2)])
@pytest.mark.parametrize("masks", [masks_of(2, 56, 88), masks_of(4, 30, 17), masks_of(3, 7, 11)])
def test_masks_are_averaged_over_each_token(masks: Tensor, layer_size: tuple[int, int]) -> None:
    weights = weights_of(StyleMasks(masks.float()), (7, 11), None, layer_size)
    expected = cell_means(cell_means(masks, 7, 11), *layer_size).flatten(1)
    close(weights, expected)
    close(weights.sum(0), torch.ones(weights.shape[1]))
    half = weights_of(StyleMasks(masks.float()), (7, 11), None, layer_size, dtype=torch.float16)
    close(half, expected, 2e-3)


def test_a_region_sees_its_part_of_the_picture() -> None:
    """Not the whole masks squeezed into it; an area that reaches out of the picture ends with it."""
    masks = StyleMasks(draw_gradient_masks(20, 12, "linear", 2, 0, 20, 1))
    full = weights_of(masks, (6, 10), None, (6, 10)).reshape(2, 6, 10)
    part = weights_of(masks, (6, 10), (4, 6, 1, 4), (4, 6)).reshape(2, 4, 6)
    close(part, full[:, 1:5, 4:10])
    close(weights_of(masks, (6, 10), (4, 6, 1, 4), (2, 3)), cell_means(full[:, 1:5, 4:10], 2, 3).flatten(1))
    close(weights_of(masks, (6, 10), (8, 8, 3, 5), (3, 5)).reshape(2, 3, 5), full[:, 3:, 5:])


def test_masks_are_resized_once_for_each_size_and_place() -> None:
    masks = StyleMasks(masks_of(2))
    first = masks.weights((6, 10), None, (3, 5))
    assert masks.weights((6, 10), None, (3, 5)) is first
    for place in (((6, 10), (3, 5, 0, 0), (3, 5)), ((5, 10), None, (3, 5)), ((6, 10), None, (5, 3))):
        assert masks.weights(*place) is not first


def test_unpainted_places_are_the_first_style_s() -> None:
    masks = torch.zeros(2, 6, 10)
    masks[1, :, 5:] = 1
    n, first, second = draw(1, 60, WIDTH), draw(1, 7, WIDTH, seed=1), draw(1, 7, WIDTH, seed=2)
    ours = layer(MergedAttention([merge_of(slice(0, 1), [second], masks)], 1, None), n, first, (6, 10))
    left = (torch.arange(60) % 10 < 5)
    assert torch.equal(ours[0, left], plain(n, first)[0, left])
    assert torch.equal(ours[0, ~left], plain(n, second)[0, ~left])


# --------------------------------------------------------------------------------------------------- algebra

def test_equal_texts_are_the_plain_attention_bit_for_bit() -> None:
    n, text = draw(2, 60, WIDTH), draw(1, 7, WIDTH, seed=1)
    context = text.expand(2, -1, -1)
    merged = MergedAttention([merge_of(slice(0, 2), [text, text], masks_of(3))], 2, None)
    assert torch.equal(layer(merged, n, context, (6, 10)), plain(n, context))


def test_order_of_the_styles_does_not_matter() -> None:
    n, texts, masks = draw(1, 60, WIDTH), [draw(1, 5 + i, WIDTH, seed=i) for i in range(4)], masks_of(4)
    order = [2, 0, 3, 1]
    swapped = [texts[i] for i in order]
    first = MergedAttention([merge_of(slice(0, 1), texts[1:], masks)], 1, None)
    other = MergedAttention([merge_of(slice(0, 1), swapped[1:], masks[order])], 1, None)
    close(layer(first, n, texts[0], (6, 10)), layer(other, n, swapped[0], (6, 10)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept_and_nothing_is_modified(dtype: torch.dtype) -> None:
    n, context, text = (draw(2, tokens, WIDTH, seed=tokens, dtype=dtype) for tokens in (15, 7, 9))
    factors, masks = draw(2, 9, dtype=dtype), masks_of(2).float()
    given = n, context, text, factors, masks
    before = [tensor.clone() for tensor in given]
    merge = merge_of(slice(0, 2), [text], masks, [factors])
    ours = layer(MergedAttention([merge], 2, None), n, context, (3, 5))
    assert ours.dtype == dtype and ours.isfinite().all()
    assert all(torch.equal(old, new) for old, new in zip(before, given))
    parts = [plain(n.double(), context.double()), plain(n.double(), text.double(), factors.double())]
    exact = sum((weight.reshape(1, -1, 1) * part for weight, part in zip(cell_means(masks, 3, 5), parts)),
                start=torch.zeros(()))
    scale = float(exact.abs().max())
    steps = 40 * torch.finfo(dtype).eps  # projections, softmax and blend each round a few times
    assert float((ours.double() - exact).abs().max()) < scale * max(steps, 1e-6)


# --------------------------------------------------------------------------------------------------- the host's slots

def test_self_attention_passes_through_and_options_are_handed_on() -> None:
    seen: list[tuple[Any, ...]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((q.shape, heads, args, kwargs))
        return softmax_attention(q, k, v, heads)

    n, context, text = draw(3, 15, WIDTH), draw(3, 7, WIDTH, seed=1), draw(1, 9, WIDTH, seed=2)
    merged = MergedAttention([merge_of(slice(1, 3), [text], masks_of(2))], 3, None)
    hidden = n @ TO_Q
    ours = merged.attend_each(kernel, hidden, hidden, hidden, HEADS, attn_precision=None)
    assert torch.equal(ours, softmax_attention(hidden, hidden, hidden, HEADS))
    assert seen == [((3, 15, INNER), HEADS, (), {"attn_precision": None})]
    layer(merged, n, context, (3, 5), func=kernel)
    assert [shape for shape, *_ in seen[1:]] == [(3, 15, INNER), (2, 15, INNER)], "queries of the merge's rows only"
    again = merged.attend_each(kernel, hidden, hidden, hidden, HEADS)
    assert torch.equal(again, ours), "the next self-attention is one again"


def test_an_override_found_in_the_slot_is_called_for_every_text() -> None:
    calls: list[int] = []

    def inner(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(k.shape[1])
        return func(q, k, v, heads, *args, **kwargs) * 2

    n, context, text = draw(1, 15, WIDTH), draw(1, 7, WIDTH, seed=1), draw(1, 9, WIDTH, seed=2)
    merges = [merge_of(slice(0, 1), [text], masks_of(2))]
    ours = layer(MergedAttention(merges, 1, inner), n, context, (3, 5))
    close(ours, layer(MergedAttention(merges, 1, None), n, context, (3, 5)) * 2, 1e-12)
    assert calls == [7, 9]


def test_changed_tokens_and_a_dropped_override_are_errors() -> None:
    n, context, text = draw(1, 15, WIDTH), draw(1, 7, WIDTH, seed=1), draw(1, 9, WIDTH, seed=2)
    merged = MergedAttention([merge_of(slice(0, 1), [text], masks_of(2))], 1, None)
    with pytest.raises(ValueError, match="expected 20 picture and 16 text tokens in a layer, got 15 and 16; remove"):
        layer(merged, n, context, (4, 5))
    options = {"activations_shape": [1, INNER, 3, 5]}
    _, keys, values = merged.join_texts(n, context, context, options)
    with pytest.raises(ValueError, match="expected 15 picture and 16 text tokens in a layer, got 15 and 32; remove"):
        merged.attend_each(softmax_attention, n @ TO_Q, (keys @ TO_K).repeat(1, 2, 1), values @ TO_V, HEADS)
    merged.join_texts(n, context, context, options)
    with pytest.raises(ValueError, match="expected to compute the model's text attention, got a node that replaces"):
        merged.join_texts(n, context, context, options)
