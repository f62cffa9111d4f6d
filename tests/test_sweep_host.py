"""Sweep's lists, and Labelled Grid's sheet: where pictures and words stand, at any size and in any script."""
from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from mixology.host import fonts, grid
from mixology.host.grid import Words, draw_grid, split_labels
from mixology.host.sweep import make_sweep
from mixology.nodes.sweep import LabelledGrid, Sweep
from PIL import ImageFont

pytestmark = pytest.mark.seam


def plain(colour: tuple[float, float, float], height: int = 64, width: int = 64, count: int = 1) -> torch.Tensor:
    return torch.tensor(colour).expand(count, height, width, 3).clone()


RED, GREEN, BLUE, GREY = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.5, 0.5)


def find(sheet: torch.Tensor, colour: tuple[float, float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the area of a colour."""
    there = ((sheet[0] - torch.tensor(colour)).abs().amax(-1) < 0.02).nonzero()
    (top, left), (bottom, right) = there.amin(0).tolist(), there.amax(0).tolist()
    assert len(there) == (bottom - top + 1) * (right - left + 1), "it is whole"
    return top, left, bottom - top + 1, right - left + 1


def test_a_product_fits_the_grid() -> None:
    runs = make_sweep("nu = 0, 0.5, 1", "k = 0.3, 0.6")
    assert runs.values == [0.0, 0.5, 1.0] * 2 and runs.values_2 == [0.3] * 3 + [0.6] * 3
    assert runs.columns == 3 and runs.across == ["nu 0", "nu 0.5", "nu 1"] and runs.down == ["k 0.3", "k 0.6"]
    assert runs.labels[:4] == ["nu 0, k 0.3", "nu 0.5, k 0.3", "nu 1, k 0.3", "nu 0, k 0.6"]
    alone = make_sweep("1, 2")
    assert alone.values == [1, 2] and alone.values_2 == ["", ""] and alone.labels == alone.across == ["1", "2"]
    assert alone.down == [""]
    three = make_sweep("1, 2", "a, b", "0.5, 0.25")
    assert three.values_3 == [0.5] * 4 + [0.25] * 4 and three.down == ["a, 0.5", "b, 0.5", "a, 0.25", "b, 0.25"]


def test_the_nodes_hand_on() -> None:
    assert Sweep.execute("1, 2", "a, b").result == make_sweep("1, 2", "a, b")
    given = LabelledGrid.execute(images=[plain(RED), plain(BLUE)], columns=[2], labels=["a\nb"], settings=["x", "x"])
    expected = draw_grid([plain(RED), plain(BLUE)], 2, Words(["a", "b"], settings="x"))
    assert torch.equal(given.result[0], expected)


def test_pictures_stand_row_by_row() -> None:
    sheet = draw_grid([plain(RED), torch.cat([plain(GREEN), plain(BLUE)]), plain(GREY)], 2, Words())
    assert sheet.ndim == 4 and len(sheet) == 1 and float(sheet.min()) >= 0 and float(sheet.max()) <= 1
    red, green, blue, grey = (find(sheet, colour) for colour in (RED, GREEN, BLUE, GREY))
    assert red[2:] == green[2:] == blue[2:] == (64, 64)
    assert red[0] == green[0] < blue[0] == grey[0] and red[1] == blue[1] < green[1] == grey[1]


def test_columns_by_themselves() -> None:
    pictures = [plain(RED)] * 6
    wide = draw_grid(pictures, 0, Words(across=["a", "b", "c"], down=["x", "y"]))
    square = draw_grid([plain(RED)] * 9, 0, Words())
    assert wide.shape[2] > wide.shape[1] and abs(square.shape[1] - square.shape[2]) < 8


def test_sizes_are_fitted_in_their_proportions() -> None:
    sheet = draw_grid([plain(RED, 128, 64), plain(BLUE, 16, 32)], 2, Words())
    assert find(sheet, RED)[2:] == (128, 64) and find(sheet, BLUE)[2:] == (32, 64)


def inked(sheet: torch.Tensor, top: int, bottom: int, left: int, right: int) -> int:
    return int((sheet[0, top:bottom, left:right].mean(-1) < 0.6).sum())


@pytest.mark.parametrize("side", [16, 64, 512, 2048])
def test_words_are_legible_at_any_size(side: int) -> None:
    sheet = draw_grid([plain(RED, side, side), plain(BLUE, side, side)], 2, Words(
        labels=["first one", "second one"], across=["left", "right"], down=["the row"], settings="a prompt, seed 3"))
    top, left, height, width = find(sheet, RED)
    blue = find(sheet, BLUE)
    assert (height, width) == (side, side) and left > 20
    size = min(max(14, side // 13), 96)
    places = {"across": (0, top, left, blue[1]), "down": (top, top + side, 0, left),
              "label": (top + side, top + side + 2 * size, left, blue[1]),
              "settings": (sheet.shape[1] - 2 * size, sheet.shape[1], 0, sheet.shape[2])}
    for name, place in places.items():
        assert inked(sheet, *place) > size, name
    for picture in (sheet[0, top:top + side, left:left + side], ):
        assert bool((picture == torch.tensor(RED)).all()), "no word runs over a picture"


def test_long_words_are_wrapped_whole() -> None:
    font = fonts.load_default(20)
    text = "a photo of a corgi_in_the_shape_of_a_very_large_coffee_machine on a table"
    lines = fonts.wrap_text(text, font, 150)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert all(font.getlength(line) <= 150 for line in lines) and len(lines) > 3
    short, tall = (draw_grid([plain(RED)], 1, Words([label])) for label in ("a", text))
    assert tall.shape[1] > short.shape[1]


def test_labels_of_lists_and_lines() -> None:
    assert split_labels(["a\nb", "c"]) == ["a", "b", "c"]
    assert split_labels(["a\n\n", ""]) == ["a"] and split_labels([""]) == [] == split_labels([])


@pytest.mark.parametrize(("words", "complaint"), [
    (Words(labels=["a"]), "labels of Labelled Grid expects a text for each of the 4 pictures, or none, got 1"),
    (Words(across=["a", "b", "c"]), "across of .* each of the 2 columns, or none, got 3"),
    (Words(down=["a"]), "down of .* each of the 2 rows, or none, got 1"),
])
def test_words_that_do_not_fit(words: Words, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"{complaint}; "):
        draw_grid([plain(RED, count=4)], 2, words)


def test_what_is_too_large_or_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expects pictures, got none"):
        draw_grid([], 2, Words())
    with pytest.raises(ValueError, match="pictures of numbers"):
        draw_grid([plain(RED), plain((float("nan"), 0.0, 0.0))], 2, Words())
    monkeypatch.setattr(grid, "MOST_PIXELS", 10_000)
    with pytest.raises(ValueError, match="0 million pixels, got 4 of up to 64x64, which need 1.*; make several grids"):
        draw_grid([plain(RED, count=4)], 2, Words())


def test_letters_that_no_font_has(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fonts, "list_wide_fonts", lambda: ())
    with caplog.at_level(logging.WARNING):
        fonts.choose_font("nu \u8001\u864e", 20)
    assert "no font on this machine with the letters '\u8001\u864e'" in caplog.text or "\\u8001" in caplog.text
    caplog.clear()
    fonts.choose_font("nu 0.5", 20)
    assert not caplog.records


def test_a_font_with_the_letters_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """DejaVu stands for a Chinese font: what counts is whether the letters are there."""
    if "DejaVuSans.ttf" not in fonts.list_wide_fonts():
        monkeypatch.setattr(fonts, "has_letters", lambda font, text: isinstance(font, FakeFont))
        monkeypatch.setattr(fonts, "list_wide_fonts", lambda: ("fake.ttf",))
        monkeypatch.setattr(ImageFont, "truetype", lambda name, size: FakeFont())
        assert isinstance(fonts.choose_font("\u0416", 20), FakeFont)
        return
    found: Any = fonts.choose_font("\u2192 \u0416", 20)
    assert found.getname()[0] == "DejaVu Sans" and fonts.has_letters(found, "\u2192\u0416")
    assert not fonts.has_letters(fonts.load_default(20), "\u8001")


class FakeFont:
    """A font for where the system has none."""
