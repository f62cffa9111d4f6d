"""Dual style's cross-attention merge: several prompts in one prediction, each in its place."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.attention_merge import merge_conditionings
from ..host.graph import is_unread
from ..samplers.masks import MAX_MASKS
from .bounds import within_bounds
from .search import search_words


class AttentionMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        prompt = io.Conditioning.Input("conditioning", tooltip="The prompt of one style.")
        return io.Schema(
            node_id="MixologyAttentionMerge",
            display_name="Cross-Attention Merge",
            category="mixology/attention",
            description=(
                "Gives each region of a picture its own prompt inside one model evaluation: the picture's text "
                "attention is shared out by masks. Keeps the picture more of a piece than merging predictions."),
            search_aliases=search_words("MixologyAttentionMerge"),
            inputs=[
                io.Model.Input("model", tooltip=(
                    "The model that will read these prompts: SD1.x, SD2.x, SDXL, SD3, AuraFlow, Flux, Flux.2, Chroma, "
                    "Qwen-Image, Krea 2, Z-Image, Lumina 2, LongCat-Image, OmniGen2, Anima, "
                    "Cosmos-Predict2, Wan or LTX-Video.")),
                io.Mask.Input("masks", tooltip=(
                    "One mask per prompt, from Gradient Masks or from painted masks joined by Batch Masks. With one "
                    "mask less, the last prompt takes the rest; where no mask is painted, the first fills in. For a "
                    "video also one for each frame: all masks of the first prompt, then all of the next.")),
                io.Autogrow.Input(
                    "conditionings",
                    template=io.Autogrow.TemplatePrefix(prompt, prefix="conditioning_", min=2, max=MAX_MASKS),
                    tooltip="The prompts, 2 to 16, in the order of the masks. The first also gives what is not text: "
                            "pooled vector, ControlNet, area, hooks."),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model that reads merged prompts. Sample with this one."),
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The merged prompt, for a sampler's or guider's inputs."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> bool:
        return is_unread(output=0)  # so that it runs again, and says so, when its MODEL is connected or not any more

    @classmethod
    @within_bounds
    def execute(cls, model: Any, masks: Any, conditionings: io.Autogrow.Type) -> io.NodeOutput:
        return io.NodeOutput(*merge_conditionings(model=model, masks=masks, conditionings=conditionings))
