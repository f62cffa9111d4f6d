"""Token attention scale in the real host: which rows it touches, under every guider, order and split."""
from __future__ import annotations

import copy
from typing import Any

import comfy.sample
import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.marks import mark_conditioning, read_mark
from torch import Tensor

pytestmark = pytest.mark.seam

TEXT, NEGATIVE = tiny.conditioning(1), tiny.conditioning(2)
OTHER = tiny.conditioning(3, tokens=154)
WORDS = [3, 5, 6]


def factors(*values: float, tokens: int = 77) -> Tensor:
    scaled = torch.ones(len(values), tokens)
    scaled[:, WORDS] = torch.tensor(values).unsqueeze(1)
    return scaled


def mark(conditioning: list[Any], *values: float, window: tuple[float, float] = (0.0, 1.0)) -> list[Any]:
    return mark_conditioning(conditioning, SCALE_KEY, TokenScale(factors(*values), *window))


def sample(guider: Any, batch: int = 1, height: int = 8, width: int = 6, steps: int = 3) -> Tensor:
    latent = tiny.latent(batch, height, width)["samples"]
    noise = comfy.sample.prepare_noise(latent, 5)
    sigmas = tiny.sigmas_of(guider.model_patcher, steps=steps)
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=5)


def explicit(model: Any, rows: dict[int, Tensor]) -> Any:
    """The unpatched model with its cross-attention values scaled by the test itself.

    `rows`: factors by index in the guider's list, for conds whose cross-attention has that very length.
    """
    clone = model.clone()

    def scale(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        share = len(value) // len(options["cond_or_uncond"])
        weights = torch.ones(value.shape[:2])
        for chunk, index in enumerate(options["cond_or_uncond"]):
            if index in rows:
                times = value.shape[1] // rows[index].shape[1]
                weights[chunk * share:(chunk + 1) * share] = rows[index].repeat(1, times)
        return n, context, value * weights.unsqueeze(-1)

    clone.set_model_attn2_patch(scale)
    return clone


def close(a: Tensor, b: Tensor) -> bool:
    """float32 rounding through three steps of a random network of about unit gain."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- rows

@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_only_the_marked_rows_are_scaled(kind: str, batch: int) -> None:
    model = tiny.unet(kind)
    ours = sample(tiny.cfg_guider(patch_model(model), mark(TEXT, -1.5), NEGATIVE), batch)
    expected = sample(tiny.cfg_guider(explicit(model, {0: factors(-1.5)}), TEXT, NEGATIVE), batch)
    plain = sample(tiny.cfg_guider(model, TEXT, NEGATIVE), batch)
    assert close(ours, expected) and not torch.allclose(ours, plain, atol=1e-2)


def test_the_negative_may_be_scaled_instead_or_as_well() -> None:
    model = tiny.unet()
    ours = sample(tiny.cfg_guider(patch_model(model), mark(TEXT, 2.0), mark(NEGATIVE, -1.0)))
    expected = sample(tiny.cfg_guider(explicit(model, {0: factors(2.0), 1: factors(-1.0)}), TEXT, NEGATIVE))
    assert close(ours, expected)


def dual(model: Any, marked: Any) -> Any:
    guider = Guider_DualCFG(model)
    guider.set_conds(OTHER, marked, NEGATIVE)
    guider.set_cfg(3.0, 2.0)
    return guider


def perpendicular(model: Any, marked: Any) -> Any:
    guider = Guider_PerpNeg(model)
    guider.set_conds(marked, NEGATIVE, OTHER)
    guider.set_cfg(3.0, 1.0)
    return guider


def index_in(make: Any) -> int:
    """Where a guider puts the marked conditioning in its list, seen from a run."""
    seen: list[Any] = []
    model = tiny.unet()
    probe = model.clone()

    def watch(executor: Any, inner: Any, conds: Any, *arguments: Any) -> Any:
        seen.append([any("probe" in cond for cond in group) for group in conds].index(True))
        return executor(inner, conds, *arguments)

    import comfy.patcher_extension

    probe.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "watch", watch)
    sample(make(probe, [[TEXT[0][0], {**TEXT[0][1], "probe": True}]]), steps=1)
    return seen[0]


@pytest.mark.parametrize("make", [dual, perpendicular])
@pytest.mark.parametrize("batch", [1, 3])
def test_guiders_of_three_conditionings(make: Any, batch: int) -> None:
    """With contexts of 77, 77 and 154 tokens: the host repeats the short ones when it batches them."""
    model = tiny.unet()
    expected = sample(make(explicit(model, {index_in(make): factors(-1.5)}), TEXT), batch)
    assert close(sample(make(patch_model(model), mark(TEXT, -1.5)), batch), expected)
    assert not torch.allclose(expected, sample(make(model, TEXT), batch), atol=1e-2)


def small_memory(model: Any) -> Any:
    """A model whose host never finds room for two chunks in one call."""
    model.get_free_memory = lambda device: 0
    return model


@pytest.mark.parametrize("values", [(-1.5,), (-1.5, 0.5, 2.0)])
def test_split_batches_give_the_same(values: tuple[float, ...]) -> None:
    ours = [sample(tiny.cfg_guider(prepare(patch_model(tiny.unet())), mark(TEXT, *values), NEGATIVE), 3)
            for prepare in (lambda model: model, small_memory)]
    assert close(*ours)


def test_two_positives_keep_their_own_scales() -> None:
    """Combined conds share the list index 0 and differ in their ids."""
    model = tiny.unet()
    both = core.ConditioningCombine().combine(mark(TEXT, -1.5), mark(NEGATIVE, 2.0))[0]
    third = tiny.conditioning(4)

    def denoise(model: Any, positive: Any) -> Tensor:
        return sample(tiny.cfg_guider(model, positive, third), steps=1)

    ours = denoise(patch_model(model), both)
    apart = [denoise(patch_model(model), mark(TEXT, -1.5)), denoise(patch_model(model), mark(NEGATIVE, 2.0))]
    assert close(ours, (apart[0] + apart[1]) / 2), "the host averages combined conds, and one step is affine in them"
    swapped = core.ConditioningCombine().combine(mark(NEGATIVE, 2.0), mark(TEXT, -1.5))[0]
    assert close(denoise(patch_model(model), swapped), ours)


def test_a_region_s_copy_in_the_negative_is_left_alone() -> None:
    """The host copies an area cond, mark and id included, into the other list with that list's text."""
    model = tiny.unet()
    region = core.ConditioningSetArea().append(TEXT, 32, 32, 16, 32, 1.0)[0]
    whole = tiny.conditioning(4)
    positive = core.ConditioningCombine().combine(mark(region, -1.5), whole)[0]
    ours = sample(tiny.cfg_guider(patch_model(model), positive, NEGATIVE))
    shape = (4, 4)  # latent size of the region
    reference = model.clone()

    def scale(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Scales where the positive reads TEXT itself."""
        share = len(value) // len(options["cond_or_uncond"])
        value = value.clone()
        for chunk, index in enumerate(options["cond_or_uncond"]):
            part = slice(chunk * share, (chunk + 1) * share)
            if index == 0 and torch.equal(context[part], TEXT[0][0]):
                assert tuple(options["original_shape"][2:]) == shape
                value[part] *= factors(-1.5).unsqueeze(-1)
        return n, context, value

    reference.set_model_attn2_patch(scale)
    plain = core.ConditioningCombine().combine(region, whole)[0]
    expected = sample(tiny.cfg_guider(reference, plain, NEGATIVE))
    assert close(ours, expected)
    assert not torch.allclose(expected, sample(tiny.cfg_guider(model, plain, NEGATIVE)), atol=1e-2)


def test_other_conditioning_nodes_keep_the_scale_where_the_text_is() -> None:
    """Concat appends text that is not scaled."""
    model = tiny.unet()
    longer = core.ConditioningConcat().concat(mark(TEXT, -1.5), NEGATIVE)[0]
    third = tiny.conditioning(4)
    ours = sample(tiny.cfg_guider(patch_model(model), longer, third))
    reference = torch.cat([factors(-1.5), torch.ones(1, 77)], dim=1)
    plain = core.ConditioningConcat().concat(TEXT, NEGATIVE)[0]
    assert close(ours, sample(tiny.cfg_guider(explicit(model, {0: reference}), plain, third)))


def test_zeroed_text_has_nothing_to_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """No factor reaches the model, which would leave zeros as they are and so not be seen in the result."""
    model = tiny.unet()
    zeroed = core.ConditioningZeroOut().zero_out(mark(TEXT, -1.5))[0]
    silent = core.ConditioningZeroOut().zero_out(TEXT)[0]
    made: list[Any] = []
    monkeypatch.setattr("mixology.host.factors.make_value_patch", lambda *args, **kwargs: made.append(args))
    assert torch.equal(sample(tiny.cfg_guider(patch_model(model), TEXT, zeroed)),
                       sample(tiny.cfg_guider(model, TEXT, silent)))
    assert not made


def test_beside_another_pack_s_patches() -> None:
    """A list patch that doubles the text after ours, as token-doubling packs do, still sees scaled values."""
    model = tiny.unet()

    def double(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        return n, context.repeat(1, 2, 1), value.repeat(1, 2, 1)

    doubled = model.clone()
    doubled.set_model_attn2_patch(double)
    ours = sample(tiny.cfg_guider(patch_model(doubled), mark(TEXT, -1.5), NEGATIVE))
    assert close(ours, sample(tiny.cfg_guider(explicit(model, {0: factors(-1.5)}), TEXT, NEGATIVE)))


# --------------------------------------------------------------------------------------------------- values, window

def test_each_image_of_a_batch_has_its_own_value() -> None:
    model = patch_model(tiny.unet())
    latent = tiny.latent(1, 8, 6)["samples"]
    noise = comfy.sample.prepare_noise(latent, 5)

    def run(values: tuple[float, ...]) -> Tensor:
        guider = tiny.cfg_guider(model, mark(TEXT, *values), NEGATIVE)
        count = len(values)
        return guider.sample(noise.repeat(count, 1, 1, 1), latent.repeat(count, 1, 1, 1),
                             comfy.samplers.sampler_object("euler"), tiny.sigmas_of(model, steps=3),
                             disable_pbar=True, seed=5)

    values = (-2.0, 0.0, 1.0, 2.5)
    assert close(run(values), torch.cat([run((value,)) for value in values]))


def test_values_that_do_not_fit_the_batch() -> None:
    model = patch_model(tiny.unet())
    with pytest.raises(ValueError, match="got 2 values for a phrase and 3 images; give one value, or one for each"):
        sample(tiny.cfg_guider(model, mark(TEXT, 1.0, 2.0), NEGATIVE), 3)
    assert torch.equal(sample(tiny.cfg_guider(model, TEXT, NEGATIVE), 3),
                       sample(tiny.cfg_guider(tiny.unet(), TEXT, NEGATIVE), 3)), "the host goes on as before"


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.6)])
def test_window_scales_the_steps_inside_it(window: tuple[float, float]) -> None:
    """As if the marked text were swapped for the plain one by the host's own time ranges."""
    model = tiny.unet()
    guider = tiny.cfg_guider(patch_model(model), mark(TEXT, -1.5, window=window), NEGATIVE)
    sampling = model.get_model_object("model_sampling")
    start, end = (sampling.percent_to_sigma(percent) for percent in window)
    reference, called = model.clone(), []

    def scale(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        inside = end <= float(options["sigmas"][0]) <= start
        called.append(inside)
        weights = torch.ones(value.shape[:2])
        for chunk, index in enumerate(options["cond_or_uncond"]):
            if inside and index == 0:
                weights[chunk] = factors(-1.5)
        return n, context, value * weights.unsqueeze(-1)

    reference.set_model_attn2_patch(scale)
    expected = sample(tiny.cfg_guider(reference, TEXT, NEGATIVE), steps=10)
    assert close(sample(guider, steps=10), expected)
    assert any(called) and not all(called)


# --------------------------------------------------------------------------------------------------- identity, cost

@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_that_reads_no_marks_is_bit_identical(batch: int) -> None:
    model = tiny.unet()
    assert torch.equal(sample(tiny.cfg_guider(patch_model(model), TEXT, NEGATIVE), batch),
                       sample(tiny.cfg_guider(model, TEXT, NEGATIVE), batch))


def test_no_evaluation_is_added_and_batches_stay_whole() -> None:
    counts = []
    for prepare, positive in ((patch_model, mark(TEXT, -1.5)), (lambda model: model, TEXT)):
        model, calls = tiny.count_evaluations(tiny.unet())
        sample(tiny.cfg_guider(prepare(model), positive, NEGATIVE), 3)
        counts.append(calls)
    assert counts[0] == counts[1] == [6, 6, 6]


def test_patching_twice_is_patching_once() -> None:
    model = tiny.unet()
    once, twice = patch_model(model), patch_model(patch_model(model))
    assert twice.wrappers == once.wrappers
    first, second = (sample(tiny.cfg_guider(patched, mark(TEXT, -1.5), NEGATIVE)) for patched in (once, twice))
    assert torch.equal(first, second)


def test_the_caller_s_model_and_conditioning_are_untouched() -> None:
    model = tiny.unet()
    before = copy.deepcopy(model.model_options), copy.deepcopy(model.wrappers)
    text = [[TEXT[0][0].clone(), dict(TEXT[0][1])]]
    marked = mark(text, -1.5)
    patched = patch_model(model)
    options = copy.deepcopy(patched.model_options)
    sample(tiny.cfg_guider(patched, marked, NEGATIVE))
    assert (model.model_options, model.wrappers) == before and patched.model_options == options
    assert text[0][1] == TEXT[0][1] and torch.equal(text[0][0], TEXT[0][0])
    assert torch.equal(read_mark(marked[0][1], SCALE_KEY).factors, factors(-1.5))


def test_an_error_inside_leaves_nothing_behind() -> None:
    model = patch_model(tiny.unet())
    broken = model.clone()

    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    broken.set_model_attn2_patch(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(tiny.cfg_guider(broken, mark(TEXT, -1.5), NEGATIVE))
    expected = sample(tiny.cfg_guider(explicit(tiny.unet(), {0: factors(-1.5)}), TEXT, NEGATIVE))
    assert close(sample(tiny.cfg_guider(model, mark(TEXT, -1.5), NEGATIVE)), expected)
