"""Token attention scale on the families that people use now, against attention written out in float64."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from families import MODERN
from families_modern import HUNYUAN_IMAGE
from family import build, draw
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.marks import keep_text, mark_conditioning
from modern_rig import CROSS, KNOWN, ORDERS, SECOND, attend, distance, sample, scaled_by_hand, with_override, words_of
from nodes import ConditioningZeroOut

pytestmark = pytest.mark.seam

# Both sides run their layers in float32 and round them differently; Krea 2 amplifies what differs.
TOLERANCE, EFFECT = 2e-5, 4e-4
TOLERANCES = {"krea2": 2e-3, "ideogram4": 1e-4}
NAMES = [name for name in (*ORDERS, *CROSS) if not MODERN[name].is_missing()]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


def model_of(name: str, models: dict[str, Any]) -> Any:
    if name not in models:
        models[name] = KNOWN[name].model()
    return models[name]


def draw_factors(name: str) -> torch.Tensor:
    """[2, words]: another value for each image at two places, one of them the last."""
    factors = torch.ones(2, words_of(name))
    factors[:, 2], factors[:, -1] = torch.tensor([-2.0, 3.0]), torch.tensor([0.0, -1.0])
    return factors


def mark(name: str, conditioning: list[Any], factors: torch.Tensor) -> list[Any]:
    others = {}
    if name == "hidream":
        factors, others["conditioning_llama3"] = factors.split([factors.shape[1] - SECOND, SECOND], dim=1)
    return mark_conditioning(conditioning, SCALE_KEY, TokenScale(factors, 0.0, 1.0, others))


@pytest.mark.parametrize("name", NAMES)
def test_sampling_is_that_with_scaled_columns(models: dict[str, Any], name: str) -> None:
    model, family, factors = model_of(name, models), KNOWN[name], draw_factors(name)
    positive, negative = family.conditioning(1), family.conditioning(2)
    by_hand = sample(name, with_override(model, scaled_by_hand(name, {0: factors})), positive, negative)
    ours = sample(name, patch_model(model), mark(name, positive, factors), negative)
    plain = sample(name, model, positive, negative)
    tolerance = TOLERANCES.get(name, TOLERANCE)
    assert distance(ours, by_hand) < tolerance
    assert distance(ours, plain) > 20 * tolerance
    assert torch.equal(sample(name, patch_model(model), positive, negative), plain)


@pytest.mark.parametrize("told_apart", [False, True], ids=["behind the text", "before it"])
def test_a_second_text_of_quotes(told_apart: bool) -> None:
    """HunyuanImage's ByT5 rows, and HunyuanVideo 1.5's, which begin with them."""
    config = {**HUNYUAN_IMAGE, "byt5": True, "use_cond_type_embedding": told_apart}
    model, family, quotes = build("HunyuanImage21", config, 0), KNOWN["hunyuan_image"], 5
    texts = [family.conditioning(seed, conditioning_byt5small=draw(1, quotes, 1472, seed=seed + 9)) for seed in (1, 2)]
    words, second = torch.ones(1, family.tokens), torch.ones(1, quotes)
    words[0, 2], second[0, 3] = -2.0, 3.0
    marked = mark_conditioning(texts[0], SCALE_KEY, TokenScale(
        words, 0.0, 1.0, {"conditioning_byt5small": second}))
    whole = torch.cat([second, words] if told_apart else [words, second], dim=1).double()
    total = whole.shape[1] + family.image_tokens(*family.size)

    def by_hand(func: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int,
                mask: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        chunks = kwargs["transformer_options"]["cond_or_uncond"]

        def change(maps: torch.Tensor) -> None:
            if maps.shape[-1] == total:
                rows = maps.reshape(len(chunks), -1, *maps.shape[1:])[chunks.index(0)] if 0 in chunks else maps[:0]
                rows[..., whole.shape[1]:, :whole.shape[1]] *= whole[:, None, None]

        return attend(q, k, v, heads, mask, change, **kwargs)

    ours, plain = (sample("hunyuan_image", patched, positive, texts[1]) for patched, positive in (
        (patch_model(model), marked), (model, texts[0])))
    assert distance(ours, sample("hunyuan_image", with_override(model, by_hand), texts[0], texts[1])) < TOLERANCE
    assert distance(ours, plain) > EFFECT


def pass_on(x: Any, *_: Any, **__: Any) -> Any:
    """What another node does after a layer's text attention (Wan) or before it (Cosmos, Anima)."""
    return x["x"] if isinstance(x, dict) else {}


@pytest.mark.parametrize("name", ["wan21_t2v", "anima"])
def test_patches_of_other_nodes_beside_a_prompt_that_is_not_scaled(models: dict[str, Any], name: str) -> None:
    """The model knows the text of a scaled prompt and looks for it in UNets' patches, which are called otherwise."""
    model, family = model_of(name, models), KNOWN[name]
    positive, negative, factors = family.conditioning(1), family.conditioning(2), draw_factors(name)
    patched = patch_model(model)
    keep_text(patched, SCALE_KEY, mark(name, positive, factors)[0][1], positive[0][0])
    patched.set_model_attn2_patch(pass_on)
    assert torch.equal(sample(name, patched, positive, negative), sample(name, model, positive, negative))


