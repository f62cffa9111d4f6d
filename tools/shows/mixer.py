"""Image Mixer: several pictures, crops and words become one picture."""
from __future__ import annotations

import io
import time
from collections.abc import Sequence

from gallery import Curve, Picture, Plot, Section, Strip, Table
from stage import Stage, pure_room, read_pictures
from workflow import Workflow

STEPS = 20
SEED = 5
SHOWN = 3  # pictures of a mix
MEASURED = 8  # pictures of a pair and setting
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # of the second picture
WORD_STRENGTHS = (0.0, 1.0, 2.0)
DIRECTIONS = (0.25, 0.5, 1.0)
MODES = ("concat", "average")
PARTS = ("shape", "colour", "texture", "background")
CROPS = ("The middle", "Left half", "Right half", "The ground")

PAIRS: tuple[tuple[str, str], ...] = (
    ("a striped red star on a blue background", "a dotted white ring on a green background"),
    ("a checkered white heart on an orange background", "a plain yellow moon on a purple background"),
    ("a dotted yellow cross on a black background", "a striped green square on a white background"),
)
EDITS: tuple[tuple[str, str, str], ...] = (  # what a picture shows, what it is, what it shall become
    ("a striped red star on a blue background", "a striped red star", "a striped red heart"),
    ("a dotted white ring on a green background", "a green background", "a purple background"),
)
CROPPED = ("a checkered white heart on an orange background", "a striped red star on a blue background")


def count_runs(real: bool) -> int:
    """How many prompts `perform` runs."""
    if real:
        return 0
    shown, measured = len(PAIRS) * len(MODES) + len(STRENGTHS), len(PAIRS) * (1 + len(STRENGTHS))
    return shown + measured + len(EDITS) * (len(WORD_STRENGTHS) + len(DIRECTIONS)) + len(CROPPED) * (len(CROPS) + 1)


def perform(stage: Stage) -> list[Section]:
    """Two pictures, a picture and words, crops; only the demo mixer is known to understand them."""
    if stage.checkpoint is not None:
        return [Section("Image Mixer", "It needs a checkpoint that was trained on image embeddings, and CLIP ViT-L/14: "
                                       "run this without --checkpoint, or open its templates in the GUI.")]
    return [mix_pictures(stage), mix_words(stage), mix_crops(stage)]


def mix_pictures(stage: Stage) -> Section:
    section = Section(
        "Image Mixer: two pictures become one",
        "Each picture is one CLIP embedding that the model attends to. concat keeps them apart, so that one may give "
        "the shape and the other the background; average blends them first. Last, the second one's strength rises.")
    started = time.monotonic()
    for pair in PAIRS:
        pictures = draw_sources(stage, pair)
        for mode in MODES:
            pictures += [Picture(data, mode) for data in mix_pair(stage, pair, SHOWN, mode)]
        section.strips.append(Strip(pictures, " + ".join(pair)))
    rising = [Picture(mix_pair(stage, PAIRS[0], 1, strength=strength)[0], f"strength {strength:g}")
              for strength in STRENGTHS]
    section.strips.append(Strip([*draw_sources(stage, PAIRS[0]), *rising], "the second picture's strength"))
    section.settings = {"steps": str(STEPS), "cfg": "3", "slots": "5"}
    section.plots, section.tables = measure(stage)
    section.seconds = time.monotonic() - started
    return section


def mix_words(stage: Stage) -> Section:
    section = Section(
        "Image Mixer: a picture and words",
        "Left the picture. First, words beside it as one more token, of rising strength; then a direction: what it "
        "shall become minus what it is, in mode sum.")
    started = time.monotonic()
    for caption, away, to in EDITS:
        pictures = draw_sources(stage, (caption,))
        for strength in WORD_STRENGTHS:
            workflow = load(stage, "mixer_picture_words", 1, {"Picture": caption})
            workflow.set("The words", text=to, strength=strength)
            pictures.append(Picture(run(stage, workflow, f"{caption} + {to}")[0], f"strength {strength:g}"))
        for w in DIRECTIONS:
            workflow = load(stage, "mixer_picture_words", 1, {"Picture": caption})
            workflow.set("The words", text=to, strength=w)
            clip = workflow.prompt[workflow.find("The words")]["inputs"]["clip"]
            turned = workflow.add("MixologyMixerText", clip=clip, text=away, strength=-w,
                                  mixer=[workflow.find("The words"), 0])
            workflow.set("MixologyMixerConditioning", mixer=[turned, 0], mode="sum")
            pictures.append(Picture(run(stage, workflow, f"{away} to {to}")[0], f"direction {w:g}"))
        section.strips.append(Strip(pictures, f"{caption}  +  {to}"))
    section.seconds = time.monotonic() - started
    return section


