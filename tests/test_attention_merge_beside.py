"""Cross-attention merge beside token scale, other packs' patches, other guiders and samplers; and what it refuses."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.patcher_extension
import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from attention_merge_rig import Expected, merge, merge_explicitly, sample, sample_latent, soft_masks, texts_of
from comfy_api.latest import _io
from families import MODERN, raise_norms
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.layout import LayoutMixSampler, Mix, make_layout
from mixology.host.marks import mark_conditioning
from mixology.host.spatial import EpsilonMergeGuider
from mixology.nodes.attention_merge import AttentionMerge
from torch import Tensor

FIRST, SECOND, THIRD, NEGATIVE = (tiny.conditioning(seed) for seed in (1, 3, 4, 2))
LONG = tiny.conditioning(5, tokens=154)
MASKS = soft_masks(2)


@pytest.fixture(scope="module")
def model() -> Any:
    return raise_norms(tiny.unet())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    """float32 rounding through three steps of a random network of about unit gain, merged in another order."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------- token scale

def factors(*values: float, tokens: int = 77) -> Tensor:
    scaled = torch.ones(len(values), tokens)
    scaled[:, [3, 5, 6]] = torch.tensor(values).unsqueeze(1)
    return scaled


def scale(conditioning: Any, *values: float, window: tuple[float, float] = (0.0, 1.0)) -> Any:
    tokens = conditioning[0][0].shape[1]
    return mark_conditioning(conditioning, SCALE_KEY, TokenScale(factors(*values, tokens=tokens), *window))


def inside(model: Any, window: tuple[float, float], scaled: Tensor) -> Callable[[float], Tensor | None]:
    start, end = (model.get_model_object("model_sampling").percent_to_sigma(percent) for percent in window)
    return lambda sigma: scaled if end <= sigma <= start else None


@pytest.mark.parametrize("values", [(-1.5,), (-1.5, 0.5, 2.0)])
@pytest.mark.parametrize("scaled", [(0,), (1,), (2,), (0, 2)])
def test_token_scale_acts_on_its_own_style(model: Any, scaled: tuple[int, ...], values: tuple[float, ...]) -> None:
    """First, second or third style; one value or one for each image; a negative and styles of 77 and 154 tokens."""
    texts, masks = [FIRST, LONG, SECOND], soft_masks(3)
    marked = [scale(text, *values) if i in scaled else text for i, text in enumerate(texts)]
    merged, positive = merge(model, masks, *marked)
    ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE), 3)
    own = [(lambda sigma, i=i: factors(*values, tokens=texts[i][0][0].shape[1])) if i in scaled else None
           for i in range(3)]
    with merge_explicitly(model, Expected(texts_of(*texts), masks, own)):
        close(ours, sample(tiny.cfg_guider(model, FIRST, NEGATIVE), 3))
    merged, positive = merge(model, masks, *texts)
    assert not torch.allclose(ours, sample(tiny.cfg_guider(merged, positive, NEGATIVE), 3), atol=1e-2)


@pytest.mark.parametrize("first", [True, False])
def test_either_node_may_patch_the_model_first(model: Any, first: bool) -> None:
    """And the merge alone does it too where its first prompt is scaled."""
    marked = scale(FIRST, -1.5)
    alone, positive = merge(model, MASKS, marked, SECOND)
    both = merge(patch_model(model), MASKS, marked, SECOND)[0] if first else patch_model(alone)
    runs = [sample(tiny.cfg_guider(patched, positive, scale(NEGATIVE, 2.0))) for patched in (alone, both)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.3, 0.6)])
@pytest.mark.parametrize("place", [0, 1])
def test_token_scale_keeps_its_window(model: Any, window: tuple[float, float], place: int) -> None:
    texts = [FIRST, SECOND]
    texts[place] = scale(texts[place], -1.5, window=window)
    merged, positive = merge(model, MASKS, *texts)
    ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE), steps=8)
    own: list[Any] = [None, None]
    own[place] = inside(model, window, factors(-1.5))
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), MASKS, own)):
        close(ours, sample(tiny.cfg_guider(model, FIRST, NEGATIVE), steps=8))


