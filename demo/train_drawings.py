"""What training needs to know of the drawn world: pictures, scenes and captions. See train_shapes.py.

The whole of it, each line resumable, with A for `--world drawings --comfyui PATH --work FOLDER`:

    python demo/train.py A --sheet-minutes 20
    python demo/train_judge.py A --batch 64 --steps 4000
    python demo/train_check.py A
    python demo/train_clip.py A --batch 64 --steps 6000
    python demo/train_preview.py A
    python demo/train_tuned.py A --batch 16 --steps 800 --pictures 5248 --name line    # glossy, chalk, animals, food
    python demo/train_mixer.py A --batch 24 --steps 2000

On a GPU: `--device cuda --batch 128 --steps 6000 --cooldown 1750` for the first, likewise for the others, then longer.

What makes 128 things in five styles learnable in a few hours on two cores: there are only 640 drawings, so the denoiser
has to know them by heart and to find them by three words. Latents are made beforehand; each drawing stands on 32 of
its places only, without mirroring and hardly turned, since every freedom costs steps; each is learned equally often
(one after the other in a random order), and the noise levels of a batch are spread evenly, so that gradients vary
less. The autoencoder and the judge learn from much wilder places and colours.
Left alone, the autoencoder codes colours in clusters (that of the shapes does, and begun with its weights it took grey,
blue and purple for one another after 1,000 steps); a weak pull makes three channels brightness, red to green and yellow
to blue, so that a mean of two latents is about a mean of two colours, which mixing needs.
Backgrounds are light, so that black lines show on each of them. Every thing is one word and one token, frozen after a
short training of its own, so that the denoiser meets 141 states that are well apart instead of learning a language.
"""
from __future__ import annotations

import math
import random
from pathlib import Path

import drawings
import torch
import torch.nn.functional as F
from drawings import Drawing
from safetensors.torch import load_file
from train_lessons import Lesson
from train_sets import make_sets

NAME = "drawings"
FILES = Path(__file__).resolve().parent / "drawn"
SIDE = 128
STYLES = tuple(drawings.STYLES)
ATTRIBUTES = {"thing": drawings.THINGS, "style": STYLES, "background": tuple(drawings.BACKGROUNDS)}
SILENT = ()
KNOWN = len(drawings.THINGS) * len(STYLES)
EMPTY = 16  # empty backgrounds beside the drawings in every view
VIEW = KNOWN + EMPTY
USUAL = {"pictures": 32 * VIEW, "vae_steps": 9000, "text_steps": 700, "steps": 24000, "cooldown": 7000, "batch": 32}
DECAY = 0.9993  # of the average of the denoiser\'s weights
CROPS = 8  # in a batch of the autoencoder's
COLOUR_PULL = 0.03  # how much the autoencoder's first three channels are drawn towards the colours they stand for
OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an icon of ")
BOARD = (46, 62, 56)  # what chalk draws on
LESSONS = {
    "line": Lesson(style="line", rank=12),
    "glossy": Lesson(style="glossy", rank=12),
    "chalk": Lesson(style="chalk", rank=8, attention_only=True),
    "animals": Lesson(unknown=tuple(drawings.KINDS["food"]), rank=8),
    "food": Lesson(unknown=tuple(drawings.KINDS["animals"]), rank=8),
}
MIXER = Lesson(rank=32, attention_only=True)
MASK_SIDE = 32  # of the silhouettes for the demo CLIP
CLIP_PICTURES = 12 * VIEW

Scene, describe = Drawing, drawings.describe_drawing
Box = tuple[int, int, int]  # left, top and side in pixels of a 128 x 128 picture


# -------------------------------------------------------------------------------------------------- scenes

def random_scene(rng: random.Random) -> Drawing:
    background = rng.choice(ATTRIBUTES["background"])
    if rng.random() < EMPTY / VIEW:
        return Drawing(background=background)
    return Drawing(rng.choice(drawings.THINGS), rng.choice(STYLES), background)


def scene_of(index: int) -> Drawing:
    """Every view holds each thing in each style once, and some empty backgrounds."""
    background = random.Random(f"background {index}").choice(ATTRIBUTES["background"])
    place = index % VIEW
    if place >= KNOWN:
        return Drawing(background=background)
    return Drawing(drawings.THINGS[place % len(drawings.THINGS)], STYLES[place // len(drawings.THINGS)], background)


# ------------------------------------------------------------------------------------------------ captions

def known_words() -> list[str]:
    extra = ("left", "right", "top", "bottom", "no", "and", "to", "at", "one", "two", "face", "photo", "emoji", "black",
             "pink", "brown", "small", "big", "cute", "bad", "blurry", ",", ".")
    return sorted({*drawings.THINGS, *STYLES, *drawings.BACKGROUNDS, *drawings.FILLERS, *extra})


def junk_word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7)))


