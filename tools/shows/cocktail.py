"""Diffusion Cocktail: the content of one model, the style of another."""
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gallery import Curve, Picture, Plot, Section, Strip, Table
from stage import Stage, pure_room, read_pictures
from workflow import Workflow

SEED = 21
STEPS = 20
RATIOS: tuple[tuple[float, float], ...] = ((0.0, 0.0), (0.3, 0.5), (0.5, 0.8), (1.0, 1.0))  # attention, features
DEMO_CFG = 3.0
MODELS = ("shapes", "sketch")
CFGS = (1.5, 3.0, 6.0, 10.0)
STRENGTHS = (0.5, 0.7, 0.8, 0.9, 1.0)  # plain image to image with the target model
MEASURED_SEEDS = 4  # a caption
DEMO_CAPTIONS = ("a striped red star on a blue background", "a plain green moon on a white background",
                 "a dotted orange ring on a purple background")
REAL_CAPTIONS = ("a photo of a lighthouse on a cliff by the sea", "a photo of a red bicycle in front of a blue door")
# a picture, and a prompt for another thing in its place
REPAINTED = ("a plain red circle on a white background", "a checkered blue heart on a white background")
MEASURED = ("a striped red star on a blue background", "a plain green heart on a yellow background")


def captions_for(real: bool) -> Sequence[str]:
    return REAL_CAPTIONS if real else DEMO_CAPTIONS


def count_runs(real: bool) -> int:
    """How many prompts `perform` runs."""
    shown = len(captions_for(real)) * len(RATIOS)
    if real:
        return shown
    measured = len(MEASURED) * MEASURED_SEEDS * (len(RATIOS) + len(STRENGTHS))
    return shown + len(DEMO_CAPTIONS) * 2 + len(MODELS) ** 2 + 2 * len(CFGS) + measured


def perform(stage: Stage) -> list[Section]:
    """Two checkpoints; with the demo checkpoints also a LoRA, all pairs of models, guidance, and the curves."""
    sections = [mix_checkpoints(stage)]
    if stage.checkpoint is None:
        sections += [mix_with_lora(stage), pair_models(stage), raise_guidance(stage)]
    return sections


def mix_checkpoints(stage: Stage) -> Section:
    section = Section(
        "Diffusion Cocktail: the content of one model, the style of another",
        "The first picture is the source model's. It is followed back to noise, and the target model samples from "
        "there: first alone, then with the source's self-attention and features injected for a longer and longer part "
        "of the way.")
    started = time.monotonic()
    for index, caption in enumerate(captions_for(stage.checkpoint is not None)):
        pictures: list[Picture] = []
        for attention, features in RATIOS:
            workflow = prepare(stage, "cocktail_checkpoints", caption, SEED + index)
            workflow.set("Cocktail", attention_until=attention, features_until=features)
            run = stage.run(workflow, f"{caption}: attention {attention:g}, features {features:g}")
            if not pictures:
                pictures.append(Picture(run.images[workflow.find("Source picture")][0], "source", source=True))
            pictures.append(Picture(run.images[workflow.find("Save Image")][0],
                                    f"attention {attention:g}, features {features:g}"))
            section.settings = read_settings(workflow)
        section.strips.append(Strip(pictures, caption))
    section.seconds = time.monotonic() - started
    if stage.checkpoint is None:
        section.plots, section.tables = measure(stage)
    return section


def mix_with_lora(stage: Stage) -> Section:
    section = Section(
        "Diffusion Cocktail: with a LoRA",
        "Left, what the checkpoint paints. Then the same picture painted anew with the LoRA, without and with "
        "injection.")
    started = time.monotonic()
    for index, caption in enumerate(DEMO_CAPTIONS):
        pictures: list[Picture] = []
        for attention, features in (RATIOS[0], RATIOS[2]):
            workflow = prepare(stage, "cocktail_lora", caption, SEED + 10 + index)
            workflow.set("LoraLoader", strength_model=1.0)
            workflow.set("Cocktail", attention_until=attention, features_until=features)
            run = stage.run(workflow, f"LoRA: {caption}")
            if not pictures:
                pictures.append(Picture(run.images[workflow.find("Source picture")][0], "source", source=True))
            pictures.append(Picture(run.images[workflow.find("Save Image")][0],
                                    f"attention {attention:g}, features {features:g}"))
            section.settings = read_settings(workflow)
        section.strips.append(Strip(pictures, caption))
    section.seconds = time.monotonic() - started
    return section