def test_scale_values_that_do_not_fit_the_batch(model: Any) -> None:
    merged, positive = merge(model, MASKS, FIRST, scale(SECOND, 1.0, 2.0))
    with pytest.raises(ValueError, match="got 2 values for a phrase and 3 images; give one value, or one for each"):
        sample(tiny.cfg_guider(merged, positive, NEGATIVE), 3)


# --------------------------------------------------------------------------------------------------- other packs

def turn_queries(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return n.flip(-1) * 1.2, context, value


def double_text(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """As packs do that append a negated copy of some tokens; the test's copy is uneven, so that it counts."""
    return n, torch.cat([context, context[:, :9]], dim=1), torch.cat([value, -value[:, :9]], dim=1)


def shrink(n: Tensor, options: dict[str, Any]) -> Tensor:
    return n * 0.7


def sharpen(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
    return func(q * 1.3, k, v, heads, *args, **kwargs)


def patch(model: Any, *patches: str) -> Any:
    clone = model.clone()
    if "attn1" in patches:
        clone.set_model_attn1_patch(turn_queries)
    if "attn2" in patches:
        clone.set_model_attn2_patch(double_text)
        clone.set_model_attn2_patch(turn_queries)
    if "output" in patches:
        clone.set_model_attn1_output_patch(shrink)
        clone.set_model_attn2_output_patch(shrink)
    if "override" in patches:
        clone.model_options["transformer_options"]["optimized_attention_override"] = sharpen
    return clone


@pytest.mark.parametrize("patches", [("attn1",), ("attn2",), ("output",), ("attn1", "attn2", "output")])
@pytest.mark.parametrize("before", [True, False])
def test_beside_other_packs_list_patches(model: Any, patches: tuple[str, ...], before: bool) -> None:
    """Patches of the text act on the first prompt's; all others act as in a plain run."""
    merged, positive = merge(patch(model, *patches) if before else model, MASKS, FIRST, SECOND)
    ours = sample(tiny.cfg_guider(merged if before else patch(merged, *patches), positive, NEGATIVE), 2)
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), MASKS)):
        close(ours, sample(tiny.cfg_guider(patch(model, *patches), FIRST, NEGATIVE), 2))
    assert not torch.allclose(ours, sample(tiny.cfg_guider(*merge(model, MASKS, FIRST, SECOND), NEGATIVE), 2),
                              atol=1e-2)


def test_beside_another_node_s_attention_override(model: Any) -> None:
    """An override that scales queries equals a model of scaled query weights, for every text and in self-attention."""
    merged, positive = merge(patch(model, "override"), MASKS, FIRST, SECOND)
    ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE), 2)
    scaled = raise_norms(tiny.unet())
    for name, parameter in scaled.model.diffusion_model.named_parameters():
        if "to_q" in name:
            parameter.mul_(1.3)
    with merge_explicitly(scaled, Expected(texts_of(FIRST, SECOND), MASKS)):
        close(ours, sample(tiny.cfg_guider(scaled, FIRST, NEGATIVE), 2))


# --------------------------------------------------------------------------------------------------- guiders, samplers

def test_as_one_style_of_an_epsilon_merge(model: Any) -> None:
    masks = soft_masks(2, seed=8)
    merged, text = merge(model, MASKS, FIRST, SECOND)

    def guider(model: Any, style: Any) -> Any:
        return EpsilonMergeGuider(model, masks, {"positive_0": THIRD, "positive_1": style}, NEGATIVE, 3.0, "2, 5")

    ours = sample(guider(merged, text), 2)
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), MASKS)):
        close(ours, sample(guider(model, FIRST), 2))
    assert not torch.allclose(ours, sample(guider(model, FIRST), 2), atol=1e-2)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "heun"])
def test_with_layout_mixing(model: Any, name: str) -> None:
    layout = make_layout(tiny.latent(1, 8, 6, seed=9), 5, "shared")
    sampler = LayoutMixSampler(comfy.samplers.sampler_object(name), layout, Mix(0.5, 0.6, 0.3))
    merged, positive = merge(model, MASKS, FIRST, SECOND)
    ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE), steps=8, sampler=sampler)
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), MASKS)):
        close(ours, sample(tiny.cfg_guider(model, FIRST, NEGATIVE), steps=8, sampler=sampler))


