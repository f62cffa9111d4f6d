"""Cross-attention merge among tokens of one sequence: pure tensors, float64, attention written out."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mixology.attention_patches.attention_merge import StyleTexts
from mixology.attention_patches.attention_merge_joint import JointMerge, share_pictures
from mixology.attention_patches.masks import StyleMasks
from mixology.attention_patches.sequence import RunningBlock
from mixology.attention_patches.together import SharedSequence, place_texts
from torch import Tensor

HEADS, WIDTH = 2, 6
GRID = (3, 5)
LENGTHS = (4, 9, 2)
PICTURE = GRID[0] * GRID[1]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """[rows, heads, tokens, d], or [rows, tokens, heads * d] without `skip_reshape`."""
    if not kwargs.get("skip_reshape"):
        q, k, v = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask.reshape(-1, 1, *mask.shape[-2:])
    out = scores.softmax(-1) @ v
    return out if kwargs.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


def masks_of(*weights: Tensor) -> StyleMasks:
    """Masks of a latent two cells to a token."""
    return StyleMasks(torch.stack([part.reshape(GRID) for part in weights]).repeat_interleave(2, 1)
                      .repeat_interleave(2, 2).float())


def soft(count: int, seed: int = 1) -> list[Tensor]:
    return list(draw(count, PICTURE, seed=seed).softmax(0))


def style(masks: StyleMasks, count: int, factors: Any = None) -> StyleTexts:
    """The texts themselves are in the sequence already."""
    return StyleTexts([torch.zeros(1, 0, 1)] * count, factors or [None] * count, masks, (6, 10))


def place(lengths: tuple[int, ...] = LENGTHS, references: int = 0) -> SharedSequence:
    pictures = PICTURE + references
    return place_texts(lengths, (lengths[0], pictures), (lengths[0], PICTURE), references=references)


def override(merges: Any, sequence: SharedSequence, inner: Any = None, running: int | None = 0) -> JointMerge:
    return JointMerge(merges, [(RunningBlock(running, True), sequence)], GRID, side=2, inner=inner)


def parts(rows: int, sequence: SharedSequence) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (draw(rows, HEADS, sequence.total, WIDTH, seed=seed) for seed in (2, 3, 4))
    return q, k, v


def alone(qkv: Any, sequence: SharedSequence, style: int, factors: Tensor | None = None) -> dict[str, Tensor]:
    """A style's attention by itself: what its text gets, and the pictures."""
    before, pictures, after = sequence.list_spans(style)
    own = [*range(before[0], sum(before)), *range(after[0], sum(after))]
    both = [*own, *range(pictures[0], sum(pictures))]
    q, k, v = (part[:, :, both] for part in qkv)
    plain = kernel(q, k, v, HEADS, skip_reshape=True)
    if factors is not None:
        v = torch.cat([v[:, :, :len(own)] * factors.reshape(len(factors), 1, -1, 1), v[:, :, len(own):]], 2)
    return {"text": plain[:, :len(own)], "pictures": kernel(q, k, v, HEADS, skip_reshape=True)[:, len(own):]}


