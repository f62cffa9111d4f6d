"""MagicMix: the layout of one picture, the content of a prompt."""
from __future__ import annotations

import time
from collections.abc import Sequence

import measure
from comfyui import Run
from gallery import Picture, Section, Strip
from stage import Stage
from workflow import Workflow

NUS = ("0", "0.1", "0.3", "0.5", "0.7", "0.9", "1")
SEEDS = (3, 11)
MEASURED_SEEDS = 4  # a pair
DEMO_CFG = 4.0  # the demo checkpoint's own
Pair = tuple[str, str]  # what the layout shows, what the prompt asks for

DEMO_PAIRS: tuple[Pair, ...] = (
    ("a plain red circle on a white background", "a dotted blue heart on a white background"),
    ("a plain yellow moon on a blue background", "a striped orange star on a blue background"),
    ("a plain green square on a white background", "a checkered purple ring on a white background"),
    ("a plain black triangle on a yellow background", "a striped red cross on a yellow background"),
)
REAL_PAIRS: tuple[Pair, ...] = (
    ("a plain red circle on a white background", "a photo of a pizza on a white table"),
    ("a plain yellow moon on a black background", "a photo of a banana on a black table"),
    ("a plain orange star on a blue background", "a photo of a starfish on blue sand"),
)
REAL_NEGATIVE = "blurry, low quality"


def pairs_for(real: bool) -> Sequence[Pair]:
    return REAL_PAIRS if real else DEMO_PAIRS


def count_runs(real: bool) -> int:
    """How many prompts `perform` runs."""
    return 2 * len(pairs_for(real)) + (0 if real else measure.count_runs(DEMO_PAIRS, MEASURED_SEEDS))


def perform(stage: Stage) -> list[Section]:
    """Image-text and text-text mixing; the curves where the demo checkpoint makes them measurable."""
    return [mix_with_pictures(stage), mix_with_prompts(stage)]


def mix_with_pictures(stage: Stage) -> Section:
    section = Section(
        "MagicMix: a picture's layout, a prompt's content",
        "The first steps follow the picture on the left, the last ones only the prompt. nu says how much the prompt "
        "may decide in between: at 0 the picture's layout stays, at 1 only its noisy beginning is left. "
        "Each row is one run: every nu is an item of the same batch.")
    started = time.monotonic()
    for index, (layout, content) in enumerate(pairs_for(stage.checkpoint is not None)):
        workflow = prepare_image_text(stage, layout, content, SEEDS[0] + index)
        shown = workflow.add("SaveImage", images=[workflow.find("Layout picture"), 0],
                             filename_prefix="mixology/layout")
        run = stage.run(workflow, f"{layout} + {content}")
        section.strips.append(make_strip(run, shown, workflow.find("Save Image"), layout, content))
        section.settings = read_settings(workflow)
    section.seconds = time.monotonic() - started
    if stage.checkpoint is None:
        section.plots, section.tables = measure.measure(stage, DEMO_PAIRS, MEASURED_SEEDS, NUS, prepare_image_text)
    return section


def mix_with_prompts(stage: Stage) -> Section:
    section = Section(
        "MagicMix: one prompt's layout, another prompt's content",
        "The layout comes from a prompt too: its sampling is recorded on the way and mixed into that of the content.")
    started = time.monotonic()
    for index, (layout, content) in enumerate(pairs_for(stage.checkpoint is not None)):
        workflow = prepare_text_text(stage, layout, content, SEEDS[1] + index)
        run = stage.run(workflow, f"{layout} + {content}")
        section.strips.append(make_strip(run, workflow.find("Layout"), workflow.find("Save Image"), layout, content))
        section.settings = read_settings(workflow)
    section.seconds = time.monotonic() - started
    return section


def prepare_image_text(stage: Stage, layout: str, content: str, seed: int, nus: Sequence[str] = NUS) -> Workflow:
    """The image-text template on a drawn layout picture, one batch item a nu."""
    workflow = stage.load("magicmix_image_text")
    workflow.use_demo_picture(caption=layout, seed=seed, width=stage.side, height=stage.side)
    set_prompts(stage, workflow, content)
    workflow.set("Layout Noise", seed=seed)
    workflow.set("Layout Mix", nu_per_image=", ".join(nus), seed=seed)
    return workflow


def prepare_text_text(stage: Stage, layout: str, content: str, seed: int, nus: Sequence[str] = NUS) -> Workflow:
    """The text-text template, its layout sampled to the end so that it can be shown, one batch item a nu."""
    workflow = stage.load("magicmix_text_text")
    workflow.set("Layout prompt", text=layout)
    workflow.set("MixologyLayoutFromPrompt", seed=seed, finish=True)
    set_prompts(stage, workflow, content)
    workflow.set("Layout Mix", nu_per_image=", ".join(nus), seed=seed)
    return workflow


def set_prompts(stage: Stage, workflow: Workflow, content: str) -> None:
    workflow.set("Content prompt", text=content)
    workflow.set("Negative prompt", text=REAL_NEGATIVE if stage.checkpoint else "")
    if stage.checkpoint is None:
        for kind in ("MixologyLayoutMixKSampler", "MixologyLayoutFromPrompt"):
            for name in workflow.ids(kind):
                workflow.set_inputs(name, cfg=DEMO_CFG)


def make_strip(run: Run, shown: str, saved: str, layout: str, content: str) -> Strip:
    source = Picture(run.images[shown][0], "layout", source=True)
    results = [Picture(data, f"nu {nu}") for nu, data in zip(NUS, run.images[saved])]
    return Strip([source, *results], f"{layout}  +  {content}")


def read_settings(workflow: Workflow) -> dict[str, str]:
    """The mixing node's widgets that are the same in every row."""
    inputs = workflow.prompt[workflow.find("Layout Mix")]["inputs"]
    varied = ("seed", "nu")
    return {key: str(value) for key, value in inputs.items() if not isinstance(value, list) and key not in varied}
