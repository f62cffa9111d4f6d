"""Token attention scale on every family, against attention written out: softmax in float64, its columns scaled."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from comfy.patcher_extension import WrappersMP
from families import FAMILIES, MODERN, PECULIAR, Family
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.marks import mark_conditioning, read_mark
from mixology.host.networks import OVERRIDE
from torch import Tensor
from unchanged import snapshot

pytestmark = pytest.mark.seam

TOKENS = 11  # of the positive; divides no number of image tokens here
SIZE = (9, 7)
SWEEP = {3: [-2.0, 0.0, 2.5], 7: [1.0, 4.0, 0.5]}  # places and what each image of a batch of 3 has there
JOINT = [name for name, family in FAMILIES.items() if family.joint]
# Both sides run their layers in float32 and round them differently: largest difference over the latents' deviation.
TOLERANCE = 1e-4
EFFECT = 100 * TOLERANCE  # what a scale must at least change, in the same measure
Table = dict[int, Tensor]  # factors [1 or batch, tokens] by the index of a conditioning in the guider's list


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: family.model() for name, family in FAMILIES.items()}


class ReversedGuider(comfy.samplers.CFGGuider):
    """The negative first, so that the positive has index 1."""

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None,
                      seed: int | None = None) -> Tensor:
        pair = [self.conds["negative"], self.conds["positive"]]
        negative, positive = comfy.samplers.calc_cond_batch(self.inner_model, pair, x, timestep, model_options)
        return negative + (positive - negative) * self.cfg


def sample(family: Family, model: Any, positive: list[Any], batch: int, size: tuple[int, int], negative: Any = None,
           guider: Any = comfy.samplers.CFGGuider) -> Tensor:
    latent = family.latent(batch, *size)
    guiding = guider(model)
    guiding.set_conds(positive, negative or family.conditioning(2, TOKENS))
    guiding.set_cfg(3.0)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    return guiding.sample(noise, latent, comfy.samplers.sampler_object("euler"), tiny.sigmas_of(model, "simple", 3),
                          disable_pbar=True, seed=0)


def factors_of(places: Mapping[int, float | list[float]], tokens: int = TOKENS) -> Tensor:
    columns = {place: torch.tensor(values).reshape(-1) for place, values in places.items()}
    factors = torch.ones(max(map(len, columns.values())), tokens)
    for place, values in columns.items():
        factors[:, place] = values
    return factors


def mark(conditioning: list[Any], factors: Tensor) -> list[Any]:
    return mark_conditioning(conditioning, SCALE_KEY, TokenScale(factors, 0.0, 1.0))


def with_override(model: Any, override: Any) -> Any:
    clone = model.clone()
    clone.model_options["transformer_options"][OVERRIDE] = override
    return clone


def in_single_chunks(model: Any) -> Any:
    """The model on a machine without memory to spare: every conditioning in a call of its own."""
    clone = model.clone()
    clone.get_free_memory = lambda device: 1.0
    return clone


def make_explicit(family: Family, table: Table, size: tuple[int, int], tokens: int = TOKENS, text_too: bool = False,
                  query_scale: float = 1.0, seen: set[int] | None = None) -> Callable[..., Tensor]:
    """Attention written out, for the host's slot.

    Args:
        tokens: of the texts in a UNet's calls, to tell cross-attention by.
        text_too: whether the text queries of a joint sequence see the scaled columns as well.
        query_scale: what another node does to the queries.
        seen: collects the key lengths of all calls.
    """
    def attend(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *args: Any,
               **kwargs: Any) -> Tensor:
        if not kwargs.get("skip_reshape", False):
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        q, k, v = q.double() * query_scale, k.double(), v.double()
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            logits = logits + (mask if mask.ndim == 4 else mask.reshape(-1, 1, *mask.shape[-2:])).double()
        maps = logits.softmax(-1)
        queries, keys = maps.shape[-2:]
        text = keys - family.image_tokens(*size) if family.joint else (keys if keys % tokens == 0 else 0)
        share = len(q) // len(kwargs["transformer_options"]["cond_or_uncond"])
        for chunk, index in enumerate(kwargs["transformer_options"]["cond_or_uncond"]):
            if text and index in table:
                rows = slice(chunk * share, (chunk + 1) * share)
                first = text if family.joint and not text_too else 0
                factors = table[index].repeat(1, text // table[index].shape[1]).double()
                maps[rows, :, first:, :text] *= factors[:, None, None, :]
        if seen is not None:
            seen.add(keys)
        return (maps @ v).transpose(1, 2).reshape(len(q), queries, -1).to(torch.float32)

    return attend


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


def check(family: Family, model: Any, factors: Tensor, batch: int = 3, size: tuple[int, int] = SIZE,
          positive: Any = None, patched: Any = None, index: int = 0, **options: Any) -> None:
    """The marked positive on the patched model is the explicit one on the bare model, and not the bare one.

    Args:
        patched: the patched model, where another than the bare one is patched.
        index: of the positive in the guider's list.
    """
    positive = positive or family.conditioning(1, TOKENS)
    plain = sample(family, model, positive, batch, size, **options)
    bare = with_override(model, make_explicit(family, {index: factors}, size))
    explicit = sample(family, bare, positive, batch, size, **options)
    scaled = sample(family, patched or patch_model(model), mark(positive, factors), batch, size, **options)
    assert distance(scaled, explicit) < TOLERANCE
    assert distance(scaled, plain) > EFFECT


@pytest.mark.parametrize(("places", "batch", "size"), [
    ({4: -1.5, 5: -1.5}, 1, (8, 8)), ({2: 0.0, 3: 0.0, 4: 0.0}, 3, (6, 10)), ({0: 2.5, 9: -0.5}, 1, (9, 7)),
    (SWEEP, 3, (9, 7)), (SWEEP, 3, (5, 12))], ids=["negative", "zero", "two", "sweep-9x7", "sweep-5x12"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_is_that_with_scaled_columns(models: dict[str, Any], name: str, places: Any, batch: int,
                                              size: tuple[int, int]) -> None:
    check(FAMILIES[name], models[name], factors_of(places), batch, size)


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_in_any_order_alone_and_together(models: dict[str, Any], name: str) -> None:
    family, model = FAMILIES[name], models[name]
    factors = factors_of(SWEEP)
    check(family, model, factors, guider=ReversedGuider, index=1)
    single, calls = tiny.count_evaluations(patch_model(model))
    check(family, model, factors, patched=in_single_chunks(single))
    assert set(calls) == {3}, "the conditionings did not come one at a time"
    check(family, model, factors, patched=in_single_chunks(patch_model(model)), guider=ReversedGuider, index=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_negative_of_another_length(models: dict[str, Any], name: str) -> None:
    """A UNet's texts are repeated to one length; joint families run one after the other."""
    family, model = FAMILIES[name], models[name]
    check(family, model, factors_of(SWEEP), negative=family.conditioning(2, 2 * TOKENS))
    check(family, model, factors_of({13: -1.0, 20: 3.0}, 2 * TOKENS), positive=family.conditioning(1, 2 * TOKENS))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_conditionings_with_factors_of_their_own(models: dict[str, Any], name: str) -> None:
    family, model = FAMILIES[name], models[name]
    texts = family.conditioning(1, TOKENS), family.conditioning(2, TOKENS)
    factors = factors_of(SWEEP), factors_of({3: 0.5, 8: -1.0})
    bare = with_override(model, make_explicit(family, dict(enumerate(factors)), SIZE))
    explicit = sample(family, bare, texts[0], 3, SIZE, texts[1])
    positive, negative = (mark(text, values) for text, values in zip(texts, factors))
    scaled = sample(family, patch_model(model), positive, 3, SIZE, negative)
    assert distance(scaled, explicit) < TOLERANCE
    assert distance(scaled, sample(family, patch_model(model), positive, 3, SIZE, texts[1])) > EFFECT