def expected(qkv: Any, sequence: SharedSequence, weights: list[Tensor], factors: Any = None) -> Tensor:
    styles = [alone(qkv, sequence, i, factors and factors[i]) for i in range(len(weights))]
    picture = sum((weight.reshape(1, -1, 1) * part["pictures"] for weight, part in zip(weights, styles)),
                  start=torch.zeros(()))
    return torch.cat([*(part["text"] for part in styles), picture], dim=1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    """Weights are float32."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------- the equation

@pytest.mark.parametrize("lengths", [(4, 4), (4, 9, 2), (9, 1, 3, 27)])
def test_pictures_read_by_masks_and_texts_read_themselves_and_the_picture(lengths: tuple[int, ...]) -> None:
    sequence, weights = place(lengths), soft(len(lengths))
    qkv = parts(2, sequence)
    merged = override([(slice(0, 2), style(masks_of(*weights), len(lengths) - 1))], sequence)
    ours = merged.attend(kernel, *qkv, HEADS, skip_reshape=True)
    close(ours, expected(qkv, sequence, weights))
    together = kernel(*qkv, HEADS, skip_reshape=True)
    assert not torch.allclose(ours, together, atol=1e-2), "one softmax over all texts is something else"


def test_hard_masks_are_one_call_with_an_additive_mask() -> None:
    sequence = place()
    owner = torch.arange(PICTURE) % 3
    weights = [(owner == i).double() for i in range(3)]
    qkv = parts(1, sequence)
    ours = override([(slice(0, 1), style(masks_of(*weights), 2))], sequence).attend(
        kernel, *qkv, HEADS, skip_reshape=True)
    reads = torch.cat([*(torch.full((tokens,), i) for i, tokens in enumerate(LENGTHS)), owner])
    mask = torch.zeros(1, sequence.total, sequence.total, dtype=torch.float64)
    for i, (first, tokens) in enumerate(sequence.before):
        mask[0, reads != i, first:first + tokens] = -torch.inf
    close(ours, kernel(*qkv, HEADS, mask, skip_reshape=True), 1e-12)


def test_tokens_that_no_mask_gives_to_a_text_do_not_ask_it() -> None:
    """Queries of a style: its words and the picture where it is painted. With another node's override: all."""
    sequence, half = place((4, 9)), (torch.arange(PICTURE) < 6).double()
    merges = [(slice(1, 2), style(masks_of(half, 1 - half), 1))]
    qkv, asked = parts(2, sequence), []

    def count(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append((len(q), q.shape[2]))
        return kernel(q, *args, **kwargs)

    ours = override(merges, sequence).attend(count, *qkv, HEADS, skip_reshape=True)
    assert asked == [(1, 19), (1, 4 + 6), (1, 9 + PICTURE - 6)]
    whole = override(merges, sequence, inner=lambda func, *args, **kwargs: count(*args, **kwargs))
    asked.clear()
    close(whole.attend(kernel, *qkv, HEADS, skip_reshape=True), ours, 1e-12)
    assert asked == [(2, 19), (1, 24)]


def test_other_rows_and_other_merges_are_untouched() -> None:
    """Rows 0 and 3 of five have no styles, 1..2 read two texts and 4 reads two others."""
    sequence = place((4, 9, 2))
    pair, other = soft(2), soft(2, seed=8)
    qkv = parts(5, sequence)
    ours = override([(slice(1, 3), style(masks_of(*pair), 1)), (slice(4, 5), style(masks_of(*other), 1))],
                    sequence).attend(kernel, *qkv, HEADS, skip_reshape=True)
    texts = [alone(qkv, sequence, i) for i in range(3)]
    for row, weights, second in ((1, pair, 1), (2, pair, 1), (4, other, 2)):
        picture = weights[0][:, None] * texts[0]["pictures"][row] + weights[1][:, None] * texts[second]["pictures"][row]
        close(ours[row, 15:], picture)
        first, tokens = sequence.before[second]
        close(ours[row, first:first + tokens], texts[second]["text"][row], 1e-12)
    for row in (0, 3):
        assert torch.equal(ours[row, :4], texts[0]["text"][row])
        assert torch.equal(ours[row, 15:], texts[0]["pictures"][row])
        assert not ours[row, 4:15].any(), "what no row reads costs nothing"


def test_factors_act_on_one_style_and_for_the_picture_only() -> None:
    """One factor for all rows, one for each, and learned tokens in front of the words."""
    for lead in (0, 2):
        sequence = replace(place(), lead=lead)
        weights, qkv = soft(3), parts(2, sequence)
        words = [draw(1, 9 - lead, seed=11), draw(2, 2 - lead, seed=12)]
        merged = override([(slice(0, 2), style(masks_of(*weights), 2, words))], sequence)
        factors = [None, *(torch.cat([torch.ones(len(part), lead), part], 1) for part in words)]
        close(merged.attend(kernel, *qkv, HEADS, skip_reshape=True), expected(qkv, sequence, weights, factors))


def test_own_tokens_behind_the_picture_and_tokens_of_nobody() -> None:
    """As learned padding stands: each style has its own, and what is left over is read by none."""
    sequence = SharedSequence(before=((0, 4), (4, 3)), after=((22, 2), (24, 2)), pictures=(7, 15), picture=(7, 15),
                              total=30)
    weights, qkv = soft(2), parts(2, sequence)
    ours = override([(slice(0, 2), style(masks_of(*weights), 1))], sequence).attend(
        kernel, *qkv, HEADS, skip_reshape=True)
    texts = [alone(qkv, sequence, i) for i in range(2)]
    for i, (before, after) in enumerate(zip(sequence.before, sequence.after)):
        own = torch.cat([ours[:, first:first + tokens] for first, tokens in (before, after)], 1)
        close(own, texts[i]["text"], 1e-12)
    close(ours[:, 7:22], sum((w.reshape(1, -1, 1) * part["pictures"] for w, part in zip(weights, texts)),
                             start=torch.zeros(())))
    assert not ours[:, 26:].any()


def test_equal_texts_are_the_plain_attention_bit_for_bit() -> None:
    sequence = place((4, 4, 4))
    q, k, v = parts(2, sequence)
    for part in (q, k, v):
        part[:, :, 4:8] = part[:, :, 8:12] = part[:, :, :4]
    ours = override([(slice(0, 2), style(masks_of(*soft(3)), 2))], sequence).attend(
        kernel, q, k, v, HEADS, skip_reshape=True)
    single = alone((q, k, v), sequence, 0)
    assert torch.equal(ours[:, 12:], single["pictures"])
    assert all(torch.equal(ours[:, first:first + 4], single["text"]) for first in (0, 4, 8))


# --------------------------------------------------------------------------------------------------- masks, forms

def test_references_read_by_the_share_of_the_picture_and_frames_alike() -> None:
    masks = masks_of(*soft(3))
    shares = masks.weights((6, 10), None, GRID, 2)
    weights = torch.stack([part.float() for part in soft(3)])
    for front in (0, 4):
        sequence = SharedSequence((), (), (7, 2 * PICTURE + 4), (7 + front, 2 * PICTURE), 60, frames=2)
        found = share_pictures(shares, sequence).squeeze(-1)
        blended = [torch.ones(found.shape[1])]
        for share in found:
            blended = [*(part * (1 - share) for part in blended), share]
        own = weights.repeat(1, 2)
        means = own.mean(1, keepdim=True).expand(-1, 4)
        wanted = torch.cat([means, own] if front else [own, means], 1)
        torch.testing.assert_close(torch.stack(blended), wanted, rtol=1e-5, atol=1e-6)
    whole = masks_of(torch.zeros(PICTURE), torch.ones(PICTURE)).weights((6, 10), None, GRID, 2)
    assert torch.equal(share_pictures(whole, sequence), torch.ones(1, 2 * PICTURE + 4, 1))


def test_masks_cover_tokens_that_reach_beyond_the_picture() -> None:
    """A latent of 5 x 9 in tokens of 2 x 2: the last ones see one row and one column."""
    mask = draw(2, 5, 9, seed=3).softmax(0).float()
    shares = StyleMasks(mask).weights((5, 9), None, GRID, 2).reshape(GRID)
    torch.testing.assert_close(shares[2, 4], mask[1, 4, 8])
    torch.testing.assert_close(shares[0, 0], mask[1, :2, :2].mean())
    torch.testing.assert_close(shares[1, 4], mask[1, 2:4, 8].mean())


@pytest.mark.parametrize("form", ["joined heads", "joined heads, split values", "split output"])
def test_every_form_of_the_host_s_calls(form: str) -> None:
    sequence, weights = place(), soft(3)
    qkv = parts(2, sequence)
    wanted = expected(qkv, sequence, weights)
    merged = override([(slice(0, 2), style(masks_of(*weights), 2))], sequence)
    if form == "split output":
        ours = merged.attend(kernel, *qkv, HEADS, skip_reshape=True, skip_output_reshape=True)
        close(ours.transpose(1, 2).flatten(2), wanted)
        return
    q, k, v = qkv[0].transpose(1, 2), qkv[1].transpose(1, 2), qkv[2].transpose(1, 2)
    close(merged.attend(kernel, q.flatten(2), k.flatten(2), v if "split" in form else v.flatten(2), HEADS), wanted)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("queries", [1, 28])
@pytest.mark.parametrize("named", [True, False])
def test_masks_of_the_call_are_cut_to_each_text(named: bool, queries: int, hard: bool) -> None:
    """For each row of the batch and for one or all queries; or for the first text alone, as nodes make that know it."""
    half = (torch.arange(PICTURE) < 6).double()
    sequence, weights = place((4, 9)), [half, 1 - half] if hard else soft(2)
    qkv, merges = parts(2, sequence), [(slice(1, 2), style(masks_of(*weights), 1))]
    mask = draw(2, queries, sequence.total, seed=9)
    own, next_own = [*range(4), *range(13, 28)], range(4, 28)
    short, long = mask[..., own], mask[..., 4:]
    if queries > 1:
        short, long = short[:, own], long[:, 4:]
    for given, kept in ((mask, True), (short, False)):
        more = ((), {"mask": given}) if named else ((given,), {})
        ours = override(merges, sequence).attend(kernel, *qkv, HEADS, *more[0], skip_reshape=True, **more[1])
        (q, k, v), more = (tuple(part[:, :, list(places)] for part in qkv) for places in (own, next_own))
        read = kernel(q, k, v, HEADS, short, skip_reshape=True)
        q, k, v = more
        next_read = kernel(q, k, v, HEADS, long if kept else None, skip_reshape=True)
        close(ours[0, 13:], read[0, 4:])
        close(ours[1, 13:], weights[0][:, None] * read[1, 4:] + weights[1][:, None] * next_read[1, 9:])


# --------------------------------------------------------------------------------------------------- other attention

def test_attention_of_other_blocks_and_of_the_picture_alone_passes() -> None:
    sequence = place()
    qkv = parts(2, sequence)
    merges = [(slice(0, 2), style(masks_of(*soft(3)), 2))]
    outside = override(merges, sequence, running=None)
    assert torch.equal(outside.attend(kernel, *qkv, HEADS, skip_reshape=True), kernel(*qkv, HEADS, skip_reshape=True))
    picture = qkv[0][:, :, 15:], qkv[1][:, :, 15:], qkv[2][:, :, 15:]
    inside = override(merges, sequence)
    assert torch.equal(inside.attend(kernel, *picture, HEADS, skip_reshape=True),
                       kernel(*picture, HEADS, skip_reshape=True))
    with pytest.raises(ValueError, match="expected to compute the model's attention, got a node that replaces it"):
        inside.check_acted()
    with pytest.raises(ValueError, match="expected 30 tokens in the model's attention, got 29; remove the node"):
        inside.attend(kernel, *(part[:, :, 1:] for part in qkv), HEADS, skip_reshape=True)


def test_pictures_that_a_network_leaves_out() -> None:
    sequence, weights = place(references=6), soft(3)
    short = place()
    qkv = parts(1, short)
    ours = override([(slice(0, 1), style(masks_of(*weights), 2))], sequence).attend(
        kernel, *qkv, HEADS, skip_reshape=True)
    close(ours, expected(qkv, short, weights))
