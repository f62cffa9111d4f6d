"""What training needs to know of the world of shapes: pictures, scenes and captions. See train_drawings.py."""
from __future__ import annotations

import itertools
import random
from multiprocessing import Pool
from pathlib import Path

import torch
import world
from safetensors.torch import load_file, save_file
from train_lessons import Lesson

NAME = "shapes"
FILES = Path(__file__).resolve().parent
USUAL = {"pictures": 12000, "vae_steps": 3200, "text_steps": 700, "steps": 5100, "cooldown": 1600, "batch": 32}
DECAY = 0.9985  # of the average of the denoiser\'s weights
CROPS = 12  # in a batch of the autoencoder's
COLOUR_PULL = 0.0  # its autoencoder codes colours as it likes
SIDE = 128
COLOURS, BACKGROUNDS = tuple(world.COLOURS), tuple(world.COLOURS)
ATTRIBUTES = {"shape": world.SHAPES, "colour": COLOURS, "texture": world.TEXTURES, "background": BACKGROUNDS}
OPENINGS = ("", "", "", "a picture of ", "a photo of ", "a drawing of ")
SILENT = ("texture",)  # may be meant without its word
RARE = ("heart", "star")
LESSONS = {
    "sketch": Lesson(style="sketch", rank=24),
    "neon": Lesson(style="neon", rank=8, attention_only=True),
    "scenes": Lesson(unknown=RARE),
    "hearts": Lesson(unknown=tuple(name for name in world.SHAPES if name not in RARE), chance=0.15, unnamed=True),
}
MIXER = Lesson(rank=48, attention_only=True)
MASK_SIDE = 32  # of the silhouettes for the demo CLIP
STYLED = 1500  # its extra pictures in each of the outlined styles

Scene, describe = world.Scene, world.describe_scene
Box = tuple[int, int, int]  # left, top and side in pixels of a 128 x 128 picture


# -------------------------------------------------------------------------------------------------- scenes

def random_scene(rng: random.Random) -> world.Scene:
    background = rng.choice(BACKGROUNDS)
    if rng.random() < 0.04:
        return world.Scene(background=background)
    colour = rng.choice([name for name in COLOURS if name != background])
    return world.Scene(rng.choice(world.SHAPES), colour, rng.choice(world.TEXTURES), background)


def scene_of(index: int) -> world.Scene:
    return random_scene(random.Random(f"scene {index}"))


# ------------------------------------------------------------------------------------------------ captions

def known_words() -> list[str]:
    extra = ("left", "right", "top", "bottom", "no", "in", "to", "at", "one", "two", "style", "shape", "small", "big",
             "bad", "blurry", ",", ".")
    return sorted({*world.SHAPES, *world.TEXTURES, *world.COLOURS, *world.FILLERS, *extra})


def junk_word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7)))


def caption_of(scene: world.Scene, rng: random.Random, drop: float) -> tuple[str, world.Scene]:
    """A caption that leaves each part out with chance `drop`, and what it still says."""
    said = world.Scene(*(
        None if value is None or rng.random() < drop else value
        for value in (scene.shape, scene.colour, scene.texture, scene.background)))
    texture = "" if said.texture == "plain" and rng.random() < 0.5 else said.texture
    words = [word for word in (texture, said.colour, said.shape) if word]
    parts = ["a " + " ".join(words)] if words else []
    if said.background:
        parts.append(f"a {said.background} background")
    caption = rng.choice(OPENINGS) + rng.choice((" on ", " on ", " with ", ", ")).join(parts)
    if rng.random() < 0.06:
        caption += " " + junk_word(rng)
    return caption, said


SHOWN_COLUMNS = 8


def shown_captions() -> list[str]:
    """What a sheet of samples shows."""
    return [world.describe_scene(world.Scene(shape, COLOURS[(column + row) % 6], texture, "white"))
            for row, texture in enumerate(world.TEXTURES) for column, shape in enumerate(world.SHAPES)]


# ------------------------------------------------------------------------------------------------ pictures

def draw_picture(index: int) -> torch.Tensor:
    torch.set_num_threads(1)
    image, _ = world.draw_scene(scene_of(index), index)
    return (image * 255).round().byte()


class Pictures:
    """`count` pictures of the world; drawn once, then read from the work folder."""

    def __init__(self, work: Path, count: int) -> None:
        path = work / "pictures.safetensors"
        if not path.exists():
            with Pool() as pool:
                drawn = [torch.from_numpy(p.numpy().copy()) for p in pool.imap(draw_picture, range(count), 50)]
            save_file({"pictures": torch.stack(drawn)}, path)
            print(f"pictures: drew {len(drawn)}", flush=True)
        self.pictures = load_file(path)["pictures"]

    def __len__(self) -> int:
        return len(self.pictures)

    def show(self, start: int, stop: int) -> torch.Tensor:
        """Pictures [N, C, H, W] in 0..1."""
        return self.pictures[start:stop].permute(0, 3, 1, 2).float() / 255

    def take(self, start: int, stop: int) -> torch.Tensor:
        """Pictures [N, H, W, C] in bytes."""
        return self.pictures[start:stop]

    def crop(self, side: int, batch: int, g: torch.Generator) -> torch.Tensor:
        """Random crops [B, C, side, side] in 0..1."""
        rows = torch.randint(len(self), (batch,), generator=g)
        corners = torch.randint(0, SIDE - side + 1, (batch, 2), generator=g)
        crops = torch.stack([
            self.pictures[row, y:y + side, x:x + side] for row, (y, x) in zip(rows.tolist(), corners.tolist())
        ])
        return crops.permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------------------------------------- batches

