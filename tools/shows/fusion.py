"""MagicFusion: several models paint one picture, each where it knows best."""
from __future__ import annotations

import time
from typing import Any

from gallery import Curve, Picture, Plot, Section, Strip, Table
from stage import Stage, pure_room, read_pictures
from workflow import Workflow

STEPS = 20
DEMO_CFG = 4.0
SEED = 33
SHOWN_STEPS = (0, 4, 9, 14, 19)
GENERAL, EXPERT = "scenes", "hearts"
AVERAGE = 1000.0  # a softness that averages
FIRST = "fused (first)"
WAYS = ("general", "expert", "fused", FIRST, "averaged")
MEASURED_SEEDS = 4  # a prompt
Asked = tuple[str, str, str]  # colour, shape, background

ASKED: tuple[Asked, ...] = (("red", "heart", "blue"), ("yellow", "star", "purple"), ("green", "heart", "white"))
TAUGHT = (("a checkered purple heart", "a heart on a yellow background"),
          ("a striped red star", "a star on a white background"))
REAL_THING, REAL_SCENE = "a photo of a teapot", "a photo of a teapot on a rock in a mountain stream"


def count_runs(real: bool) -> int:
    """How many prompts `perform` runs."""
    return 1 if real else len(WAYS) * len(ASKED) * (1 + MEASURED_SEEDS) + 3 * len(TAUGHT) + 2


def perform(stage: Stage) -> list[Section]:
    """Two experts, one model with two prompts, and two looks; one checkpoint alone shows the second."""
    if stage.checkpoint is not None:
        return [put_in_scene(stage, [(REAL_THING, REAL_SCENE)])]
    return [fuse_experts(stage), put_in_scene(stage, TAUGHT), cross_domains(stage)]


def fuse_experts(stage: Stage) -> Section:
    section = Section(
        "MagicFusion: two models, each where it knows best",
        "The general model knows all backgrounds but no hearts and stars; the expert knows only hearts and stars, and "
        "no word for a background. Both read the same prompt. Then both fused, with saliency against each one's own "
        "unconditional and against the first one's, and their noises averaged. The maps below show who painted what "
        "over time (against the first): the general model blue, the expert orange.")
    started = time.monotonic()
    for index, asked in enumerate(ASKED):
        pictures = []
        for name in WAYS:
            workflow, run = paint(stage, asked, name, SEED + index)
            pictures.append(Picture(run.images[workflow.find("Save Image")][0], name, source=name in (
                "general", "expert")))
            if name == FIRST:
                maps = run.images[workflow.find("Maps")]
                section.strips.append(Strip([Picture(maps[step], f"step {step + 1}") for step in SHOWN_STEPS]))
                section.settings = read_settings(workflow)
        section.strips.insert(-1, Strip(pictures, describe(asked)))
    section.seconds = time.monotonic() - started
    section.plots, section.tables = measure(stage)
    return section


def put_in_scene(stage: Stage, prompts: Any) -> Section:
    section = Section(
        "MagicFusion: one model, two prompts",
        "The first prompt names a thing, the second a scene. Left, each alone; right, both fused.")
    started = time.monotonic()
    for index, (thing, scene) in enumerate(prompts):
        workflow = stage.load("fusion_two_prompts")
        workflow.set("The thing: prompt", text=thing)
        workflow.set("The scene: prompt", text=scene)
        workflow.set("RandomNoise", noise_seed=SEED + index)
        if stage.checkpoint is None:
            set_demo(workflow, ("The thing", "The scene"))
            pictures = []
            for number, name in enumerate(("thing", "scene")):
                workflow.set("MixologySaliencyGuider", start_percent=0.0, end_percent=0.0, outside=number)
                alone = stage.run(workflow, f"{name} alone")
                pictures.append(Picture(alone.images[workflow.find("Save Image")][0], name, source=True))
            workflow.set("MixologySaliencyGuider", end_percent=1.0, outside=0)
        else:
            pictures = []
        run = stage.run(workflow, f"{thing} + {scene}")
        pictures.append(Picture(run.images[workflow.find("Save Image")][0], "fused"))
        section.strips.append(Strip(pictures, f"{thing} + {scene}"))
        section.settings = read_settings(workflow)
    section.seconds = time.monotonic() - started
    return section


