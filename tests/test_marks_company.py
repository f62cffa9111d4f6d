"""Marked prompts beside packs that exchange texts, regroup rows or show the model parts of the picture.

For both nodes that mark: what comes out is the effect written out by the tests, or a sentence. Never neither.
"""
from __future__ import annotations

import copy
import uuid
from typing import Any

import comfy.samplers
import nodes as core
import pytest
import tiny
import torch
from attention_merge_rig import merge
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from families import raise_norms
from marks_rig import (
    MASKS,
    NEGATIVE,
    NODES,
    OTHER,
    TEXT,
    THIRD,
    around_conds,
    close,
    differ,
    explicit,
    factors,
    mark,
    run,
    with_text,
    written_out,
)
from torch import Tensor

pytestmark = pytest.mark.seam


@pytest.fixture(scope="module")
def model() -> Any:
    return raise_norms(tiny.unet())


# --------------------------------------------------------------------------------------------------- exchanged texts

@pytest.mark.parametrize("technique", NODES)
def test_a_wrapper_that_clones_the_text(model: Any, technique: str) -> None:
    """Before or after ours."""
    expected = written_out(technique, model)

    def clone_text(cond: dict[str, Any]) -> dict[str, Any]:
        return with_text(cond, cond["model_conds"]["c_crossattn"].cond.clone())

    patched, positive = mark(technique, around_conds(model, clone_text))
    close(run(patched, positive), expected)
    patched, positive = mark(technique, model)
    close(run(around_conds(patched, clone_text), positive), expected)
    assert differ(expected, run(model, TEXT))


@pytest.mark.parametrize("technique", NODES)
def test_a_node_that_noises_the_text_at_every_step(model: Any, technique: str) -> None:
    noise = 0.3 * torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(9))

    def noise_texts(arguments: dict[str, Any]) -> Any:
        conds = [[with_text(cond, cond["model_conds"]["c_crossattn"].cond + noise) for cond in group]
                 for group in arguments["conds"]]
        return comfy.samplers.calc_cond_batch(
            arguments["model"], conds, arguments["input"], arguments["sigma"], arguments["model_options"])

    patched, positive = mark(technique, model)
    patched.set_model_sampler_calc_cond_batch_function(noise_texts)
    noisy, other = ([[text[0][0] + noise, text[0][1]]] for text in (TEXT, NEGATIVE))
    close(run(patched, positive), written_out(technique, model, noisy, negative=other))


@pytest.mark.parametrize("technique", NODES)
@pytest.mark.parametrize("stripped", [False, True])
def test_a_model_that_reads_no_marks(model: Any, technique: str, stripped: bool) -> None:
    """The output was not wired, or another node drops what it holds; a later model of it serves all prompts."""
    patched, positive = mark(technique, model)
    bare = patched.clone()
    for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL):
        bare.wrappers.pop(kind, None)
    node = NODES[technique]
    for prompts in ((positive, NEGATIVE), (TEXT, positive)):
        with pytest.raises(ValueError, match=f"^{node} expected its prompt to be sampled with its MODEL output, got a "
                                             f"model that does not read it; connect the MODEL output of {node} to"):
            run(bare if stripped else model, *prompts)
    assert torch.equal(run(model, TEXT), run(bare, TEXT))


@pytest.mark.parametrize("technique", NODES)
def test_a_zeroed_prompt_needs_no_patched_model(model: Any, technique: str) -> None:
    patched, marked = mark(technique, model)
    zeroed, silent = (core.ConditioningZeroOut().zero_out(part)[0] for part in (marked, TEXT))
    expected = run(model, OTHER, silent)
    assert torch.equal(run(model, OTHER, zeroed), expected)
    assert torch.equal(run(patched, OTHER, zeroed), expected)
    both = core.ConditioningCombine().combine(marked, zeroed)[0]
    with pytest.raises(ValueError, match="connect the MODEL output"):
        run(model, both)


@pytest.mark.parametrize("technique", NODES)
def test_marks_leave_the_batching_and_the_callers_conds_alone(model: Any, technique: str) -> None:
    counted, calls = tiny.count_evaluations(model)
    patched, positive = mark(technique, counted)
    before = copy.copy(positive[0][1]), dict(positive[0][1]["model_conds"])
    guider = tiny.cfg_guider(patched, positive, NEGATIVE)
    seen: list[Any] = []

    def watch(arguments: dict[str, Any]) -> Tensor:
        seen.append([dict(cond["model_conds"]) for cond in (*arguments["cond"], *arguments["uncond"])])
        return arguments["denoised"]

    guider.model_options["sampler_post_cfg_function"] = [watch]
    run(patched, positive, guider=guider)
    assert calls == [2, 2] and len(seen) == 2
    assert (positive[0][1], dict(positive[0][1]["model_conds"])) == before
    assert all(len(shown[0]) == len(shown[1]) + 1 for shown in seen), "the guider's own conds keep the mark"


# --------------------------------------------------------------------------------------------------- rows

@pytest.mark.parametrize("technique", NODES)
def test_a_mark_that_finds_no_row(model: Any, technique: str) -> None:
    """A node that gives prompts other ids inside ours; one that skips the model is let alone, as is a time range."""
    patched, positive = mark(technique, model)
    with pytest.raises(ValueError, match=f"^{NODES[technique]} expected the model to read its prompt at this step, got "
                                         "calls without it; remove the node that regroups"):
        run(around_conds(patched, lambda cond: {**cond, "uuid": uuid.uuid4()}), positive)
    cached = patched.clone()
    cached.add_wrapper_with_key(
        WrappersMP.CALC_COND_BATCH, "cache", lambda executor, inner, conds, x, *rest: [x * 0.5 for _ in conds])
    assert run(cached, positive).isfinite().all()
    ranged = core.ConditioningSetTimestepRange().set_range(positive, 0.0, 0.4)[0]
    assert run(patched, core.ConditioningCombine().combine(ranged, THIRD)[0], steps=4).isfinite().all()


