"""What `compare.py` lets run in the host: for each technique the pack, the core graph that comes nearest, and what
others' nodes do, written in few lines the way they do it."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timing import CAPTIONS, load_model, patch_slightly
from watch import Run

CFG = 7.5
FACTORS = {3: -1.5, 4: 2.0}
BLUR, FUSED_WORDS = 4.0, "own"


def patch_values(model: Any, factors: torch.Tensor) -> Any:
    """A negative-weight node: a patch multiplies the values of a prompt's words."""
    def scale(n: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Mapping[str, Any]) -> tuple[Any, ...]:
        parts = v.chunk(len(options["cond_or_uncond"]))
        return n, k, torch.cat([part if kind else part * factors.to(part)
                                for kind, part in zip(options["cond_or_uncond"], parts)])

    clone = model.clone()
    clone.set_model_attn2_patch(scale)
    return clone


def couple_attention(model: Any, masks: torch.Tensor, contexts: list[torch.Tensor]) -> Any:
    """An attention couple: a patch repeats a prompt's rows for each style, another adds up what came of them."""
    def spread(n: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Mapping[str, Any]) -> tuple[Any, ...]:
        queries, keys = [], []
        for kind, query, key in zip(options["cond_or_uncond"], *(x.chunk(len(options["cond_or_uncond"]))
                                                                 for x in (n, k))):
            queries += [query] * (1 if kind else len(contexts))
            keys += [key] if kind else [context.to(key).expand(len(key), -1, -1) for context in contexts]
        key = torch.cat(keys)
        return torch.cat(queries), key, key

    def gather(n: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        kinds, height, width = options["cond_or_uncond"], *options["original_shape"][-2:]
        shrink = (height * width / n.shape[1]) ** 0.5
        weights = torch.nn.functional.interpolate(
            masks[None].to(n), (round(height / shrink), round(width / shrink))).reshape(len(masks), 1, -1, 1)
        parts = list(n.chunk(sum(1 if kind else len(contexts) for kind in kinds)))
        return torch.cat([parts.pop(0) if kind else torch.stack([w * parts.pop(0) for w in weights]).sum(0)
                          for kind in kinds])

    clone = model.clone()
    clone.set_model_attn2_patch(spread)
    clone.set_model_attn2_output_patch(gather)
    return clone


@dataclass
class Stage:
    """A model, its prompts and a start, on which everything runs.

    Args:
        chunks: how many times 77 tokens each prompt has.
        networks: every network that runs here, for counting its rows.
    """

    model: Any
    other: Any
    encode: Callable[[str], Any]
    side: int
    batch: int = 1
    steps: int = 20
    chunks: int = 1
    networks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        import comfy.sample
        import comfy.samplers
        from mixology.host.run import full_sigmas

        self.networks += [patcher.model.diffusion_model for patcher in (self.model, self.other)]
        generator = torch.Generator().manual_seed(0)
        self.latent = {"samples": torch.randn(self.batch, 4, self.side, self.side, generator=generator)}
        self.noise = comfy.sample.prepare_noise(self.latent["samples"], 0)
        self.sigmas = full_sigmas(self.model, "ddim", "ddim_uniform", self.steps)
        self.sampler = comfy.samplers.sampler_object("ddim")
        self.first, self.second, self.negative = (self.prompt(text) for text in (*CAPTIONS, ""))
        self.factors = torch.ones(1, self.first[0][0].shape[1])
        for place, factor in FACTORS.items():
            self.factors[0, place] = factor

    def prompt(self, text: str) -> Any:
        [[tokens, rest]] = self.encode(text)
        return [[tokens.repeat(1, self.chunks, 1), dict(rest)]]

    def masks(self, styles: int) -> torch.Tensor:
        from mixology.samplers.spatial import draw_gradient_masks

        return draw_gradient_masks(self.side, self.side, "logistic", styles, 0.0, 20.0, 1)

    def styles(self, count: int) -> list[Any]:
        return [(self.first, self.second)[i % 2] for i in range(count)]

    def guide(self, model: Any, positive: Any, negative: Any = None) -> Any:
        from mixology.host.run import make_guider

        return make_guider(model, positive, self.negative if negative is None else negative, CFG)

    def sample(self, guider: Any, sampler: Any = None, sigmas: torch.Tensor | None = None, made: int = 0) -> Run:
        """A run of that guider; `made`: its steps, where they are not those of the sigmas."""
        from mixology.host.run import run_guider

        grid = self.sigmas if sigmas is None else sigmas

        def run() -> int:
            run_guider(guider, sampler or self.sampler, grid, self.latent, noise=self.noise, seed=0)
            return made or len(grid) - 1

        return run

    def bare(self) -> Run:
        return self.sample(self.guide(self.model, self.first))

    def layout(self) -> dict[str, Run]:
        from mixology.host import layout as magicmix

        start = magicmix.sigma_window(self.model.model, self.sigmas, 0.6, 0.3).start
        mixing = magicmix.LayoutMixSampler(
            self.sampler, magicmix.make_layout(self.latent, 0, "shared"), magicmix.Mix(0.5, 0.6, 0.3))
        guider = self.guide(self.model, self.first)
        return {"pack": self.sample(guider, mixing, made=len(self.sigmas) - 1 - start),
                "core: KSampler, denoise 0.6": self.sample(guider, sigmas=self.sigmas[start:])}

    def token_scale(self) -> dict[str, Run]:
        from mixology.host.factors import SCALE_KEY, TokenScale, patch_model
        from mixology.host.marks import mark_conditioning

        scaled = mark_conditioning(self.first, SCALE_KEY, TokenScale(self.factors, 0.0, 1.0))
        weighted = self.prompt(CAPTIONS[0].replace("striped", "(striped:1.5)"))
        return {"pack": self.sample(self.guide(patch_model(self.model), scaled)),
                "core: (word:1.5) in the prompt": self.sample(self.guide(self.model, weighted)),
                "own lines: negative-weight node": self.sample(
                    self.guide(patch_values(self.model, self.factors[..., None]), self.first))}

    def attention_merge(self, styles: int = 2) -> dict[str, Run]:
        from mixology.host.attention_merge import merge_conditionings

        masks, prompts = self.masks(styles), self.styles(styles)
        model, merged = merge_conditionings(
            self.model, masks, {f"conditioning_{i}": prompt for i, prompt in enumerate(prompts)})
        coupled = couple_attention(self.model, masks, [prompt[0][0] for prompt in prompts])
        return {"pack": self.sample(self.guide(model, merged)),
                "core: masked conditioning": self.sample(self.guide(self.model, self.masked(styles))),
                "own lines: attention couple": self.sample(self.guide(coupled, self.first))}

    def masked(self, styles: int) -> list[Any]:
        import nodes

        return [entry for mask, style in zip(self.masks(styles), self.styles(styles))
                for entry in nodes.ConditioningSetMask().append(style, mask, "default", 1.0)[0]]

    def epsilon_merge(self, styles: int = 2) -> dict[str, Run]:
        from mixology.host.spatial import EpsilonMergeGuider

        positives = {f"positive_{i}": prompt for i, prompt in enumerate(self.styles(styles))}
        return {"pack": self.sample(EpsilonMergeGuider(
                    self.model, self.masks(styles), positives, self.negative, CFG)),
                "core: masked conditioning": self.sample(self.guide(self.model, self.masked(styles)))}

    def cycle(self) -> dict[str, Run]:
        from mixology.host.cycle import CycleSampler

        guider = self.guide(self.model, self.second)
        return {"pack": self.sample(guider, CycleSampler(self.first, 1.0, 0.1, 0)),
                "core: KSampler from the picture": self.sample(guider)}

    def inversion(self) -> dict[str, Run]:
        import comfy.samplers
        from mixology.host.inversion import invert_latent

        def invert() -> int:
            invert_latent(self.model, self.first, self.latent, self.steps, "ddim_uniform", "ditail")
            return len(self.sigmas) - 1

        rising = self.sigmas.flip(0).clone()
        rising[0] = 1e-4  # as Flip Sigmas of the host makes it
        guider = comfy.samplers.CFGGuider(self.model)
        guider.inner_set_conds({"positive": self.first})
        return {"pack": invert, "core: Flip Sigmas": self.sample(
            guider, comfy.samplers.sampler_object("euler"), rising)}

    def injection(self) -> dict[str, Run]:
        from mixology.host.injection import inject_features
        from mixology.host.inversion import invert_latent

        with torch.inference_mode():
            trajectory = invert_latent(
                self.model, self.negative, self.latent, self.steps, "ddim_uniform", "ditail")
        runs = {name: self.sample(self.guide(inject_features(
                    self.model, trajectory, self.negative, attention, features), self.first))
                for name, attention, features in (("pack", 1.0, 1.0), ("pack, its defaults", 0.5, 0.8))}
        return {**runs, "core: KSampler, nothing injected": self.bare()}

    def fuse(self, *pairs: tuple[Any, Any]) -> Run:
        from mixology.host.experts import add_expert
        from mixology.host.fusion import SaliencyGuider

        experts: tuple[Any, ...] = ()
        for model, prompt in pairs:
            experts = add_expert(model, prompt, self.negative, CFG, 1.0, experts)
        guider = SaliencyGuider(experts, BLUR, 0.0, 0.0, 1.0, 0, FUSED_WORDS)
        run = self.sample(guider)
        self.networks += [network for expert in guider.experts
                          if (network := expert.model_patcher.model.diffusion_model) not in self.networks]
        return run

    def alternate(self, first: Any, second: Any) -> dict[str, Run]:
        """The host's guider of two models, where it has one: a prompt on one, the negative on the other."""
        import comfy_extras.nodes_custom_sampler as host

        if not hasattr(host, "Guider_DualModel"):
            return {}
        guider = host.Guider_DualModel(first, second)
        guider.set_conds(self.first, self.negative)
        guider.set_cfg(CFG)
        return {"core: Dual Model Guider": self.sample(guider)}

    def fusion(self) -> dict[str, Run]:
        return {"pack": self.fuse((self.model, self.first), (self.other, self.second)),
                **self.alternate(self.model, self.other)}

    def fusion_of_loras(self) -> dict[str, Run]:
        clones = patch_slightly(self.model), patch_slightly(self.model)
        return {"pack": self.fuse((clones[0], self.first), (clones[1], self.second)), **self.alternate(*clones)}

    def mix(self) -> tuple[Any, Any]:
        """Five random pictures side by side, and their zeros."""
        from mixology.host.mixer import make_conditioning
        from mixology.samplers.mixer import Mixer, add_source

        mixer: Mixer = ()
        for seed in range(5):
            tokens = torch.randn(1, self.first[0][0].shape[-1], generator=torch.Generator().manual_seed(seed))
            mixer = add_source(mixer, tokens, 1.0)
        return make_conditioning(mixer, "concat", 5)

    def mixer(self) -> dict[str, Run]:
        import nodes

        joined = nodes.ConditioningConcat().concat(self.first, self.second)[0]
        return {"pack": self.sample(self.guide(self.model, *self.mix())),
                "core: Conditioning Concat": self.sample(self.guide(self.model, joined))}


def open_stage(arguments: argparse.Namespace) -> Stage:
    (model, encode, side), (other, *_) = load_model(arguments), load_model(arguments)
    return Stage(model, other, encode, arguments.side or side, arguments.batch, arguments.steps)
