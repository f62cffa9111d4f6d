"""Token attention scale without a host: scaled values against scaled columns of an explicit softmax, in float64."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from mixology.attention_patches.sequence import RunningBlock, TokenSequence
from mixology.attention_patches.values import (
    ScaledSequence,
    extend_factors,
    join_factors,
    make_value_patch,
    scaled_outputs,
)
from torch import Tensor

HEADS, WIDTH = 2, 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def columns(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt d) with every column times its factor [rows, queries or 1, keys], times V."""
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    logits = heads(q) @ heads(k).transpose(-1, -2) * (q.shape[-1] // HEADS) ** -0.5
    if mask is not None:
        logits = logits + mask.reshape(mask.shape[0], 1, -1, mask.shape[-1])
    weights = logits.softmax(-1) * factors.unsqueeze(1)
    return (weights @ heads(v)).transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, skip_reshape: bool = False,
           skip_output_reshape: bool = False, **_: Any) -> Tensor:
    """A kernel with the host's calling convention."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim == 3:
        mask = mask.unsqueeze(1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


# ----------------------------------------------------------------------------------------------- factors

def test_factors_of_chunks_are_laid_out_by_row_and_repeated_with_the_text() -> None:
    """Contexts of unequal length are repeated to a common one by the host."""
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -1.0, 3.0], [1.0, 0.0, 5.0]])
    joined = join_factors([first, None, second], 6, 6)
    assert joined.tolist() == [
        [1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1, 2], [1] * 6, [1] * 6, [1, -1, 3, 1, -1, 3], [1, 0, 5, 1, 0, 5]]


@pytest.mark.parametrize(("chunks", "rows", "tokens"), [
    ([torch.ones(1, 4), None], 3, 4),  # rows that do not divide into chunks
    ([torch.ones(2, 4)], 3, 4),  # values that do not fit the rows
    ([torch.ones(1, 4)], 1, 6),  # a text that is no repetition
])
def test_a_call_that_another_node_changed_is_refused(chunks: list[Any], rows: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="Token Attention Scale expected .* got .*; remove the node"):
        join_factors(chunks, rows, tokens)


def test_appended_text_is_not_scaled_and_shortened_text_is_refused() -> None:
    assert extend_factors(torch.tensor([[2.0, 3.0]]), 4).tolist() == [[2, 3, 1, 1]]
    with pytest.raises(ValueError, match="expected the 2 tokens of its own conditioning, got 1; .* conditioning_to"):
        extend_factors(torch.tensor([[2.0, 3.0]]), 1)


# ----------------------------------------------------------------------------------------------- cross-attention

@pytest.mark.parametrize("s", [-2.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_scaled_values_equal_scaled_columns(s: float, rows: int) -> None:
    """To float64 rounding: (A diag(f)) V = A (diag(f) V), with bias-free projections as the host has them."""
    n, context = draw(rows, 15, WIDTH), draw(rows, 7, 5, seed=1)
    to_q, to_k, to_v = (draw(width, WIDTH, seed=seed) for width, seed in ((WIDTH, 2), (5, 3), (5, 4)))
    factors = torch.ones(rows, 7, dtype=torch.float64)
    factors[-1, [2, 5]] = s
    kept = n.clone(), context.clone()
    new_n, new_context, value = make_value_patch(factors)(n, context, context, {})
    assert new_n is n and new_context is context, "queries and keys stay"
    ours = attend(n @ to_q, context @ to_k, value @ to_v, HEADS)
    expected = columns(n @ to_q, context @ to_k, context @ to_v, factors.unsqueeze(1))
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12)
    assert torch.equal(n, kept[0]) and torch.equal(context, kept[1]), "the inputs are not written to"
    plain = columns(n @ to_q, context @ to_k, context @ to_v, torch.ones_like(factors).unsqueeze(1))
    assert not torch.allclose(expected[-1], plain[-1], atol=1e-3)


def test_values_keep_their_type() -> None:
    context = draw(2, 3, 4).half()
    _, _, value = make_value_patch(torch.full((2, 3), -1.5))(context, context, context, {})
    assert value.dtype == torch.float16 and torch.equal(value, context * -1.5)


def test_patches_multiply() -> None:
    context = draw(1, 3, 4)
    first, second = make_value_patch(torch.tensor([[2.0, 1, 1]])), make_value_patch(torch.tensor([[3.0, 1, -1]]))
    value = second(*first(context, context, context, {}), {})[2]
    assert torch.equal(value, context * torch.tensor([6.0, 1, -1]).double().reshape(1, 3, 1))


def test_text_of_another_length_is_refused() -> None:
    context = draw(1, 6, 4)
    with pytest.raises(ValueError, match=r"expected text of \(1, 3\) rows and tokens, got \(1, 6\); place the node"):
        make_value_patch(torch.ones(1, 3))(context, context, context, {})


# ----------------------------------------------------------------------------------------------- joint attention

TEXT, IMAGE = 6, 10
SEQUENCE = TokenSequence((0, TEXT), (TEXT, IMAGE), (TEXT, IMAGE), TEXT + IMAGE, (2, 5))


def scaling(factors: Tensor, inner: Any = None, sequence: TokenSequence = SEQUENCE, block: int | None = 0) -> Any:
    """The override of a joint block that runs."""
    return ScaledSequence(factors, sequence, RunningBlock(block, entered=True), inner).attend


MASKS = {
    "none": None,
    "keys": draw(2, 1, TEXT + IMAGE, seed=8),  # [rows, 1, keys]
    "queries": draw(2, TEXT + IMAGE, TEXT + IMAGE, seed=9),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(("skip_reshape", "skip_output_reshape"), [(False, False), (True, False), (True, True)])
def test_image_queries_see_scaled_text_and_text_queries_the_original(
        mask: str, by_name: bool, skip_reshape: bool, skip_output_reshape: bool) -> None:
    q, k, v = (draw(2, TEXT + IMAGE, WIDTH, seed=seed) for seed in range(3))
    factors = torch.ones(2, TEXT, dtype=torch.float64)
    factors[1, 2:4] = -1.5
    everywhere = torch.ones(2, TEXT + IMAGE, TEXT + IMAGE, dtype=torch.float64)
    everywhere[:, TEXT:, :TEXT] = factors.unsqueeze(1)
    expected = columns(q, k, v, everywhere, MASKS[mask])
    shaped = [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) if skip_reshape else x for x in (q, k, v)]
    override = scaling(factors)
    options: dict[str, Any] = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    before = shaped[2].clone()
    if by_name:
        ours = override(attend, *shaped, HEADS, mask=MASKS[mask], **options)
    else:
        ours = override(attend, *shaped, HEADS, MASKS[mask], **options)
    if skip_output_reshape:
        ours = ours.transpose(1, 2).flatten(2)
    assert torch.allclose(ours, expected, rtol=0, atol=1e-12)
    assert torch.equal(shaped[2], before)
    assert not torch.allclose(ours, columns(q, k, v, torch.ones_like(everywhere), MASKS[mask]), atol=1e-3)


def test_attention_of_the_image_alone_is_passed_through() -> None:
    q, k, v = (draw(2, IMAGE, WIDTH, seed=seed) for seed in range(3))
    override = scaling(torch.full((2, TEXT), 5.0))
    assert torch.equal(override(attend, q, k, v, HEADS), attend(q, k, v, HEADS))


def test_an_override_of_another_node_is_called_with_everything() -> None:
    """It sees the host's kernel and all arguments, and its result is used."""
    seen = []

    def other(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((args[0].shape[1], kwargs))
        return func(*args, **kwargs) * 2

    q, k, v = (draw(1, TEXT + IMAGE, WIDTH, seed=seed) for seed in range(3))
    factors = torch.ones(1, TEXT)
    ours = scaling(factors, other)(attend, q, k, v, HEADS, own="kept")
    assert torch.allclose(ours, 2 * attend(q, k, v, HEADS), rtol=0, atol=1e-12)
    assert sorted(queries for queries, _ in seen) == [TEXT, IMAGE]
    assert all(options["own"] == "kept" for _, options in seen)


@pytest.mark.parametrize(("sequence", "first"), [
    (TokenSequence((8, 4), (12, 6), (12, 6), 18, (2, 3)), 8),  # registers, text, picture
    (TokenSequence((6, 4), (0, 6), (0, 6), 10, (2, 3)), 6),  # picture, text
    (TokenSequence((0, 4), (8, 6), (8, 6), 16, (2, 3)), 0),  # text, padding, picture, padding
    (TokenSequence((0, 4), (4, 6), (4, 9), 13, (2, 3), references=3), 0),  # text, picture, references
    (TokenSequence((0, 4), (7, 6), (4, 9), 13, (2, 3), references=3), 0),  # text, references, picture
])
@pytest.mark.parametrize("mask", [None, "queries"])
def test_wherever_text_and_pictures_stand(sequence: TokenSequence, first: int, mask: str | None) -> None:
    total = sequence.total
    q, k, v = (draw(2, total, WIDTH, seed=seed) for seed in range(3))
    added = None if mask is None else draw(2, total, total, seed=9)
    factors = torch.ones(2, 4, dtype=torch.float64)
    factors[:, 1], factors[1, 3] = -2.0, 0.5
    everywhere = torch.ones(2, total, total, dtype=torch.float64)
    rows = slice(sequence.pictures[0], sum(sequence.pictures))
    everywhere[:, rows, first:first + 4] = factors.unsqueeze(1)
    ours = scaling(factors, sequence=sequence)(attend, q, k, v, HEADS, added)
    assert torch.allclose(ours, columns(q, k, v, everywhere, added), rtol=0, atol=1e-12)
    assert not torch.allclose(ours, columns(q, k, v, torch.ones_like(everywhere), added), atol=1e-3)


def test_references_that_a_network_leaves_out() -> None:
    sequence = TokenSequence((0, 4), (4, 6), (4, 10), 14, (2, 3), references=4, optional=True)  # as many as text
    q, k, v = (draw(1, 10, WIDTH, seed=seed) for seed in range(3))
    factors = torch.tensor([[1.0, -2.0, 1.0, 1.0]])
    everywhere = torch.ones(1, 10, 10, dtype=torch.float64)
    everywhere[:, 4:, 1] = -2.0
    ours = scaling(factors, sequence=sequence)(attend, q, k, v, HEADS)
    assert torch.allclose(ours, columns(q, k, v, everywhere), rtol=0, atol=1e-12)


def test_other_blocks_pass_and_tokens_of_other_nodes_are_refused() -> None:
    """A refiner's attention may be as long as the joint one."""
    q, k, v = (draw(1, TEXT + IMAGE, WIDTH, seed=seed) for seed in range(3))
    factors = torch.full((1, TEXT), 5.0)
    assert torch.equal(scaling(factors, block=None)(attend, q, k, v, HEADS), attend(q, k, v, HEADS))
    with pytest.raises(ValueError, match=r"expected 6 text and 10 picture tokens in the model's attention, got 15"):
        scaling(factors)(attend, q[:, 1:], k[:, 1:], v[:, 1:], HEADS)


def test_attention_that_never_comes_is_told() -> None:
    scaled = ScaledSequence(torch.ones(1, TEXT), SEQUENCE, RunningBlock(None, entered=True), None)
    with pytest.raises(ValueError, match="expected to compute the model's joint attention, got a node that replaces"):
        scaled.check_acted()
    ScaledSequence(torch.ones(1, TEXT), SEQUENCE, RunningBlock(), None).check_acted()  # a cache answered for the blocks


# ----------------------------------------------------------------------------------------------- values of a layer

class Reader(torch.nn.Module):
    """Attends to a text; a node may make it read none, or several."""

    def __init__(self) -> None:
        super().__init__()
        self.v = torch.nn.Linear(3, 5).double()

    def forward(self, *texts: Tensor) -> list[Tensor]:
        return [self.v(text) for text in texts]


def test_values_of_a_text_are_scaled_while_asked() -> None:
    """Behind a bias, too: what attention weighs is the value."""
    reader = Reader()
    text, factors = draw(2, 4, 3), torch.tensor([[1.0, -2.0, 1.0, 0.0], [3.0, 1.0, 1.0, 1.0]])
    plain = reader(text)[0]
    with scaled_outputs([(reader, [reader.v])], factors):
        assert torch.equal(reader(text)[0], plain * factors.double().unsqueeze(-1))
        longer = reader(torch.cat([text, text], dim=1))[0]
        assert torch.equal(longer[:, :4], plain * factors.double().unsqueeze(-1))
        assert torch.allclose(longer[:, 4:], plain, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match=r"expected text of \(2, 4\) rows and tokens, got \(2, 3\)"):
            reader(text[:, 1:])
    assert torch.equal(reader(text)[0], plain)


@pytest.mark.parametrize("count", [0, 2])
def test_a_layer_that_reads_no_text_or_several_is_told(count: int) -> None:
    reader, text = Reader(), draw(1, 2, 3)
    words = f"expected the model to read one text in each layer, got {count}; remove"
    with scaled_outputs([(reader, [reader.v])], torch.full((1, 2), 2.0)), pytest.raises(ValueError, match=words):
        reader(*[text] * count)