def tile(model: Any, at_once: int) -> Any:
    """Two overlapping tiles, blended; with two at once their rows come tile by tile: [c, u, c, u]."""
    clone = model.clone()
    bounds = [(0, 5), (3, 8)]

    def wrapper(apply: Any, arguments: dict[str, Any]) -> Tensor:
        x, t, c = arguments["input"], arguments["timestep"], arguments["c"]
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for start in range(0, len(bounds), at_once):
            group = bounds[start:start + at_once]
            parts = torch.cat([x[:, :, top:bottom] for top, bottom in group])
            own = {key: value.repeat(len(group), 1, 1) if key == "c_crossattn" else value for key, value in c.items()}
            for (top, bottom), part in zip(group, apply(parts, t.repeat(len(group)), **own).chunk(len(group))):
                total[:, :, top:bottom] += part
                count[:, :, top:bottom] += 1
        return total / count

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_one_at_a_time_are_scaled(model: Any, batch: int) -> None:
    patched, positive = mark("scale", model)
    expected = run(explicit(tile(model, 1), TEXT[0][0], factors(-1.5)), TEXT, batch=batch)
    close(run(tile(patched, 1), positive, batch=batch), expected)
    assert differ(expected, run(tile(model, 1), TEXT, batch=batch))


@pytest.mark.parametrize("technique", NODES)
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_together_are_refused(model: Any, technique: str, batch: int) -> None:
    patched, positive = mark(technique, model)
    with pytest.raises(ValueError, match=rf"^{NODES[technique]} expected a model call of 2 prompt\(s\) x {batch} image"
                                         rf"\(s\), got {4 * batch} row\(s\); set a tile batch size of 1"):
        run(tile(patched, 2), positive, batch=batch)


PARTS = "^Cross-Attention Merge expected the model to see 48x64 pixels at once, got 48x40 pixels; remove the node that"


def test_tiles_are_refused_by_the_merge(model: Any) -> None:
    patched, positive = mark("merge", model)
    with pytest.raises(ValueError, match=PARTS):
        run(tile(patched, 1), positive)


def slide(model: Any) -> Any:
    """The whole and a window of the picture in turn, as sliding window guidance reads it."""
    clone = model.clone()

    def windowed(executor: Any, inner: Any, conds: Any, x: Tensor, *rest: Any) -> Any:
        whole = executor(inner, conds, x, *rest)
        part = executor(inner, conds, x[:, :, 2:7], *rest)
        for out, inside in zip(whole, part):
            out[:, :, 2:7] = 0.5 * (out[:, :, 2:7] + inside)
        return whole

    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "slide", windowed)
    return clone


def test_windows_of_the_picture(model: Any) -> None:
    patched, positive = mark("scale", slide(model))
    close(run(patched, positive), run(explicit(slide(model), TEXT[0][0], factors(-1.5)), TEXT))
    patched, positive = mark("merge", slide(model))
    with pytest.raises(ValueError, match=PARTS):
        run(patched, positive)


def in_windows(model: Any, dim: int) -> Any:
    return ContextWindowsManualNode.execute(
        model, 3, 1, "standard_static", 1, False, "pyramid", dim, False, "", False).result[0]


@pytest.mark.parametrize("values", [(-1.5,), (-2.0, 0.0, 0.5, 2.0, 3.0)])
def test_context_windows_over_images(model: Any, values: tuple[float, ...]) -> None:
    """Each image keeps its own value in every window that shows it."""
    patched, positive = mark("scale", in_windows(model, 0), values=values)
    ours = run(patched, positive, batch=5)
    reference = in_windows(model, 0).clone()

    def scale(n: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        window, share = options["context_window"], len(value) // len(options["cond_or_uncond"])
        first = [window.index_list[0] - 1] if share > len(window.index_list) else []
        value = value.clone()
        for chunk, index in enumerate(options["cond_or_uncond"]):
            if index == 0:
                own = factors(*values)
                shown = own if len(own) == 1 else own[[*first, *window.index_list]]
                value[chunk * share:(chunk + 1) * share] *= shown.unsqueeze(-1)
        return n, context, value

    reference.set_model_attn2_patch(scale)
    expected = run(reference, TEXT, batch=5)
    close(ours, expected)
    assert differ(expected, run(in_windows(model, 0), TEXT, batch=5))
    with pytest.raises(ValueError, match="got 2 values for a phrase and 5 images"):
        run(patched, mark("scale", model, values=(1.0, 2.0))[1], batch=5)


def test_context_windows_and_the_merge(model: Any) -> None:
    """Over images: also with a text for each image in a style; over rows of the picture: refused."""
    many = [[torch.cat([tiny.conditioning(seed)[0][0] for seed in range(20, 25)]), {}]]
    for other in (OTHER, many):
        patched, positive = merge(in_windows(model, 0), MASKS, TEXT, other)
        ours = run(patched, positive, batch=5, steps=1)
        own = [[[text, {}]] for text in other[0][0].expand(5, -1, -1).split(1)]
        singles = [run(*merge(model, MASKS, TEXT, own[i]), batch=5, steps=1)[i:i + 1] for i in range(5)]
        close(ours, torch.cat(singles))  # images do not see one another here
    patched, positive = mark("merge", in_windows(model, 2))
    with pytest.raises(ValueError, match="^Cross-Attention Merge expected the model to see 48x64 pixels"):
        run(patched, positive)
    patched, positive = mark("scale", in_windows(model, 2))
    close(run(patched, positive), run(explicit(in_windows(model, 2), TEXT[0][0], factors(-1.5)), TEXT))
