"""Evaluate nodes: many settings in one queue, and their pictures on one sheet."""
from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..host.grid import label_grid
from ..host.sweep import make_sweep
from .bounds import within_bounds
from .search import search_words

Value = io.AnyType  # what a list holds decides; the host's older lists of choices take no narrower type


class Sweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologySweep",
            display_name="Sweep",
            category="mixology/evaluate",
            description="Runs what is connected to it once for each value of a list, in one queue. Several lists give "
                        "all their combinations, which Labelled Grid shows in rows and columns.",
            search_aliases=search_words("MixologySweep"),
            inputs=[
                io.String.Input("values", default="0:1:5", tooltip=(
                    "What a widget runs through: '0.1, 0.3', '0:1:5' for five from 0 to 1, 'cfg = 2, 4' with a name "
                    "for the labels, or words such as 'euler, ddim'. From left to right in a grid.")),
                io.String.Input("values_2", display_name="values_2 (rows)", default="", optional=True, tooltip=(
                    "A second list: every one of its values with every one of the first. From top to bottom in a "
                    "grid. Empty for none.")),
                io.String.Input(
                    "values_3", display_name="values_3 (more rows)", default="", optional=True, advanced=True,
                    tooltip="A third list, in further rows below. Empty for none."),
            ],
            outputs=[
                Value.Output(display_name="values", is_output_list=True, tooltip=(
                    "For any widget of any node: drag it onto the widget. Whole numbers where all are whole and none "
                    "has a point, else decimals, or words.")),
                io.String.Output(display_name="labels", is_output_list=True, tooltip=(
                    "The settings of each run in words, for Labelled Grid's labels or a filename.")),
                io.Int.Output(display_name="columns", tooltip=(
                    "How many values the first list has: Labelled Grid's columns.")),
                Value.Output(display_name="values_2", is_output_list=True, tooltip=(
                    "The second list's value of each run, for another widget.")),
                Value.Output(display_name="values_3", is_output_list=True, tooltip=(
                    "The third list's value of each run, for another widget.")),
                io.String.Output(display_name="across", is_output_list=True, tooltip=(
                    "The first list in words, for Labelled Grid's across: a text above each column.")),
                io.String.Output(display_name="down", is_output_list=True, tooltip=(
                    "The other lists in words, for Labelled Grid's down: a text beside each row.")),
            ],
        )

    @classmethod
    @within_bounds
    def execute(cls, values: str, values_2: str = "", values_3: str = "") -> io.NodeOutput:
        return io.NodeOutput(*make_sweep(values=values, values_2=values_2, values_3=values_3))


class LabelledGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MixologyLabelledGrid",
            display_name="Labelled Grid",
            category="mixology/evaluate",
            description="Puts pictures of lists and batches on one sheet, in rows and columns with words above, beside "
                        "and below: what a sweep made, or a batch of one run.",
            search_aliases=search_words("MixologyLabelledGrid"),
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip=(
                    "All pictures, from left to right and top to bottom: a list, a batch, or a list of batches. "
                    "Smaller ones are scaled up to the largest, in their own proportions.")),
                io.String.Input("labels", default="", multiline=True, optional=True, tooltip=(
                    "A text below each picture: one a line, or a list such as Sweep's labels. Empty for none.")),
                io.Int.Input("columns", display_name="columns (0: by itself)", default=0, min=0, max=1000, tooltip=(
                    "Pictures in a row. 0: as many as across has texts, else about as many as there are rows.")),
                io.String.Input("across", default="", optional=True, tooltip=(
                    "A text above each column: Sweep's across, or one a line.")),
                io.String.Input("down", default="", optional=True, tooltip=(
                    "A text left of each row: Sweep's down, or one a line.")),
                io.String.Input("settings", default="", multiline=True, optional=True, tooltip=(
                    "What all pictures have in common, in small letters below the grid: prompt, model, seed.")),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The sheet, for Save Image.")],
        )

    @classmethod
    @within_bounds
    def execute(cls, images: list[Any], columns: list[int], labels: Any = (), across: Any = (), down: Any = (),
                settings: Any = ()) -> io.NodeOutput:
        sheet = label_grid(
            images=images, labels=labels, columns=columns, across=across, down=down, settings=settings)
        return io.NodeOutput(sheet, ui=ui.PreviewImage(image=sheet))
