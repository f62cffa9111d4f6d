"""Image Mixer's arithmetic against its definition in float64: tokens, padding, averages, directions, crops."""
from __future__ import annotations

import pytest
import torch
from mixology.samplers.embeddings import is_trained
from mixology.samplers.mixer import MODES, Mixer, add_source, combine_sources, crop_image
from toy import noise

WIDTH = 6
EMBEDDINGS = [noise((2, WIDTH), k) for k in range(4)]
STRENGTHS = [1.0, 0.35, -2.5, 1.4]


def mix(strengths: list[float], embeddings: list[torch.Tensor] | None = None) -> Mixer:
    mixer: Mixer = ()
    for embedding, strength in zip(embeddings or EMBEDDINGS, strengths):
        mixer = add_source(mixer, embedding, strength)
    return mixer


def test_concat_is_a_token_for_each_source_times_its_strength() -> None:
    context = combine_sources(mix(STRENGTHS), "concat", 5)
    assert context.shape == (2, 5, WIDTH) and context.dtype == torch.float32
    for n, (embedding, strength) in enumerate(zip(EMBEDDINGS, STRENGTHS)):
        torch.testing.assert_close(context[:, n].double(), strength * embedding, rtol=0, atol=1e-6)
    assert not context[:, 4].any()


def test_sum_and_average_are_one_token() -> None:
    """Average: (1 - w) e_a + w e_b for the strengths 1 - w and w, or any multiple of them."""
    expected = sum(s * e for s, e in zip(STRENGTHS, EMBEDDINGS))
    for mode, divisor in (("sum", 1.0), ("average", sum(STRENGTHS))):
        context = combine_sources(mix(STRENGTHS), mode, 5)
        torch.testing.assert_close(context[:, 0].double(), expected / divisor, rtol=0, atol=2e-5)
        assert context.shape == (2, 5, WIDTH) and not context[:, 1:].any()
    a, b = EMBEDDINGS[:2]
    for w in (0.0, 0.25, 1.0):
        for scale in (1.0, 3.0):
            context = combine_sources(mix([scale * (1 - w), scale * w]), "average", 1)
            torch.testing.assert_close(context[:, 0].double(), (1 - w) * a + w * b, rtol=0, atol=1e-6)


def test_two_texts_of_opposite_strength_are_a_direction() -> None:
    picture, to, away = EMBEDDINGS[:3]
    context = combine_sources(mix([1.0, 0.5, -0.5]), "sum", 0)
    torch.testing.assert_close(context[:, 0].double(), picture + 0.5 * (to - away), rtol=0, atol=1e-6)
    none = combine_sources(mix([1.0, 0.5, -0.5], [picture, to, to]), "sum", 0)
    torch.testing.assert_close(none[:, 0].double(), picture, rtol=0, atol=1e-6)


@pytest.mark.parametrize("slots", [0, 2, 3, 77])
def test_slots_fill_up_with_zeros(slots: int) -> None:
    bare = combine_sources(mix([1.0, 2.0]), "concat", 0)
    context = combine_sources(mix([1.0, 2.0]), "concat", slots)
    assert bare.shape[1] == 2 and context.shape[1] == (slots or 2)
    assert torch.equal(context[:, :2], bare) and not context[:, 2:].any()


@pytest.mark.parametrize("mode", MODES)
def test_no_strength_is_nothing(mode: str) -> None:
    assert not combine_sources(mix([0.0, 0.0]), mode, 5).any()


def test_a_single_picture_goes_with_every_picture_of_a_batch() -> None:
    single, batch = EMBEDDINGS[0][:1], EMBEDDINGS[1]
    context = combine_sources(mix([2.0, 1.0], [single, batch]), "concat", 0)
    for row in range(2):
        alone = combine_sources(mix([2.0, 1.0], [single, batch[row:row + 1]]), "concat", 0)
        assert torch.equal(context[row], alone[0])


def test_sources_before_stay_as_they_are() -> None:
    embedding = EMBEDDINGS[0].clone()
    first = add_source((), embedding, 1.0)
    add_source(first, EMBEDDINGS[1], 1.0)
    combine_sources(first, "average", 5).add_(1)
    assert len(first) == 1 and torch.equal(embedding, EMBEDDINGS[0])
    assert torch.equal(first[0].embedding, embedding.float())


def test_errors_say_what_to_do() -> None:
    mixer = mix([1.0, 1.0])
    with pytest.raises(ValueError, match="^The mixer expected embeddings of one width, got 6 and 8; use the vision"):
        add_source(mixer, torch.zeros(1, 8), 1.0)
    with pytest.raises(ValueError, match="^The mixer expected image batches of one size, got 2 and 3 images; batches"):
        add_source(add_source(mixer, torch.zeros(1, WIDTH), 1.0), torch.zeros(3, WIDTH), 1.0)
    with pytest.raises(ValueError, match=r"expected at most 1 source\(s\), got 2; disconnect some, .* raise slots"):
        combine_sources(mixer, "concat", 1)
    with pytest.raises(ValueError, match="expected strengths with a sum above 0 for mode average, got -1; use mode"):
        combine_sources(mix([1.0, -2.0]), "average", 5)


# ------------------------------------------------------------------------------------------------- crops

@pytest.mark.parametrize(("box", "expected"), [
    ((0.0, 0.0, 1.0, 1.0), (0, 10, 0, 20)), ((0.5, 0.2, 0.25, 0.5), (2, 7, 10, 15)),
    ((0.9, 0.9, 0.5, 0.5), (9, 10, 18, 20)), ((0.99, 0.99, 0.01, 0.01), (9, 10, 19, 20)),
    ((0.0, 0.0, 0.01, 0.01), (0, 1, 0, 1))])
def test_crops_are_fractions_of_the_sides(box: tuple[float, ...], expected: tuple[int, ...]) -> None:
    image = noise((2, 10, 20, 3), 1)
    top, bottom, left, right = expected
    assert torch.equal(crop_image(image, *box), image[:, top:bottom, left:right])


# ------------------------------------------------------------------------------------------ projections

def test_what_a_host_leaves_in_a_missing_projection_is_told_from_a_trained_one() -> None:
    trained = noise((8, 8), 2) * 0.04
    assert is_trained(trained) and is_trained(trained.half()) and is_trained(noise((4, 8), 3))
    holes = trained.clone()
    holes[5:] = 0
    for weight in (None, torch.zeros(8, 8), torch.eye(8), holes, holes.T, trained.index_fill(0, torch.tensor(3), 1e9),
                   trained.index_fill(0, torch.tensor(3), float("nan")), torch.empty(8, 8, device="meta")):
        assert not is_trained(weight)