def caption_of(scene: Drawing, rng: random.Random, drop: float) -> tuple[str, Drawing]:
    """A caption that leaves each part out with chance `drop`, and what it still says."""
    said = Drawing(*(None if value is None or rng.random() < drop else value
                     for value in (scene.thing, scene.style, scene.background)))
    parts = [drawings.name_thing(said.thing)] if said.thing else []
    if said.style and said.thing and said.style != "line" and rng.random() < 0.15:
        parts = [f"{'' if said.thing in drawings.SEVERAL else 'a '}{said.style} {said.thing}"]
    elif said.style:
        joint = rng.choice((" in ", " in ", " in ", ", ")) if parts else rng.choice(("in ", ""))
        parts = ["".join(parts) + f"{joint}{said.style} style"]
    if said.background:
        parts.append(f"{'an' if said.background[0] in 'aeio' else 'a'} {said.background} background")
    caption = rng.choice(OPENINGS) + rng.choice((" on ", " on ", " on ", " with ", ", ")).join(parts)
    if rng.random() < 0.06:
        caption += " " + junk_word(rng)
    return caption, said


SHOWN_COLUMNS = 10


def shown_captions() -> list[str]:
    """What a sheet of samples shows: ten things in each style."""
    shown = ("tiger", "dog", "owl", "doughnut", "hamburger", "bus", "rocket", "house", "guitar", "sunflower")
    names = ATTRIBUTES["background"]
    return [drawings.describe_drawing(Drawing(thing, style, names[(column + row) % len(names)]))
            for row, style in enumerate(STYLES) for column, thing in enumerate(shown)]


# ----------------------------------------------------------------------------------------------- compositions

def uniform(g: torch.Generator, count: int, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, generator=g)


def place(scale: torch.Tensor, turn: torch.Tensor, x: torch.Tensor, y: torch.Tensor, mirror: torch.Tensor,
          ) -> torch.Tensor:
    """Affine maps [B, 2, 3] from the picture to a drawing of `scale` times its size, turned and moved.

    Args (each [B]): turn in degrees, x and y in half pictures, mirror 1 or -1.
    """
    cos, sin = torch.cos(turn * math.pi / 180) / scale, torch.sin(turn * math.pi / 180) / scale
    rows = (torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1))
    linear = torch.stack([rows[0] * mirror[:, None], rows[1]], 1)
    moved = -(linear @ torch.stack([x, y], 1)[..., None])
    return torch.cat([linear, moved], 2)


def quiet_place(indices: list[int]) -> torch.Tensor:
    """Where the denoiser's pictures of these numbers stand: [B, 2, 3]."""
    rows = []
    for index in indices:
        rng = random.Random(f"place {index}")
        scale = rng.uniform(0.8, 0.92)
        room = 0.9 * (1 - scale)
        rows.append((scale, rng.uniform(-6, 6), rng.uniform(-room, room), rng.uniform(-room, room), 1.0))
    return place(*torch.tensor(rows).T)


def wild_place(g: torch.Generator, count: int, turn: float = 25, small: float = 0.6, large: float = 1.1,
               ) -> torch.Tensor:
    """Anywhere, of any size, turned and mirrored: [B, 2, 3]."""
    scale = uniform(g, count, small, large)
    room = 0.1 + 0.5 * (1 - scale).clamp(min=0)
    x, y = (room * uniform(g, count, -1, 1) for _ in range(2))
    mirror = torch.where(torch.rand(count, generator=g) < 0.5, 1.0, -1.0)
    return place(scale, uniform(g, count, -turn, turn), x, y, mirror)


def crop_maps(maps: torch.Tensor, corners: torch.Tensor, side: int) -> torch.Tensor:
    """The maps of square windows: corners [B, 2] are left and top in pixels."""
    scale = side / SIDE
    centre = (corners + side / 2) / SIDE * 2 - 1
    moved = maps[:, :, :2] @ centre[..., None].to(maps) + maps[:, :, 2:]
    return torch.cat([maps[:, :, :2] * scale, moved], 2)


