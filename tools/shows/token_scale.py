"""Token attention scale: a word turned up, down, or into its absence."""
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from comfyui import Run
from gallery import Curve, Picture, Plot, Section, Strip, Table
from stage import Stage, pure_room, read_pictures
from workflow import Workflow

SCALES = ("-2", "-1", "0", "0.5", "1", "2")
PARTS = ("shape", "colour", "texture")
SEED = 5
MEASURED_SEEDS = 4  # a caption and part
DEMO_CFG = 4.0  # the demo checkpoint's own
DEMO_K_MAX = 0.75  # its flat shapes keep their outline below that
REAL_NEGATIVE = "blurry, low quality"
Word = tuple[str, str]  # a prompt, and the word of it that is scaled

DEMO_WORDS: tuple[Word, ...] = (
    ("a striped red star on a white background", "star"),
    ("a dotted blue circle on a yellow background", "blue"),
    ("a checkered green cross on a black background", "checkered"),
)
REAL_WORDS: tuple[Word, ...] = (
    ("a photo of a fluffy cat on a red sofa", "fluffy"),
    ("a photo of a fluffy cat on a red sofa", "red"),
    ("a photo of a fluffy cat on a red sofa", "cat"),
)
MEASURED = ("a striped red star on a white background", "a dotted blue circle on a yellow background",
            "a checkered green cross on a black background", "a striped purple heart on a white background")
REMOVED: tuple[tuple[str, str], ...] = (  # what the layout shows, and the shape that has to go
    ("a plain red star on a white background", "star"),
    ("a plain blue circle on a yellow background", "circle"),
    ("a plain purple heart on a white background", "heart"),
)


def words_for(real: bool) -> Sequence[Word]:
    return REAL_WORDS if real else DEMO_WORDS


def count_runs(real: bool) -> int:
    """How many prompts `perform` runs."""
    return len(words_for(real)) + 2 * len(REMOVED) + (0 if real else len(PARTS) * len(MEASURED) * MEASURED_SEEDS)


def perform(stage: Stage) -> list[Section]:
    """A sweep of s for some words, and concept removal; the curves where the demo checkpoint makes them measurable."""
    return [turn_words(stage), remove_concepts(stage)]


def turn_words(stage: Stage) -> Section:
    section = Section(
        "Token attention scale: a word turned up, down, or into its absence",
        "The attention that the picture pays to one word is multiplied by s. At 1 nothing changes, at 0 the word is "
        "unseen, below 0 the picture moves away from what it names; the other words keep their say. Each row is one "
        "run from one noise.")
    started = time.monotonic()
    for text, word in words_for(stage.checkpoint is not None):
        workflow = prepare_sweep(stage, text, word, SEED)
        run = stage.run(workflow, f"{text}: {word}")
        pictures = [Picture(data, f"s {s}") for s, data in zip(SCALES, run.images[workflow.find("Save Image")])]
        section.strips.append(Strip(pictures, f"{text}: {word}"))
        section.settings = read_settings(workflow, "KSampler")
    section.seconds = time.monotonic() - started
    if stage.checkpoint is None:
        section.plots, section.tables = measure_words(stage)
    return section


def remove_concepts(stage: Stage) -> Section:
    section = Section(
        "MagicMix: a concept taken out of a picture",
        "The layout comes from the picture on the left, and the prompt names what is in it. With a negative s the word "
        "drives it out; leaving the word out of the prompt (last picture) often leaves the thing in the picture.")
    started = time.monotonic()
    for index, (layout, shape) in enumerate(REMOVED):
        workflow = prepare_removal(stage, layout, shape, SEED + index)
        shown = workflow.add("SaveImage", images=[workflow.find("Layout picture"), 0],
                             filename_prefix="mixology/layout")
        run = stage.run(workflow, f"removing: {shape}")
        saved = workflow.find("Save Image")
        without = prepare_removal(stage, layout, shape, SEED + index)
        without.set("MixologyTokenScale", text=name_shape(layout, ""), scales="")
        without.set("Layout Mix", nu_per_image="")
        deleted = stage.run(without, f"without the word: {shape}")
        section.strips.append(make_strip(run, shown, saved, deleted, shape))
        section.settings = read_settings(workflow, "Layout Mix")
    section.seconds = time.monotonic() - started
    return section


