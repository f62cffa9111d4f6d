"""Feature Injection on tiny models of the host, against injection written out with hooks on their own modules."""
from __future__ import annotations

import gc
import weakref
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import tiny
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ops import disable_weight_init
from comfy.patcher_extension import WrappersMP
from families import FAMILIES, MODERN, raise_norms
from injection_rig import SD1_BLOCKS, guide, in_single_chunks, inject_explicitly, invert, run, soft_mask
from mixology.attention_patches.injection import UNetInjector
from mixology.host import demo
from mixology.host.injection import KEY, inject_features, sample_cocktail
from mixology.host.injection_unet import features_layer, injected_blocks
from mixology.host.trajectory import start_trajectory
from torch import Tensor
from unchanged import snapshot

pytestmark = pytest.mark.seam

TINY_BLOCKS = [("output", 1), ("output", 2), ("output", 3)]  # of the 7 blocks with attention
SOURCE, POSITIVE, NEGATIVE = tiny.conditioning(3), tiny.conditioning(1), tiny.conditioning(2)
# Source and target in one batch or in two calls: convolutions and matrix products round differently.
TOLERANCE = 2e-5
EFFECT = 100 * TOLERANCE


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Tiny UNets by what they predict."""
    return {kind: raise_norms(tiny.unet(kind)) for kind in tiny.KINDS}


@pytest.fixture(scope="module")
def sources() -> dict[str, Any]:
    """Other checkpoints of the same kinds, which invert."""
    return {kind: raise_norms(tiny.unet(kind, seed=9)) for kind in tiny.KINDS}


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.isfinite().all()
    return float((a - b).abs().max() / b.std())


def sdxl_plan() -> dict[str, Any]:
    return {
        "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "num_heads": -1, "num_head_channels": 32, "use_spatial_transformer": True,
        "context_dim": 16, "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
    }


@pytest.mark.parametrize(("plan", "first", "last"), [
    (lambda: demo.read_config()["unet"], 4, 11), (sdxl_plan, 1, 5)], ids=["sd1", "sdxl"])
def test_points_are_the_papers_and_sdxls_of_the_same_resolution(plan: Any, first: int, last: int) -> None:
    network = UNetModel(**plan(), dtype=torch.float32, device="meta", operations=disable_weight_init)
    assert [name for name, _ in injected_blocks(network)] == [("output", i) for i in range(first, last + 1)]
    assert features_layer(network) is network.output_blocks[first][0].out_layers


@pytest.mark.parametrize(("kind", "batch", "size", "attention", "features"), [
    ("eps", 1, (8, 8), 0.5, 0.8), ("eps", 3, (9, 7), 0.8, 0.5), ("eps", 1, (7, 12), 1.0, 1.0),
    ("eps", 1, (8, 6), 0.0, 0.6), ("eps", 1, (8, 6), 0.6, 0.0), ("v", 1, (8, 6), 0.5, 0.8),
    ("flow", 3, (6, 8), 0.5, 0.8)])
def test_as_hooks_on_the_modules(models: dict[str, Any], sources: dict[str, Any], kind: str, batch: int,
                                 size: tuple[int, int], attention: float, features: float) -> None:
    model = models[kind]
    trajectory = invert(sources[kind], SOURCE, tiny.latent(batch, *size))
    plain = run(guide(model, POSITIVE, NEGATIVE), trajectory)
    explicit = inject_explicitly(model, trajectory, SOURCE, attention, features, TINY_BLOCKS)
    expected = run(guide(explicit, POSITIVE, NEGATIVE), trajectory)
    ours = run(guide(inject_features(model, trajectory, SOURCE, attention, features), POSITIVE, NEGATIVE), trajectory)
    assert distance(ours, expected) < TOLERANCE
    assert distance(ours, plain) > EFFECT


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_other_unets(name: str) -> None:
    family = FAMILIES[name]
    model, source = family.model(), family.conditioning(3, 77)
    blocks = TINY_BLOCKS if name == "sd2" else [("output", 0), ("output", 1)]
    trajectory = invert(family.model(5), source, {"samples": family.latent(1, 9, 6)})
    guided = [family.conditioning(seed, 77) for seed in (1, 2)]
    expected = run(guide(inject_explicitly(model, trajectory, source, 0.5, 0.8, blocks), *guided), trajectory)
    ours = run(guide(inject_features(model, trajectory, source, 0.5, 0.8), *guided), trajectory)
    assert distance(ours, expected) < TOLERANCE
    assert distance(ours, run(guide(model, *guided), trajectory)) > EFFECT


@pytest.mark.parametrize(("batch", "masks", "size"), [(1, 1, (9, 7)), (3, 1, (8, 6)), (3, 3, (6, 10))])
def test_mask_of_any_size(model: Any, batch: int, masks: int, size: tuple[int, int]) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(batch, *size))
    mask = soft_mask(masks)
    explicit = inject_explicitly(model, trajectory, SOURCE, 0.5, 0.8, TINY_BLOCKS, mask)
    expected = run(guide(explicit, POSITIVE, NEGATIVE), trajectory)
    ours = run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8, mask), POSITIVE, NEGATIVE), trajectory)
    everywhere = run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE), trajectory)
    assert distance(ours, expected) < TOLERANCE
    assert distance(ours, everywhere) > EFFECT


def test_mask_of_ones_is_no_mask(model: Any) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6))
    ours, masked = (run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8, mask), POSITIVE, NEGATIVE),
                        trajectory) for mask in (None, torch.ones(5, 3)))
    assert torch.equal(ours, masked)


def test_one_trajectory_for_three_images(model: Any) -> None:
    """The source is read once, and the images are those of three runs."""
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6))
    mask = soft_mask(3)
    noise, sigmas, latent = start_trajectory(trajectory)
    counted, calls = tiny.count_evaluations(model)
    states = torch.cat([noise.generate_noise(latent)] * 3)
    together = guide(inject_features(counted, trajectory, SOURCE, 0.5, 1.0, mask), POSITIVE, NEGATIVE).sample(
        states, torch.cat([latent["samples"]] * 3), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    assert calls == [1, 6] * (len(sigmas) - 1)
    for image, own in zip(together, mask):
        alone = run(guide(inject_features(model, trajectory, SOURCE, 0.5, 1.0, own), POSITIVE, NEGATIVE), trajectory)
        assert distance(image[None], alone) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
def test_conditionings_one_at_a_time(model: Any, batch: int) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(batch, 8, 6))
    counted, calls = tiny.count_evaluations(model)
    injecting = in_single_chunks(inject_features(counted, trajectory, SOURCE, 0.5, 0.8, soft_mask()))
    explicit = inject_explicitly(model, trajectory, SOURCE, 0.5, 0.8, TINY_BLOCKS, soft_mask())
    assert distance(run(guide(injecting, POSITIVE, NEGATIVE), trajectory),
                    run(guide(explicit, POSITIVE, NEGATIVE), trajectory)) < TOLERANCE
    assert set(calls) == {batch}


def test_evaluations_of_fifty_steps(model: Any) -> None:
    """50 for the inversion, 40 for the source, 100 for the target."""
    counted, calls = tiny.count_evaluations(model)
    trajectory = invert(counted, SOURCE, tiny.latent(1, 4, 4), 50)
    assert calls == [1] * 50
    calls.clear()
    run(guide(inject_features(counted, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE), trajectory)
    assert calls == [1, 2] * 40 + [2] * 10
    calls.clear()
    run(guide(inject_features(counted, trajectory, SOURCE, 0.5, 0.0), POSITIVE, NEGATIVE), trajectory)
    assert calls == [1, 2] * 25 + [2] * 25


@pytest.mark.parametrize(("attention", "features", "last"), [(0.0, 1.0, "conv"), (1.0, 1.0, "attention")])
def test_the_source_is_read_no_further_than_needed(model: Any, attention: float, features: float, last: str) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6))
    network, seen = model.model.diffusion_model, []
    last_block = network.output_blocks[3][1].transformer_blocks[0]
    watched = {"conv": network.output_blocks[1][1], "attention": last_block.attn2, "end": network.out}
    handles = [module.register_forward_hook(lambda module, args, output, name=name: seen.append((name, len(output))))
               for name, module in watched.items()]
    try:
        run(guide(inject_features(model, trajectory, SOURCE, attention, features), POSITIVE, NEGATIVE), trajectory)
    finally:
        for handle in handles:
            handle.remove()
    rows = {name: {count for found, count in seen if found == name} for name in watched}
    assert rows["end"] == {2} and rows["attention"] == {2}
    assert rows["conv"] == ({2} if last == "conv" else {1, 2})


def test_nothing_injected_is_the_untouched_model(model: Any) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6))
    counted, calls = tiny.count_evaluations(model)
    plain = run(guide(counted, POSITIVE, NEGATIVE), trajectory)
    expected = list(calls)
    for settings in ((0.0, 0.0, None), (0.5, 0.8, torch.zeros(1, 8, 8))):
        calls.clear()
        assert torch.equal(
            run(guide(inject_features(counted, trajectory, SOURCE, *settings), POSITIVE, NEGATIVE), trajectory), plain)
        assert calls == expected


def test_the_same_picture_and_prompt_on_both_sides_change_nothing(models: dict[str, Any]) -> None:
    """At the first step the target's state is the trajectory's."""
    for model in models.values():
        trajectory = invert(model, SOURCE, tiny.latent(3, 8, 6))
        sigmas = trajectory.sigmas.flip(0)[:2]
        plain = run(guide(model, SOURCE, SOURCE), trajectory, sigmas=sigmas)
        ours = run(guide(inject_features(model, trajectory, SOURCE, 1.0, 1.0), SOURCE, SOURCE), trajectory,
                   sigmas=sigmas)
        assert distance(ours, plain) < TOLERANCE


def test_two_injections_act_one_after_another(model: Any) -> None:
    """Two pictures, two masks: where masks do not overlap each has its part; where they do the later one is on top."""
    first, second = (invert(model, SOURCE, tiny.latent(1, 8, 8, seed=seed)) for seed in (7, 8))
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    injecting = inject_features(model, first, SOURCE, 0.8, 0.8, left)
    both = inject_features(injecting, second, tiny.conditioning(5), 0.8, 0.8, 1 - left)
    swapped = inject_features(inject_features(model, second, tiny.conditioning(5), 0.8, 0.8, 1 - left), first, SOURCE,
                              0.8, 0.8, left)
    covered = inject_features(injecting, second, tiny.conditioning(5), 0.8, 0.8)
    results = [run(guide(patched, POSITIVE, NEGATIVE), first) for patched in (
        both, swapped, covered, inject_features(model, second, tiny.conditioning(5), 0.8, 0.8), injecting)]
    assert distance(results[0], results[1]) < TOLERANCE
    assert torch.equal(results[2], results[3])
    assert distance(results[0], results[2]) > EFFECT and distance(results[0], results[4]) > EFFECT
    counted, calls = tiny.count_evaluations(both)
    run(guide(counted, POSITIVE, NEGATIVE), first)
    assert calls[:3] == [1, 1, 2], "one injection reads through the other"


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpm_2"])
def test_samplers_that_ask_between_sigmas(model: Any, sampler: str) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6))
    explicit = inject_explicitly(model, trajectory, SOURCE, 0.5, 0.8, TINY_BLOCKS)
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
    assert distance(run(guide(injecting, POSITIVE, NEGATIVE), trajectory, sampler),
                    run(guide(explicit, POSITIVE, NEGATIVE), trajectory, sampler)) < TOLERANCE


def describe(model: Any) -> tuple[str, ...]:
    return tuple(snapshot(vars(model)[part]) for part in ("model_options", "wrappers", "callbacks", "object_patches"))


@pytest.mark.parametrize("failure", [None, RuntimeError, comfy.model_management.InterruptProcessingException])
def test_nothing_remains_after_a_run(model: Any, monkeypatch: pytest.MonkeyPatch, failure: Any) -> None:
    """No hook on a module, no feature in memory, the caller's model as it was: also after an error and a stop."""
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6))
    plain, before = run(guide(model, POSITIVE, NEGATIVE), trajectory), describe(model)
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
    carried = describe(injecting)
    alive: list[Any] = []
    inject = UNetInjector.inject_features

    def watch(self: Any, module: Any, args: Any, output: Tensor) -> Tensor:
        for chunk in self.chunks:
            alive.extend(weakref.ref(part) for parts in chunk.reading.values() for part in parts)
        if failure is not None and len(alive) > 10:
            raise failure
        return inject(self, module, args, output)

    with monkeypatch.context() as patch:
        patch.setattr(UNetInjector, "inject_features", watch)
        if failure is None:
            run(guide(injecting, POSITIVE, NEGATIVE), trajectory)
        else:
            with pytest.raises(failure):
                run(guide(injecting, POSITIVE, NEGATIVE), trajectory)
    gc.collect()
    assert alive and not any(reference() is not None for reference in alive)
    assert not any(module._forward_hooks for module in model.model.diffusion_model.modules())
    assert describe(model) == before and describe(injecting) == carried
    assert torch.equal(run(guide(model, POSITIVE, NEGATIVE), trajectory), plain)


