"""What messages quote can always be logged; masks are read by one rule."""
from __future__ import annotations

import io
import sys

import pytest
import torch
from mixology.samplers.masks import check_mask, check_mask_count
from mixology.samplers.wording import LONGEST, format_picture, legible


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
@pytest.mark.parametrize("text", ["tiger", "\u661f", "lone \ud800 surrogate", "a\x00b\nc", "\u2028", "x" * 1000])
def test_every_text_can_be_logged(monkeypatch: pytest.MonkeyPatch, encoding: str, text: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stderr", stream)
    shown = legible(text)
    shown.encode(encoding)
    assert len(shown.splitlines()) == 1 and len(shown) <= LONGEST + 6 * text.count("\x00") + 8
    assert shown.isprintable()


def test_what_the_log_can_show_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert legible("\u661f tiger") == "\u661f tiger"
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert legible("\u661f tiger") == "\\u661f tiger"


def test_long_text_is_cut() -> None:
    assert legible("a" * 81) == "a" * 77 + "..."
    assert legible("a" * 80) == "a" * 80


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_a_mask_of_any_type_is_read(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    found = check_mask(mask)
    assert found.dtype == torch.float32 and found.tolist() == [[[0.0, 1.0], [1.0, 0.0]]]
    assert torch.equal(check_mask(mask[None, None]), found)


@pytest.mark.parametrize(("shape", "cell", "text"), [
    ((1, 4, 6, 8), 8, "64x48 pixels"), ((2, 16, 6, 8), 16, "128x96 pixels"), ((1, 4, 6, 8), None, "8x6 latent cells"),
    ((1, 16, 5, 6, 8), 8, "64x48 pixels in 5 latent frame(s)"), ((1, 64, 215), 8, "length 215")])
def test_sizes_are_told_in_pixels(shape: tuple[int, ...], cell: int | None, text: str) -> None:
    assert format_picture(shape, cell) == text


def test_a_mask_is_clamped_and_the_callers_stays() -> None:
    mask = torch.tensor([[[-1.0, 0.5, 2.0]]])
    before = mask.clone()
    assert check_mask(mask).tolist() == [[[0.0, 0.5, 1.0]]]
    assert torch.equal(mask, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_mask_of_no_numbers_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"^mask expects values from 0 to 1, got some that are no numbers"):
        check_mask(torch.full((1, 2, 2), value))


@pytest.mark.parametrize("shape", [(), (3,), (0, 2, 2), (1, 2, 2, 3), (1, 1, 1, 2, 2)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^mask expects pictures of height x width"):
        check_mask(torch.zeros(shape))


def test_masks_are_one_for_all_or_one_for_each() -> None:
    for count in (1, 3):
        check_mask_count(torch.zeros(count, 2, 2), 3)
    with pytest.raises(ValueError, match=r"^mask expects one mask for all images or one for each of the 3, got 2;"):
        check_mask_count(torch.zeros(2, 2, 2), 3)