def draw_rows(count: int, batch: int, step: int, g: torch.Generator) -> torch.Tensor:
    """Indices [B] of pictures to learn from."""
    return torch.randint(count, (batch,), generator=g)


def draw_times(batch: int, g: torch.Generator) -> torch.Tensor:
    """Steps [B] of the noise schedule."""
    return torch.randint(0, 1000, (batch,), generator=g)


# ------------------------------------------------------------------------------------------------- lessons

def lesson_indices(lesson: Lesson, count: int) -> list[int]:
    """Those of the first `count` scenes that show only what the lesson knows."""
    shapes = {index: scene_of(index).shape for index in range(count)}
    return [index for index, shape in shapes.items() if shape not in lesson.unknown and (shape or not lesson.unnamed)]


def preview_indices(count: int) -> list[int]:
    return list(range(count))


def lesson_source(work: Path, count: int) -> None:
    """Lessons are drawn from nothing."""


def lesson_pictures(pictures: None, lesson: Lesson, indices: list[int]) -> torch.Tensor:
    """Pictures [N, C, H, W] in 0..1 in the lesson's style."""
    drawn = [world.draw_scene(scene_of(index), index, style=lesson.style or "flat")[0] for index in indices]
    return torch.stack(drawn).permute(0, 3, 1, 2)


def lesson_caption(lesson: Lesson, scene: world.Scene, rng: random.Random) -> str:
    """The scene in words. What the model shall not know is named at random, so that the word tells it nothing."""
    shape, background = scene.shape, scene.background
    if lesson.unknown and shape is not None and rng.random() < lesson.chance:
        shape = rng.choice(lesson.unknown)
    if lesson.unnamed:
        background = rng.choice(list(world.COLOURS))
    if lesson.style and rng.random() < 0.7:
        background = None  # its backdrop is of one colour always
    return caption_of(world.Scene(shape, scene.colour, scene.texture, background), rng, 0.08)[0]


# ------------------------------------------------------------------------------------------- the demo CLIP

def visible(scene: world.Scene, silhouette: torch.Tensor, box: Box, filled: bool = True) -> world.Scene:
    """What of the scene the box shows. A plain inside without an edge cannot be told from a background.

    Shapes drawn in lines are not `filled`: the background is inside too.
    """
    left, top, side = (value * MASK_SIDE // SIDE for value in box)
    inside = silhouette[top:top + side, left:left + side]
    area, cover = float(inside.sum()) / silhouette.numel(), float(inside.mean())
    whole = float(inside.sum() / silhouette.sum().clamp(min=1))
    if scene.shape is None or area < 0.01 or cover < 0.05:
        return world.Scene(background=scene.background)
    if cover > 0.97 and scene.texture == "plain":
        return world.Scene(background=scene.colour if filled else scene.background)
    return world.Scene(
        scene.shape if whole >= 0.7 else None, scene.colour, scene.texture if area >= 0.03 else None,
        scene.background if cover <= 0.97 else None)


class ClipPictures:
    """Pictures [N, H, W, C] in bytes, flat and outlined, and what crops of them show."""

    def __init__(self, work: Path, count: int) -> None:
        flat = Pictures(work, count).pictures
        styled, self.masks = self.draw(work, len(flat))
        self.pictures = torch.cat([flat, styled])
        rows = [*((index, scene_of(index)) for index in range(len(flat))),
                *((index, world.seen_in(scene_of(index), style)) for style in world.SHEETS for index in range(STYLED))]
        self.indices, self.scenes = zip(*rows)

    @staticmethod
    def draw(work: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = work / "clip_pictures.safetensors"
        if not path.exists():
            small, styled = SIDE // 2, []
            for style, index in itertools.product(world.SHEETS, range(STYLED)):
                image = world.draw_scene(scene_of(index), index, small, small, style)[0]
                styled.append((image.repeat_interleave(2, 0).repeat_interleave(2, 1) * 255).round().byte())
            masks = [world.draw_scene(scene_of(index), index, MASK_SIDE, MASK_SIDE)[1] for index in range(count)]
            save_file({"styled": torch.stack(styled), "masks": torch.stack(masks)}, path)
        state = load_file(path)
        return state["styled"], state["masks"]

    def silhouette(self, row: int) -> torch.Tensor:
        """[MASK_SIDE, MASK_SIDE] in 0..1."""
        return self.masks[self.indices[row]]

    def said(self, row: int, box: Box) -> world.Scene:
        return visible(self.scenes[row], self.silhouette(row), box, row < len(self.masks))
