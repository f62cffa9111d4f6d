"""Token attention scale on the families that people use now, against attention written out in float64."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from families import MODERN
from families_modern import HUNYUAN_IMAGE
from family import build, draw
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.marks import keep_text, mark_conditioning
from modern_rig import CROSS, KNOWN, ORDERS, SECOND, attend, distance, sample, scaled_by_hand, with_override, words_of

pytestmark = pytest.mark.seam

# Both sides run their layers in float32 and round them differently; Krea 2 amplifies what differs.
TOLERANCE, TOLERANCES = 2e-5, {"krea2": 2e-3, "ideogram4": 1e-4}
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
    assert distance(ours, plain) > 20 * TOLERANCE


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
