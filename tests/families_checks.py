"""One check for each technique on any family: identities to the bit, and the technique written out beside it.

A check returns the largest error, as a fraction of the result's deviation, of what is equal to float precision only.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import comfy.sample
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import cycle_rig
import families_rig as written
import fusion_rig
import injection_rig
import inversion_rig
import rig
import spatial_rig
import tiny
import torch
from attention_merge_rig import Expected, merge, merge_explicitly, soft_masks, texts_of
from family import Family
from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
from mixology.host.injection import inject_features
from mixology.host.marks import mark_conditioning
from mixology.host.trajectory import start_trajectory
from torch import Tensor

WINDOW = {"k_max": 0.8, "k_min": 0.4}
SWEEP = {3: [-2.0, 2.5], 5: [1.0, 4.0]}  # words and what each image of a batch of 2 has there
NEARLY = 2.0 ** -24  # a share that leaves a style in the call, and out of the picture
LEAST_EFFECT = 1e-3


class NoEffect(AssertionError):
    """A technique that changed nothing, or not what it should."""


def distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not a.isfinite().all():
        raise NoEffect(f"expected finite numbers of shape {list(b.shape)}, got {list(a.shape)}")
    return float((a.double() - b.double()).abs().max() / b.double().std())


def expect_equal(a: Tensor, b: Tensor, what: str) -> None:
    if not torch.equal(a, b):
        raise NoEffect(f"{what}: {distance(a, b):.1e} off")


def expect_effect(a: Tensor, b: Tensor, error: float, what: str) -> None:
    if distance(a, b) < max(LEAST_EFFECT, 10 * error):
        raise NoEffect(f"{what} changes {distance(a, b):.1e} only, at an error of {error:.1e}")


@dataclass
class Subject:
    """A family on the bench.

    Attributes:
        network_calls: calls of the network that ended, since the count was last set to 0.
    """

    family: Family
    network_calls: int = field(default=0, init=False)

    @cached_property
    def model(self) -> Any:
        model = self.family.model()
        model.model.diffusion_model.register_forward_hook(self._count)
        return model

    @cached_property
    def sibling(self) -> Any:
        """The same network with other weights."""
        return self.family.model(seed=1)

    def _count(self, *_: Any) -> None:
        self.network_calls += 1

    def text(self, seed: int, times: int = 1) -> list[Any]:
        return self.family.conditioning(seed, times * self.family.tokens)

    def latent(self, batch: int = 1) -> dict[str, Any]:
        return {"samples": self.family.latent(batch, *self.family.size)}

    def sigmas(self, steps: int) -> Tensor:
        return tiny.sigmas_of(self.model, "simple", steps)

    def guider(self, model: Any = None, positive: Any = None, cfg: float = 3.0) -> Any:
        return tiny.cfg_guider(model or self.model, positive or self.text(1), self.text(2), cfg)

    def sample(self, model: Any = None, positive: Any = None, batch: int = 1, steps: int = 2) -> Tensor:
        return rig.run(self.model, comfy.samplers.sampler_object("euler"), self.latent(batch), self.sigmas(steps),
                       guider=self.guider(model, positive))

    @cached_property
    def trajectory(self) -> Any:
        return inversion_rig.invert(self.model, self.latent(), 3, "simple", prompt=self.text(3))


# ------------------------------------------------------------------------------------ layout, token scale

def check_layout(subject: Subject) -> float:
    """nu 1 is the plain run and 0 a run from the window's end, both to the bit; between, Algorithm 1 by hand."""
    model, latent, sigmas = subject.model, subject.latent(), subject.sigmas(3)
    start, stop = (rig.start_index(model, sigmas, WINDOW[key]) for key in ("k_max", "k_min"))
    noise = comfy.sample.prepare_noise(latent["samples"], rig.SEED, None)

    def run(sampler: Any, grid: Tensor) -> Tensor:
        return rig.run(model, sampler, latent, grid, guider=subject.guider())

    def by_hand(model_k: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        sampling = model_k.inner_model.inner_model.model_sampling
        for i in range(len(sigmas) - 1):
            denoised = model_k(x, sigmas[i].expand(len(x)), **extra_args)
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
            if start + i < stop:
                x = 0.5 * x + 0.5 * sampling.noise_scaling(sigmas[i + 1], noise, model_k.latent_image)
        return x

    euler = comfy.samplers.sampler_object("euler")
    ours = {nu: run(rig.mixer("euler", latent, nu, **WINDOW), sigmas) for nu in (0.0, 0.5, 1.0)}
    expect_equal(ours[1.0], run(euler, sigmas[start:]), "nu 1 beside the plain run")
    expect_equal(ours[0.0], run(euler, sigmas[stop:]), "nu 0 beside a run from the window's end")
    error = distance(ours[0.5], run(comfy.samplers.KSAMPLER(by_hand), sigmas[start:]))
    expect_effect(ours[0.5], ours[1.0], error, "nu 0.5")
    expect_effect(ours[0.5], ours[0.0], error, "nu 0.5")
    return error


def check_scale(subject: Subject) -> float:
    """An unmarked prompt is the plain run to the bit; a marked one is attention in float64 whose columns are scaled for
    the picture's queries, with a factor for each image of a batch."""
    family, model, positive = subject.family, subject.model, subject.text(1)
    factors = torch.ones(2, family.words or family.tokens)
    for word, values in SWEEP.items():
        factors[:, word] = torch.tensor(values)
    patched = patch_model(model)
    scaled = subject.sample(patched, mark_conditioning(positive, SCALE_KEY, TokenScale(factors, 0.0, 1.0)), batch=2)
    plain = subject.sample(batch=2)
    expect_equal(subject.sample(patched, batch=2), plain, "an unmarked prompt beside the plain run")
    expect_written(family)
    override = written.scale_columns(family, {0: factors}, family.tokens)
    error = distance(scaled, subject.sample(written.with_override(model, override), batch=2))
    expect_effect(scaled, plain, error, "scaled words")
    return error


def expect_written(family: Family) -> None:
    if family.deaf:
        raise NoEffect("it works, and nothing here is written out for attention that hears no override")


# ------------------------------------------------------------------------------------ merges

def check_merge(subject: Subject) -> float:
    """Equal prompts are the plain run; all of the mask on one style is that style alone, one text 3 times as long
    as the other. On UNets also against attention in float64, merged by soft masks."""
    family, model = subject.family, subject.model
    masks = soft_masks(2)
    first, second = subject.text(1), subject.text(3, 3)
    other = [[second[0][0], {**second[0][1], "pooled_output": first[0][1]["pooled_output"]}]]
    whole = torch.stack([torch.ones(24, 20), torch.full((24, 20), NEARLY)])
    merged = merge(model, masks, first, second)
    mixed = subject.sample(*merged)
    alone = [subject.sample(), subject.sample(positive=other)]
    errors = [distance(subject.sample(*merge(model, masks, first, subject.text(1))), alone[0])]
    errors += [distance(subject.sample(*merge(model, share, first, second)), one)
               for share, one in zip((whole, whole.flip(0)), alone)]
    if family.unet:
        with merge_explicitly(model, Expected(texts_of(first, second), masks)) as seen:
            errors.append(distance(mixed, subject.sample()))
        assert seen
    for one in alone:
        expect_effect(mixed, one, max(errors), "a merge")
    return max(errors)


def check_epsilon_merge(subject: Subject) -> float:
    """One mask of ones is the plain run to the bit; else the plain predictions of the styles under their masks."""
    model, latent, sigma = subject.model, subject.latent(), float(subject.sigmas(2)[1])
    styles, masks = [subject.text(1), subject.text(3)], spatial_rig.gradient(2, 20, 24)

    def step(shares: Tensor) -> Tensor:
        guider = spatial_rig.merger(model, shares, styles, subject.text(2))
        return spatial_rig.one_step(guider, latent, sigma)

    merged = step(masks)
    plain = spatial_rig.one_step(subject.guider(), latent, sigma)
    expect_equal(step(torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])), plain, "one mask of ones")
    expected = spatial_rig.merged_plain_steps(
        model, masks, styles, [3.0, 3.0], latent, sigma, negative=subject.text(2))
    error = distance(merged, expected)
    expect_effect(merged, plain, error, "a merge")
    return error


