"""Cross-attention merge on networks of one sequence, each against plain calls side by side that share the picture."""
from __future__ import annotations

from typing import Any

import nodes as core
import pytest
import tiny
import torch
from attention_merge_rig import merge, sample_latent, soft_masks
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_torch_compile import TorchCompileModel
from injection_rig import invert
from injection_rig import run as inject
from joint_merge_rig import ALL, expect, written_out
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.injection import inject_features
from mixology.host.marks import mark_conditioning
from mixology.host.networks import OVERRIDE
from torch import Tensor

pytestmark = pytest.mark.seam

SHARED = ("flux", "flux_schnell", "flux_fill", "flux_kontext", "chroma", "chroma_radiance", "flux2", "klein",
          "klein_edit", "qwen", "qwen_edit", "qwen_layered", "krea2", "sd3", "sd35_medium", "z_image", "z_image_pixel",
          "lumina2", "longcat", "omnigen2", "auraflow")
REFUSED = {"hidream": "HiDream-I1", "hunyuan_video": "HunyuanVideo", "ideogram4": "Ideogram 4", "lens": "Lens",
           "mage_flow": "Mage-Flow", "boogu": "Boogu"}
TOLERANCE = 1e-4  # of the result's deviation: float32 through two steps, summed in another order
MASKS = soft_masks(3, 48, 40)


def model_of(name: str) -> Any:
    if ALL[name].is_missing():
        pytest.skip("the running host lacks this family")
    return ALL[name].model()


def prompts(name: str, **options: Any) -> list[Any]:
    """Three styles, the second about three times as long as the last, and a negative as long as the first."""
    lengths = (40, 70, 33, 40) if name.startswith("z_image") else (9, 23, 7, 9)
    return [ALL[name].conditioning(seed, tokens, **options) for seed, tokens in zip((1, 3, 4, 2), lengths)]


def run(name: str, model: Any, positive: Any, negative: Any, size: tuple[int, int] | None = None) -> Tensor:
    latent = ALL[name].latent(2, *(size or ALL[name].size))
    return sample_latent(tiny.cfg_guider(model, positive, negative), latent, steps=2)


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    error = float((a - b).abs().max() / b.std())
    assert error < tolerance, f"{error:.1e} of the deviation"


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-2 * b.std())


def alone(first: Any, text: Any) -> Any:
    """A style by itself, with what the first prompt gives besides its text."""
    own = {key: value for key, value in text[0][1].items() if key == "attention_mask"}
    return [[text[0][0], {**first[0][1], **own}]]


# --------------------------------------------------------------------------------------------------- every family

@pytest.mark.parametrize("name", SHARED)
def test_whole_runs_equal_plain_calls_that_share_the_picture(name: str) -> None:
    """Three texts of other lengths, soft masks, an odd size, two images; references and frames where a family has."""
    model, (*texts, negative) = model_of(name), prompts(name)
    merged, positive = merge(model, MASKS, *texts)
    ours = run(name, merged, positive, negative)
    close(ours, run(name, written_out(model, expect(name, MASKS, *texts)), texts[0], negative))
    for text in texts:
        assert differ(ours, run(name, model, alone(texts[0], text), negative))


@pytest.mark.parametrize("name", SHARED)
def test_equal_prompts_are_the_plain_run_and_a_whole_mask_its_style_alone(name: str) -> None:
    """A style that has the whole picture and is three times longer than the first, or shorter."""
    model, (*texts, negative) = model_of(name), prompts(name)
    merged, positive = merge(model, MASKS, *[texts[0]] * 3)
    close(run(name, merged, positive, negative), run(name, model, texts[0], negative))
    whole = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    for text in texts[1:]:
        merged, positive = merge(model, whole, texts[0], text)
        close(run(name, merged, positive, negative), run(name, model, alone(texts[0], text), negative))


@pytest.mark.parametrize("name", ["flux", "qwen_edit", "z_image", "omnigen2", "auraflow"])
def test_no_evaluation_is_added_and_other_rows_are_what_they_were(name: str) -> None:
    """The negative's prediction bit for bit, where it stands in one call with the merge."""
    model, (*texts, negative) = model_of(name), prompts(name)
    seen: list[list[Tensor]] = []
    for masks in (None, MASKS):
        patched, positive = (model, texts[0]) if masks is None else merge(model, masks, *texts)
        counted, calls = tiny.count_evaluations(patched)
        seen.append([])
        counted.set_model_sampler_post_cfg_function(lambda args: (seen[-1].append(args["uncond_denoised"]),
                                                                  args["denoised"])[1])
        run(name, counted, positive, negative)
        assert calls == [4, 4]
    plain, ours = (part[0] for part in seen)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    if name != "z_image":
        assert torch.equal(ours, plain)


# --------------------------------------------------------------------------------------------------- masks and rows

