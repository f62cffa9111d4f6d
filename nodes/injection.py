"""Nodes of Diffusion Cocktail's second half: sampling with the structure that a model reads in a picture."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.injection import inject_features, sample_cocktail
from .bounds import within_bounds
from .search import search_words
from .sockets import Trajectory


def injection_inputs() -> list[io.Input]:
    """How long features are injected, in percents of the model's time axis."""
    return [
        io.Float.Input(
            "attention_until", display_name="attention_until (form)", default=0.5, min=0.0, max=1.0, step=0.01,
            tooltip=(
                "How long the picture's self-attention is injected: 0 never, 0.5 the first half of the time, 1 to "
                "the end. It holds layout and shapes.")),
        io.Float.Input(
            "features_until", display_name="features_until (parts)", default=0.8, min=0.0, max=1.0, step=0.01, tooltip=(
                "How long the picture's residual features are injected. They hold what is where, down to parts of "
                "things. SD1.x, SD2.x and SDXL only.")),
    ]


def mask_input() -> io.Input:
    return io.Mask.Input("mask", optional=True, tooltip=(
        "Keep the picture's structure inside this mask only; one for all images, or one for each."))


class FeatureInjection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyFeatureInjection",
            display_name="Feature Injection",
            category="mixology/cocktail",
            description="While sampling, the model reads an inverted picture as well, and what it samples takes over "
                        "that picture's self-attention and features: its structure stays, all else is the prompt's "
                        "and the model's.",
            search_aliases=search_words("MixologyFeatureInjection"),
            inputs=[
                io.Model.Input("model", tooltip=(
                    "The target model, with its LoRAs: a UNet (SD1.x to SDXL), or a transformer such as Flux, "
                    "Qwen-Image, Z-Image, Krea 2 or Wan.")),
                Trajectory.Input("trajectory", tooltip=(
                    "The picture whose structure is kept, from DDIM Inversion or Load Trajectory.")),
                io.Conditioning.Input("conditioning", tooltip=(
                    "What the picture is read with while sampling. Ditail uses an empty prompt, encoded with the "
                    "target model's text encoder.")),
                *injection_inputs(),
                mask_input(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip=(
                "The model that injects. Sample with the sigmas, noise and latent of Start from Trajectory."))],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, model: Any, trajectory: Any, conditioning: Any, attention_until: float, features_until: float,
        mask: Any = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(inject_features(
            model=model, trajectory=trajectory, conditioning=conditioning, attention_until=attention_until,
            features_until=features_until, mask=mask))


class CocktailKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyCocktailKSampler",
            display_name="KSampler (Cocktail)",
            category="mixology/cocktail",
            description="Diffusion Cocktail in one node: the content of an inverted picture in the style of another "
                        "model or LoRA.",
            search_aliases=search_words("MixologyCocktailKSampler"),
            inputs=[
                io.Model.Input("model", tooltip=(
                    "The target model, whose style the result has. Its latent format must be the source model's.")),
                Trajectory.Input("trajectory", tooltip=(
                    "The inverted picture, from DDIM Inversion or Load Trajectory. It also gives the steps.")),
                io.Conditioning.Input("source_conditioning", tooltip=(
                    "What the picture is read with while sampling. Ditail uses an empty prompt, encoded with the "
                    "target model's text encoder.")),
                io.Conditioning.Input("positive", tooltip="What the result shows, with the LoRA's trigger words."),
                io.Conditioning.Input("negative", tooltip="What the result should not show."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=(
                    "Guidance scale. Higher changes appearance and even the subject more, at the same structure; the "
                    "paper uses 7.5 and 15.")),
                *injection_inputs(),
                mask_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The result, for VAE Decode.")],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, model: Any, trajectory: Any, source_conditioning: Any, positive: Any, negative: Any, cfg: float,
        attention_until: float, features_until: float, mask: Any = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(sample_cocktail(
            model=model, trajectory=trajectory, source_conditioning=source_conditioning, positive=positive,
            negative=negative, cfg=cfg, attention_until=attention_until, features_until=features_until, mask=mask))