@pytest.mark.parametrize("window", [(0.0, 0.5), (0.4, 1.0)])
def test_a_time_range(model: Any, window: tuple[float, float]) -> None:
    """The host's own ranges on the merged prompt and a plain one for the rest of the time."""
    merged, text = merge(model, MASKS, FIRST, SECOND)

    def parts(own: Any) -> Any:
        ranged = core.ConditioningSetTimestepRange().set_range(own, *window)[0]
        return core.ConditioningCombine().combine(ranged, THIRD)[0]

    ours = sample(tiny.cfg_guider(merged, parts(text), NEGATIVE), steps=8)
    with merge_explicitly(model, Expected(texts_of(FIRST, SECOND), MASKS)):
        close(ours, sample(tiny.cfg_guider(model, parts(FIRST), NEGATIVE), steps=8))


def test_the_node_as_the_host_calls_it(model: Any) -> None:
    """The host's own expansion and nesting of the group, wired in another order than numbered, then execute."""
    texts = {"conditioning_2": LONG, "conditioning_0": FIRST, "conditioning_1": SECOND}
    group = {f"conditionings.{name}": text for name, text in texts.items()}
    wired = {"model": model, "masks": soft_masks(3)[:2], **group}
    inputs, _, v3_data = _io.get_finalized_class_inputs(AttentionMerge.INPUT_TYPES(), dict.fromkeys(wired))
    assert len([name for name in inputs["required"] if name.startswith("conditionings.")]) == 2
    assert len([name for name in inputs["optional"] if name.startswith("conditionings.")]) == 14
    clone = AttentionMerge.PREPARE_CLASS_CLONE({**v3_data, "hidden_inputs": {}})
    merged, positive = clone.EXECUTE_NORMALIZED(**_io.build_nested_inputs(wired, v3_data)).result
    reference, whole = merge(model, soft_masks(3), FIRST, SECOND, LONG)
    close(sample(tiny.cfg_guider(merged, positive, NEGATIVE)), sample(tiny.cfg_guider(reference, whole, NEGATIVE)))


# --------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize(("make", "name"), [(MODERN["ernie"].model, "ERNIE-Image"), (MODERN["lens"].model, "Lens")])
def test_other_families_are_refused(make: Any, name: str) -> None:
    with pytest.raises(ValueError, match="^Cross-Attention Merge expected a model of SD1.x, SD2.x, SDXL, SD3, .* or "
                                         f"LTX-Video, got {name}; use the Epsilon Merge Guider, which takes any model"):
        merge(make(), MASKS, FIRST, SECOND)


def test_a_video_unet_is_refused() -> None:
    """Its temporal layers hand pixels over time to cross-attention, which have no place in a mask."""
    video = tiny.unet()
    video.model.model_config.unet_config["use_temporal_attention"] = True
    with pytest.raises(ValueError, match="^Cross-Attention Merge expected a model of SD1.x, SD2.x, SDXL, .*, got"):
        merge(video, MASKS, FIRST, SECOND)


@pytest.mark.parametrize(("masks", "prompts", "message"), [
    (soft_masks(3), (FIRST, SECOND), "^2 styles expect 2 masks, or 1 where the last style takes the rest, got 3; "),
    (MASKS[:1], (FIRST, SECOND, THIRD), "^3 styles expect 3 masks, or 2 where the last style takes the rest, got 1; "),
    (torch.zeros(2, 8, 8), (FIRST, SECOND), "^The masks expect at least one painted area, got empty masks only; "),
    (MASKS, (FIRST, []), "expected one prompt at conditioning_1, got none; connect a single CLIP Text Encode"),
    (MASKS, ([], FIRST), "expected one prompt at conditioning_0, got none; connect a single CLIP Text Encode"),
    (MASKS, (FIRST, [*SECOND, *THIRD]), "expected one prompt at conditioning_1, got 2; connect a single CLIP Text"),
    (MASKS, (FIRST, tiny.conditioning(3, width=20)),
     "expected texts 16 wide as the first, got 20 at conditioning_1; encode all with the model's own text encoder"),
    (MASKS, (core.ConditioningZeroOut().zero_out(FIRST)[0], SECOND),
     "expected a prompt with text at conditioning_0, got a zeroed one; put another prompt and its mask first"),
])
def test_mistakes_are_one_sentence(model: Any, masks: Tensor, prompts: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        merge(model, masks, *prompts)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0, 1])
def test_a_merge_of_a_merge_is_refused(model: Any, place: int) -> None:
    prompts = [SECOND, SECOND]
    prompts[place] = merge(model, MASKS, FIRST, THIRD)[1]
    with pytest.raises(ValueError, match=f"expected a plain prompt at conditioning_{place}, got one that is merged "
                                         "already; connect all prompts to one node"):
        merge(model, MASKS, *prompts)


