"""Cross-attention merge in the real host, against the merge written out on the UNet's modules."""
from __future__ import annotations

from typing import Any

import nodes as core
import pytest
import tiny
import torch
from attention_merge_rig import Expected, merge, merge_explicitly, sample, sample_latent, soft_masks, texts_of
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from families import FAMILIES, raise_norms
from mixology.host.attention_merge import KEY
from mixology.host.marks import read_mark
from torch import Tensor

pytestmark = pytest.mark.seam

FIRST, SECOND, NEGATIVE = tiny.conditioning(1), tiny.conditioning(3), tiny.conditioning(2)
THIRD, FOURTH = tiny.conditioning(4, tokens=154), tiny.conditioning(6, tokens=231)
MASKS = soft_masks(2)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: raise_norms(tiny.unet(kind)) for kind in tiny.KINDS}


@pytest.fixture(scope="module")
def model(models: dict[str, Any]) -> Any:
    return models["eps"]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """float32 rounding through three steps of a random network of about unit gain, merged in another order."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-2)


# --------------------------------------------------------------------------------------------------- the equation

@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(("batch", "height", "width", "count"), [
    (1, 8, 8, 2), (3, 9, 7, 2), (1, 7, 10, 4), (3, 6, 8, 4)])
def test_whole_runs_equal_the_merge_written_out(
    models: dict[str, Any], kind: str, batch: int, height: int, width: int, count: int,
) -> None:
    """Texts of 77, 77, 154 and 231 tokens; sizes that a layer halves to 5 x 4 and 4 x 5."""
    model, texts, masks = models[kind], [FIRST, SECOND, THIRD, FOURTH][:count], soft_masks(count)
    merged, positive = merge(model, masks, *texts)
    ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE), batch, height, width)
    with merge_explicitly(model, Expected(texts_of(*texts), masks)) as seen:
        expected = sample(tiny.cfg_guider(model, FIRST, NEGATIVE), batch, height, width)
    close(ours, expected)
    assert seen and set(seen) == {batch}
    for text in texts[:2]:
        assert differ(ours, sample(tiny.cfg_guider(model, text, NEGATIVE), batch, height, width))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_family_with_cross_attention(name: str, batch: int) -> None:
    """Linear projections, levels without attention, several transformers in a block, a pooled vector of the first."""
    family, masks = FAMILIES[name], soft_masks(3)
    model = family.model()
    *texts, negative = (family.conditioning(seed, tokens) for seed, tokens in ((1, 77), (3, 154), (4, 77), (2, 77)))
    latent = family.latent(batch, 9, 6)
    merged, positive = merge(model, masks, *texts)
    ours = sample_latent(tiny.cfg_guider(merged, positive, negative), latent)
    with merge_explicitly(model, Expected(texts_of(*texts), masks)):
        expected = sample_latent(tiny.cfg_guider(model, texts[0], negative), latent)
    close(ours, expected)
    assert differ(ours, sample_latent(tiny.cfg_guider(model, texts[0], negative), latent))


def test_half_precision() -> None:
    """In bfloat16 as close to the float32 run as the plain picture is."""
    model, half = raise_norms(tiny.unet()), raise_norms(tiny.unet())
    half.model.diffusion_model.to(torch.bfloat16)
    half.model.diffusion_model.dtype = torch.bfloat16
    runs = []
    for patcher in (model, half):
        merged, positive = merge(patcher, MASKS, FIRST, SECOND)
        runs.append([sample(tiny.cfg_guider(merged, positive, NEGATIVE)),
                     sample(tiny.cfg_guider(patcher, FIRST, NEGATIVE))])
    (ours, plain), (ours_half, plain_half) = runs
    assert ours_half.isfinite().all() and not torch.equal(ours, ours_half)
    assert (ours_half - ours).norm() < 1.5 * (plain_half - plain).norm()


@pytest.mark.parametrize("negative", [NEGATIVE, THIRD, FOURTH])
@pytest.mark.parametrize("first", [FIRST, THIRD])
def test_unequal_lengths(model: Any, negative: Any, first: Any) -> None:
    """The host repeats the first text and the negative to a common length; the other styles keep theirs."""
    texts = [first, SECOND, FOURTH]
    merged, positive = merge(model, soft_masks(3), *texts)
    ours = sample(tiny.cfg_guider(merged, positive, negative), 2)
    with merge_explicitly(model, Expected(texts_of(*texts), soft_masks(3)), index=0):
        close(ours, sample(tiny.cfg_guider(model, first, negative), 2))


def test_a_style_may_hold_a_text_for_each_image(model: Any) -> None:
    """As prompt schedules for a batch do; the host repeats or cuts it to the batch."""
    many = [[torch.cat(texts_of(tiny.conditioning(7), tiny.conditioning(8))), {}]]
    merged, positive = merge(model, MASKS, FIRST, many)
    for images, order in ((2, [0, 1]), (3, [0, 1, 0])):
        ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE), images)
        with merge_explicitly(model, Expected([FIRST[0][0], many[0][0][order]], MASKS)):
            close(ours, sample(tiny.cfg_guider(model, FIRST, NEGATIVE), images))


# --------------------------------------------------------------------------------------------------- rows

def dual(model: Any, merged: Any) -> Any:
    guider = Guider_DualCFG(model)
    guider.set_conds(THIRD, merged, NEGATIVE)
    guider.set_cfg(3.0, 2.0)
    return guider


def perpendicular(model: Any, merged: Any) -> Any:
    guider = Guider_PerpNeg(model)
    guider.set_conds(merged, NEGATIVE, THIRD)
    guider.set_cfg(3.0, 1.0)
    return guider


def as_negative(model: Any, merged: Any) -> Any:
    return tiny.cfg_guider(model, THIRD, merged)


@pytest.mark.parametrize("make", [dual, perpendicular, as_negative])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_guider_and_place(model: Any, make: Any, batch: int) -> None:
    merged, text = merge(model, MASKS, FIRST, SECOND)
    ours = sample(make(merged, text), batch)
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), MASKS)):
        close(ours, sample(make(model, FIRST), batch))
    assert differ(ours, sample(make(model, FIRST), batch))


def small_memory(model: Any) -> Any:
    """A model whose host never finds room for two chunks in one call."""
    model.get_free_memory = lambda device: 0
    return model


@pytest.mark.parametrize("batch", [1, 3])
def test_split_batches_give_the_same(model: Any, batch: int) -> None:
    runs = []
    for prepare in (lambda model: model, small_memory):
        counted, calls = tiny.count_evaluations(model)
        merged, positive = merge(counted, MASKS, FIRST, THIRD)
        runs.append((sample(tiny.cfg_guider(prepare(merged), positive, NEGATIVE), batch), len(calls)))
    close(runs[0][0], runs[1][0])
    assert runs[1][1] == 2 * runs[0][1]


def test_two_merged_conditionings_combined_keep_their_own_styles(model: Any) -> None:
    masks = soft_masks(2, seed=1), soft_masks(2, seed=2)
    merged, first = merge(model, masks[0], FIRST, SECOND)
    merged, second = merge(merged, masks[1], NEGATIVE, FOURTH)
    both = core.ConditioningCombine().combine(first, second)[0]
    ours = sample(tiny.cfg_guider(merged, both, THIRD), 2)
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), masks[0]),
                          Expected(texts_of(NEGATIVE, FOURTH), masks[1])):
        close(ours, sample(tiny.cfg_guider(
            model, core.ConditioningCombine().combine(FIRST, NEGATIVE)[0], THIRD), 2))


def test_merged_positive_and_negative(model: Any) -> None:
    masks = soft_masks(2, seed=1), soft_masks(3, seed=2)
    merged, positive = merge(model, masks[0], FIRST, SECOND)
    merged, negative = merge(merged, masks[1], NEGATIVE, FOURTH, THIRD)
    ours = sample(tiny.cfg_guider(merged, positive, negative), 2)
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), masks[0]),
                          Expected(texts_of(NEGATIVE, FOURTH, THIRD), masks[1])):
        close(ours, sample(tiny.cfg_guider(model, FIRST, NEGATIVE), 2))


def region(conditioning: Any) -> Any:
    return core.ConditioningSetArea().append(conditioning, 32, 40, 16, 24, 1.0)[0]


def region_in_shares(conditioning: Any) -> Any:
    return core.ConditioningSetAreaPercentage().append(conditioning, 0.5, 0.4, 0.25, 0.3, 1.0)[0]


def region_of_a_mask(conditioning: Any) -> Any:
    mask = torch.zeros(1, 80, 64)
    mask[:, 8:79, 10:63] = 1
    return core.ConditioningSetMask().append(conditioning, mask, "mask bounds", 1.0)[0]


@pytest.mark.parametrize(("confine", "area"), [
    (region, (5, 4, 3, 2)), (region_in_shares, (4, 4, 3, 2)), (region_of_a_mask, (9, 7, 1, 1))])
def test_a_region_shows_its_part_of_the_masks(model: Any, confine: Any, area: tuple[int, int, int, int]) -> None:
    """The masks cover the picture, not the region; the negative's copy of the region reads the negative's text."""
    merged, text = merge(model, MASKS, FIRST, SECOND)
    positive = core.ConditioningCombine().combine(confine(text), THIRD)[0]
    ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE), 2, 10, 8)
    plain = core.ConditioningCombine().combine(confine(FIRST), THIRD)[0]
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), MASKS, area=area, picture=(10, 8))) as seen:
        close(ours, sample(tiny.cfg_guider(model, plain, NEGATIVE), 2, 10, 8))
    assert seen
    assert differ(ours, sample(tiny.cfg_guider(model, plain, NEGATIVE), 2, 10, 8))


def test_a_region_of_the_negative_reads_the_merged_prompt_too(model: Any) -> None:
    """The host copies the negative's area into the positive list, where it reads the positive's text."""
    merged, positive = merge(model, MASKS, FIRST, SECOND)
    area = (5, 4, 3, 2)
    negative = core.ConditioningCombine().combine(region(NEGATIVE), THIRD)[0]
    ours = sample(tiny.cfg_guider(merged, positive, negative), 2, 10, 8)
    texts = texts_of(FIRST, SECOND)
    with merge_explicitly(model, Expected(texts, MASKS), of_shape=(10, 8)), merge_explicitly(
            model, Expected(texts, MASKS, area=area, picture=(10, 8)), of_shape=area[:2]):
        close(ours, sample(tiny.cfg_guider(model, FIRST, negative), 2, 10, 8))


def test_other_conditioning_nodes_keep_the_merge_where_the_text_is(model: Any) -> None:
    """Concat appends to the first text; Zero Out leaves nothing to merge."""
    merged, text = merge(model, MASKS, FIRST, SECOND)
    longer = core.ConditioningConcat().concat(text, NEGATIVE)[0]
    ours = sample(tiny.cfg_guider(merged, longer, THIRD))
    plain = core.ConditioningConcat().concat(FIRST, NEGATIVE)[0]
    with merge_explicitly(model, Expected(texts_of(plain, SECOND), MASKS)):
        close(ours, sample(tiny.cfg_guider(model, plain, THIRD)))
    zeroed, silent = (core.ConditioningZeroOut().zero_out(part)[0] for part in (text, FIRST))
    assert torch.equal(sample(tiny.cfg_guider(merged, SECOND, zeroed)), sample(tiny.cfg_guider(model, SECOND, silent)))


# --------------------------------------------------------------------------------------------------- identity, cost

@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_identities(models: dict[str, Any], kind: str, batch: int) -> None:
    """Bit for bit where only the first style is painted, and for prompts without a merge.

    Elsewhere `to_k` and `to_v` read a longer text at once and may round it otherwise: equal prompts, and a last style
    that takes the whole picture.
    """
    model = models[kind]
    plain, other = (sample(tiny.cfg_guider(model, text, NEGATIVE), batch) for text in (FIRST, SECOND))

    def run(masks: Tensor, *texts: Any) -> Tensor:
        merged, positive = merge(model, masks, *texts)
        return sample(tiny.cfg_guider(merged, positive, NEGATIVE), batch)

    ones, zeros = torch.ones(1, 64, 64), torch.zeros(1, 64, 64)
    assert torch.equal(run(ones, FIRST, SECOND), plain)
    assert torch.equal(run(torch.cat([ones, zeros, zeros]), FIRST, SECOND, THIRD), plain)
    merged, _ = merge(model, MASKS, FIRST, SECOND)
    assert torch.equal(sample(tiny.cfg_guider(merged, FIRST, NEGATIVE), batch), plain)
    close(run(torch.cat([zeros, ones]), FIRST, SECOND), other)
    for count in (2, 4):
        close(run(soft_masks(count), *[FIRST] * count), plain)


def test_order_of_the_styles_does_not_matter(model: Any) -> None:
    texts, masks, order = [FIRST, SECOND, THIRD, FOURTH], soft_masks(4), [2, 0, 3, 1]
    runs = []
    for chosen, own in ((texts, masks), ([texts[i] for i in order], masks[order])):
        merged, positive = merge(model, own, *chosen)
        runs.append(sample(tiny.cfg_guider(merged, positive, NEGATIVE), 2))
    close(*runs)


def test_an_empty_style_is_left_out(model: Any) -> None:
    masks = torch.stack([MASKS[0], torch.zeros(24, 20), MASKS[1]])
    merged, three = merge(model, masks, FIRST, THIRD, SECOND)
    _, two = merge(model, MASKS, FIRST, SECOND)
    assert len(read_mark(three[0][1], KEY).texts) == 1
    assert torch.equal(*(sample(tiny.cfg_guider(merged, positive, NEGATIVE)) for positive in (three, two)))


def test_no_evaluation_is_added_and_batches_stay_whole(model: Any) -> None:
    counts = []
    for count in (1, 2, 4):
        counted, calls = tiny.count_evaluations(model)
        positive = FIRST
        if count > 1:
            counted, positive = merge(counted, soft_masks(count), *[FIRST, SECOND, THIRD, FOURTH][:count])
        sample(tiny.cfg_guider(counted, positive, NEGATIVE), 3)
        counts.append(calls)
    assert counts == [[6, 6, 6]] * 3


def test_patching_twice_is_patching_once(model: Any) -> None:
    once, positive = merge(model, MASKS, FIRST, SECOND)
    twice, again = merge(once, MASKS, FIRST, SECOND)
    assert twice.wrappers == once.wrappers
    runs = [sample(tiny.cfg_guider(*parts, NEGATIVE)) for parts in ((once, positive), (twice, again))]
    assert torch.equal(*runs)


def copy_containers(value: Any) -> Any:
    """Containers anew, what they hold as it is, so that comparing tells whether any of it was exchanged."""
    if isinstance(value, dict):
        return {key: copy_containers(part) for key, part in value.items()}
    return type(value)(map(copy_containers, value)) if isinstance(value, list | tuple) else value


def test_the_caller_s_model_and_conditioning_are_untouched(model: Any) -> None:
    before = copy_containers(model.model_options), copy_containers(model.wrappers)
    first, second = ([[text[0][0].clone(), dict(text[0][1])]] for text in (FIRST, SECOND))
    masks = MASKS.clone()
    merged, positive = merge(model, masks, first, second)
    options = copy_containers(merged.model_options)
    sample(tiny.cfg_guider(merged, positive, NEGATIVE))
    assert (model.model_options, model.wrappers) == before and merged.model_options == options
    for text, original in ((first, FIRST), (second, SECOND)):
        assert text[0][1] == original[0][1] and torch.equal(text[0][0], original[0][0])
    assert torch.equal(masks, MASKS) and torch.equal(read_mark(positive[0][1], KEY).masks.mask, MASKS)


def test_an_error_inside_leaves_nothing_behind(model: Any) -> None:
    merged, positive = merge(model, MASKS, FIRST, SECOND)
    expected = sample(tiny.cfg_guider(merged, positive, NEGATIVE))
    broken = merged.clone()

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    broken.set_model_attn2_output_patch(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(tiny.cfg_guider(broken, positive, NEGATIVE))
    assert torch.equal(sample(tiny.cfg_guider(merged, positive, NEGATIVE)), expected)


def test_one_conditioning_at_several_sizes(model: Any) -> None:
    """The same merged prompt for one latent after another, as in a second pass at a higher resolution."""
    merged, positive = merge(model, MASKS, FIRST, SECOND)
    for height, width in ((8, 6), (12, 10), (6, 12), (8, 6)):
        ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE), 1, height, width)
        with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), MASKS)):
            close(ours, sample(tiny.cfg_guider(model, FIRST, NEGATIVE), 1, height, width))
