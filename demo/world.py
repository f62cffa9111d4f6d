"""The demo world: one textured shape on a plain background, drawn from a caption.

"a striped red star on a blue background" has a shape, a colour, a texture and a background.
The demo checkpoints are trained on these pictures and the judge reads them back.
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
TEXTURES = ("plain", "striped", "dotted", "checkered")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 50),
    "green": (40, 165, 75),
    "blue": (45, 90, 220),
    "purple": (135, 60, 175),
    "white": (245, 245, 245),
    "black": (28, 28, 28),
}
FILLERS = ("a", "an", "the", "on", "with", "of", "and", "picture", "photo", "drawing", "background")
REFERENCE_SIDE = 128  # textures and jitter are stated in pixels of a 128 x 128 picture
TEXTURE_PERIOD = 16.0
CHECKER_CELL = 12.0
DOT_RADIUS = 4.6
SUPERSAMPLING = 3
STYLES = ("flat", "sketch", "neon")
SHEETS = {"sketch": ("white", "black"), "neon": ("black", "white")}  # background, and the line for its own colour
OUTLINE = 5.0  # width of the outlined styles' line in pixels


@dataclass(frozen=True)
class Scene:
    """What a caption says. None means unsaid in a caption, absent (`shape`) in a drawn scene."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    background: str | None = None


def parse_caption(caption: str, quote: Callable[[str], str] = ascii) -> Scene:
    """Read shape, colour, texture and background; parts left unsaid stay None.

    Args:
        quote: how a message shows a word.

    Raises:
        ValueError: on a word that the demo world does not know.
    """
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    known = set(SHAPES) | set(TEXTURES) | set(COLOURS) | set(FILLERS)
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(
            f"Demo Picture knows shapes ({', '.join(SHAPES)}), colours ({', '.join(COLOURS)}) and textures "
            f"({', '.join(TEXTURES)}), got {quote(unknown[0])}; write for instance "
            f"'a striped red star on a blue background'."
        )
    shape = next((word for word in words if word in SHAPES), None)
    texture = next((word for word in words if word in TEXTURES), None)
    background = None
    if "background" in words:
        before = words[: words.index("background")]
        if before and before[-1] in COLOURS:
            background = before[-1]
            words = before[:-1] + words[len(before):]
    colour = next((word for word in words if word in COLOURS), None)
    return Scene(shape, colour, texture, background)


def describe_scene(scene: Scene) -> str:
    """The caption of a scene; unsaid parts are left out."""
    if scene.shape is None:
        return f"a {scene.background} background" if scene.background else ""
    words = ["a", scene.texture, scene.colour, scene.shape]
    if scene.background:
        words += ["on", "a", scene.background, "background"]
    return " ".join(word for word in words if word)


def complete_scene(scene: Scene, rng: random.Random) -> Scene:
    """Fill what the caption left unsaid; a caption with only a background stays an empty picture."""
    empty = scene.shape is None and scene.colour is None and scene.texture is None and scene.background is not None
    shape = None if empty else scene.shape or rng.choice(SHAPES)
    colour, background = scene.colour, scene.background
    if colour is None:
        colour = rng.choice([name for name in COLOURS if name != background])
    if background is None:
        background = rng.choice([name for name in COLOURS if name != colour])
    return Scene(shape, colour, scene.texture or "plain", background)


def ink_of(colour: torch.Tensor) -> torch.Tensor:
    """The second colour of a texture: a darker tone, or a lighter one on black. [..., 3] in 0..1."""
    dark = colour.amax(dim=-1, keepdim=True) < 0.25
    return torch.where(dark, colour + 0.38, colour * 0.42)


