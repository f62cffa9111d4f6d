"""MagicMix nodes: the layout of one picture, the content of a prompt."""
from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..host import layout as magicmix
from ..host.run import Schedule
from .bounds import within_bounds
from .search import search_words

Layout = io.Custom("MIXOLOGY_LAYOUT")
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def seed_input(tooltip: str) -> io.Input:
    return io.Int.Input("seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip=tooltip)


def schedule_inputs() -> list[io.Input]:
    """Steps, guidance and solver, as the host's KSampler has them."""
    return [
        io.Int.Input("steps", default=50, min=1, max=10000, tooltip=(
            "Steps of the whole schedule. Only those from k_max on are run, so 50 steps cost about 30.")),
        io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=(
            "Guidance scale: how strongly the picture follows the prompt.")),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="ddim", tooltip=(
            "Solver. ddim is the paper's; any works.")),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="ddim_uniform", tooltip=(
            "Noise schedule. ddim_uniform gives the paper's time steps.")),
    ]


def window_inputs() -> list[io.Input]:
    """The mixing window in fractions of the noise axis."""
    return [
        io.Float.Input(
            "k_max", display_name="k_max (mixes from)", default=0.6, min=0.0, max=1.0, step=0.01, tooltip=(
                "Where sampling starts, as the fraction of noise: higher gives the content more freedom of shape.")),
        io.Float.Input(
            "k_min", display_name="k_min (mixes to)", default=0.3, min=0.0, max=1.0, step=0.01, tooltip=(
                "Where mixing ends, as the fraction of noise: lower holds the layout longer.")),
    ]


def mix_inputs() -> list[io.Input]:
    """What both mixing nodes share."""
    nu = io.Float.Input("nu", display_name="nu (prompt's share)", default=0.5, min=0.0, max=1.0, step=0.01, tooltip=(
        "Content weight: 0 keeps the layout picture, 1 is plain image to image. "
        "Alike things mix at about 0.1, unlike ones at 0.5 to 0.9."))
    values = io.String.Input("nu_per_image", display_name="nu_per_image (list)", default="", tooltip=(
        "One nu for each image of the batch, such as '0.1, 0.3, 0.5': a whole sweep in one run. "
        "Images beyond the list use nu."))
    mask = io.Mask.Input("mask", optional=True, tooltip=(
        "Mix inside this mask only; outside it the prompt is free of the layout (nu = 1)."))
    variant = io.Combo.Input("variant", options=["paper", "diffusers"], default="paper", advanced=True, tooltip=(
        "paper mixes the sampler's states. diffusers mixes only what the model reads, as the community pipeline "
        "does: it keeps less layout at the same nu, so use it for nu values found there."))
    return [nu, *window_inputs(), values, mask, variant]


class LayoutNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyLayoutNoise",
            display_name="Layout Noise",
            category="mixology/layout",
            description="Makes a picture the layout of a mix: its noised states are what the sampler is held to.",
            search_aliases=search_words("MixologyLayoutNoise"),
            inputs=[
                io.Latent.Input("latent", tooltip="The layout picture, from VAE Encode."),
                seed_input("Seed of the layout's noise. The same seed in RandomNoise gives the same noise."),
                io.Combo.Input("noise_mode", options=["shared", "fresh"], default="shared", tooltip=(
                    "shared: one noise for all steps. fresh: a new draw at every step, which gives smoother, "
                    "softer mixes.")),
            ],
            outputs=[Layout.Output(display_name="layout", tooltip="The layout, for a Layout Mix node.")],
        )

    @classmethod
    @within_bounds
    def execute(cls, latent: Any, seed: int, noise_mode: str) -> io.NodeOutput:
        return io.NodeOutput(magicmix.make_layout(latent=latent, seed=seed, noise_mode=noise_mode))


class LayoutFromPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyLayoutFromPrompt",
            display_name="Layout Noise (Prompt)",
            category="mixology/layout",
            description="Samples a layout from a prompt and records its states: text to text mixing.",
            search_aliases=search_words("MixologyLayoutFromPrompt"),
            inputs=[
                io.Model.Input("model", tooltip="The model that draws the layout; usually the one that mixes."),
                io.Conditioning.Input("positive", tooltip="The prompt of the layout."),
                io.Conditioning.Input("negative", tooltip="What the layout should not show."),
                io.Latent.Input("latent", tooltip="An empty latent of the wanted size and batch."),
                seed_input("Seed of the start noise."),
                *schedule_inputs(),
                *window_inputs(),
                io.Boolean.Input("finish", display_name="finish (show layout)", default=False, tooltip=(
                    "Go on to the finished layout picture, to look at it. Costs the steps below k_min.")),
            ],
            outputs=[
                Layout.Output(display_name="layout", tooltip=(
                    "The recorded layout. Mix with the same steps and scheduler.")),
                io.Latent.Output(display_name="latent", tooltip=(
                    "The finished layout picture, or without finish the model's estimate of it at k_min.")),
            ],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: Any, seed: int, steps: int, cfg: float,
        sampler_name: str, scheduler: str, k_max: float, k_min: float, finish: bool,
    ) -> io.NodeOutput:
        schedule = Schedule(seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name, scheduler=scheduler)
        layout, picture = magicmix.record_layout(
            model=model, positive=positive, negative=negative, latent=latent, schedule=schedule, k_max=k_max,
            k_min=k_min, finish=finish)
        return io.NodeOutput(layout, picture)


class LayoutMixSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyLayoutMixSampler",
            display_name="Layout Mix Sampler",
            category="mixology/layout",
            description="Keeps a layout while the prompt decides the content. Wraps any SAMPLER for "
                        "SamplerCustomAdvanced, with any guider.",
            search_aliases=search_words("MixologyLayoutMixSampler"),
            inputs=[
                io.Sampler.Input("sampler", tooltip="The solver to wrap, for instance from KSamplerSelect."),
                Layout.Input("layout", tooltip="From Layout Noise or Layout Noise (Prompt)."),
                *mix_inputs(),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, sampler: Any, layout: Any, nu: float, k_max: float, k_min: float, nu_per_image: str, variant: str,
        mask: Any = None,
    ) -> io.NodeOutput:
        mix = magicmix.Mix(nu=nu, k_max=k_max, k_min=k_min, nu_per_image=nu_per_image, mask=mask, variant=variant)
        return io.NodeOutput(magicmix.LayoutMixSampler(sampler=sampler, layout=layout, mix=mix))


class LayoutMixKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyLayoutMixKSampler",
            display_name="KSampler (Layout Mix)",
            category="mixology/layout",
            description="MagicMix in one node: the layout of a picture or prompt, the content of another prompt.",
            search_aliases=search_words("MixologyLayoutMixKSampler"),
            inputs=[
                io.Model.Input("model", tooltip="The model that paints the content."),
                io.Conditioning.Input("positive", tooltip="The prompt of the content."),
                io.Conditioning.Input("negative", tooltip="What the picture should not show."),
                Layout.Input("layout", tooltip="From Layout Noise or Layout Noise (Prompt)."),
                seed_input("Seed of the solver's own noise; only stochastic solvers use it."),
                *schedule_inputs(),
                *mix_inputs(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The mixed picture, for VAE Decode.")],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, model: Any, positive: Any, negative: Any, layout: Any, seed: int, steps: int, cfg: float,
        sampler_name: str, scheduler: str, nu: float, k_max: float, k_min: float, nu_per_image: str, variant: str,
        mask: Any = None,
    ) -> io.NodeOutput:
        schedule = Schedule(seed=seed, steps=steps, cfg=cfg, sampler_name=sampler_name, scheduler=scheduler)
        mix = magicmix.Mix(nu=nu, k_max=k_max, k_min=k_min, nu_per_image=nu_per_image, mask=mask, variant=variant)
        return io.NodeOutput(magicmix.mix_latent(
            model=model, positive=positive, negative=negative, layout=layout, schedule=schedule, mix=mix))