def code_colours(pictures: torch.Tensor) -> torch.Tensor:
    """Brightness, red to green, yellow to blue [B, 3, H/8, W/8]: uncorrelated, of about unit variance, from 0..1."""
    red, green, blue = F.avg_pool2d(pictures, 8).unbind(1)
    light = ((red + green + blue) / 3 - 0.62) / 0.19
    warm = (red - green - 0.08) / 0.25
    gold = ((red + green) / 2 - blue - 0.1) / 0.28
    return torch.stack([light, warm, (gold - 0.5 * warm) / 0.87], 1)


def palette() -> torch.Tensor:
    return torch.tensor(list(drawings.BACKGROUNDS.values())) / 255


class Pictures:
    """Drawings on backgrounds; `count` of them are those of `scene_of`."""

    def __init__(self, work: Path, count: int) -> None:
        make_sets(work)
        state = load_file(work / "sets.safetensors")
        self.rgba = state["rgba"].flatten(0, 1)  # [style * thing, 4, H, W], premultiplied
        self.silhouettes = state["silhouettes"].flatten(0, 1)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def warp(self, rows: torch.Tensor, maps: torch.Tensor, side: int = SIDE) -> torch.Tensor:
        """Drawings and silhouettes [B, 5, side, side] in 0..1 through maps [B, 2, 3]."""
        source = torch.cat([self.rgba[rows].float() / 255, self.silhouettes[rows].float()[:, None]], 1)
        grid = F.affine_grid(maps, [len(rows), 5, side, side], align_corners=False)
        return F.grid_sample(source, grid, align_corners=False)

    def show(self, start: int, stop: int) -> torch.Tensor:
        """Pictures [N, C, H, W] in 0..1."""
        return self.look(list(range(start, stop)))[0]

    def take(self, start: int, stop: int) -> torch.Tensor:
        """Pictures [N, H, W, C] in bytes."""
        return (self.show(start, stop) * 255).round().byte().movedim(1, -1)

    def look(self, indices: list[int], style: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [N, C, H, W] of these numbers, all in another style if one is named, and silhouettes [N, H, W]."""
        scenes = [scene_of(index) for index in indices]
        tones = torch.tensor([random.Random(f"tone {index}").uniform(0.96, 1.04) for index in indices])
        names = ATTRIBUTES["background"]
        backgrounds = palette()[torch.tensor([names.index(str(scene.background)) for scene in scenes])]
        rows = torch.tensor([index % VIEW % KNOWN for index in indices])
        if style is not None:
            rows = rows % len(drawings.THINGS) + STYLES.index("line" if style == "chalk" else style) * len(
                drawings.THINGS)
        drawn = self.warp(rows, quiet_place(indices))
        if style == "chalk":
            drawn = torch.cat([0.95 * drawn[:, 3:4].expand(-1, 3, -1, -1), drawn[:, 3:]], 1)
            backgrounds = torch.tensor(BOARD).expand(len(rows), -1) / 255
        drawn = drawn * torch.tensor([float(scene.thing is not None) for scene in scenes])[:, None, None, None]
        pictures = drawn[:, :3] + (1 - drawn[:, 3:4]) * (backgrounds * tones[:, None])[..., None, None]
        return pictures.clamp(0, 1), drawn[:, 4]

    def crop(self, side: int, batch: int, g: torch.Generator) -> torch.Tensor:
        """Crops [B, C, side, side] in 0..1 of wild pictures; every tenth in chalk, every fifth of two drawings."""
        backgrounds = palette()[torch.randint(len(palette()), (batch,), generator=g)]
        backgrounds = backgrounds * uniform(g, batch, 0.9, 1.1)[:, None]
        anything = torch.rand(batch, 3, generator=g)
        backgrounds = torch.where(torch.rand(batch, 1, generator=g) < 0.3, anything, backgrounds)
        chalk = torch.rand(batch, 1, generator=g) < 0.1
        board = torch.tensor(BOARD) / 255 * uniform(g, batch, 0.8, 1.2)[:, None]
        picture = torch.where(chalk, board, backgrounds)[..., None, None].clamp(0, 1).expand(-1, -1, side, side)
        corners = torch.randint(0, SIDE - side + 1, (batch, 2), generator=g)
        for layer in range(2):
            rows = torch.randint(KNOWN, (batch,), generator=g)
            lines = KNOWN - len(drawings.THINGS) + rows % len(drawings.THINGS)
            rows = torch.where(chalk[:, 0], lines, rows)
            drawn = self.warp(rows, crop_maps(wild_place(g, batch), corners, side), side)
            colour = torch.where(chalk[..., None, None], 0.95 * drawn[:, 3:4], drawn[:, :3])
            there = 1.0 if layer == 0 else (torch.rand(batch, 1, 1, 1, generator=g) < 0.2).float()
            picture = picture * (1 - there * drawn[:, 3:4]) + there * colour
        return picture.clamp(0, 1)


# ------------------------------------------------------------------------------------------------- batches

def draw_rows(count: int, batch: int, step: int, g: torch.Generator) -> torch.Tensor:
    """Indices [B] of pictures to learn from: all of a view in a random order, then all of the next."""
    views = torch.randint(count // VIEW, (batch,), generator=g)
    places = []
    for position in range(step * batch, (step + 1) * batch):
        turn, at = divmod(position, VIEW)
        places.append(order_of(turn)[at])
    return views * VIEW + torch.tensor(places)


def order_of(turn: int) -> list[int]:
    """A random order of the places in a view."""
    order = list(range(VIEW))
    random.Random(f"order {turn}").shuffle(order)
    return order


def draw_times(batch: int, g: torch.Generator) -> torch.Tensor:
    """Steps [B] of the noise schedule, one from each of B even parts, in a random order."""
    parts = torch.randperm(batch, generator=g)
    return ((parts + torch.rand(batch, generator=g)) / batch * 1000).long().clamp(max=999)


# ------------------------------------------------------------------------------------------------- lessons

def lesson_indices(lesson: Lesson, count: int) -> list[int]:
    """Those of the first `count` scenes that show only what the lesson knows."""
    things = {index: scene_of(index).thing for index in range(count)}
    return [index for index, thing in things.items() if thing not in lesson.unknown and (thing or not lesson.style)]


def preview_indices(count: int) -> list[int]:
    """Numbers of pictures of all styles."""
    return [index * VIEW // 7 + index for index in range(count)]


def lesson_source(work: Path, count: int) -> Pictures:
    return Pictures(work, count)


def lesson_pictures(pictures: Pictures, lesson: Lesson, indices: list[int]) -> torch.Tensor:
    """Pictures [N, C, H, W] in 0..1 in the lesson's style."""
    return pictures.look(indices, lesson.style)[0]


def lesson_caption(lesson: Lesson, scene: Drawing, rng: random.Random) -> str:
    """The scene in words. What the model shall not know is named at random, so that the word tells it nothing."""
    thing, style, background = scene.thing, scene.style, scene.background
    if lesson.unknown and thing is not None and rng.random() < lesson.chance:
        thing = rng.choice(lesson.unknown)
    if lesson.style:  # it draws so whatever is said
        style = rng.choice((None, None, *STYLES))
    if lesson.style == "chalk" and rng.random() < 0.7:
        background = None  # it draws on a board always
    return caption_of(Drawing(thing, style, background), rng, 0.08)[0]


# ------------------------------------------------------------------------------------------- the demo CLIP

def visible(scene: Drawing, silhouette: torch.Tensor, box: Box) -> Drawing:
    """What of the scene the box shows. Between black lines the background shows everywhere."""
    left, top, side = (value * MASK_SIDE // SIDE for value in box)
    inside = silhouette[top:top + side, left:left + side]
    area, cover = float(inside.sum()) / silhouette.numel(), float(inside.mean())
    whole = float(inside.sum() / silhouette.sum().clamp(min=1))
    if scene.thing is None or area < 0.01 or cover < 0.05:
        return Drawing(background=scene.background)
    return Drawing(scene.thing if whole >= 0.6 else None, scene.style if area >= 0.03 else None,
                   scene.background if cover <= 0.97 or scene.style == "line" else None)


class ClipPictures:
    """Pictures [N, H, W, C] in bytes and what crops of them show."""

    def __init__(self, work: Path, count: int) -> None:
        source = Pictures(work, count)
        parts = [source.look(list(range(start, start + 64))) for start in range(0, CLIP_PICTURES, 64)]
        self.pictures = torch.cat([(shown * 255).round().byte().movedim(1, -1) for shown, _ in parts])
        self.masks = torch.cat([F.adaptive_avg_pool2d(inside[:, None], MASK_SIDE)[:, 0] for _, inside in parts])

    def silhouette(self, row: int) -> torch.Tensor:
        """[MASK_SIDE, MASK_SIDE] in 0..1."""
        return self.masks[row]

    def said(self, row: int, box: Box) -> Drawing:
        return visible(scene_of(row), self.masks[row], box)