def test_flux_with_a_mask_of_queries_and_keys(models: dict[str, Any]) -> None:
    family = FAMILIES["flux"]
    tokens = TOKENS + family.image_tokens(*SIZE)
    mask = 3.0 * torch.randn(1, tokens, tokens, generator=torch.Generator().manual_seed(3))
    options = {"attention_mask": mask, "attention_mask_img_shape": (-(-SIZE[0] // 2), -(-SIZE[1] // 2))}
    positive = family.conditioning(1, TOKENS, **options)
    unmasked = sample(family, models["flux"], family.conditioning(1, TOKENS), 3, SIZE)
    assert distance(sample(family, models["flux"], positive, 3, SIZE), unmasked) > EFFECT
    check(family, models["flux"], factors_of(SWEEP), positive=positive)
    check(family, models["flux"], factors_of(SWEEP), positive=positive,
          negative=family.conditioning(2, TOKENS, **options))  # in one call


def test_qwen_with_a_mask_of_keys(models: dict[str, Any]) -> None:
    family = FAMILIES["qwen"]
    masks = torch.ones(2, 1, TOKENS, dtype=torch.long)
    masks[0, :, 8:] = masks[1, :, 2:4] = 0
    positive = family.conditioning(1, TOKENS, attention_mask=masks[0])
    unmasked = sample(family, models["qwen"], family.conditioning(1, TOKENS), 3, SIZE)
    assert distance(sample(family, models["qwen"], positive, 3, SIZE), unmasked) > EFFECT
    check(family, models["qwen"], factors_of(SWEEP), positive=positive)
    check(family, models["qwen"], factors_of(SWEEP), positive=positive,
          negative=family.conditioning(2, TOKENS, attention_mask=masks[1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_override_of_another_node_keeps_its_effect(models: dict[str, Any], name: str) -> None:
    family, model = FAMILIES[name], models[name]
    calls: list[int] = []

    def halve(func: Any, q: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        assert "cond_or_uncond" in kwargs["transformer_options"]
        calls.append(len(q))
        return func(q * 0.5, *rest, **kwargs)

    factors, positive = factors_of(SWEEP), family.conditioning(1, TOKENS)
    bare = with_override(model, make_explicit(family, {0: factors}, SIZE, query_scale=0.5))
    explicit = sample(family, bare, positive, 3, SIZE)
    for patched in (patch_model(with_override(model, halve)), with_override(patch_model(model), halve)):
        calls.clear()
        scaled = sample(family, patched, mark(positive, factors), 3, SIZE)
        assert calls and distance(scaled, explicit) < TOLERANCE
        assert torch.equal(sample(family, patched, positive, 3, SIZE),
                           sample(family, with_override(model, halve), positive, 3, SIZE))
    assert distance(explicit, sample(family, patch_model(model), mark(positive, factors), 3, SIZE)) > EFFECT


@pytest.mark.parametrize("name", JOINT)
def test_text_queries_see_the_original_values(models: dict[str, Any], name: str) -> None:
    family, factors, positive = FAMILIES[name], factors_of(SWEEP), FAMILIES[name].conditioning(1, TOKENS)
    scaled = sample(family, patch_model(models[name]), mark(positive, factors), 3, SIZE)
    both, image = (sample(family, with_override(models[name], make_explicit(family, {0: factors}, SIZE, text_too=text)),
                          positive, 3, SIZE) for text in (True, False))
    assert distance(scaled, both) > EFFECT
    assert distance(scaled, image) < TOLERANCE


def test_sd35_medium_has_image_only_attention(models: dict[str, Any]) -> None:
    """Else the tests above would not show that it is left alone."""
    family, seen = FAMILIES["sd35_medium"], set()
    sample(family, with_override(models["sd35_medium"], make_explicit(family, {}, SIZE, seen=seen)),
           family.conditioning(1, TOKENS), 1, SIZE)
    assert seen == {family.image_tokens(*SIZE), family.image_tokens(*SIZE) + TOKENS}


@pytest.mark.parametrize("name", FAMILIES)
def test_unmarked_conditioning_is_bit_identical(models: dict[str, Any], name: str) -> None:
    family, model = FAMILIES[name], models[name]
    for batch, prepare in ((3, lambda model: model), (1, in_single_chunks)):
        plain = sample(family, prepare(model), family.conditioning(1, TOKENS), batch, SIZE)
        for patched in (patch_model(model), patch_model(patch_model(model))):
            assert torch.equal(sample(family, prepare(patched), family.conditioning(1, TOKENS), batch, SIZE), plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_patching_twice_scales_once(models: dict[str, Any], name: str) -> None:
    check(FAMILIES[name], models[name], factors_of(SWEEP), patched=patch_model(patch_model(models[name])))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_evaluation_is_added(models: dict[str, Any], name: str) -> None:
    family, positive = FAMILIES[name], FAMILIES[name].conditioning(1, TOKENS)
    bare, expected = tiny.count_evaluations(models[name])
    sample(family, bare, positive, 3, SIZE)
    patched, calls = tiny.count_evaluations(patch_model(models[name]))
    sample(family, patched, mark(positive, factors_of(SWEEP)), 3, SIZE)
    assert calls == expected == [6, 6, 6]


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_the_caller_changes(models: dict[str, Any], name: str) -> None:
    family, model = FAMILIES[name], models[name]
    marked = mark(family.conditioning(1, TOKENS), factors_of(SWEEP))
    weights = {key: value.clone() for key, value in model.model.state_dict().items()}

    def describe() -> tuple[str, ...]:
        parts = ("model_options", "wrappers", "callbacks", "object_patches")
        return tuple(snapshot(vars(model)[part]) for part in parts)

    before = describe()
    patched = patch_model(model)
    sample(family, patched, marked, 3, SIZE)
    assert describe() == before
    assert all(torch.equal(value, weights[key]) for key, value in model.model.state_dict().items())
    assert torch.equal(marked[0][0], family.conditioning(1, TOKENS)[0][0])
    assert torch.equal(read_mark(marked[0][1], SCALE_KEY).factors, factors_of(SWEEP))
    for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL):
        assert not model.wrappers.get(kind, {}).get(SCALE_KEY) and len(patched.wrappers[kind][SCALE_KEY]) == 1


# --------------------------------------------------------------------------------------------------- peculiar ones

@pytest.mark.parametrize(("name", "tokens"), [("flux2", TOKENS), ("klein", 512)])
def test_a_text_that_the_model_makes_longer_in_front(name: str, tokens: int) -> None:
    """Also beside a negative of another length, and where other text was appended."""
    family, size = PECULIAR[name], (5, 3)
    model, factors = family.model(), factors_of(SWEEP, tokens)
    positive, negative = family.conditioning(1, tokens), family.conditioning(2, 30)
    longer = core.ConditioningConcat().concat(positive, family.conditioning(4, 20))[0]
    marked = mark(positive, factors)
    for plain, own, after in ((positive, marked, 0),
                              (longer, core.ConditioningConcat().concat(marked, family.conditioning(4, 20))[0], 20)):
        whole = torch.ones(3, max(512, tokens + after))
        first = whole.shape[1] - after - tokens
        whole[:, first:first + tokens] = factors
        bare = with_override(model, make_explicit(family, {0: whole}, size))
        explicit = sample(family, bare, plain, 3, size, negative)
        assert distance(sample(family, patch_model(model), own, 3, size, negative), explicit) < TOLERANCE
        assert distance(sample(family, model, plain, 3, size, negative), explicit) > EFFECT


def test_a_region_of_a_text_made_longer() -> None:
    """The host copies the region to the other list, where it reads the marked text of that list."""
    family, size = PECULIAR["flux2"], (6, 5)
    model, factors = family.model(), factors_of(SWEEP)
    region = [[text, {**options, "area": (3, 4, 1, 1)}] for text, options in family.conditioning(2, 25)]
    negative = [*region, *family.conditioning(6, 17)]
    whole = torch.ones(3, 512)
    whole[:, 512 - TOKENS:] = factors
    explicit = make_explicit(family, {0: whole}, size)
    part = make_explicit(family, {0: whole}, (3, 4))

    def either(func: Any, q: Tensor, k: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return (explicit if k.shape[2] == 512 + 30 else part)(func, q, k, *rest, **kwargs)

    positive = family.conditioning(1, TOKENS)
    expected = sample(family, with_override(model, either), positive, 3, size, negative)
    ours = sample(family, patch_model(model), mark(positive, factors), 3, size, negative)
    assert distance(ours, expected) < TOLERANCE
    assert distance(sample(family, model, positive, 3, size, negative), expected) > EFFECT


def test_transformers_that_read_text_twice() -> None:
    family = PECULIAR["upscaler"]
    model = family.model()
    seen: set[int] = set()
    sample(family, with_override(model, make_explicit(family, {}, SIZE, seen=seen)), family.conditioning(1, TOKENS), 1,
           SIZE)
    assert SIZE[0] * SIZE[1] not in seen, "the first level attends to text only"
    check(family, model, factors_of(SWEEP))


def test_family_without_a_seam_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="expected a model of SD1.x, .* or HunyuanVideo, got Mochi; its attention"):
        patch_model(MODERN["mochi"].model())