def test_features_do_not_outlive_their_step(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6))
    alive: list[Any] = []
    inject, counts = UNetInjector.inject_features, []

    def watch(self: Any, module: Any, args: Any, output: Tensor) -> Tensor:
        alive.extend(weakref.ref(part) for parts in self.chunks[0].reading.values() for part in parts)
        return inject(self, module, args, output)

    monkeypatch.setattr(UNetInjector, "inject_features", watch)
    run(guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE), trajectory,
        callback=lambda *arguments: counts.append(sum(reference() is not None for reference in alive)))
    assert alive and counts and set(counts) == {0}


def test_sampler_node_is_its_parts(model: Any) -> None:
    """Bit for bit, noise mask included; and the kept area is the picture."""
    from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

    mask = torch.zeros(1, 64, 48)
    mask[:, :32] = 1
    latent = {**tiny.latent(3, 8, 6), "noise_mask": mask}
    trajectory = invert(model, SOURCE, latent)
    settings = {"source_conditioning": SOURCE, "positive": POSITIVE, "negative": NEGATIVE, "cfg": 4.0,
                "attention_until": 0.5, "features_until": 0.8}
    result = sample_cocktail(model, trajectory, **settings)
    noise, sigmas, start = start_trajectory(trajectory)
    guider = guide(inject_features(model, trajectory, SOURCE, 0.5, 0.8), POSITIVE, NEGATIVE, 4.0)
    chain = SamplerCustomAdvanced.execute(noise, guider, comfy.samplers.sampler_object("euler"), sigmas, start)
    assert torch.equal(result["samples"], chain.result[0]["samples"])
    assert torch.equal(sample_cocktail(model, trajectory, **settings)["samples"], result["samples"])
    torch.testing.assert_close(result["samples"][:, :, 4:], latent["samples"][:, :, 4:], rtol=0, atol=1e-5)
    assert "noise_mask" in result