def pair_models(stage: Stage) -> Section:
    section = Section(
        "Diffusion Cocktail: m models, m x m pictures",
        "Each row is one prompt painted by one model (left), then by each model from that picture's trajectory.")
    started = time.monotonic()
    for source in MODELS:
        pictures: list[Picture] = []
        for target in MODELS:
            workflow = prepare(stage, "cocktail_checkpoints", DEMO_CAPTIONS[0], SEED, source, target)
            run = stage.run(workflow, f"from {source} to {target}")
            if not pictures:
                pictures.append(Picture(run.images[workflow.find("Source picture")][0], f"painted by {source}",
                                        source=True))
            pictures.append(Picture(run.images[workflow.find("Save Image")][0], f"then by {target}"))
        section.strips.append(Strip(pictures, f"content of {source}"))
    section.seconds = time.monotonic() - started
    return section


def raise_guidance(stage: Stage) -> Section:
    section = Section(
        "Diffusion Cocktail: guidance, and what it cannot do",
        "A drawn picture, painted anew under another prompt. A larger cfg changes appearance and kind more. The number "
        "of things is structure: at a low cfg two stay two although the prompt says one, a larger one joins them.")
    started = time.monotonic()
    picture, text = REPAINTED
    for title, twice in (("one thing", False), ("two things, the prompt says one", True)):
        pictures: list[Picture] = []
        for cfg in CFGS:
            workflow = prepare_photo(stage, picture, text, SEED, twice)
            workflow.set("Cocktail", cfg=cfg)
            fitted = workflow.prompt[workflow.find("ImageScaleToTotalPixels")]["inputs"]
            shown = workflow.add("PreviewImage", images=fitted["image"])
            run = stage.run(workflow, f"{title}: cfg {cfg:g}")
            if not pictures:
                pictures.append(Picture(run.images[shown][0], "source", source=True))
            pictures.append(Picture(run.images[workflow.find("Save Image")][0], f"cfg {cfg:g}"))
        section.strips.append(Strip(pictures, f"{title}: {text}"))
    section.seconds = time.monotonic() - started
    return section


def prepare(stage: Stage, template: str, caption: str, seed: int, source: str = MODELS[0], target: str = MODELS[1],
            ) -> Workflow:
    """A template whose source model paints the caption."""
    workflow = stage.load(template)
    for title in ("Source prompt", "What the picture shows", "What it shall become"):
        workflow.set(title, text=caption)
    workflow.set("Source", seed=seed)
    if stage.checkpoint is None:
        if template == "cocktail_checkpoints":
            workflow.set("Source checkpoint", name=source)
            workflow.set("Target checkpoint", name=target)
        if target != MODELS[0]:
            workflow.set("What it shall become", text=name_thing(caption))
        workflow.set("Source", steps=STEPS, cfg=4.0)
        set_demo(workflow)
    return workflow


def prepare_photo(stage: Stage, picture: str, text: str, seed: int, twice: bool) -> Workflow:
    """The template on a drawn picture, or on two small ones side by side above an empty half."""
    workflow = stage.load("cocktail_photo")
    side = stage.side // 2 if twice else stage.side
    workflow.use_demo_picture(caption=picture, seed=seed, width=side, height=side)
    if twice:
        drawn = [workflow.find("Picture"), 0]
        pair = workflow.add("ImageStitch", image1=drawn, image2=drawn)
        rest = workflow.add("MixologyDemoPicture", caption=f"a {picture.split()[-2]} background", seed=seed,
                            width=stage.side, height=side)
        whole = workflow.add("ImageStitch", image1=[pair, 0], image2=[rest, 0], direction="down")
        workflow.set("ImageScaleToTotalPixels", image=[whole, 0])
    workflow.set("What the picture shows", text=picture)
    workflow.set("What it shall become", text=text)
    set_demo(workflow)
    return workflow


def name_thing(caption: str) -> str:
    """The caption without its background: what is drawn in lines has one of its own."""
    return caption.partition(" on ")[0]


