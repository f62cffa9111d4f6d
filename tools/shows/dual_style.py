"""Dual style: several prompts in one picture, each in its own region, and pictures restyled."""
from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gallery import Picture, Section, Strip, Table
from stage import Stage, pure_room, read_pictures
from workflow import Workflow

if TYPE_CHECKING:
    import torch

SEED = 3
DEMO_CFG, DEMO_STEPS = 4.0, 20  # the demo checkpoint's own
REAL_NEGATIVE = "blurry, low quality"
EPSILON, ATTENTION = "dual_style_epsilon", "dual_style_attention"
CORNER_PICTURES = 4
TEXTURES = ("striped", "dotted")  # left, right
Styles = tuple[str, str, str]  # the left prompt, the right one, and one that names both

DEMO_STYLES: tuple[Styles, ...] = tuple(
    (f"a striped {thing}", f"a dotted {thing}", f"a striped and dotted {thing}")
    for thing in ("red circle on a white background", "blue square on a white background"))
REAL_STYLES: tuple[Styles, ...] = tuple(
    (f"a Van Gogh painting of {thing}, bold swirling brushstrokes",
     f"a Minecraft rendering of {thing}, pixelated textures, blocky cubes",
     f"{thing} in the style of Van Gogh on the left and in the style of Minecraft on the right")
    for thing in ("a village by the sea", "a castle on a hill"))
Corners = tuple[Sequence[str], float, str]  # the prompts row by row, the masks' sharpness, a CFG for each
DEMO_CORNERS: tuple[Corners, ...] = (
    ([f"a {texture} green square on a white background" for texture in ("striped", "dotted", "plain", "checkered")],
     20.0, ""),
    ([f"a plain {colour} square on a yellow background" for colour in ("green", "blue", "purple", "red")],
     100.0, "4, 4, 2, 4"))
RESTYLED = ("red circle on a white background", "blue square on a yellow background",
            "green cross on a white background", "purple star on a white background")
REAL_RESTYLES = ("a Van Gogh painting of", "a mosaic of")
DENOISES = (0.6, 1.0)

PICTURES = 2  # for each of the four captions, behind every figure of the table
MEASURED_STEPS = 10
COLUMNS = (  # those of the page's table: how the masks run, and what merges
    ("linear", "attention"), ("linear", "epsilon"), ("linear", "pixels"), ("", "one prompt"),
    ("logistic", "attention"), ("logistic", "epsilon"), ("logistic", "pixels"))


def styles_for(real: bool) -> Sequence[Styles]:
    return REAL_STYLES if real else DEMO_STYLES


def targets_for(real: bool, thing: str) -> Styles:
    """What a plain drawing of `thing` becomes on the left and on the right, and one prompt that asks for both."""
    if real:
        return (f"{REAL_RESTYLES[0]} a {thing}", f"{REAL_RESTYLES[1]} a {thing}",
                f"{REAL_RESTYLES[0]} and {REAL_RESTYLES[1]} a {thing}")
    return f"a striped {thing}", f"a dotted {thing}", f"a striped and dotted {thing}"


def count_runs(real: bool) -> int:
    """How many prompts `perform` runs."""
    merged = 5 * len(styles_for(real))
    restyled = (len(DENOISES) + 2) * len(RESTYLED)
    return merged + (1 if real else len(DEMO_CORNERS)) + restyled + (0 if real else 7 * PICTURES * len(RESTYLED))


def perform(stage: Stage) -> list[Section]:
    """Two styles side by side, four corners, and pictures restyled; the page's table on the demo checkpoint."""
    return [merge_styles(stage), paint_corners(stage), restyle_pictures(stage)]


def merge_styles(stage: Stage) -> Section:
    section = Section(
        "Dual style: two prompts in one picture",
        "The left prompt paints the left, the right one the right, from one noise. Merging predictions shows both "
        "styles and no seam. Merging cross-attention costs hardly more than one prompt, but one style may take over. "
        "Fading between two finished pictures leaves ghosts where they differ, and a single prompt that asks for "
        "both gets one of them.")
    started = time.monotonic()
    for left, right, both in styles_for(stage.checkpoint is not None):
        strip: list[Picture] = []
        for template, first, second, caption in (
                (EPSILON, left, left, "left alone"), (EPSILON, right, right, "right alone"),
                (EPSILON, left, right, "epsilon merge"), (ATTENTION, left, right, "attention merge"),
                (EPSILON, both, both, "one prompt")):
            workflow = prepare_styles(stage, template, first, second)
            run = stage.run(workflow, f"{caption}: {left}")
            strip.append(Picture(run.images[workflow.find("Save Image")][0], caption))
        alone = [read_pictures([picture.data]) for picture in strip[:2]]
        faded = fade(alone[0], alone[1], "logistic")
        strip.insert(4, Picture(write_picture(faded[0]), "pixels faded"))
        section.strips.append(Strip(strip, f"{left}  |  {right}"))
        merged = prepare_styles(stage, EPSILON, left, right)
        section.settings = read_settings(merged, "MixologyGradientMask", "MixologyEpsilonMergeGuider", "BasicScheduler")
    section.seconds = time.monotonic() - started
    return section


