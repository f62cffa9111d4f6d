"""Image Mixer nodes: several pictures and words as one conditioning."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import mixer as image_mixer
from ..host.mixer_graph import fingerprint_graph
from ..samplers.mixer import MODES
from .bounds import within_bounds
from .search import search_words

Mixer = io.Custom("MIXOLOGY_MIXER")


def chain_input() -> io.Input:
    return Mixer.Input("mixer", optional=True, tooltip="The sources before this one; their order means nothing.")


def chain_output() -> io.Output:
    return Mixer.Output(display_name="mixer", tooltip="The sources so far, for a further source or Mixer Conditioning.")


class MixerImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyMixerImage",
            display_name="Mixer Image",
            category="mixology/mixer",
            description="Adds a picture, or a crop of it, to a mix: its projected CLIP embedding becomes a token that "
                        "an image-mixer or image-variations model attends to.",
            search_aliases=search_words("MixologyMixerImage"),
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip=(
                    "CLIP ViT-L/14 with its projection for the published checkpoints; the Demo Checkpoint's for the "
                    "demo mixer.")),
                io.Image.Input("image", tooltip=(
                    "The picture. CLIP sees the middle square. A batch is mixed picture by picture: image 1 with "
                    "image 1 of the other sources, and so on.")),
                io.Float.Input("strength", default=1.0, min=0.0, max=5.0, step=0.05, tooltip=(
                    "Factor of the embedding: how much of this picture comes through. 0 leaves the slot empty.")),
                io.Float.Input(
                    "x", display_name="x (crop's left edge)", default=0.0, min=0.0, max=0.99, step=0.01, tooltip=(
                        "Left edge of the crop, as a fraction of the picture's width.")),
                io.Float.Input(
                    "y", display_name="y (crop's top edge)", default=0.0, min=0.0, max=0.99, step=0.01, tooltip=(
                        "Top edge of the crop, as a fraction of the picture's height.")),
                io.Float.Input(
                    "width", display_name="width (of the crop)", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=(
                        "Width of the crop, as a fraction; it ends at the picture's edge.")),
                io.Float.Input(
                    "height", display_name="height (of the crop)", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=(
                        "Height of the crop, as a fraction; it ends at the picture's edge.")),
                chain_input(),
            ],
            outputs=[chain_output()],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, clip_vision: Any, image: Any, strength: float, x: float, y: float, width: float, height: float,
        mixer: Any = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(image_mixer.mix_image(
            clip_vision=clip_vision, image=image, strength=strength, box=(x, y, width, height), mixer=mixer))


class MixerText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyMixerText",
            display_name="Mixer Text",
            category="mixology/mixer",
            description="Adds words to a mix: their projected CLIP embedding lies in the same space as the pictures'. "
                        "Two texts with strengths of opposite sign are a direction for mode sum.",
            search_aliases=search_words("MixologyMixerText"),
            inputs=[
                io.Clip.Input("clip", tooltip=(
                    "A CLIP-L text encoder whose file holds text_projection.weight, from Load CLIP. The CLIP of an "
                    "SD1.x checkpoint has none.")),
                io.String.Input("text", default="", multiline=True, tooltip=(
                    "A short text, at most 75 tokens. Weights such as (word:1.3) do not act here.")),
                io.Float.Input("strength", default=1.0, min=-5.0, max=5.0, step=0.05, tooltip=(
                    "Factor of the embedding; 1.4 to 1.5 is usual beside pictures. Negative takes away, in mode sum.")),
                chain_input(),
            ],
            outputs=[chain_output()],
        )

    @classmethod
    @within_bounds
    def execute(cls, clip: Any, text: str, strength: float, mixer: Any = None) -> io.NodeOutput:
        return io.NodeOutput(image_mixer.mix_text(clip=clip, text=text, strength=strength, mixer=mixer))


class MixerConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyMixerConditioning",
            display_name="Mixer Conditioning",
            category="mixology/mixer",
            description="Makes the conditioning of a mix, and its negative, for a model that was trained on image "
                        "embeddings. Use both outputs: a text negative does not belong here.",
            search_aliases=search_words("MixologyMixerConditioning"),
            inputs=[
                Mixer.Input("mixer", tooltip="All sources, chained."),
                io.Combo.Input("mode", options=list(MODES), default="concat", tooltip=(
                    "concat: a token for each source, for models trained on several. average: one token, weighted by "
                    "the strengths. sum: one token, for text directions and for weights of your own.")),
                io.Int.Input("slots", display_name="slots (0: no filling)", default=5, min=0, max=77, tooltip=(
                    "Tokens that the model was trained with; what is free is filled with zeros. 5 for Image Mixer, 1 "
                    "for Image Variations, 0 for no filling.")),
                io.Model.Input("model", optional=True, tooltip=(
                    "The model that will sample this, to check that it fits; it is not changed.")),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The mix."),
                io.Conditioning.Output(display_name="negative", tooltip="Zeros of the same shape: nothing."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return fingerprint_graph()

    @classmethod
    @within_bounds
    def execute(cls, mixer: Any, mode: str, slots: int, model: Any = None) -> io.NodeOutput:
        return io.NodeOutput(*image_mixer.make_conditioning(mixer=mixer, mode=mode, slots=slots, model=model))