def prepare_sweep(stage: Stage, text: str, word: str, seed: int) -> Workflow:
    """The template with one picture for each s."""
    workflow = stage.load("token_scale")
    workflow.set("EmptyLatentImage", batch_size=len(SCALES))
    workflow.set("MixologyTokenScale", text=text, scales=f"{word} = [{', '.join(SCALES)}]")
    workflow.set("Negative prompt", text=REAL_NEGATIVE if stage.checkpoint else "")
    workflow.set("KSampler", seed=seed, **({} if stage.checkpoint else {"cfg": DEMO_CFG}))
    return workflow


def prepare_removal(stage: Stage, layout: str, shape: str, seed: int) -> Workflow:
    """MagicMix on a drawn picture of the shape, with a scaled prompt and one picture for each s."""
    workflow = stage.load("magicmix_image_text")
    workflow.use_demo_picture(caption=layout, seed=seed, width=stage.side, height=stage.side)
    prompt = workflow.prompt[workflow.find("Content prompt")]["inputs"]
    scale = workflow.add("MixologyTokenScale", model=workflow.prompt[workflow.find("Layout Mix")]["inputs"]["model"],
                         clip=prompt["clip"], text=name_shape(layout, shape),
                         scales=f"{shape} = [{', '.join(SCALES)}]")
    workflow.set("Negative prompt", text="")
    workflow.set("Layout Noise", seed=seed)
    workflow.set("Layout Mix", model=[scale, 0], positive=[scale, 1], seed=seed,
                 nu_per_image=", ".join(["0.9"] * len(SCALES)), k_max=DEMO_K_MAX)
    if stage.checkpoint is None:
        workflow.set("Layout Mix", cfg=DEMO_CFG)
    return workflow


def name_shape(layout: str, shape: str) -> str:
    """The prompt that names the shape and the background only."""
    return " ".join(f"a {shape} on{layout.partition(' on')[2]}".split())


def make_strip(run: Run, shown: str, saved: str, deleted: Run, shape: str) -> Strip:
    source = Picture(run.images[shown][0], "layout", source=True)
    results = [Picture(data, f"{shape} = {s}") for s, data in zip(SCALES, run.images[saved])]
    return Strip([source, *reversed(results), Picture(deleted.images[saved][0], "word left out")], shape)


def read_settings(workflow: Workflow, title: str) -> dict[str, str]:
    """The sampling node's widgets that are the same in every row."""
    inputs = workflow.prompt[workflow.find(title)]["inputs"]
    return {key: str(value) for key, value in inputs.items() if not isinstance(value, list) and key != "seed"}


def measure_words(stage: Stage) -> tuple[list[Plot], list[Table]]:
    """Recognition of a part of the picture over the scale of its word: 12 steps without guidance."""
    means = {part: [0.0] * len(SCALES) for part in PARTS}
    for part in PARTS:
        for caption in MEASURED:
            for seed in range(MEASURED_SEEDS):
                for index, score in enumerate(read_scores(stage, caption, part, 1000 + seed)):
                    means[part][index] += score / (len(MEASURED) * MEASURED_SEEDS)
    places = [float(s) for s in SCALES]
    plot = Plot("What a word's scale does", "s", "recognition of what the word names", [
        Curve(part, list(zip(places, means[part]))) for part in PARTS], (0.0, 1.0))
    rows = [(f"s {s}", *(f"{means[part][index]:.2f}" for part in PARTS)) for index, s in enumerate(SCALES)]
    return [plot], [Table((f"setting (mean of {len(MEASURED) * MEASURED_SEEDS} pictures)", *PARTS), rows)]


def read_scores(stage: Stage, caption: str, part: str, seed: int) -> list[Any]:
    judge, world = pure_room("demo.judge"), pure_room("demo.world")
    word = getattr(world.parse_caption(caption), part)
    workflow = prepare_sweep(stage, caption, word, seed)
    workflow.set("KSampler", steps=12, cfg=1.0)
    run = stage.run(workflow, f"measuring: {caption}: {word}")
    verdict = judge.judge_pictures(read_pictures(run.images[workflow.find("Save Image")]))
    return verdict.score(part, word).tolist()