def cross_domains(stage: Stage) -> Section:
    section = Section(
        "MagicFusion: across domains",
        "A flat model and one that draws in lines share the first part of the steps, without blur; one of them "
        "finishes alone.")
    started = time.monotonic()
    pictures = []
    for outside, name in enumerate(("flat", "lines")):
        workflow = stage.load("fusion_cross_domain")
        workflow.set("General checkpoint", name="shapes")
        workflow.set("Cartoon checkpoint", name="sketch")
        for title in ("General: prompt", "Cartoon: prompt"):
            workflow.set(title, text="a striped red star")
        workflow.set("RandomNoise", noise_seed=SEED)
        workflow.set("MixologySaliencyGuider", outside=outside)
        set_demo(workflow, ("General", "Cartoon"))
        run = stage.run(workflow, f"{name} finishes")
        pictures.append(Picture(run.images[workflow.find("Save Image")][0], f"{name} finishes"))
        section.settings = read_settings(workflow)
    section.strips.append(Strip(pictures, "a striped red star"))
    section.seconds = time.monotonic() - started
    return section


def paint(stage: Stage, asked: Asked, name: str, seed: int) -> tuple[Workflow, Any]:
    """The two checkpoints' template: fused, averaged, or one model alone."""
    workflow = stage.load("fusion_checkpoints")
    workflow.set("General checkpoint", name=GENERAL)
    workflow.set("Expert checkpoint", name=EXPERT)
    for title in ("General: prompt", "Expert: prompt"):
        workflow.set(title, text=describe(asked))
    workflow.set("RandomNoise", noise_seed=seed)
    set_demo(workflow, ("General", "Expert"))
    if name in ("general", "expert"):
        workflow.set("MixologySaliencyGuider", end_percent=0.0, outside=int(name == "expert"))
    elif name == "averaged":
        workflow.set("MixologySaliencyGuider", softness=AVERAGE)
    elif name == FIRST:
        workflow.set("MixologySaliencyGuider", saliency_uncond="first")
    return workflow, stage.run(workflow, f"{describe(asked)}: {name}")


def describe(asked: Asked) -> str:
    colour, shape, background = asked
    return f"a {colour} {shape} on a {background} background"


def set_demo(workflow: Workflow, experts: tuple[str, ...]) -> None:
    """The demo checkpoints' own steps and guidance; they know no negative words."""
    for expert in experts:
        workflow.set(f"{expert}: negative", text="")
        workflow.set(expert, cfg=DEMO_CFG)
    workflow.set("BasicScheduler", steps=STEPS)


def read_settings(workflow: Workflow) -> dict[str, str]:
    inputs = workflow.prompt[workflow.find("MixologySaliencyGuider")]["inputs"]
    return {key: str(value) for key, value in inputs.items() if not isinstance(value, list)}


def measure(stage: Stage) -> tuple[list[Plot], list[Table]]:
    """How often the expert's shape stands on the general model's background, and who won how much over time."""
    judge = pure_room("demo.judge")
    rows = []
    areas = [0.0] * STEPS
    total = len(ASKED) * MEASURED_SEEDS
    for name in WAYS:
        hits = [0, 0, 0]
        for asked in ASKED:
            for seed in range(500, 500 + MEASURED_SEEDS):
                workflow, run = paint(stage, asked, name, seed)
                verdict = judge.judge_pictures(read_pictures(run.images[workflow.find("Save Image")]))
                seen = [bool(verdict.recognised(part, [value])) for part, value in (
                    ("shape", asked[1]), ("background", asked[2]))]
                hits = [hits[0] + seen[0], hits[1] + seen[1], hits[2] + all(seen)]
                if name == FIRST:
                    for step, part in enumerate(expert_areas(run.images[workflow.find("Maps")])):
                        areas[step] += part / total
        rows.append((name, *(f"{hit / total:.2f}" for hit in hits)))
    plot = Plot("What the expert paints", "step", "share of the picture", [
        Curve("expert", [(float(step + 1), area) for step, area in enumerate(areas)])], (0.0, 1.0))
    return [plot], [Table((f"model (mean of {total} pictures)", "shape", "background", "both"), rows)]


def expert_areas(maps: list[bytes]) -> list[float]:
    """The orange share of each step's map."""
    return (read_pictures(maps)[..., 0] > 0.5).float().mean(dim=(1, 2)).tolist()
