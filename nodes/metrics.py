"""Image Metrics and Clip Metrics: how alike pictures are, and how well they fit their texts."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..host import metrics, metrics_clip
from ..host.metrics_lpips import fingerprint_network
from .bounds import within_bounds
from .search import search_words


class ImageMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyImageMetrics",
            display_name="Image Metrics",
            category="mixology/evaluate",
            description="Measures how alike pictures are to a reference: L2, PSNR, SSIM, smoothness, and LPIPS where "
                        "its files are at hand. Shown on the node as a table, picture by picture, with the means.",
            search_aliases=search_words("MixologyImageMetrics"),
            is_output_node=True,
            inputs=[
                io.Image.Input("image", tooltip="The pictures to measure."),
                io.Image.Input("reference", tooltip=(
                    "What they are compared with, at the same size: one picture for all, or one for each.")),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The table that the node shows."),
                io.Float.Output(display_name="l2", tooltip=(
                    "Mean distance: the root of all pixels' summed squared differences. It grows with the size.")),
                io.Float.Output(display_name="psnr", tooltip=(
                    "Mean peak signal-to-noise ratio in dB; infinite where a picture equals its reference.")),
                io.Float.Output(display_name="ssim", tooltip="Mean structural similarity; 1 for equal pictures."),
                io.Float.Output(display_name="smoothness", tooltip=(
                    "Mean of how far the total variation in the central 20% of the width is from the reference's, as a "
                    "share of it; 0 is equally smooth.")),
                io.Float.Output(display_name="lpips", tooltip=(
                    "Mean learned perceptual distance; not a number (nan) while its files are missing: the report says "
                    "which, and where to put them.")),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return fingerprint_network()

    @classmethod
    @within_bounds
    def execute(cls, image: Any, reference: Any) -> io.NodeOutput:
        figures = metrics.measure_pictures(image=image, reference=reference)
        return io.NodeOutput(*figures, ui=ui.PreviewText(value=figures[0]))


class ClipMetrics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyClipMetrics",
            display_name="Clip Metrics",
            category="mixology/evaluate",
            description="Measures with a CLIP how well pictures fit their text, and whether a change goes the "
                        "way of the text's change; of two styles also on both halves. Shown on the node.",
            search_aliases=search_words("MixologyClipMetrics"),
            is_output_node=True,
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip=(
                    "A CLIP vision model with its projection, such as ViT-L/14; or the Demo Checkpoint's.")),
                io.Clip.Input("clip", tooltip=(
                    "The text encoder of the same CLIP with its projection, from Load CLIP; or the Demo Checkpoint's. "
                    "The CLIP of an SD1.x checkpoint has no projection.")),
                io.Image.Input("image", tooltip="The pictures to measure."),
                io.String.Input("text", default="", multiline=True, tooltip=(
                    "What the pictures shall show; of two styles the whole of both. CLIP reads 75 tokens.")),
                io.Image.Input("source_image", optional=True, tooltip=(
                    "For the directional figure: what the pictures were made from, one for all or one for each.")),
                io.String.Input("source_text", default="", multiline=True, optional=True, tooltip=(
                    "For the directional figure: what source_image shows, in words like those of the text.")),
                io.String.Input("left_text", default="", multiline=True, optional=True, tooltip=(
                    "Of two styles the left one's prompt: measured on the whole picture and on each half.")),
                io.String.Input("right_text", default="", multiline=True, optional=True, tooltip=(
                    "Of two styles the right one's prompt: measured on the whole picture and on each half.")),
                io.Combo.Input(
                    "fit", display_name="fit (if not square)", options=list(metrics_clip.FITS), default="crop",
                    optional=True, advanced=True, tooltip=(
                        "What CLIP sees of a picture that is not square. crop: its middle square, as CLIP was made. "
                        "pad: all of it, with its mean colour around; so it sees halves in any case.")),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The table that the node shows."),
                io.Float.Output(display_name="similarity", tooltip=(
                    "Mean cosine of picture and text. Compare it only with figures of the same CLIP.")),
                io.Float.Output(display_name="directional", tooltip=(
                    "Mean cosine of the picture's change and the text's; above 0 is toward the text. Not a number "
                    "(nan) without source_image and source_text.")),
            ],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, clip_vision: Any, clip: Any, image: Any, text: str, source_image: Any = None, source_text: str = "",
        left_text: str = "", right_text: str = "", fit: str = "crop",
    ) -> io.NodeOutput:
        texts = metrics_clip.Texts(text=text, source_text=source_text, left_text=left_text, right_text=right_text)
        figures = metrics_clip.measure_clip(
            clip_vision=clip_vision, clip=clip, image=image, texts=texts, source_image=source_image, fit=fit)
        return io.NodeOutput(*figures, ui=ui.PreviewText(value=figures[0]))