@pytest.mark.parametrize(("settings", "words"), [
    ({"conditioning": []}, "expected one prompt to read the trajectory with, got none"),
    ({"conditioning": [*SOURCE, *POSITIVE]}, "expected one prompt to read the trajectory with, got 2"),
    ({"conditioning": [[SOURCE[0][0], {"control": object()}]]}, "got a ControlNet in it"),
    ({"conditioning": [[SOURCE[0][0], {"hooks": object(), "area": (4, 4, 0, 0)}]]}, "got hooks and an area in it"),
])
def test_what_cannot_be_read_is_refused(model: Any, settings: dict[str, Any], words: str) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    with pytest.raises(ValueError, match=words):
        inject_features(model, trajectory, settings["conditioning"], 0.5, 0.8)


def test_other_models_are_refused(models: dict[str, Any]) -> None:
    trajectory = invert(models["eps"], SOURCE, tiny.latent(1, 8, 6), 2)
    with pytest.raises(ValueError, match="expected a model of SD1.x, .* or HunyuanVideo, got Mochi; sample"):
        inject_features(MODERN["mochi"].model(), trajectory, SOURCE, 0.5, 0.8)
    with pytest.raises(ValueError, match="The trajectory expects a model"):
        inject_features(models["flow"], trajectory, SOURCE, 0.5, 0.8)
    with pytest.raises(ValueError, match="latent format SD15, got SD3"):
        inject_features(FAMILIES["sd3"].model(), trajectory, SOURCE, 0.5, 0.8)


