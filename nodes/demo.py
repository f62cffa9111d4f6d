"""Demo Checkpoint and Demo Picture: a small model and its world, for trying every node on a laptop."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..host.demo import (
    draw_picture,
    find_fault,
    fingerprint,
    list_names,
    load_checkpoint,
    load_clip_vision,
)
from .bounds import within_bounds
from .search import search_words


class DemoCheckpoint(io.ComfyNode):
    """Loads a small checkpoint that ships with the pack, or one saved from it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = list_names()
        return io.Schema(
            node_id="MixologyDemoCheckpoint",
            display_name="Demo Checkpoint",
            category="mixology/demo",
            description=(
                "Loads a small SD1.x-shaped checkpoint that ships with Mixology, so that every node and workflow runs "
                "on a laptop CPU with nothing downloaded. It draws shapes at 128 x 128: write prompts such as "
                "'a striped red star on a blue background'. LoRA, hooks, ControlNet and all samplers work on it. "
                "ModelSave and Save Checkpoint write files which this node reads back bit for bit; the stock loaders "
                "detect only published model sizes and cannot open them."
            ),
            search_aliases=search_words("MixologyDemoCheckpoint"),
            inputs=[
                io.Combo.Input(
                    "name",
                    options=names,
                    default=names[0],
                    tooltip=(
                        "shapes knows the whole demo world; sketch draws it with a pencil; scenes knows no hearts and "
                        "stars; hearts knows nothing else, and no backgrounds. Or one that you saved with Save "
                        "Checkpoint ([checkpoints]) or ModelSave ([diffusion_models]). Keep those folders at the start "
                        "of the saver's filename prefix. A ModelSave file gets the shipped CLIP and VAE."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The denoiser: SD1.x's blocks at a small size, with eps prediction."),
                io.Clip.Output(tooltip="The text encoder. It knows the words of the demo world only."),
                io.Vae.Output(tooltip="The autoencoder: 8 pixels to one latent cell."),
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip=(
                        "A CLIP vision model in one space with the text encoder's projection, trained on the drawn "
                        "shapes: for Mixer Image, and to measure pictures."
                    ),
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: Any = None) -> bool | str:  # None is one that is connected
        return True if name is None else find_fault(name) or True

    @classmethod
    def fingerprint_inputs(cls, name: Any = None) -> str | float:
        return fingerprint(name)

    @classmethod
    @within_bounds
    def execute(cls, name: str) -> io.NodeOutput:
        return io.NodeOutput(*load_checkpoint(name=name), load_clip_vision())


class DemoPicture(io.ComfyNode):
    """Draws a picture of the demo world from its caption."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyDemoPicture",
            display_name="Demo Picture",
            category="mixology/demo",
            description=(
                "Draws a picture of the demo world from its caption, so that a workflow has an image to start from. "
                "What the caption leaves out is chosen by the seed."
            ),
            search_aliases=search_words("MixologyDemoPicture"),
            is_output_node=True,
            inputs=[
                io.String.Input(
                    "caption",
                    default="a striped red star on a blue background",
                    tooltip=(
                        "Shapes: circle, square, triangle, star, heart, cross, ring, moon. Textures: plain, striped, "
                        "dotted, checkered. Colours: red, orange, yellow, green, blue, purple, white, black. "
                        "'a blue background' alone draws an empty picture."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Places, sizes, turns and shades the shape, and chooses what the caption leaves out.",
                ),
                io.Int.Input(
                    "width", default=128, min=64, max=1024, step=8,
                    tooltip="Width in pixels. The demo checkpoint knows 128 x 128 best.",
                ),
                io.Int.Input(
                    "height", default=128, min=64, max=1024, step=8,
                    tooltip="Height in pixels. The demo checkpoint knows 128 x 128 best.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The picture."),
                io.Mask.Output(tooltip="The shape's silhouette: 1 inside, 0 on the background."),
            ],
        )

    @classmethod
    @within_bounds
    def execute(cls, caption: str, seed: int, width: int, height: int) -> io.NodeOutput:
        image, mask = draw_picture(caption=caption, seed=seed, width=width, height=height)
        return io.NodeOutput(image, mask, ui=ui.PreviewImage(image=image))