def set_demo(workflow: Workflow) -> None:
    """The demo checkpoints' own steps and guidance; they know no negative words."""
    for title in ("What it does not show", "Negative prompt"):
        workflow.set(title, text="")
    for name in workflow.ids("CLIPTextEncode"):
        if workflow.prompt[name]["_meta"]["title"].endswith("(Source negative)"):
            workflow.set_inputs(name, text="")
    workflow.set("Blend Prompts", alpha=1.0, beta=0.0)
    workflow.set("MixologyInvert", steps=STEPS)
    workflow.set("Cocktail", cfg=DEMO_CFG)


def read_settings(workflow: Workflow) -> dict[str, str]:
    """The widgets that are the same in every row."""
    found = {}
    for title in ("Blend Prompts", "MixologyInvert", "Cocktail"):
        inputs = workflow.prompt[workflow.find(title)]["inputs"]
        found |= {key: str(value) for key, value in inputs.items() if not isinstance(value, list)}
    return {key: value for key, value in found.items() if not key.endswith("_until")}


def measure(stage: Stage) -> tuple[list[Plot], list[Table]]:
    """Structure against style over the ratios, beside plain image to image with the target model."""
    names = [*(f"attention {a:g}, features {f:g}" for a, f in RATIOS), *(f"image to image {s:g}" for s in STRENGTHS)]
    sums = [[0.0, 0.0] for _ in names]
    for number, caption in enumerate(MEASURED):
        for seed in range(1000 * number, 1000 * number + MEASURED_SEEDS):
            for row, reading in zip(sums, read_all(stage, caption, seed)):
                row[0] += reading[0] / (len(MEASURED) * MEASURED_SEEDS)
                row[1] += reading[1] / (len(MEASURED) * MEASURED_SEEDS)
    split = len(RATIOS)
    plot = Plot("Structure and style", "style recognised", "overlap with the source", [
        Curve("Cocktail", [(style, overlap) for overlap, style in sums[:split]]),
        Curve("image to image", [(style, overlap) for overlap, style in sums[split:]], dashed=True)], (0.0, 1.0))
    rows = [(name, f"{overlap:.2f}", f"{style:.2f}") for name, (overlap, style) in zip(names, sums)]
    return [plot], [Table((f"setting (mean of {len(MEASURED) * MEASURED_SEEDS} pictures)", "overlap", "style"), rows)]


def read_all(stage: Stage, caption: str, seed: int) -> list[tuple[float, float]]:
    """Overlap with the drawn source, and style, for every ratio and strength."""
    found: list[tuple[float, float]] = []
    for attention, features in RATIOS:
        workflow = prepare_transfer(stage, caption, seed)
        workflow.set("Cocktail", attention_until=attention, features_until=features)
        found.append(read(stage, workflow, caption, seed))
    for strength in STRENGTHS:
        workflow = prepare_transfer(stage, caption, seed)
        cocktail = workflow.prompt[workflow.find("Cocktail")]["inputs"]
        plain = workflow.add(
            "KSampler", model=cocktail["model"], positive=cocktail["positive"], negative=cocktail["negative"],
            latent_image=[workflow.find("VAE Encode"), 0], seed=seed, steps=STEPS, cfg=DEMO_CFG, sampler_name="ddim",
            scheduler="ddim_uniform", denoise=strength)
        workflow.set("VAE Decode", samples=[plain, 0])
        found.append(read(stage, workflow, caption, seed))
    return found


def prepare_transfer(stage: Stage, caption: str, seed: int) -> Workflow:
    """A drawn picture, inverted by the first model and painted by the second."""
    workflow = prepare_photo(stage, caption, caption, seed, False)
    target = workflow.add("MixologyDemoCheckpoint", name=MODELS[1])
    for title in ("Empty prompt", "What it shall become", "Negative prompt"):
        workflow.set(title, clip=[target, 1])
    workflow.set("Cocktail", model=[target, 0])
    workflow.set("What it shall become", text=name_thing(caption))
    return workflow


def read(stage: Stage, workflow: Workflow, caption: str, seed: int) -> tuple[float, float]:
    judge, styles, world = (pure_room(f"demo.{name}") for name in ("judge", "style_judge", "world"))
    run = stage.run(workflow, f"measuring: {caption}")
    verdict = styles.judge_styles(read_pictures(run.images[workflow.find("Save Image")]))
    _, mask = world.draw_scene(world.parse_caption(caption), seed, stage.side, stage.side)
    overlap: Any = judge.silhouette_overlap(verdict.mask, mask[None])
    return float(overlap), float(verdict.style(MODELS[1]))