@pytest.mark.parametrize("name", ["flux", "z_image", "qwen"])
def test_hard_masks_leave_out_what_nobody_reads(name: str) -> None:
    """Half and half: queries of the other half never meet a style's text, also beside a third that covers a corner."""
    model, (*texts, negative) = model_of(name), prompts(name)
    masks = torch.zeros(3, 12, 8)
    masks[0, :6], masks[1, 6:], masks[2, 8:, 4:] = 1, 1, 1
    masks[1, 8:, 4:] = 0
    merged, positive = merge(model, masks, *texts)
    ours = run(name, merged, positive, negative, (12, 8))
    close(ours, run(name, written_out(model, expect(name, masks, *texts)), texts[0], negative, (12, 8)))
    counted: list[int] = []

    def count(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        counted.append(q.shape[2])
        return func(q, k, v, heads, *args, **kwargs)

    watched = merged.clone()
    watched.model_options["transformer_options"][OVERRIDE] = count
    close(run(name, watched, positive, negative, (12, 8)), ours)
    assert min(counted) >= 24, "an override of another node sees all of the picture's queries"


@pytest.mark.parametrize("name", ["flux", "z_image", "qwen"])
def test_a_region_shows_its_part_of_the_masks(name: str) -> None:
    model, (*texts, negative) = model_of(name), prompts(name)
    merged, text = merge(model, MASKS, *texts)
    area = (7, 8, 3, 2)

    def confine(part: Any) -> Any:
        region = core.ConditioningSetArea().append(part, area[1] * 8, area[0] * 8, area[3] * 8, area[2] * 8, 1.0)[0]
        return core.ConditioningCombine().combine(region, texts[2])[0]

    ours = run(name, merged, confine(text), negative, (12, 10))
    styles = expect(name, MASKS, *texts, area=area, picture=(12, 10))
    close(ours, run(name, written_out(model, styles), confine(texts[0]), negative, (12, 10)))
    assert differ(ours, run(name, model, confine(texts[0]), negative, (12, 10)))


@pytest.mark.parametrize("name", ["chroma", "omnigen2"])
def test_two_merges_in_one_call(name: str) -> None:
    """A merged positive and a merged negative, with other texts and masks."""
    model, (first, second, third, negative) = model_of(name), prompts(name)
    masks = soft_masks(2, 48, 40, seed=5), soft_masks(3, 48, 40, seed=6)
    merged, positive = merge(model, masks[0], first, second)
    merged, other = merge(merged, masks[1], negative, third, second)
    ours = run(name, merged, positive, other)
    close(ours, run(name, written_out(model, expect(name, masks[0], first, second),
                                      expect(name, masks[1], negative, third, second)), first, negative))


def test_a_style_may_hold_a_text_for_each_image() -> None:
    model, (*texts, negative) = model_of("qwen"), prompts("qwen")
    many = [[torch.cat([texts[1][0][0], texts[1][0][0].flip(1)]), {}]]
    masks = soft_masks(2, 48, 40)
    merged, positive = merge(model, masks, texts[0], many)
    ours = run("qwen", merged, positive, negative)
    close(ours, run("qwen", written_out(model, expect("qwen", masks, texts[0], many)), texts[0], negative))


def test_tokens_that_a_prompt_hides_stay_hidden() -> None:
    """Qwen-Image's encoder may mask tokens of its own text; those of the other styles are read."""
    model, (first, second, _, negative) = model_of("qwen"), prompts("qwen")
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    hidden = [[first[0][0], {**first[0][1], "attention_mask": mask}]]
    shown = [[negative[0][0], {**negative[0][1], "attention_mask": torch.ones_like(mask)}]]
    merged, positive = merge(model, torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]), hidden, second)
    plain = run("qwen", model, hidden, shown)
    close(run("qwen", merged, positive, shown), plain)
    assert differ(plain, run("qwen", model, first, shown))
    with pytest.raises(ValueError, match="expected a plain prompt at conditioning_1, got one with an attention mask"):
        merge(model, MASKS[:2], first, hidden)


# --------------------------------------------------------------------------------------------------- token scale

def scale(conditioning: Any, *values: float) -> Any:
    factors = torch.ones(len(values), conditioning[0][0].shape[1])
    factors[:, [2, 4, 5]] = torch.tensor(values).unsqueeze(1)
    return mark_conditioning(conditioning, SCALE_KEY, TokenScale(factors, 0.0, 1.0)), factors


