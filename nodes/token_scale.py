"""MagicMix's token attention scale: a word turned up, down, or into its absence."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.graph import is_unread
from ..host.token_scale import scale_tokens
from .bounds import within_bounds
from .search import search_words


class TokenScale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyTokenScale",
            display_name="Token Attention Scale",
            category="mixology/attention",
            description=(
                "Encodes a prompt and scales the attention that the picture pays to words of it: up, down, or below "
                "zero, which removes what the word names while the layout stays."),
            search_aliases=search_words("MixologyTokenScale"),
            inputs=[
                io.Model.Input("model", tooltip=(
                    "The model that will read this prompt: SD1.x to SDXL, SD3, Flux, Flux.2, Chroma, Qwen-Image, "
                    "Z-Image, Lumina 2, Krea 2, HiDream, OmniGen2, AuraFlow, LongCat-Image, Anima, Cosmos, Wan, "
                    "LTX-Video, HunyuanVideo and HunyuanImage.")),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.String.Input("text", default="", multiline=True, dynamic_prompts=True, tooltip=(
                    "The prompt, encoded as CLIP Text Encode does; (word:1.2) and embeddings work as there.")),
                io.String.Input("scales", display_name="scales (word = factor)", default="", multiline=True, tooltip=(
                    "One phrase a line: 'tiger = -1.5'. 1 changes nothing, 0 hides the words, below 0 removes what "
                    "they name, above 1 stresses it; from -10 to 10. 'tiger = [-1, 0, 1]' gives each image of a batch "
                    "its own value.")),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=(
                    "When the scaling starts: 0 is pure noise, 1 the end.")),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=(
                    "When the scaling ends: 1 is the end. Shapes are settled early, textures late.")),
                io.Conditioning.Input("conditioning", optional=True, tooltip=(
                    "The same text as another node encoded it (with pictures for an edit model, or with references): "
                    "this one gets the scales, and keeps all else. Without it the node encodes the text itself.")),
            ],
            outputs=[
                io.Model.Output(tooltip="The model that heeds the scales. Sample with this one."),
                io.Conditioning.Output(tooltip=(
                    "The prompt with its scales, for a sampler's positive or negative input.")),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> bool:
        return is_unread(output=0)  # so that it runs again, and says so, when its MODEL is connected or not any more

    @classmethod
    @within_bounds
    def execute(cls, model: Any, clip: Any, text: str, scales: str, start_percent: float, end_percent: float,
                conditioning: Any = None) -> io.NodeOutput:
        return io.NodeOutput(*scale_tokens(
            model=model, clip=clip, text=text, scales=scales, start_percent=start_percent, end_percent=end_percent,
            conditioning=conditioning))