def compiled_blocks(model: Any) -> Any:
    """Each block compiled by itself, as nodes of other packs do it."""
    clone = model.clone()
    for index, block in enumerate(model.model.diffusion_model.blocks):
        clone.add_object_patch(f"diffusion_model.blocks.{index}", torch.compile(block, backend="eager"))
    return clone


@pytest.mark.parametrize("name", ["wan21_t2v", "anima"])
def test_blocks_that_are_compiled_one_by_one(models: dict[str, Any], name: str) -> None:
    model, family, factors = model_of(name, models), KNOWN[name], draw_factors(name)
    positive, negative = family.conditioning(1), family.conditioning(2)
    expected = sample(name, patch_model(model), mark(name, positive, factors), negative)
    assert distance(sample(name, patch_model(compiled_blocks(model)), mark(name, positive, factors), negative),
                    expected) < TOLERANCE
    assert distance(sample(name, model, positive, negative), expected) > EFFECT


def test_text_attention_that_another_node_replaces_is_told(models: dict[str, Any]) -> None:
    """One that makes values by itself, past the layer."""
    name = "wan21_t2v"
    model, family = model_of(name, models).clone(), KNOWN[name]
    reader = model.model.diffusion_model.blocks[0].cross_attn
    model.add_object_patch("diffusion_model.blocks.0.cross_attn.forward", lambda x, *args, **kwargs: reader.q(x))
    with pytest.raises(ValueError, match="expected the model to read one text in each layer, got 0; remove the node"):
        sample(name, patch_model(model), mark(name, family.conditioning(1), draw_factors(name)),
               family.conditioning(2))


def zero_out(conditioning: list[Any]) -> list[Any]:
    return ConditioningZeroOut().zero_out(conditioning)[0]


@pytest.mark.parametrize("name", ["anima", "cosmos_predict2"])
def test_a_zeroed_prompt_has_no_scaled_words(models: dict[str, Any], name: str) -> None:
    """Anima makes a text of a zeroed one, too."""
    model, family, factors = model_of(name, models), KNOWN[name], draw_factors(name)
    positive = family.conditioning(1)
    marked = mark(name, positive, factors)
    ours, expected = (sample(name, patch_model(model), marked, zero_out(negative)) for negative in (marked, positive))
    assert torch.equal(ours, expected)


def test_hidream_without_t5(models: dict[str, Any]) -> None:
    """Its place is zeros, and Llama's words carry all."""
    model, family, factors = model_of("hidream", models), KNOWN["hidream"], draw_factors("hidream")
    positive, negative = family.conditioning(1), family.conditioning(2)
    positive[0][0] = torch.zeros_like(positive[0][0])
    factors[:, :family.tokens] = 1.0
    by_hand = sample("hidream", with_override(model, scaled_by_hand("hidream", {0: factors})), positive, negative)
    ours = sample("hidream", patch_model(model), mark("hidream", positive, factors), negative)
    assert distance(ours, by_hand) < TOLERANCE
    assert distance(ours, sample("hidream", model, positive, negative)) > EFFECT


def test_pictures_that_clip_saw_stand_before_the_words() -> None:
    """HunyuanVideo 1.5 from a picture."""
    model, family = build("HunyuanImage21", {**HUNYUAN_IMAGE, "vision_in_dim": 1152}, 0), KNOWN["hunyuan_image"]
    network, seen = model.model.diffusion_model, draw(1, 4, 1152, seed=5)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "seen", lambda executor, *args, **kwargs: executor(
        *args, **{**kwargs, "clip_fea": seen.expand(len(args[0]), -1, -1)}))
    assert network.vision_in is not None
    positive, negative, factors = family.conditioning(1), family.conditioning(2), draw_factors("hunyuan_image")[:1]
    total = 4 + family.tokens + family.image_tokens(*family.size)

    def by_hand(func: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int,
                mask: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        chunks = kwargs["transformer_options"]["cond_or_uncond"]

        def change(maps: torch.Tensor) -> None:
            if maps.shape[-1] == total and 0 in chunks:
                rows = maps.reshape(len(chunks), -1, *maps.shape[1:])[chunks.index(0)]
                rows[..., 4 + family.tokens:, 4:4 + family.tokens] *= factors[:, None, None].double()

        return attend(q, k, v, heads, mask, change, **kwargs)

    outer = patch_model(model)
    ours = sample("hunyuan_image", outer, mark("hunyuan_image", positive, factors), negative)
    assert distance(ours, sample("hunyuan_image", with_override(model, by_hand), positive, negative)) < TOLERANCE
    assert distance(ours, sample("hunyuan_image", model, positive, negative)) > EFFECT