@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "krea2", "z_image", "omnigen2", "auraflow"])
def test_token_scale_acts_on_its_own_style(name: str) -> None:
    """On the first of two styles, the second, or both, with a value for each image; and on the negative."""
    model, (first, second, _, negative) = model_of(name), prompts(name)
    masks = soft_masks(2, 48, 40)
    plain, positive = merge(model, masks, first, second)
    unscaled = run(name, plain, positive, negative)
    for chosen in ((0,), (1,), (0, 1)):
        marked, factors = [first, second], list[Any]([None, None])
        for i in chosen:
            marked[i], own = scale(marked[i], -1.5, 2.0)
            front = max(0, 512 - own.shape[1]) if name == "flux2" else 0
            factors[i] = torch.nn.functional.pad(own, (front, 0), value=1.0)
        merged, positive = merge(model, masks, *marked)
        ours = run(name, merged, positive, negative)
        styles = expect(name, masks, first, second, factors=factors)
        close(ours, run(name, written_out(model, styles), first, negative))
        assert differ(ours, unscaled)


@pytest.mark.parametrize("scale_first", [True, False])
def test_either_node_may_patch_the_model_first(scale_first: bool) -> None:
    """Styles of equal length: the first one's factors stay with it, and the negative has its own."""
    model, (first, _, _, negative) = model_of("flux"), prompts("flux")
    second, masks = ALL["flux"].conditioning(8, 9), soft_masks(2, 48, 40)
    (marked, own), (scaled, others) = scale(first, -1.5), scale(negative, 0.5)
    if scale_first:
        merged, positive = merge(patch_model(model), masks, marked, second)
    else:
        merged, positive = merge(model, masks, marked, second)
        merged = patch_model(merge(model, masks, first, second)[0])
    ours = run("flux", merged, positive, scaled)
    whole = torch.ones(1, 48, 40)
    close(ours, run("flux", written_out(
        model, expect("flux", masks, first, second, factors=[own, None]),
        expect("flux", whole, negative, factors=[others])), first, negative))


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_factors_stay_with_their_style_beside_a_node_that_passes_attention_on(name: str) -> None:
    model, (first, _, _, negative) = model_of(name), prompts(name)
    second, masks = ALL[name].conditioning(8, 9), soft_masks(2, 48, 40)

    def pass_on(executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any,
                transformer_options: dict[str, Any], **kwargs: Any) -> Any:
        inner = transformer_options[OVERRIDE]
        options = {**transformer_options, OVERRIDE: lambda func, *args, **more: inner(func, *args, **more)}
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    marked, own = scale(first, -1.5, 2.0)
    merged, positive = merge(patch_model(model), masks, marked, second)
    merged.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "another", pass_on)
    close(run(name, merged, positive, negative),
          run(name, written_out(model, expect(name, masks, first, second, factors=[own, None])), first, negative))


# --------------------------------------------------------------------------------------------------- other nodes