# ------------------------------------------------------------------------------------ trajectories, experts

def check_cycle(subject: Subject) -> float:
    """The same prompts return the latent; others do what the paper prints."""
    model, latent, sigmas = subject.model, subject.latent(), cycle_rig.grid(subject.model, 3)
    cycle = cycle_rig.cycle(source=subject.text(3), negative=subject.text(2))
    same = cycle_rig.run(tiny.cfg_guider(model, subject.text(3), subject.text(2), 1.0), cycle, latent, sigmas)
    edited = cycle_rig.run(subject.guider(), cycle, latent, sigmas)
    expected = cycle_rig.printed_cycle(model, subject.guider, lambda: subject.guider(
        positive=subject.text(3), cfg=1.0), latent, sigmas, 0.1)
    error = max(distance(same, latent["samples"]), distance(edited, expected))
    expect_effect(edited, latent["samples"], error, "another prompt")
    return error


def check_inversion(subject: Subject) -> float:
    """Every state as printed, and sampling that starts at the last one."""
    found, latent = subject.trajectory, subject.latent()
    printed = inversion_rig.printed_inversion(subject.model, subject.text(3), latent, found.sigmas, "ditail")
    seen: list[Tensor] = []

    def stay(model_k: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        seen.append(x.clone())
        return x

    noise, sigmas, own = start_trajectory(found)
    custom.SamplerCustomAdvanced.execute(noise, subject.guider(), comfy.samplers.KSAMPLER(stay), sigmas, own)
    error = max(distance(state, expected) for state, expected in zip(found.states, printed, strict=True))
    error = max(error, distance(seen[0], found.states[-1]))
    other = inversion_rig.invert(subject.model, latent, 3, "simple", prompt=subject.text(1))
    expect_effect(other.states[-1], found.states[-1], error, "another prompt")
    return error


def check_injection(subject: Subject) -> float:
    """Own states change nothing, to the bit; those of another prompt do what an exchange by hand does."""
    family, model, source, found = subject.family, subject.model, subject.text(3), subject.trajectory
    subject.network_calls = 0
    injecting = inject_features(model, found, source, 0.6, 0.0)
    reading = injection_rig.OneReading(found.states[-1])
    own = [injection_rig.run(injection_rig.guide(
        injection_rig.in_single_chunks(one), source, source, 1.0), found, reading)
        for one in (inject_features(model, found, source, 1.0, 0.0), model)]
    expect_equal(own[0], own[1], "own states")
    expect_written(family)
    ours, plain, expected = (injection_rig.run(subject.guider(one), found)
                             for one in (injecting, model, exchange_by_hand(subject, source)))
    error = distance(ours, expected)
    expect_effect(ours, plain, error, "another prompt's states")
    return error


def exchange_by_hand(subject: Subject, source: list[Any]) -> Any:
    family, model, found = subject.family, subject.model, subject.trajectory
    if family.unet:
        return injection_rig.inject_explicitly(model, found, source, 0.6, 0.0, later_blocks(model))
    find = written.main_call(family, family.tokens)
    calls = written.count_main_calls(family, model, source)
    weight = torch.ones(family.image_tokens(*family.size))
    return injection_rig.inject_by_override(model, found, source, 0.6, written.exchange(find, calls, weight))


def later_blocks(model: Any) -> list[tuple[str, int]]:
    """The later half, rounded down, of a UNet's blocks that attend among the picture's tokens."""
    found: dict[tuple[str, int], None] = {}
    for name, module in model.model.diffusion_model.named_modules():
        parts = name.split(".")
        if parts[-1] == "attn1" and module.to_k.in_features == module.to_q.in_features:
            found["middle" if parts[0] == "middle_block" else parts[0].removesuffix("_blocks"), int(parts[1])] = None
    place = {"input": 0, "middle": 1, "output": 2}
    blocks = sorted({(part, 0 if part == "middle" else index) for part, index in found},
                    key=lambda block: (place[block[0]], block[1]))
    return blocks[(len(blocks) + 1) // 2:]


def check_fusion(subject: Subject) -> float:
    """Equal experts are the plain run to the bit; others the printed fusion of their plain runs."""
    latent, sigma, texts = subject.latent(), float(subject.sigmas(2)[1]), [subject.text(seed) for seed in (1, 3)]
    specs = [fusion_rig.spec(subject.model, texts[0], subject.text(2)),
             fusion_rig.spec(subject.sibling, texts[1], subject.text(2), 3.0)]
    guider = fusion_rig.fuser(specs, blur=16.0)
    fused = fusion_rig.one_step(guider, latent, sigma)
    plain = fusion_rig.one_step(subject.guider(), latent, sigma)
    expect_equal(fusion_rig.one_step(fusion_rig.fuser([specs[0]] * 2), latent, sigma), plain, "equal experts")
    expected, winners = fusion_rig.fused_plain_steps(specs, latent, sigma, blur=16.0)
    if guider.winners is None or len(winners.unique()) < 2:
        raise NoEffect("one expert paints all")
    same = guider.winners[0] == winners
    if float(same.double().mean()) < 0.98:
        raise NoEffect("other places are painted than by the printed fusion")
    error = distance(torch.where(same.unsqueeze(1), fused.double(), expected), expected)
    expect_effect(fused, plain, error, "a second expert")
    return error


CHECKS: dict[str, Callable[[Subject], float]] = {
    "layout mix": check_layout, "token scale": check_scale, "cross-attention merge": check_merge,
    "epsilon merge": check_epsilon_merge, "cycle": check_cycle, "invert + start": check_inversion,
    "feature injection": check_injection, "fusion": check_fusion,
}
