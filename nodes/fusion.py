"""MagicFusion nodes: several models in one picture, each where it is most salient."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..host import experts as chain
from ..host import fusion
from ..host.fusion_strip import draw_strip
from .bounds import within_bounds
from .search import search_words

Experts = io.Custom("MIXOLOGY_EXPERTS")


class Expert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyExpert",
            display_name="Fusion Expert",
            category="mixology/fusion",
            description="A model with its prompts as one of several that paint a picture together. Connect one to the "
                        "next, and the last to Saliency Fusion Guider.",
            search_aliases=search_words("MixologyExpert"),
            inputs=[
                io.Model.Input("model", tooltip=(
                    "The expert's model with its LoRAs and patches. All experts need one latent format and noise "
                    "schedule, such as SD1.5 with SD1.5.")),
                io.Conditioning.Input("positive", tooltip=(
                    "What this expert shall paint, encoded by its own text encoder. Usually the same words for all.")),
                io.Conditioning.Input("negative", tooltip=(
                    "What it shall avoid. Experts on one model that share it are evaluated together.")),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=(
                    "Guidance scale of this expert. It also scales its saliency, as temperature does.")),
                io.Float.Input(
                    "temperature", display_name="temperature (focus)", default=1.0, min=0.0, max=1000.0, step=0.1,
                    round=0.01, tooltip=(
                        "k of the paper: a higher one sharpens this expert's saliency, so that it wins what it "
                        "cares for most and leaves the rest to the others.")),
                Experts.Input("experts", optional=True, tooltip="The experts before this one.")],
            outputs=[Experts.Output(display_name="experts", tooltip=(
                "These experts and this one, for the next Fusion Expert or Saliency Fusion Guider."))],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, model: Any, positive: Any, negative: Any, cfg: float, temperature: float, experts: Any = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(chain.add_expert(
            model=model, positive=positive, negative=negative, cfg=cfg, temperature=temperature, experts=experts))


class SaliencyGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologySaliencyGuider",
            display_name="Saliency Fusion Guider",
            category="mixology/fusion",
            description="Several models paint one picture: at each step and place the expert that responds most to its "
                        "prompt supplies the noise prediction. A guider for SamplerCustomAdvanced.",
            search_aliases=search_words("MixologySaliencyGuider"),
            not_idempotent=True,  # it keeps its run's maps, so that two equal nodes must not share one guider
            inputs=[
                Experts.Input("experts", tooltip="Two experts or more, from the last Fusion Expert."),
                io.Float.Input(
                    "blur", display_name="blur (of saliency)", default=4.0, min=0.0, max=64.0, step=0.5, round=0.01,
                    tooltip=(
                        "Smooths the saliency: side of a box in latent pixels at 64, in proportion at other sizes. "
                        "4 is the published one and keeps objects whole; 0 for fusing a style with a photo model.")),
                io.Float.Input(
                    "softness", display_name="softness (0: winner)", default=0.0, min=0.0, max=1000.0, step=0.1,
                    round=0.01, tooltip=(
                        "0: the winner takes the place, as in the paper. Higher blends the experts, up to a plain "
                        "average.")),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=(
                    "Where the fusion starts, on the first model's time axis: 0 is pure noise.")),
                io.Float.Input(
                    "end_percent", display_name="end_percent (fusion)", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip=(
                        "Where it ends. With 0.4 the outside expert alone finishes the picture.")),
                io.Int.Input(
                    "outside", display_name="outside (expert no.)", advanced=True, default=0, min=0, max=255,
                    tooltip=(
                        "Which expert samples outside the window, counted from 0.")),
                io.Combo.Input("saliency_uncond", advanced=True, options=list(fusion.UNCONDS), default="own", tooltip=(
                    "What a response is measured against: the expert's own negative, as in the paper, or that of the "
                    "first expert, as in the published code.")),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip=(
                "For SamplerCustomAdvanced, and afterwards for Saliency Maps."))],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, experts: Any, blur: float, softness: float, start_percent: float, end_percent: float, outside: int,
        saliency_uncond: str,
    ) -> io.NodeOutput:
        return io.NodeOutput(fusion.SaliencyGuider(
            experts=experts, blur=blur, softness=softness, start_percent=start_percent, end_percent=end_percent,
            outside=outside, saliency_uncond=saliency_uncond))


class SaliencyMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologySaliencyMaps",
            display_name="Saliency Maps",
            category="mixology/fusion",
            description="Shows which expert won where, step by step, in the run that a Saliency Fusion Guider has just "
                        "guided: one strip on the node, and every map at its outputs.",
            search_aliases=search_words("MixologySaliencyMaps"),
            is_output_node=True,
            inputs=[
                io.Guider.Input("guider", tooltip=(
                    "The Saliency Fusion Guider. Give each sampling node one of its own.")),
                io.Latent.Input("latent", tooltip=(
                    "The latent that was sampled with it; this node then runs after the sampling.")),
                io.Image.Input("image", optional=True, tooltip=(
                    "What the latent was decoded to, from VAE Decode: the maps are laid over it, in grey.")),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip=(
                    "One picture a step and image, a colour for each expert: blue, orange, green, pink, yellow, ...")),
                io.Mask.Output(display_name="masks", tooltip=(
                    "What each expert won, at the latent's size: all steps of the first expert, then of the next.")),
            ],
        )

    @classmethod
    @within_bounds
    def execute(cls, guider: Any, latent: Any, image: Any = None) -> io.NodeOutput:
        maps, masks = fusion.show_maps(guider=guider, latent=latent, image=image)
        strip = draw_strip(maps=maps, masks=masks, latent=latent)
        return io.NodeOutput(maps, masks, ui=ui.PreviewImage(image=strip))