def sharpen(func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
    return func(q * 1.3, k, v, heads, *args, **kwargs)


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_an_override_of_another_node_acts_on_every_style(name: str) -> None:
    model, (*texts, negative) = model_of(name), prompts(name)
    model.model_options["transformer_options"][OVERRIDE] = sharpen
    merged, positive = merge(model, MASKS, *[texts[1]] * 3)
    ours, plain = (run(name, *pair, negative) for pair in ((merged, positive), (model, texts[1])))
    close(ours, plain)
    assert differ(ours, run(name, model_of(name), texts[1], negative))
    whole = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    merged, positive = merge(model, whole, texts[0], texts[1])
    close(run(name, merged, positive, negative), run(name, model, alone(texts[0], texts[1]), negative))


@pytest.mark.parametrize("name", ["flux", "longcat", "z_image", "lumina2", "auraflow", "krea2"])
def test_features_may_be_injected_beside(name: str) -> None:
    """Into a merge of equal prompts as into the plain run; into one of others it does what the plain run shows."""
    model, (*texts, negative) = model_of(name), prompts(name)
    trajectory = invert(model, texts[2], {"samples": ALL[name].latent(1, *ALL[name].size)}, 3)
    injecting = inject_features(model, trajectory, texts[2], 1.0, 0.0)

    def go(patched: Any, positive: Any) -> Tensor:
        return inject(tiny.cfg_guider(patched, positive, negative), trajectory, "euler",
                      sigmas=trajectory.sigmas.flip(0)[:2])

    plain = go(injecting, texts[0])
    close(go(*merge(injecting, MASKS, *[texts[0]] * 3)), plain)
    whole = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    close(go(*merge(injecting, whole, texts[0], texts[1])), go(injecting, alone(texts[0], texts[1])))
    assert differ(plain, go(model, texts[0]))


@pytest.mark.parametrize("name", ["sd3", "omnigen2"])
def test_features_outside_a_network_are_refused(name: str) -> None:
    """They have no place for wrappers around the network, so that injection would stand inside the merge."""
    model, (*texts, negative) = model_of(name), prompts(name)
    trajectory = invert(model, texts[2], {"samples": ALL[name].latent(1, *ALL[name].size)}, 3)
    merged, positive = merge(inject_features(model, trajectory, texts[2], 1.0, 0.0), MASKS, *texts)
    with pytest.raises(ValueError, match="expected no Feature Injection on .*, got both; use the Epsilon Merge Guider"):
        inject(tiny.cfg_guider(merged, positive, negative), trajectory, "euler",
               sigmas=trajectory.sigmas.flip(0)[:2])


def test_a_style_that_weighs_its_tokens_is_refused() -> None:
    model, (first, second, _, _) = model_of("flux"), prompts("flux")
    bias = torch.zeros(1, 43, 43)
    bias[..., :5] = -2.0
    biased = [[second[0][0], {**second[0][1], "attention_mask": bias}]]
    with pytest.raises(ValueError, match="expected a plain prompt at conditioning_1, got one with an attention mask"):
        merge(model, soft_masks(2, 48, 40), first, biased)
    even = [[second[0][0], {**second[0][1], "attention_mask": torch.ones(1, 23, dtype=torch.long)}]]
    merge(model, soft_masks(2, 48, 40), first, even)


def test_a_node_that_wraps_blocks_may_stay() -> None:
    model, (*texts, negative) = model_of("flux"), prompts("flux")
    seen: list[int] = []

    def wrap(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(args["txt"].shape[1])
        return extra["original_block"](args)

    merged, positive = merge(model, MASKS, *texts)
    expected = run("flux", merged, positive, negative)
    merged.set_model_patch_replace(wrap, "dit", "double_block", 1)
    assert torch.equal(run("flux", merged, positive, negative), expected) and seen


def test_a_node_that_replaces_attention_is_refused() -> None:
    model, (*texts, negative) = model_of("qwen"), prompts("qwen")
    merged, positive = merge(model, MASKS, *texts)

    def skip(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = next(part for part in args if isinstance(part, dict) and OVERRIDE in part)
        del options[OVERRIDE]
        return executor(*args, **kwargs)

    merged.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "skip", skip)
    with pytest.raises(ValueError, match="expected to compute the model's attention, got a node that replaces it; rem"):
        run("qwen", merged, positive, negative)


def test_a_node_that_adds_tokens_is_refused() -> None:
    model, (*texts, negative) = model_of("flux"), prompts("flux")
    merged, positive = merge(model, MASKS, *texts)

    def add(args: dict[str, Any]) -> dict[str, Any]:
        return {**args, "img": torch.cat([args["img"], args["img"][:, :3]], 1),
                "img_ids": torch.cat([args["img_ids"], args["img_ids"][:, :3]], 1)}

    merged.set_model_patch(add, "post_input")
    with pytest.raises(ValueError, match="expected 59 tokens in the model's attention, got 62; remove the node that"):
        run("flux", merged, positive, negative)


@pytest.mark.parametrize("name", ["qwen", "omnigen2"])
@pytest.mark.parametrize("compile_first", [True, False])
def test_a_compiled_network_reads_all_texts(name: str, compile_first: bool) -> None:
    """It runs as it was written while a merged prompt is read, so that nothing is traced here."""
    model, (*texts, negative) = model_of(name), prompts(name)
    merged, positive = merge(model, MASKS, *texts)
    expected = run(name, merged, positive, negative)
    if compile_first:
        merged = merge(TorchCompileModel.execute(model, "eager").result[0], MASKS, *texts)[0]
    else:
        merged = TorchCompileModel.execute(merged, "eager").result[0]
    close(run(name, merged, positive, negative), expected)


def count_hooks(model: Any) -> int:
    modules = model.model.diffusion_model.modules()
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in modules)


@pytest.mark.parametrize("name", ["z_image", "omnigen2", "krea2"])
def test_nothing_is_left_behind(name: str) -> None:
    model, (*texts, negative) = model_of(name), prompts(name)
    expected = run(name, model, texts[0], negative)
    merged, positive = merge(model, MASKS, *texts)
    run(name, merged, positive, negative)
    assert count_hooks(model) == 0

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    merged.model_options["transformer_options"][OVERRIDE] = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        run(name, merged, positive, negative)
    assert count_hooks(model) == 0
    assert torch.equal(run(name, model, texts[0], negative), expected)


# --------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused(name: str) -> None:
    model, texts = model_of(name), prompts(name)
    with pytest.raises(ValueError, match="^Cross-Attention Merge expected a model of SD1.x, .* or .*, got "
                                         f"{REFUSED[name]}; use the Epsilon Merge Guider, which takes any model.$"):
        merge(model, MASKS, *texts[:3])


def test_references_of_z_image_are_refused() -> None:
    model = model_of("z_image")
    *texts, negative = prompts("z_image", reference_latents=[torch.zeros(1, 16, 8, 8)])
    merged, positive = merge(model, MASKS, *texts)
    with pytest.raises(ValueError, match="expected no reference pictures on this model, got some; remove the node"):
        run("z_image", merged, positive, negative)
