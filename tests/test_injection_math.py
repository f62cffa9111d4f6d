"""The arithmetic of feature injection: exchanged hidden states, masks, and the attentions of joint sequences."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_merge_rig import cell_means
from mixology.attention_patches.injection import (
    FEATURES,
    Chunk,
    Injector,
    JointCall,
    SourceRead,
    UNetInjector,
    UNetReader,
    keep,
    make_joint_injector,
    make_joint_reader,
)
from mixology.attention_patches.masks import LayerMasks
from mixology.attention_patches.sequence import RunningBlock, TokenSequence
from torch import Tensor

GRID = (3, 5)
POINT = ("output", 4, 0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chunk_of(source: Tensor, point: Any = POINT, mask: Tensor | None = None, area: Any = None,
             picture: tuple[int, int] = (12, 20)) -> Chunk:
    return Chunk({point: (source, source)}, None if mask is None else LayerMasks(mask), picture, area)


def options(point: Any = POINT, grid: tuple[int, int] = GRID) -> dict[str, Any]:
    return {"block": point[:2], "block_index": point[2], "activations_shape": [2, 8, *grid]}


@pytest.mark.parametrize("masks", [None, 1, 3])
def test_exchanged_hidden_states_are_exchanged_queries_and_keys(masks: int | None) -> None:
    """Blending what to_q and to_k read is blending q and k, at any mask; to_v reads the own."""
    n, source = draw(6, 15, 8, seed=1), draw(3, 15, 8, seed=2)
    to_q, to_k, to_v = (torch.nn.Linear(8, 4, bias=False).double() for _ in range(3))
    mask = None if masks is None else torch.rand(masks, 25, 43)
    laid, context, value = UNetInjector([chunk_of(source, mask=mask)] * 2).inject_attention(n, n, n, options())
    weight = torch.ones(1, 15) if mask is None else cell_means(cell_means(mask, 12, 20).float(), *GRID).flatten(1)
    weight = weight.expand(3, 15).repeat(2, 1)[..., None]
    for module, given in ((to_q, laid), (to_k, context)):
        expected = weight * module(source.repeat(2, 1, 1)) + (1 - weight) * module(n)
        torch.testing.assert_close(module(given), expected, rtol=0, atol=1e-6 if masks else 1e-12)
    assert torch.equal(to_v(value), to_v(n)) and value is n
    assert context is laid


def test_chunks_get_what_is_theirs() -> None:
    """One source for all images or one for each; chunks without a source, and points that were not read, stay."""
    n, first, second = draw(6, 15, 8), draw(1, 15, 8, seed=1), draw(2, 15, 8, seed=2)
    kept = n.clone()
    laid, *_ = UNetInjector([chunk_of(first), None, chunk_of(second)]).inject_attention(n, n, n, options())
    assert torch.equal(laid, torch.cat([first, first, n[2:4], second])) and torch.equal(n, kept)
    other = UNetInjector([chunk_of(first)] * 3)
    assert other.inject_attention(n, n, n, options(("output", 4, 1)))[0] is n
    features = draw(6, 8, *GRID)
    assert other.inject_features(None, None, features) is features


def test_context_of_its_own_is_exchanged_too() -> None:
    n, context, sources = draw(2, 15, 8), draw(2, 15, 8, seed=1), (draw(1, 15, 8, seed=2), draw(1, 15, 8, seed=3))
    injector = UNetInjector([Chunk({POINT: sources}, None, GRID, None)])
    laid, keys, value = injector.inject_attention(n, context, context, options())
    assert torch.equal(laid, sources[0].expand_as(n)) and torch.equal(keys, sources[1].expand_as(n))
    assert value is context


def test_masks_are_exact_at_their_ends_and_keep_the_type() -> None:
    own, source = draw(2, 8, *GRID).half(), draw(2, 8, *GRID, seed=1).half()
    mask = torch.zeros(12, 20)
    mask[:, :8] = 1
    result = UNetInjector([chunk_of(source, FEATURES, mask[None])]).inject_features(None, None, own)
    assert result.dtype == own.dtype
    assert torch.equal(result[..., :2], source[..., :2]) and torch.equal(result[..., 2:], own[..., 2:])


def test_region_mask_is_cropped_to_an_area() -> None:
    mask = torch.rand(2, 33, 47, generator=torch.Generator().manual_seed(0))
    region = LayerMasks(mask)
    area = (6, 10, 2, 4)
    expected = cell_means(cell_means(mask, 12, 20)[:, 2:8, 4:14], 3, 5)
    torch.testing.assert_close(region.weights((12, 20), area, (3, 5)).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        region.weights((12, 20), None, (5, 3)).double(), cell_means(cell_means(mask, 12, 20), 5, 3), rtol=0, atol=1e-6)
    assert region.weights((12, 20), area, (3, 5)) is region.weights((12, 20), area, (3, 5))


def test_reader_keeps_each_chunk_and_ends_at_the_last_point() -> None:
    readings: list[Any] = [{}, {}]
    points = [FEATURES, POINT, ("output", 5, 0)]
    reader = UNetReader(readings, points)
    n, features = draw(6, 15, 8), draw(6, 8, *GRID)
    assert reader.read_attention(n, n, n, options(("output", 3, 0))) == (n, n, n) and not readings[0]
    assert reader.read_features(None, None, features) is None
    assert reader.read_attention(n, n, n, options())[0] is n
    with pytest.raises(SourceRead):
        reader.read_attention(n, n, n, options(points[-1]))
    for index, reading in enumerate(readings):
        rows = slice(3 * index, 3 * index + 3)
        assert list(reading) == points
        assert torch.equal(reading[FEATURES][0], features[rows]) and torch.equal(reading[POINT][1], n[rows])


@pytest.mark.parametrize("split", [False, True], ids=["joined heads", "split heads"])
def test_joint_attentions_are_told_apart(split: bool) -> None:
    """Text first; picture tokens alone belong to the joint attention before; others pass."""
    calls: list[tuple[Tensor, Tensor]] = []
    more = {"skip_reshape": split, "mask": None}

    def kernel(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
        assert kwargs == more and heads == 2
        calls.append((q, k))
        return v

    def tokens(count: int, seed: int, rows: int = 2) -> Tensor:
        return draw(rows, 2, count, 4, seed=seed) if split else draw(rows, count, 8, seed=seed)

    axis, text, own_text = 2 if split else 1, 7, 4
    running = RunningBlock()

    def call_of(text: int) -> JointCall:
        return JointCall(TokenSequence((0, text), (text, 15), (text, 15), text + 15, GRID), running)

    points, blocks = [("joint", 1)], (0, 1, 1)
    reading: Any = {}
    attend = make_joint_reader(call_of(text), [reading], points, None)
    source = [(tokens(count, seed, 1), tokens(count, seed + 1, 1)) for seed, count in ((1, 22), (3, 22), (5, 15))]
    for running.index, (q, k) in zip(blocks, source):
        attend(kernel, q, k, q, 2, **more)
    assert set(reading) == {("joint", 1), ("picture", 1)}
    calls.clear()
    attend = make_joint_injector(
        call_of(own_text), [Injector([Chunk(reading, None, GRID, None)])], lambda f, *a, **b: f(*a, **b))
    targets = [(tokens(count, seed), tokens(count, seed + 1)) for seed, count in ((7, 19), (9, 19), (11, 15))]
    for running.index, (q, k) in zip(blocks, targets):
        attend(kernel, q, k, q, 2, **more)
    assert calls[0][0] is targets[0][0]
    for part in (0, 1):
        joint, picture = calls[1][part], calls[2][part]
        assert torch.equal(joint.narrow(axis, 0, own_text), targets[1][part].narrow(axis, 0, own_text))
        expected = source[1][part].narrow(axis, text, 15)
        assert torch.equal(joint.narrow(axis, own_text, 15), expected.expand(2, *expected.shape[1:]))
        assert torch.equal(picture, source[2][part].expand(2, *source[2][part].shape[1:]))
    crossing = tokens(15, 13), tokens(3, 14)
    attend(kernel, *crossing, crossing[0], 2, **more)
    assert calls[3][0] is crossing[0]
    with pytest.raises(ValueError, match="expected 4 text and 15 picture tokens, got 30 in all"):
        attend(kernel, tokens(30, 1), tokens(30, 2), tokens(30, 1), 2, **more)


def test_joint_mask_and_two_injectors() -> None:
    """Later ones on top."""
    own, sources = draw(2, 19, 8), [draw(1, 15, 8, seed=seed) for seed in (1, 2)]
    mask = torch.zeros(1, *GRID)
    mask[:, 0] = 1
    injectors = [Injector([chunk_of(source, ("joint", 0), region, picture=GRID)])
                 for source, region in zip(sources, (None, mask))]
    sequence = TokenSequence((0, 4), (4, 15), (4, 15), 19, GRID)
    attend = make_joint_injector(JointCall(sequence, RunningBlock(0)), injectors, None)
    result = attend(lambda q, k, v, heads: q, own, own, own, 2)
    assert torch.equal(result[:, :4], own[:, :4])
    assert torch.equal(result[:, 4:9], sources[1][:, :5].expand(2, 5, 8))
    assert torch.equal(result[:, 9:], sources[0][:, 5:].expand(2, 10, 8))


def test_what_does_not_fit_is_told() -> None:
    injector = UNetInjector([chunk_of(draw(1, 15, 8)), None])
    wide, odd = draw(4, 16, 8), draw(3, 15, 8)
    with pytest.raises(ValueError, match=r"expected features of the shape \(1, 15, 8\) as in the source, got \(2, 16"):
        injector.inject_attention(wide, wide, wide, options())
    with pytest.raises(ValueError, match="expected a batch of 2 equal parts, got 3 rows"):
        injector.inject_attention(odd, odd, odd, options())
    three: list[Any] = [{}, {}, {}]
    keep(three, POINT, draw(6, 2))
    assert [len(reading[POINT][0]) for reading in three] == [2, 2, 2]