def test_sampling_beyond_the_trajectory_or_another_size(model: Any) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 4)
    injecting = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
    for latent, sigmas, words in (
        (tiny.latent(1, 8, 6), tiny.sigmas_of(model, "normal", 4), "The trajectory reaches from sigma 0 to"),
        (tiny.latent(1, 8, 8), trajectory.sigmas.flip(0), "latents of its size, 48x64 pixels, got 64x64 pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            guide(injecting, POSITIVE, NEGATIVE).sample(
                torch.zeros_like(latent["samples"]), latent["samples"], comfy.samplers.sampler_object("euler"), sigmas,
                disable_pbar=True)


def test_a_node_that_skips_the_source_is_told(model: Any) -> None:
    """Such as step caches: they answer without running the network."""
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    caching = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
    caching.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", lambda executor, x, *rest, **more: x * 0)
    with pytest.raises(ValueError, match="expected the model to read the trajectory at every step, got one of which"):
        run(guide(caching, POSITIVE, NEGATIVE), trajectory)


def test_the_model_carries_what_it_injects(model: Any) -> None:
    trajectory = invert(model, SOURCE, tiny.latent(1, 8, 6), 2)
    once = inject_features(model, trajectory, SOURCE, 0.5, 0.8)
    twice = inject_features(once, trajectory, SOURCE, 0.5, 0.8)
    counts = [len(patched.model_options["transformer_options"].get(KEY, ())) for patched in (model, once, twice)]
    assert counts == [0, 1, 2] and len(twice.wrappers[WrappersMP.CALC_COND_BATCH][KEY]) == 1


def test_demo_checkpoint_has_the_papers_points(checkpoints: Any) -> None:
    """Output 4 to 11, hooked on a network of SD1.x's own plan."""
    model, clip, _ = checkpoints("shapes")
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (
        "", "a striped red star on a blue background", "a dotted green heart")]
    trajectory = invert(model, texts[0], tiny.latent(1, 14, 18), 5)
    expected = run(guide(inject_explicitly(model, trajectory, texts[0], 0.5, 0.8, SD1_BLOCKS), *texts[1:]), trajectory)
    ours = run(guide(inject_features(model, trajectory, texts[0], 0.5, 0.8), *texts[1:]), trajectory)
    assert distance(ours, expected) < 5 * TOLERANCE  # deeper than the tiny ones, and convolved otherwise on one thread
    assert distance(ours, run(guide(model, *texts[1:]), trajectory)) > EFFECT