def paint_corners(stage: Stage) -> Section:
    section = Section("Dual style: four corners", "Four prompts, two masks across and two down; one noise a picture.")
    started = time.monotonic()
    workflow = stage.load("four_corners")
    workflow.set("EmptyLatentImage", batch_size=CORNER_PICTURES)
    workflow.set("RandomNoise", noise_seed=SEED)
    saved = workflow.find("Save Image")
    if stage.checkpoint is None:
        set_demo_sampling(workflow)
        for texts, sharpness, scales in DEMO_CORNERS:
            for title, text in zip(("Top left", "Top right", "Bottom left", "Bottom right"), texts):
                workflow.set(title, text=text)
            workflow.set("MixologyGradientMask", sharpness=sharpness)
            workflow.set("MixologyEpsilonMergeGuider", cfg_per_style=scales)
            pictures = [Picture(data) for data in stage.run(workflow, "four corners").images[saved]]
            section.strips.append(Strip(pictures, "  |  ".join(texts)))
    else:
        section.strips.append(Strip([Picture(data) for data in stage.run(workflow, "four corners").images[saved]]))
    section.settings = read_settings(workflow, "MixologyGradientMask", "MixologyEpsilonMergeGuider", "BasicScheduler")
    section.seconds = time.monotonic() - started
    return section


def restyle_pictures(stage: Stage) -> Section:
    section = Section(
        "CycleDiffusion: a picture restyled",
        "The picture on the left is read with a prompt that says what it shows, and painted with one that says what it "
        "shall become. A higher denoise changes more. In the last two pictures two prompts share the picture.")
    started = time.monotonic()
    for index, thing in enumerate(RESTYLED):
        left, right, _ = targets_for(stage.checkpoint is not None, thing)
        workflow = prepare_restyling(stage, thing, left, SEED + index)
        shown = workflow.add("SaveImage", images=[workflow.find("Picture"), 0], filename_prefix="mixology/picture")
        pictures: list[Picture] = []
        for denoise in DENOISES:
            workflow.set("BasicScheduler", denoise=denoise)
            run = stage.run(workflow, f"restyling: {left}")
            pictures = pictures or [Picture(run.images[shown][0], "picture", source=True)]
            pictures.append(Picture(run.images[workflow.find("Save Image")][0], f"denoise {denoise:g}"))
        for method in ("epsilon", "attention"):
            workflow = prepare_restyling(stage, thing, left, SEED + index)
            share_restyling(workflow, method, "logistic", left, right)
            run = stage.run(workflow, f"two styles: {thing}")
            pictures.append(Picture(run.images[workflow.find("Save Image")][0], f"two, {method} merge"))
        section.strips.append(Strip(pictures, thing))
        section.settings = read_settings(workflow, "MixologyCycleSampler", "BasicScheduler")
    if stage.checkpoint is None:
        section.tables = [measure_merges(stage)]
    section.seconds = time.monotonic() - started
    return section


def prepare_styles(stage: Stage, template: str, left: str, right: str) -> Workflow:
    """A dual-style template; the same prompt on both sides is that prompt alone."""
    workflow = stage.load(template)
    workflow.set("Left style", text=left)
    workflow.set("Right style", text=right)
    workflow.set("Negative prompt", text=REAL_NEGATIVE if stage.checkpoint else "")
    if template == EPSILON:
        workflow.set("RandomNoise", noise_seed=SEED)
    else:
        workflow.set("KSampler", seed=SEED)
    if stage.checkpoint is None:
        set_demo_sampling(workflow)
    return workflow


def set_demo_sampling(workflow: Workflow) -> None:
    """The steps and guidance that the demo checkpoint was made for."""
    for name, node in workflow.prompt.items():
        if "cfg" in node["inputs"]:
            workflow.set_inputs(name, cfg=DEMO_CFG)
        if "steps" in node["inputs"]:
            workflow.set_inputs(name, steps=DEMO_STEPS)


def prepare_restyling(stage: Stage, thing: str, target: str, seed: int) -> Workflow:
    """The restyling template on a plain drawing of `thing`."""
    workflow = stage.load("restyle_photo")
    workflow.use_demo_picture(caption=f"a plain {thing}", seed=seed, width=stage.side, height=stage.side)
    workflow.set("What the picture shows", text=f"a plain {thing}")
    workflow.set("What it shall become", text=target)
    workflow.set("RandomNoise", noise_seed=seed)
    if stage.checkpoint is None:
        set_demo_sampling(workflow)
    return workflow


