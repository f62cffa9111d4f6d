"""Labelled Grid: pictures in rows and columns on one sheet, with words above, beside and below."""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ..samplers.wording import format_size
from .fonts import Font, choose_font, wrap_text

MOST_PIXELS = 1 << 26  # of a sheet: 0.8 GB as an IMAGE
SMALLEST, LARGEST, SHARE = 14, 96, 13  # pixels of text: a 13th of a picture's height
PAPER, INK, FAINT = (255, 255, 255), (24, 24, 24), (90, 90, 90)


@dataclass(frozen=True)
class Words:
    """What stands on a grid.

    Attributes:
        labels: below each picture; across, down: above each column and left of each row; settings: below the grid.
    """

    labels: Sequence[str] = ()
    across: Sequence[str] = ()
    down: Sequence[str] = ()
    settings: str = ""


def split_labels(texts: Iterable[str]) -> list[str]:
    """Labels of a list, of which each may hold several lines; empty ones at the end are none."""
    found = [line.strip() for text in texts for line in text.split("\n")]
    while found and not found[-1]:
        found.pop()
    return found


def label_grid(
    images: Sequence[Tensor], *, labels: Sequence[str], columns: Sequence[int], across: Sequence[str],
    down: Sequence[str], settings: Sequence[str],
) -> Tensor:
    """`draw_grid` of lists as the host hands them: of `columns` the first counts, equal settings are told once."""
    words = Words(*map(split_labels, (labels, across, down)), settings="\n".join(dict.fromkeys(settings)))
    return draw_grid(images, columns[0], words)


def draw_grid(images: Sequence[Tensor], columns: int, words: Words) -> Tensor:
    """Pictures of any sizes on one sheet, each in its own proportions.

    Args:
        images: IMAGEs [B, H, W, C]; columns: 0 for as many as `across` has, else about as many as rows.

    Returns:
        IMAGE [1, H, W, 3].

    Raises:
        ValueError: on no pictures, words that are not as many as what they stand beside, or a sheet beyond
            `MOST_PIXELS`.
    """
    tiles = [picture[..., :3 if picture.shape[-1] > 2 else 1] for image in images for picture in image]
    if not tiles:
        raise ValueError("Labelled Grid expects pictures, got none; connect what VAE Decode made.")
    if not all(bool(tile.isfinite().all()) for tile in tiles):
        raise ValueError(
            "Labelled Grid expects pictures of numbers, got some with none (NaN or infinite); look at the node that "
            "made them.")
    columns = columns or len(words.across) or math.ceil(math.sqrt(len(tiles)))
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    for name, given, count, what in (("labels", words.labels, len(tiles), "picture"),
                                     ("across", words.across, columns, "column"), ("down", words.down, rows, "row")):
        if len(given) not in (0, count):
            raise ValueError(
                f"{name} of Labelled Grid expects a text for each of the {count} {what}s, or none, got {len(given)}; "
                f"connect the sweep that made the pictures, or set columns.")
    height, width = (max(tile.shape[side] for tile in tiles) for side in (0, 1))
    size = min(max(SMALLEST, height // SHARE), LARGEST)
    font = choose_font("".join((*words.labels, *words.across, *words.down, words.settings)), size)
    return Sheet(tiles, columns, cell=(height, width), font=font, size=size).draw(words)


@dataclass
class Sheet:
    """Where everything stands.

    Attributes:
        tiles: pictures [H, W, C], row by row; cell: height and width that each may fill.
    """

    tiles: Sequence[Tensor]
    columns: int
    cell: tuple[int, int]
    font: Font
    size: int

    def draw(self, words: Words) -> Tensor:
        gap, line = max(self.size // 2, 4), round(self.size * 1.3)
        height, width = self.cell
        # a short word is never broken: narrow pictures stand further apart
        column = max(width, min(self.widest([*words.labels, *words.across]), 6 * self.size))
        left = min(self.widest(words.down), 10 * self.size) + 2 * gap if words.down else gap
        rows = math.ceil(len(self.tiles) / self.columns)
        above = [wrap_text(text, self.font, column) for text in words.across]
        below = [wrap_text(text, self.font, column) for text in words.labels]
        beside = [wrap_text(text, self.font, left - 2 * gap) for text in words.down]
        top = gap + max(map(len, above), default=0) * line
        caption = max(map(len, below), default=0) * line
        row = max(height + caption, max(map(len, beside), default=0) * line) + gap
        across = left + self.columns * (column + gap)
        foot = [part for text in words.settings.split("\n") if text.strip()
                for part in wrap_text(text, self.font, across - 2 * gap)]
        down = top + rows * row + (len(foot) * line + gap if foot else 0)
        if across * down > MOST_PIXELS:
            raise ValueError(
                f"Labelled Grid expects pictures that fit a sheet of {MOST_PIXELS / 1e6:.0f} million pixels, got "
                f"{len(self.tiles)} of up to {format_size((width, height))}, which need {format_size((across, down))}; "
                f"make several grids, or scale the pictures down first.")
        sheet = Image.new("RGB", (across, down), PAPER)
        pen = ImageDraw.Draw(sheet)

        def write(lines: Sequence[str], x: int, y: int, room: int = 0, faint: bool = False) -> None:
            for number, text in enumerate(lines):
                start = x + (room - math.ceil(self.font.getlength(text))) // 2 if room else x
                pen.text((start, y + number * line), text, fill=FAINT if faint else INK, font=self.font)

        for place, lines in enumerate(above):
            write(lines, left + place * (column + gap), top - len(lines) * line - gap // 3, column)
        for place, lines in enumerate(beside):
            write(lines, gap, top + place * row + max(height - len(lines) * line, 0) // 2)
        for place, tile in enumerate(self.tiles):
            x = left + place % self.columns * (column + gap)
            y = top + place // self.columns * row
            picture = fit_tile(tile, self.cell)
            sheet.paste(picture, (x + (column - picture.width) // 2, y + (height - picture.height) // 2))
            if below:
                write(below[place], x, y + height + gap // 3, room=column, faint=True)
        write(foot, gap, top + rows * row, faint=True)
        return torch.from_numpy(numpy.array(sheet)).float()[None] / 255

    def widest(self, texts: Sequence[str]) -> int:
        return max((math.ceil(self.font.getlength(text)) for text in texts), default=0)


def fit_tile(picture: Tensor, cell: tuple[int, int]) -> Image.Image:
    """A picture [H, W, C], grey or coloured, as large as a cell (height, width) in its own proportions."""
    height, width = picture.shape[:2]
    scale = min(cell[0] / height, cell[1] / width)
    pixels = picture.detach().float().cpu().movedim(-1, 0)[None]
    if (height, width) != cell and scale != 1:
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    levels = (pixels[0].expand(3, -1, -1).movedim(0, -1).clamp(0, 1) * 255).round()
    return Image.fromarray(levels.to(torch.uint8).numpy())
