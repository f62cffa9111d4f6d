"""Several pictures on one sheet with captions and a legend: what a node shows of its own work."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .fonts import Font, load_default

WIDTH, SMALLEST, LARGEST = 760, 96, 192  # pixels of a sheet in all, and of the longer side of its pictures
TEXT, GAP = 26, 8
LINE = TEXT + GAP
PAPER, INK, FRAME = (32, 32, 32), (235, 235, 235), (96, 96, 96)

Colour = tuple[float, float, float]  # 0 to 1


def draw_sheet(
    pictures: Sequence[torch.Tensor], captions: Sequence[str], columns: int, legend: Sequence[tuple[Colour, str]] = (),
) -> torch.Tensor:
    """Pictures of one size row by row, each with its caption above, and what their colours mean below.

    Args:
        pictures: [H, W, 3] each or, in grey, [H, W, 1], 0 to 1; captions: of each.
        legend: colours with what they stand for.

    Returns:
        IMAGE [1, H, W, 3]; its size goes by the number of columns, not by the pictures' size.
    """
    font = load_default(TEXT)
    tiles = [make_tile(picture, max(SMALLEST, min(LARGEST, WIDTH // columns))) for picture in pictures]
    width = max(tiles[0].width, *(measure(caption, font) for caption in captions)) + GAP
    height = LINE + tiles[0].height + GAP
    entries = place_legend([text for _, text in legend], font, GAP + columns * width)
    across = max([GAP + columns * width, *(x + size for x, _, size in entries)])
    top = GAP + math.ceil(len(tiles) / columns) * height
    sheet = Image.new("RGB", (across, top + max((row + 1 for _, row, _ in entries), default=0) * LINE), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (tile, caption) in enumerate(zip(tiles, captions)):
        x, y = GAP + place % columns * width, GAP + place // columns * height
        pen.text((x, y), caption, fill=INK, font=font)
        pen.rectangle((x - 1, y + LINE - 1, x + tile.width, y + LINE + tile.height), outline=FRAME)
        sheet.paste(tile, (x, y + LINE))
    for (colour, text), (x, row, _) in zip(legend, entries):
        y = top + row * LINE
        red, green, blue = (round(part * 255) for part in colour)
        pen.rectangle((x, y, x + TEXT - 1, y + TEXT - 1), fill=(red, green, blue), outline=FRAME)
        pen.text((x + LINE, y), text, fill=INK, font=font)
    return torch.from_numpy(numpy.array(sheet)).float()[None] / 255


def measure(text: str, font: Font) -> int:
    """Width of a text in pixels."""
    return math.ceil(font.getlength(text))


def make_tile(picture: torch.Tensor, side: int) -> Image.Image:
    """A picture, coloured or grey, as large as a sheet shows it: averaged where it shrinks, in squares where it grows.

    Args:
        side: of its longer side, in pixels.
    """
    height, width = picture.shape[:2]
    size = [max(1, round(part * side / max(height, width))) for part in (height, width)]
    mode = "area" if max(height, width) > side else "nearest-exact"
    pixels = F.interpolate(picture.detach().float().cpu().movedim(-1, 0)[None], size=size, mode=mode)[0]
    return Image.fromarray((pixels.expand(3, -1, -1).movedim(0, -1).clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def place_legend(texts: Sequence[str], font: Font, width: int) -> list[tuple[int, int, int]]:
    """Where each entry of a legend begins, in which row, and how wide it is: as many in a row as there is room for."""
    places: list[tuple[int, int, int]] = []
    x, row = GAP, 0
    for text in texts:
        size = LINE + measure(text, font) + 2 * GAP
        if x > GAP and x + size > width:
            x, row = GAP, row + 1
        places.append((x, row, size))
        x += size
    return places


def draw_mask_sheet(masks: torch.Tensor, columns: int) -> torch.Tensor:
    """Masks [N, H, W] on one sheet, numbered as the sockets of their styles are. Returns an IMAGE [1, H, W, 3].

    Args:
        columns: of a grid that the masks are the parts of; more than four are wrapped where they are one row.
    """
    columns = min(columns, 4) if columns == len(masks) else columns
    return draw_sheet(list(masks[..., None]), [f"mask {n}" for n in range(len(masks))], columns)
