"""What nodes show of their work: one sheet of masks, one strip of a fusion's maps, and the maps in the picture."""
from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch
from einops import rearrange
from fusion_rig import OTHER, fuser, run, spec
from mixology.host.fusion import show_maps
from mixology.host.fusion_strip import draw_strip, overlay_maps, spread
from mixology.host.sheet import GAP, INK, LINE, PAPER, draw_mask_sheet, draw_sheet, make_tile
from mixology.nodes.demo import DemoPicture
from mixology.nodes.fusion import SaliencyMaps
from mixology.nodes.spatial import GradientMask
from mixology.samplers.fusion import draw_winners, expert_colours, lay_over
from mixology.samplers.spatial import draw_gradient_masks
from PIL import Image, ImageFont


def read(result: Any) -> list[torch.Tensor]:
    """The pictures that a node shows, as the host wrote them: [H, W, 3], 0 to 1."""
    import folder_paths
    import numpy

    files = result.ui.as_dict()["images"]
    assert {file["type"] for file in files} == {"temp"}
    return [torch.from_numpy(numpy.array(Image.open(f"{folder_paths.get_temp_directory()}/{file['filename']}"))) / 255
            for file in files]


def find(picture: torch.Tensor, colour: tuple[float, ...]) -> torch.Tensor:
    """Where a sheet [H, W, 3] has a colour, as far as eight bits tell: [H, W]."""
    return (picture - torch.tensor(colour)).abs().amax(-1) < 0.003


def ink_of(picture: torch.Tensor) -> torch.Tensor:
    return picture.mean(-1) > (INK[0] + PAPER[0]) / 2 / 255


# -------------------------------------------------------------------------------------------------- sheets

@pytest.mark.parametrize("size", [(4, 4), (64, 40), (2000, 1250), (1, 3000)])
def test_captions_are_as_large_on_a_sheet_of_any_pictures(size: tuple[int, int]) -> None:
    """Text of 26 pixels above each picture, whatever the picture's size, and never cut off."""
    pictures = [torch.zeros(*size, 3) for _ in range(3)]
    captions = ["step 1/20", "step 11/20", "M"]
    drawn = draw_sheet(pictures, captions, 2)
    assert drawn.shape[0] == 1 and drawn.dtype == torch.float32 and max(drawn.shape[1:3]) < 900
    column, row = (drawn.shape[2] - GAP) // 2, (drawn.shape[1] - GAP) // 2
    heights = []
    for place in range(3):
        y, x = GAP + place // 2 * row, GAP + place % 2 * column
        ink = ink_of(drawn[0, y:y + LINE - 2, x:x + column])
        heights.append(int(ink.any(1).sum()))
        assert not bool(ink[:, -1].any()) and bool(ink.any())
    assert min(heights) >= 17, "capitals and digits of a font of 26"


def test_a_legend_is_wrapped_and_whole() -> None:
    colours = expert_colours(7)  # the next is grey, as edges of letters are
    legend = [(colour, f"expert {n}: 12%") for n, colour in enumerate(colours)]
    drawn = draw_sheet([torch.zeros(8, 8, 3)] * 2, ["a", "b"], 2, legend)[0]
    squares = [find(drawn, colour).nonzero() for colour in colours]
    assert all(len(square) > 300 for square in squares), "a colour is missing"
    lines = [int(square[:, 0].min()) for square in squares]
    assert lines == sorted(lines) and len(set(lines)) > 2
    assert not bool(ink_of(drawn[:, -1]).any()), "text reaches the edge"


def test_a_font_of_one_size_is_used_where_pillow_has_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ImageFont.load_default

    def without_size(*size: float) -> Any:
        if size:
            raise ImportError
        return plain()

    monkeypatch.setattr(ImageFont, "load_default", without_size)
    drawn = draw_sheet([torch.zeros(8, 8, 3)], ["step 1/2"], 1)
    assert bool(ink_of(drawn[0, :LINE]).any())


def test_pictures_shrink_by_averages_and_grow_in_squares() -> None:
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(64, 64)[..., None].expand(-1, -1, 3)
    assert set(make_tile(board, 64).get_flattened_data() if hasattr(Image.Image, "get_flattened_data") else
               make_tile(board, 64).getdata()) == {(128, 128, 128)}
    grown = make_tile(board[:2, :2], 64)
    assert grown.size == (64, 64) and len(grown.getcolors()) == 2
    assert make_tile(board[:1], 64).size == (64, 1)