def test_a_zeroed_prompt_may_be_another_style(model: Any) -> None:
    zeroed = core.ConditioningZeroOut().zero_out(SECOND)[0]
    merged, positive = merge(model, MASKS, FIRST, zeroed)
    ours = sample(tiny.cfg_guider(merged, positive, NEGATIVE))
    with merge_explicitly(model, Expected(texts_of(FIRST, zeroed), MASKS)):
        close(ours, sample(tiny.cfg_guider(model, FIRST, NEGATIVE)))


def test_a_node_that_replaces_cross_attention_is_refused(model: Any) -> None:
    merged, positive = merge(model, MASKS, FIRST, SECOND)
    replaced = merged.clone()
    replaced.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0)
    with pytest.raises(ValueError, match=r"expected the model's own cross-attention, got one that another node "
                                         r"replaces \(such as an IP adapter\); remove that node, or use the Epsilon"):
        sample(tiny.cfg_guider(replaced, positive, NEGATIVE))
    plain = model.clone()
    plain.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0)
    assert torch.equal(sample(tiny.cfg_guider(replaced, FIRST, NEGATIVE)),
                       sample(tiny.cfg_guider(plain, FIRST, NEGATIVE))), "without a merged prompt nothing is refused"


def wrap(model: Any, around: Callable[..., Any]) -> Any:
    """A clone with another node's wrapper inside ours."""
    clone = model.clone()
    clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "test", around)
    return clone


def test_a_node_that_drops_the_override_is_refused(model: Any) -> None:
    def drop(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = {key: part for key, part in args[5].items() if key != "optimized_attention_override"}
        return executor(*args[:5], options, **kwargs)

    merged, positive = merge(model, MASKS, FIRST, SECOND)
    with pytest.raises(ValueError, match="expected to compute the model's text attention, got a node that replaces it"):
        sample(tiny.cfg_guider(wrap(merged, drop), positive, NEGATIVE))


def test_a_node_that_changes_text_after_ours_is_refused(model: Any) -> None:
    def append(executor: Any, *args: Any, **kwargs: Any) -> Any:
        patches = args[5].get("patches", {})
        listed = [*patches.get("attn2_patch", []), double_text]
        return executor(*args[:5], {**args[5], "patches": {**patches, "attn2_patch": listed}}, **kwargs)

    merged, positive = merge(model, MASKS, FIRST, SECOND)
    with pytest.raises(ValueError, match="expected 48 picture and 154 text tokens in a layer, got 48 and 163; remove"):
        sample(tiny.cfg_guider(wrap(merged, append), positive, NEGATIVE))


def test_a_node_that_changes_the_batch_is_refused(model: Any) -> None:
    def add_row(apply: Any, arguments: dict[str, Any]) -> Tensor:
        x, t = (torch.cat([part, part[:1]]) for part in (arguments["input"], arguments["timestep"]))
        return apply(x, t, **arguments["c"])[:-1]

    merged, positive = merge(model, MASKS, FIRST, SECOND)
    merged.set_model_unet_function_wrapper(add_row)
    with pytest.raises(ValueError, match=r"expected a model call of 2 prompt\(s\) x 1 image\(s\), got 3 row"):
        sample(tiny.cfg_guider(merged, positive, NEGATIVE))
    assert sample_latent(tiny.cfg_guider(model, FIRST, NEGATIVE), tiny.latent()["samples"]).isfinite().all()
