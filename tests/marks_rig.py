"""Marked prompts as both nodes make them, runs of them, and their effect by the tests' own hands."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.conds
import comfy.samplers
import tiny
import torch
from attention_merge_rig import Expected, merge, merge_explicitly, soft_masks, texts_of
from comfy.patcher_extension import WrappersMP
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.marks import keep_text, mark_conditioning
from torch import Tensor

TEXT, OTHER, NEGATIVE, THIRD = (tiny.conditioning(seed) for seed in (1, 3, 2, 4))
MASKS = soft_masks(2)
NODES = {"scale": "Token Attention Scale", "merge": "Cross-Attention Merge"}
Conds = list[Any]


def factors(*values: float) -> Tensor:
    scaled = torch.ones(len(values), 77)
    scaled[:, [3, 5, 6]] = torch.tensor(values).unsqueeze(1)
    return scaled


def mark(technique: str, model: Any, text: Any = TEXT, values: tuple[float, ...] = (-1.5,)) -> tuple[Any, Conds]:
    """The patched model and the marked prompt."""
    if technique == "merge":
        return merge(model, MASKS, text, OTHER)
    scale = TokenScale(factors(*values), 0.0, 1.0)
    patched = patch_model(model)
    keep_text(patched, SCALE_KEY, scale, text[0][0])
    return patched, mark_conditioning(text, SCALE_KEY, scale)


def run(model: Any, positive: Any, negative: Any = NEGATIVE, batch: int = 1, steps: int = 2, guider: Any = None,
        size: tuple[int, int] = (8, 6)) -> Tensor:
    latent = tiny.latent(batch, *size)["samples"]
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(5))
    guider = guider or tiny.cfg_guider(model, positive, negative)
    return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), tiny.sigmas_of(model, steps=steps),
                         disable_pbar=True, seed=5)


def explicit(model: Any, text: Tensor, values: Tensor) -> Any:
    """The model with values scaled by the test wherever a row reads `text`."""
    clone = model.clone()

    def scale(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        value = value.clone()
        for row in range(len(value)):
            if torch.equal(context[row], text[0]):
                value[row] *= values[0].unsqueeze(-1)
        return n, context, value

    clone.set_model_attn2_patch(scale)
    return clone


def written_out(technique: str, model: Any, text: Any = TEXT, **options: Any) -> Tensor:
    """The effect by the tests' own hands, for a positive that reads `text`."""
    if technique == "scale":
        return run(explicit(model, text[0][0], factors(-1.5)), text, **options)
    with merge_explicitly(model, Expected(texts_of(text, OTHER), MASKS)) as seen:
        result = run(model, text, **options)
    assert seen
    return result


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, atol=1e-2)


def around_conds(model: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A wrapper that hands on other conditionings, changed one by one."""
    clone = model.clone()

    def wrapper(executor: Any, inner: Any, conds: Any, *arguments: Any) -> Any:
        return executor(inner, [[change(cond) for cond in group] for group in conds], *arguments)

    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "stranger", wrapper)
    return clone


def with_text(cond: dict[str, Any], text: Tensor) -> dict[str, Any]:
    return {**cond, "model_conds": {**cond["model_conds"], "c_crossattn": comfy.conds.CONDCrossAttn(text)}}