# --------------------------------------------------------------------------------------------------- masks

def test_gradient_masks_are_shown_on_one_sheet() -> None:
    inputs = {"width": 96, "height": 48, "profile": "linear", "parts": 3, "angle": 0.0, "sharpness": 20.0, "rows": 2}
    result = GradientMask.execute(**inputs)
    assert torch.equal(result.result[0], draw_gradient_masks(**inputs))
    (shown,) = read(result)
    column, row = (shown.shape[1] - GAP) // 3, (shown.shape[0] - GAP) // 2
    for n, mask in enumerate(result.result[0]):  # in the places that they have in the picture
        x, y = GAP + n % 3 * column, GAP + n // 3 * row + LINE
        tile = shown[y:y + 96, x:x + 192].mean(-1)
        torch.testing.assert_close(tile, mask.repeat_interleave(2, 0).repeat_interleave(2, 1), rtol=0, atol=0.004)


def test_many_masks_in_a_row_are_wrapped() -> None:
    wide, tall = (draw_mask_sheet(draw_gradient_masks(8, 8, "linear", parts, 0, sharpness=20, rows=rows), parts)
                  for parts, rows in ((16, 1), (8, 2)))
    assert wide.shape[1] > wide.shape[2], "four by four: a name needs room above its picture"
    assert tall.shape[2] > 2 * tall.shape[1], "eight by two, as the masks lie"


def test_demo_picture_shows_its_picture() -> None:
    result = DemoPicture.execute("a red star on a blue background", 0, 128, 128)
    (shown,) = read(result)
    torch.testing.assert_close(shown, result.result[0][0], rtol=0, atol=0.005)


# ---------------------------------------------------------------------------------------------------- maps

@pytest.fixture(scope="module")
def fused() -> tuple[Any, Any]:
    """A run of 12 steps, its guider and latent."""
    model = tiny.unet()
    guider = fuser([spec(model), spec(tiny.unet(seed=1), OTHER)])
    return guider, {"samples": run(guider, tiny.latent(1, 12, 10), tiny.sigmas_of(model, "simple", 12))}


def tiles(strip: torch.Tensor, columns: int, rows: int, size: tuple[int, int]) -> list[torch.Tensor]:
    column, row = (strip.shape[1] - GAP) // columns, (strip.shape[0] - GAP - LINE) // rows
    places = [(GAP + j * column, GAP + i * row + LINE) for i in range(rows) for j in range(columns)]
    return [strip[y:y + size[0], x:x + size[1]] for x, y in places]


def test_a_run_is_one_strip(fused: tuple[Any, Any]) -> None:
    """Eight of its steps with the first and the last, each as its map is, and the share of each expert."""
    guider, latent = fused
    result = SaliencyMaps.execute(guider, latent)
    maps, masks = show_maps(guider, latent)
    assert torch.equal(result.result[0], maps) and torch.equal(result.result[1], masks)
    assert torch.equal(maps, draw_winners(guider.winners, 8))
    (shown,) = read(result)
    steps = spread(12, 8)
    assert steps[0] == 0 and steps[-1] == 11 and len(set(steps)) == 8
    for step, tile in zip(steps, tiles(shown, 4, 2, (190, 158))):
        expected = make_tile(maps[step], 190)
        size = (expected.width, expected.height)
        whole = torch.tensor(list(expected.resize(size).tobytes())).view(expected.height, expected.width, 3) / 255
        assert (tile - whole[:190, :158]).abs().mean() < 0.02
    assert all(find(shown, colour).sum() > 300 for colour in expert_colours(2))