def share_restyling(workflow: Workflow, method: str, profile: str, left: str, right: str) -> None:
    """Puts two prompts in the place of the one that restyles."""
    target = workflow.prompt[workflow.find("CFGGuider")]["inputs"]
    clip = workflow.prompt[workflow.find("What it shall become")]["inputs"]["clip"]
    masks = [workflow.add("MixologyGradientMask", profile=profile), 0]
    texts = [[workflow.add("CLIPTextEncode", clip=clip, text=text), 0] for text in (left, right)]
    if method == "epsilon":
        guider = workflow.add("MixologyEpsilonMergeGuider", model=target["model"], masks=masks,
                              negative=target["negative"], cfg=target["cfg"],
                              **{f"positives.positive_{index}": text for index, text in enumerate(texts)})
        workflow.set("SamplerCustomAdvanced", guider=[guider, 0])
    else:
        merge = workflow.add("MixologyAttentionMerge", model=target["model"], masks=masks,
                             **{f"conditionings.conditioning_{index}": text for index, text in enumerate(texts)})
        workflow.set("CFGGuider", model=[merge, 0], positive=[merge, 1])


def read_settings(workflow: Workflow, *titles: str) -> dict[str, str]:
    """The widgets of these nodes."""
    return {key: str(value) for title in titles
            for key, value in workflow.prompt[workflow.find(title)]["inputs"].items()
            if not isinstance(value, list) and key not in ("width", "height") and value != ""}


def fade(left: torch.Tensor, right: torch.Tensor, profile: str) -> torch.Tensor:
    """The page's pixel baseline: two finished pictures [B, H, W, C], faded into each other by the masks."""
    masks = draw_masks(left, profile)
    return masks[0, :, :, None] * left + masks[1, :, :, None] * right


def draw_masks(pictures: torch.Tensor, profile: str) -> torch.Tensor:
    """The masks [2, H, W] of the templates, at the pictures' size."""
    _, height, width, _ = pictures.shape
    return pure_room("samplers.spatial").draw_gradient_masks(width, height, profile, 2, 0.0, 20.0, 1)


def write_picture(picture: torch.Tensor) -> bytes:
    """A picture [H, W, C] as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((picture * 255).round().byte().numpy()).save(file, "PNG")
    return file.getvalue()


def measure_merges(stage: Stage) -> Table:
    """The page's table on drawn pictures: each restyled by CycleDiffusion in two styles, and compared with itself.

    Where the page asks CLIP for the styles, the judge is asked whether it sees each on its side.
    """
    import torch

    metrics = pure_room("metrics.image")
    pictures, results = gather_merges(stage)
    figures = [torch.stack([metrics.l2(found, pictures), metrics.psnr(found, pictures),
                            metrics.smoothness(found, pictures), metrics.ssim(found, pictures),
                            metrics.seam(found, draw_masks(pictures, "linear")), *see_styles(found).double()])
               for found in (results[column] for column in COLUMNS)]
    rows = [(name, *(f"{figure[row].mean():.{digits}f} \u00b1 {figure[row].std() / len(pictures) ** 0.5:.{digits}f}"
                     for figure in figures))
            for row, (name, digits) in enumerate((("L2", 1), ("PSNR", 1), ("Smooth.", 2), ("SSIM", 2), ("seam", 2),
                                                  ("left style seen", 2), ("right style seen", 2)))]
    head = (f"{len(pictures)} pictures, mean ± standard error", *(" ".join(column).strip() for column in COLUMNS))
    return Table(head, rows)


def gather_merges(stage: Stage) -> tuple[torch.Tensor, dict[tuple[str, str], torch.Tensor]]:
    """The drawn pictures [B, H, W, C] and, for each column of the table, what became of them."""
    import torch

    world = pure_room("demo.world")
    sources: list[torch.Tensor] = []
    results: dict[tuple[str, str], list[torch.Tensor]] = {column: [] for column in COLUMNS}
    for number, thing in enumerate(RESTYLED):
        left, right, both = targets_for(False, thing)
        for seed in range(1000 * (number + 1), 1000 * (number + 1) + PICTURES):
            sources.append(world.draw_scene(world.parse_caption(f"a plain {thing}"), seed, stage.side, stage.side)[0])
            alone = [sample_one(stage, prepare_restyling(stage, thing, text, seed)) for text in (left, right, both)]
            results["", "one prompt"].append(alone[2])
            for profile in ("linear", "logistic"):
                results[profile, "pixels"].append(fade(alone[0], alone[1], profile))
                for method in ("epsilon", "attention"):
                    workflow = prepare_restyling(stage, thing, left, seed)
                    share_restyling(workflow, method, profile, left, right)
                    results[profile, method].append(sample_one(stage, workflow))
    return torch.stack(sources), {column: torch.cat(found) for column, found in results.items()}


def sample_one(stage: Stage, workflow: Workflow) -> torch.Tensor:
    """The picture [1, H, W, C] that a restyling workflow makes in the table's number of steps."""
    workflow.set("BasicScheduler", steps=MEASURED_STEPS)
    run = stage.run(workflow, "measuring")
    return read_pictures(run.images[workflow.find("Save Image")])


def see_styles(pictures: torch.Tensor) -> torch.Tensor:
    """How surely the judge sees the left style on the left and the right one on the right: [2, B]."""
    import torch

    judge = pure_room("demo.judge")
    masks = draw_masks(pictures, "linear")
    return torch.stack([judge.judge_region(pictures, (mask > 0.5).float()).score("texture", texture)
                        for mask, texture in zip(masks, TEXTURES)])
