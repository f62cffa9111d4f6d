"""Dual style nodes: several prompts in one picture, each in its own region."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..host import spatial
from ..host.sheet import draw_mask_sheet
from ..samplers.masks import MAX_MASKS
from ..samplers.spatial import MAX_SIDE, PROFILES, draw_gradient_masks
from .bounds import within_bounds
from .search import search_words


class GradientMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyGradientMask",
            display_name="Gradient Masks",
            category="mixology/spatial",
            description="Draws masks that hand the picture from one style to the next, and shows them. They sum to 1 "
                        "at every pixel.",
            search_aliases=search_words("MixologyGradientMask"),
            is_output_node=True,
            inputs=[
                io.Int.Input("width", default=512, min=1, max=MAX_SIDE, tooltip=(
                    "Width of the masks in pixels; that of the picture. They are resized to the latent later.")),
                io.Int.Input("height", default=512, min=1, max=MAX_SIDE, tooltip="Height of the masks in pixels."),
                io.Combo.Input("profile", options=list(PROFILES), default="linear", tooltip=(
                    "linear: an even blend from side to side. logistic: each style keeps its area, with a short "
                    "transition between.")),
                io.Int.Input("parts", display_name="parts (along angle)", default=2, min=2, max=MAX_MASKS,
                             tooltip="How many styles along the angle."),
                io.Float.Input(
                    "angle", display_name="angle (degrees)", default=0.0, min=-360.0, max=360.0, step=1.0, round=0.01,
                    tooltip=(
                        "Direction in degrees: 0 runs left to right, 90 top to bottom, 45 from corner to corner.")),
                io.Float.Input(
                    "sharpness", display_name="sharpness (logistic)", default=20.0, min=0.0, max=1000.0, step=1.0,
                    round=0.01, tooltip=(
                        "Steepness of the logistic transition: 20 takes 22% of the picture, 70 about 6%. linear "
                        "ignores it.")),
                io.Int.Input("rows", display_name="rows (across angle)", default=1, min=1, max=MAX_MASKS, tooltip=(
                    "Styles across the angle as well: 2 parts and 2 rows are four corners, row by row. parts times "
                    "rows is at most 16.")),
            ],
            outputs=[io.Mask.Output(display_name="masks", tooltip="A batch of masks, one per style, row by row.")],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, width: int, height: int, profile: str, parts: int, angle: float, sharpness: float, rows: int,
    ) -> io.NodeOutput:
        masks = draw_gradient_masks(
            width=width, height=height, profile=profile, parts=parts, angle=angle, sharpness=sharpness, rows=rows)
        return io.NodeOutput(masks, ui=ui.PreviewImage(image=draw_mask_sheet(masks=masks, columns=parts)))


class EpsilonMergeGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        prompt = io.Conditioning.Input("positive", tooltip="The prompt of one style, in the order of the masks.")
        return io.Schema(
            node_id="MixologyEpsilonMergeGuider",
            display_name="Epsilon Merge Guider",
            category="mixology/spatial",
            description="Paints each region of the picture by its own prompt and merges their noise predictions, so "
                        "that the styles meet without a seam. A guider for SamplerCustomAdvanced.",
            search_aliases=search_words("MixologyEpsilonMergeGuider"),
            inputs=[
                io.Model.Input("model", tooltip="The model that paints all styles."),
                io.Mask.Input("masks", tooltip=(
                    "One mask per style, from Gradient Masks or from painted masks joined by Batch Masks. With one "
                    "mask less, the last style takes the rest; where no mask is painted, the first fills in.")),
                io.Conditioning.Input("negative", tooltip="What no style should show; evaluated once for all."),
                io.Float.Input("cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=(
                    "Guidance scale of every style: how strongly it follows its prompt. Higher keeps styles apart.")),
                io.String.Input(
                    "cfg_per_style", display_name="cfg_per_style (list)", default="", advanced=True, tooltip=(
                        "A guidance scale for each style, such as '5, 7.5'. Styles beyond the list use cfg.")),
                io.Autogrow.Input(
                    "positives", template=io.Autogrow.TemplatePrefix(prompt, prefix="positive_", min=2, max=MAX_MASKS),
                    tooltip="The prompts of the styles, 2 to 16, in the order of the masks."),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    @within_bounds
    def execute(
        cls, model: Any, masks: Any, negative: Any, cfg: float, cfg_per_style: str, positives: io.Autogrow.Type,
    ) -> io.NodeOutput:
        return io.NodeOutput(spatial.EpsilonMergeGuider(
            model=model, masks=masks, positives=positives, negative=negative, cfg=cfg, cfg_per_style=cfg_per_style))