def inside_shape(shape: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Boolean silhouette of `shape` at shape coordinates (u right, v down), about one unit in radius."""
    r = torch.sqrt(u * u + v * v)
    if shape == "circle":
        return r <= 0.86
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) <= 0.76
    if shape == "triangle":
        w = v - 0.18
        return (w <= 0.62) & (u.abs() * 1.732 - w <= 1.12)
    if shape == "star":
        sector = 2 * math.pi / 5
        angle = torch.remainder(torch.atan2(u, -v) + sector / 2, sector) - sector / 2
        x, y = r * torch.sin(angle.abs()), r * torch.cos(angle)
        inner_x, inner_y = 0.46 * math.sin(sector / 2), 0.46 * math.cos(sector / 2)
        return x * (1.12 - inner_y) <= inner_x * (1.12 - y)
    if shape == "heart":
        x, y = u * 1.22, 0.22 - v * 1.22
        return (x * x + y * y - 1) ** 3 - x * x * y ** 3 <= 0
    if shape == "cross":
        return (torch.minimum(u.abs(), v.abs()) <= 0.31) & (torch.maximum(u.abs(), v.abs()) <= 0.95)
    if shape == "ring":
        return (r <= 0.95) & (r >= 0.45)
    if shape == "moon":
        return (r <= 0.98) & (torch.sqrt((u - 0.46) ** 2 + (v + 0.1) ** 2) >= 0.72)
    raise ValueError(f"Shape must be one of {', '.join(SHAPES)}, got {shape!a}.")


def inked(texture: str, x: torch.Tensor, y: torch.Tensor, phase: tuple[float, float]) -> torch.Tensor:
    """Boolean second-colour map of `texture` at pixel coordinates of a 128 x 128 picture."""
    if texture == "plain":
        return torch.zeros_like(x, dtype=torch.bool)
    x, y = x + phase[0] * 2 * CHECKER_CELL, y + phase[1] * 2 * CHECKER_CELL
    if texture == "striped":
        return torch.remainder((x + y) / math.sqrt(2), TEXTURE_PERIOD) < TEXTURE_PERIOD / 2
    if texture == "checkered":
        return (torch.floor(x / CHECKER_CELL) + torch.floor(y / CHECKER_CELL)).remainder(2) < 1
    if texture == "dotted":
        dx = torch.remainder(x, TEXTURE_PERIOD) - TEXTURE_PERIOD / 2
        dy = torch.remainder(y, TEXTURE_PERIOD) - TEXTURE_PERIOD / 2
        return dx * dx + dy * dy <= DOT_RADIUS ** 2
    raise ValueError(f"Texture must be one of {', '.join(TEXTURES)}, got {texture!a}.")


def pixel_grid(width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Supersampled pixel centres, scaled so that the short side spans 128: x, y each [H*s, W*s]."""
    scale = REFERENCE_SIDE / min(width, height)
    x = (torch.arange(width * SUPERSAMPLING) + 0.5) / SUPERSAMPLING * scale
    y = (torch.arange(height * SUPERSAMPLING) + 0.5) / SUPERSAMPLING * scale
    return x.expand(len(y), -1), y[:, None].expand(-1, len(x))


def seen_in(scene: Scene, style: str) -> Scene:
    """What is to be seen of a scene in a style: drawn in lines, it lies on a sheet of one colour."""
    if style not in SHEETS:
        return scene
    sheet, line = SHEETS[style]
    return replace(scene, background=sheet, colour=line if scene.colour == sheet else scene.colour)


def outline_of(inside: torch.Tensor, width: float) -> torch.Tensor:
    """The line of `width` samples along the edge of a boolean silhouette [H, W]."""
    reach = max(1, round(width / 2))
    shape = inside.float()[None, None]
    grown = F.max_pool2d(shape, 2 * reach + 1, 1, reach)
    shrunk = 1 - F.max_pool2d(1 - shape, 2 * reach + 1, 1, reach)
    return (grown - shrunk)[0, 0] > 0


def paint(colour: torch.Tensor, backdrop: torch.Tensor, style: str) -> tuple[torch.Tensor, ...]:
    """Colours [3] in 0..1 of the fill, its ink, the backdrop and the outline in a style.

    All pairs that meet are known to the autoencoder from the flat world: flat is plain and has no outline of its own,
    sketch is drawn with a coloured pencil on white paper, neon with light in the dark.
    """
    if style == "flat":
        return colour, ink_of(colour), backdrop, colour
    white, black = (torch.tensor(COLOURS[name]) / 255 for name in ("white", "black"))
    if style == "sketch":
        line = black if bool(colour.amin() > 0.8) else colour
        return white, line, white, line
    if style == "neon":
        line = white if bool(colour.amax() < 0.25) else colour
        return black, line, black, line
    raise ValueError(f"The style must be one of {', '.join(STYLES)}, got {style!a}.")


def draw_scene(
    scene: Scene, seed: int, width: int = 128, height: int = 128, style: str = "flat",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `scene`; the seed places, sizes, turns and shades it (and fills what is unsaid).

    Returns:
        image [H, W, C] in 0..1 and the silhouette [H, W] in 0..1, both float32.
    """
    rng = random.Random(seed)
    scene = complete_scene(scene, rng)
    x, y = pixel_grid(width, height)
    scale = REFERENCE_SIDE / min(width, height)
    radius = rng.uniform(38.0, 50.0)
    centre_x = width * scale / 2 + rng.uniform(-10.0, 10.0)
    centre_y = height * scale / 2 + rng.uniform(-10.0, 10.0)
    angle = math.radians(rng.uniform(-18.0, 18.0))
    phase = (rng.random(), rng.random())
    shades = [1 + rng.uniform(-0.05, 0.05) for _ in range(2)]
    colour = torch.tensor(COLOURS[str(scene.colour)]) / 255 * shades[0]
    background = torch.tensor(COLOURS[str(scene.background)]) / 255 * shades[1]

    u, v = (x - centre_x) / radius, (y - centre_y) / radius
    u, v = u * math.cos(angle) + v * math.sin(angle), v * math.cos(angle) - u * math.sin(angle)
    inside = torch.zeros_like(x, dtype=torch.bool) if scene.shape is None else inside_shape(scene.shape, u, v)
    ink = inked(str(scene.texture), x, y, phase)
    fill, dark, backdrop, line = paint(colour, background, style)
    picture = torch.where(ink[..., None], dark, fill)
    picture = torch.where(inside[..., None], picture, backdrop)
    if style != "flat":
        picture = torch.where(outline_of(inside, OUTLINE * SUPERSAMPLING / scale)[..., None], line, picture)
    image = F.avg_pool2d(picture.permute(2, 0, 1)[None], SUPERSAMPLING)[0].permute(1, 2, 0)
    mask = F.avg_pool2d(inside.float()[None, None], SUPERSAMPLING)[0, 0]
    return image.clamp(0, 1).contiguous(), mask