def test_the_legend_tells_what_each_won(fused: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from mixology.host import fusion_strip

    told: dict[str, Any] = {}

    def record(pictures: Any, captions: Any, columns: int, legend: Any) -> torch.Tensor:
        told.update(count=len(pictures), captions=captions, columns=columns, legend=[text for _, text in legend])
        return torch.zeros(1, 1, 1, 3)

    monkeypatch.setattr(fusion_strip, "draw_sheet", record)
    maps = torch.zeros(3 * 2, 16, 16, 3)
    masks = torch.zeros(2, 3 * 2, 2, 2)
    masks[0, :, 0, 0] = 1
    masks[1] = 1 - masks[0]
    draw_strip(maps, masks.flatten(0, 1), {"samples": torch.zeros(2, 4, 2, 2)})
    assert told["legend"] == ["expert 0: 25%", "expert 1: 75%"]
    assert told["captions"] == [f"image {image}, step {step}" for image in (1, 2) for step in (1, 2, 3)]
    assert told["columns"] == 3
    draw_strip(torch.zeros(50 * 21, 8, 8, 3), torch.ones(50 * 21, 1, 1), {"samples": torch.zeros(1, 4, 21, 1, 1)})
    assert told["count"] == 16 and told["captions"][-1] == "frame 21, step 50"  # however long a video is
    draw_strip(torch.zeros(1, 8, 8, 3), torch.ones(40, 1, 1), {"samples": torch.zeros(1, 4, 1, 1)})
    assert told["captions"] == ["step 1/1"] and len(told["legend"]) == 12


def test_maps_are_laid_over_the_picture_in_grey(fused: tuple[Any, Any]) -> None:
    guider, latent = fused
    picture = torch.rand(1, 12, 10, 3).repeat_interleave(8, 1).repeat_interleave(8, 2)
    plain, over = show_maps(guider, latent)[0], show_maps(guider, latent, picture)[0]
    grey = (picture @ torch.tensor([0.299, 0.587, 0.114]))[..., None]
    torch.testing.assert_close(over, (plain + grey) / 2, rtol=0, atol=1e-5)
    result = SaliencyMaps.execute(guider, latent, image=picture)
    assert torch.equal(result.result[0], over)
    doubled = show_maps(guider, latent, picture.repeat_interleave(2, 1).repeat_interleave(2, 2))[0]
    assert (doubled - over).abs().mean() < 0.02, "a picture that was enlarged is the same picture"
    assert show_maps(guider, latent, torch.full_like(picture, float("nan")))[0].isfinite().all()
    alpha = torch.cat([picture, torch.rand(1, 96, 80, 1)], -1)
    assert torch.equal(show_maps(guider, latent, alpha)[0], over)


def test_each_image_of_a_batch_and_frame_of_a_video_gets_its_own_picture() -> None:
    def brightness(pictures: torch.Tensor, items: int, frames: int, steps: int = 2) -> list[list[int]]:
        laid = lay_over(torch.zeros(steps * items * frames, 8, 8, 3), pictures, items, frames)
        return rearrange(laid[:, 0, 0, 0] * 200, "(s n) -> s n", s=steps).round().int().tolist()

    ramp = torch.arange(100)[:, None, None, None].expand(-1, 8, 8, 3) / 100
    assert brightness(ramp[7:10], 3, 1) == [[7, 8, 9]] * 2
    assert brightness(ramp[7:8], 3, 1) == [[7, 7, 7]] * 2
    assert brightness(ramp[:18], 2, 3) == [[0, 4, 8, 9, 13, 17]] * 2  # nine pictures for three frames of a latent
    assert brightness(ramp[5:6], 2, 3) == [[5] * 6] * 2


@pytest.mark.parametrize("size", [(96, 80), (100, 87), (90, 75), (960, 800), (12, 10)])
def test_a_picture_in_the_latents_proportions_fits(size: tuple[int, int]) -> None:
    overlay_maps(torch.zeros(1, 96, 80, 3), torch.zeros(1, *size, 3), torch.zeros(1, 4, 12, 10))


@pytest.mark.parametrize(("picture", "text"), [
    (torch.zeros(2, 96, 80, 3), r"^Saliency Maps expects one picture at image, or one for each of the 3 image\(s\) of "
                                r"the latent, got 2; connect what the latent was decoded to\.$"),
    (torch.zeros(96, 80, 3), r"^Saliency Maps expects one picture at image, .*, got something else; connect"),
    (torch.zeros(1, 80, 96, 3), r"^Saliency Maps expects a picture in the proportions of the latent's 80x96 pixels, "
                                r"got 96x80; connect what the latent was decoded to\.$"),
])
def test_a_picture_that_cannot_be_of_the_latent(picture: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        overlay_maps(torch.zeros(6, 96, 80, 3), picture, torch.zeros(3, 4, 12, 10))


def test_what_is_shown_needs_no_other_node() -> None:
    """The host runs a node that nothing hangs on only if it says that it is an end."""
    for node in (GradientMask, SaliencyMaps, DemoPicture):
        node.GET_SCHEMA()
        assert node.OUTPUT_NODE is True
    assert list(inspect.signature(SaliencyMaps.execute).parameters)[-1] == "image"
    assert SaliencyMaps.define_schema().inputs[-1].optional