def mix_crops(stage: Stage) -> Section:
    section = Section(
        "Image Mixer: crops of one picture",
        "Left the picture. Then what each crop brings alone, and last all four together.")
    started = time.monotonic()
    for caption in CROPPED:
        pictures = draw_sources(stage, (caption,))
        for shown in (*CROPS, "all"):
            workflow = load(stage, "mixer_crops", 1, {"Picture": caption})
            for crop in CROPS:
                workflow.set(crop, strength=float(shown in (crop, "all")))
            pictures.append(Picture(run(stage, workflow, f"{caption}: {shown}")[0], shown.lower()))
        section.strips.append(Strip(pictures, caption))
    section.seconds = time.monotonic() - started
    return section


def mix_pair(stage: Stage, pair: Sequence[str], count: int, mode: str = "concat", strength: float = 1.0,
             seed: int = SEED) -> list[bytes]:
    """Pictures of the two pictures' template."""
    workflow = load(stage, "mixer_two_pictures", count, dict(zip(("First picture", "Second picture"), pair)))
    workflow.set("Second", strength=strength)
    workflow.set("MixologyMixerConditioning", mode=mode)
    workflow.set("KSampler", seed=seed)
    return run(stage, workflow, f"{' + '.join(pair)}: {mode} {strength:g}")


def load(stage: Stage, template: str, count: int, captions: dict[str, str]) -> Workflow:
    """A template with drawn pictures in it, for `count` pictures, with the demo checkpoint's own steps."""
    workflow = stage.load(template)
    workflow.use_demo_picture(seed=SEED, width=stage.side, height=stage.side)
    for title, caption in captions.items():
        workflow.set(title, caption=caption)
    workflow.set("EmptyLatentImage", batch_size=count)
    workflow.set("KSampler", seed=SEED, steps=STEPS)
    return workflow


def run(stage: Stage, workflow: Workflow, label: str) -> list[bytes]:
    return stage.run(workflow, label).images[workflow.find("Save Image")]


def draw_sources(stage: Stage, captions: Sequence[str]) -> list[Picture]:
    """What Demo Picture draws."""
    from PIL import Image

    world = pure_room("demo.world")
    found = []
    for caption in captions:
        picture, _ = world.draw_scene(world.parse_caption(caption), SEED, stage.side, stage.side)
        file = io.BytesIO()
        Image.fromarray((picture * 255).round().byte().numpy()).save(file, "PNG")
        found.append(Picture(file.getvalue(), caption, source=True))
    return found


def measure(stage: Stage) -> tuple[list[Plot], list[Table]]:
    """What comes from each picture, by mode; and the second one's share by its strength."""
    readings = {strength: read_pairs(stage, "concat", strength) for strength in STRENGTHS}
    rows = [(mode, *(f"{value:.2f}" for value in reading)) for mode, reading in (
        ("concat", readings[1.0]), ("average", read_pairs(stage, "average", 1.0)))]
    head = (f"mode (mean of {len(PAIRS) * MEASURED} pictures)", "parts of the first", "parts of the second",
            "all parts, from both")
    shares = [(strength, second / max(first + second, 1e-6)) for strength, (first, second, _) in readings.items()]
    return [Plot("Who is seen", "the second picture's strength", "its share", [Curve("second", shares)], (0.0, 1.0))], [
        Table(head, rows)]


def read_pairs(stage: Stage, mode: str, strength: float) -> tuple[float, float, float]:
    """Shares of parts that are as in the first picture, as in the second, and of pictures made wholly of both."""
    import torch

    judge, world = pure_room("demo.judge"), pure_room("demo.world")
    rows = []
    for pair in PAIRS:
        verdict = judge.judge_pictures(read_pictures(mix_pair(stage, pair, MEASURED, mode, strength, seed=1000)))
        scenes = [world.parse_caption(caption) for caption in pair]
        first, second = (
            torch.stack([verdict.recognised(part, [getattr(scene, part)] * MEASURED) for part in PARTS]).sum(dim=0)
            for scene in scenes)
        both = (first > 0) & (second > 0) & (first + second >= len(PARTS))
        rows.append(torch.stack([first / len(PARTS), second / len(PARTS), both.float()]))
    shares = torch.cat(rows, dim=1).mean(dim=1).tolist()
    return shares[0], shares[1], shares[2]
