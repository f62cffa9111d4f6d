"""Marked prompts beside packs that bring texts of their own into attention: doubled ones, and couples.

For both nodes that mark: what comes out is the effect written out by the tests, or a sentence. Never neither.
"""
from __future__ import annotations

from typing import Any

import comfy.hooks
import pytest
import tiny
import torch
from attention_merge_rig import Expected, merge, merge_explicitly, texts_of
from families import PECULIAR, raise_norms
from marks_rig import MASKS, NEGATIVE, NODES, OTHER, TEXT, THIRD, close, differ, explicit, factors, mark, run
from mixology.host.inversion import blend_prompts
from mixology.host.marks import is_marked
from torch import Tensor


@pytest.fixture(scope="module")
def model() -> Any:
    return raise_norms(tiny.unet())


# --------------------------------------------------------------------------------------------------- other texts

def doubled(seed: int) -> Any:
    """As NegPip encodes: of every token one for the keys, and one for the values, which may be negated."""
    text = tiny.conditioning(seed)[0][0]
    signs = torch.ones(1, 77, 1)
    signs[:, 4:9] = -1.0
    return [[torch.stack([text, text * signs], dim=2).flatten(1, 2), {}]]


def read_doubled(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return n, context[:, 0::2], value[:, 1::2]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_doubled_texts_of_every_style(model: Any, before: bool, batch: int) -> None:
    """Against the mean of the styles' attentions, each read by the pack's own patch in a plain run of one layer."""
    masks = torch.stack([torch.zeros(24, 20), torch.ones(24, 20)])
    paired = model.clone()
    paired.set_model_attn2_patch(read_doubled)
    texts, negative = [doubled(1), doubled(3)], doubled(2)
    merged, positive = merge(paired if before else model, masks, *texts)
    if not before:
        merged.set_model_attn2_patch(read_doubled)
    ours = run(merged, positive, negative, batch)
    close(ours, run(paired, texts[1], negative, batch))  # the second style alone
    assert differ(ours, run(paired, texts[0], negative, batch))
    half, whole = merge(paired, MASKS, texts[0], texts[0])
    close(run(half, whole, negative, batch), run(paired, texts[0], negative, batch))


def couple(region: Any, on: Any = None) -> tuple[Any, Any]:
    """Two patches that read a region's text beside the prompt's, half and half, in the positive's rows."""
    text, rows = region[0][0], []

    def lay(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        share = len(n) // len(options["cond_or_uncond"])
        rows[:] = [len(n)]
        own = text.expand(share, -1, -1) * 1.5
        return torch.cat([n, n[:share]]), torch.cat([context, own]), torch.cat([value, own])

    def blend(out: Tensor, options: dict[str, Any]) -> Tensor:
        out, other = out[:rows[0]].clone(), out[rows[0]:]
        out[:len(other)] = 0.5 * (out[:len(other)] + other)
        return out

    return lay, blend


def coupled(model: Any, region: Any) -> Any:
    clone = model.clone()
    lay, blend = couple(region)
    clone.set_model_attn2_patch(lay)
    clone.set_model_attn2_output_patch(blend)
    return clone


@pytest.mark.parametrize("technique", NODES)
def test_a_marked_prompt_as_a_region_of_a_couple(model: Any, technique: str) -> None:
    """There only its text is left; the scaled prompt may be the base, or a plain one the region."""
    patched, marked = mark(technique, model)
    with pytest.raises(ValueError, match=f"^{NODES[technique]} expected its prompt as a prompt of the sampler, got it "
                                         "as a region of a node that couples prompts inside attention"):
        run(coupled(patched, marked), THIRD)
    assert torch.equal(run(coupled(patched, OTHER), THIRD), run(coupled(model, OTHER), THIRD))
    if technique == "scale":
        reference = explicit(model, TEXT[0][0], factors(-1.5))
        close(run(coupled(patched, THIRD), marked), run(coupled(reference, THIRD), TEXT))
    else:
        with pytest.raises(ValueError, match="expected 2 rows of text inside the model, got 3; remove the node that"):
            run(coupled(patched, THIRD), marked)


@pytest.mark.parametrize("place", [0, 1])
def test_a_couple_as_an_input_of_the_merge(model: Any, place: int) -> None:
    hook = comfy.hooks.TransformerOptionsHook(hook_scope=comfy.hooks.EnumHookScope.HookedOnly)
    lay, blend = couple(THIRD)
    hook.transformers_dict = {"patches": {"attn2_patch": [lay], "attn2_output_patch": [blend]}}
    group = comfy.hooks.HookGroup()
    group.add(hook)
    prompts = [TEXT, OTHER]
    prompts[place] = comfy.hooks.set_hooks_for_conditioning(prompts[place], hooks=group)
    with pytest.raises(ValueError, match=f"^Cross-Attention Merge expected a plain prompt at conditioning_{place}, got "
                                         "one whose regions another node couples inside attention; connect the"):
        merge(model, MASKS, *prompts)


def test_merge_where_transformers_read_text_twice() -> None:
    family = PECULIAR["upscaler"]
    model = family.model()
    texts = [family.conditioning(seed, 11) for seed in (1, 3)]
    merged, positive = merge(model, MASKS, *texts)
    ours = run(merged, positive, family.conditioning(2, 11))
    with merge_explicitly(model, Expected(texts_of(*texts), MASKS)):
        close(ours, run(model, texts[0], family.conditioning(2, 11)))
    assert differ(ours, run(model, texts[0], family.conditioning(2, 11)))


@pytest.mark.parametrize("technique", NODES)
def test_a_marked_prompt_is_not_blended(technique: str, model: Any) -> None:
    """A blend's tokens are two prompts': a mark of either would mean other words."""
    _, marked = mark(technique, model)
    for pair in ((marked, NEGATIVE), (NEGATIVE, marked)):
        with pytest.raises(ValueError, match="Blend Prompts expects plain prompts, got one with scaled words"):
            blend_prompts(*pair, 2.0, 0.5)
    alone, = blend_prompts(marked, NEGATIVE, 2.0, 0.0)
    assert torch.equal(alone[0], 2 * marked[0][0]) and is_marked(alone[1])
