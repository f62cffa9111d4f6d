"""Image Metrics and Clip Metrics in the host: batches, sizes, files of LPIPS, encoders of one space, and sentences."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from mixer_rig import load_text, load_two_texts, text_state, vision
from mixology.host import demo, metrics_clip
from mixology.host.metrics_clip import Texts, cut, measure_clip
from mixology.metrics.image import l2, psnr, smoothness, ssim
from mixology.nodes.metrics import ClipMetrics, ImageMetrics
from mixology.samplers.embeddings import pad_to_square
from safetensors.torch import save_file
from test_metrics_networks import joined, linear_state, network_state, reference_distance

pytestmark = pytest.mark.seam
NOTHING: tuple[Any, ...] = ()
CAPTION, OTHER = "a striped red star on a blue background", "a plain green ring on a white background"


def pictures(seed: int, batch: int = 2, height: int = 34, width: int = 39, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for LPIPS in a models directory of its own."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {
        name: paths for name, paths in folder_paths.folder_names_and_paths.items() if name != "lpips"})
    (tmp_path / "lpips").mkdir()
    return tmp_path / "lpips"


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return demo.load_clip_vision(), demo.load_clip(demo.shipped_file("text"))


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(metrics_clip, "show_notice", told.append)
    return told


# ----------------------------------------------------------------------------------------- Image Metrics

@pytest.mark.parametrize("references", [1, 3])
def test_figures_are_means_of_the_pictures(folder: Path, references: int) -> None:
    x, y = pictures(0, 3), pictures(1, references)
    copies = x.clone(), y.clone()
    report, *means = ImageMetrics.execute(x, y).result or NOTHING
    expected = [float(metric(x, y).mean()) for metric in (l2, psnr, ssim, smoothness)]
    assert means[:4] == pytest.approx(expected, rel=1e-12) and math.isnan(means[4])
    lines = str(report).split("\n")
    assert [line.split()[0] for line in lines[:5]] == ["picture", "1", "2", "3", "mean"]
    assert lines[2].split()[1:] == [f"{float(value[1]):.{digits}f}" for value, digits in (
        (l2(x, y), 2), (psnr(x, y), 4 if float(psnr(x, y)[1]) < 10 else 2), (ssim(x, y), 4), (smoothness(x, y), 4),
        (smoothness(x, y, share=1.0), 4))]
    assert "3 picture(s) of 39x34 pixels against" in str(report)
    assert torch.equal(x, copies[0]) and torch.equal(y, copies[1])


def test_the_report_is_shown_on_the_node(folder: Path) -> None:
    result = ImageMetrics.execute(pictures(0, 1), pictures(1, 1))
    assert result.result is not None and result.ui.as_dict() == {"text": (result.result[0],)}
    assert "mean" not in result.result[0], "one picture is its own mean"


def test_equal_pictures(folder: Path) -> None:
    x = pictures(0, 1)
    assert (ImageMetrics.execute(x, x.clone()).result or NOTHING)[1:5] == pytest.approx((0, math.inf, 1, 0))


def test_grey_and_transparent_pictures_are_compared_as_colours(folder: Path) -> None:
    x, y = pictures(0, 1), pictures(1, 1)
    grey, clear = x[..., :1], torch.cat([y, x[..., :1]], dim=-1)
    expected = ImageMetrics.execute(grey.repeat(1, 1, 1, 3), y).result or NOTHING
    assert (ImageMetrics.execute(grey, clear).result or NOTHING)[:5] == expected[:5]


@pytest.mark.parametrize(("image", "reference", "text"), [
    (pictures(0), pictures(1, width=20), "one size, got 39x34 and 20x34 pixels .*; bring one to the other's with Upsc"),
    (pictures(0, 3), pictures(1, 2), "each of the 3 pictures, got 2; make the two batches equally long"),
    (pictures(0, 1, 8, 8), pictures(1, 1, 8, 8), "at least 11x11 pixels, got 8x8; use larger"),
    (pictures(0)[0], pictures(1), "Image Metrics expected pictures of batch x height x width x channels"),
    (pictures(0) * math.nan, pictures(1), "Image Metrics expected pictures of values from 0 to 1, got some that are"),
])
def test_pictures_that_do_not_fit(folder: Path, image: torch.Tensor, reference: torch.Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ImageMetrics.execute(image, reference)


@pytest.mark.parametrize("name", ["VGG16", "AlexNet"])
def test_lpips_is_measured_with_files_of_any_kind_and_name(folder: Path, name: str) -> None:
    x, y = pictures(0), pictures(1, 1)
    before = ImageMetrics.fingerprint_inputs()
    assert "needs VGG16 and its linear weights in models/lpips; put torchvision's" in str(
        (ImageMetrics.execute(x, y).result or NOTHING)[0])
    save_file(network_state(name), folder / "any.safetensors")
    told = str((ImageMetrics.execute(x, y).result or NOTHING)[0])
    assert f"needs the linear weights of {name} in models/lpips" in told
    torch.save(linear_state(name), folder / "other.pth")
    (folder / "notes.txt").write_text("no weights")
    assert ImageMetrics.fingerprint_inputs() != before, "the host would keep the report"
    report, *_, distance = ImageMetrics.execute(x, y).result or NOTHING
    expected = [reference_distance(name, [picture.double().numpy() for picture in (image, y[0])]) for image in x]
    assert distance == pytest.approx(sum(expected) / 2, rel=1e-5)
    lines = str(report).split("\n")
    assert lines[0].endswith("LPIPS") and lines[1].split()[-1] == f"{expected[0]:.4f}"
    assert f"LPIPS by {name}" in lines[-1]


def test_a_file_that_is_no_weights_is_told(folder: Path) -> None:
    for name, content in (("a.pth", b"no pickle"), ("a.safetensors", b"\x00" * 4), ("a.pt", b"")):
        (folder / name).write_bytes(content)
        report, *_, distance = ImageMetrics.execute(pictures(0), pictures(1)).result or NOTHING
        assert f"'{name}' in models/lpips is no readable file; get it anew." in str(report) and math.isnan(distance)
        (folder / name).unlink()


def test_pictures_too_small_for_lpips_have_all_other_figures(folder: Path) -> None:
    save_file({**network_state("VGG16"), **linear_state("VGG16")}, folder / "both.safetensors")
    small = pictures(0, 1, 12, 12)
    report, *means = ImageMetrics.execute(small, pictures(1, 1, 12, 12)).result or NOTHING
    assert "LPIPS is not measured: LPIPS expects pictures of at least 16x16" in str(report)
    assert all(math.isfinite(value) for value in means[:4]) and math.isnan(means[4])
    assert joined("VGG16").trunk.smallest == 16


def test_a_folder_of_the_users_own_is_read(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save_file({**network_state("AlexNet"), **linear_state("AlexNet")}, elsewhere / "both.safetensors")
    folder_paths.add_model_folder_path("lpips", str(elsewhere))
    assert "LPIPS by AlexNet" in str((ImageMetrics.execute(pictures(0), pictures(1)).result or NOTHING)[0])


# ------------------------------------------------------------------------------------------ Clip Metrics

def embed(pair: tuple[Any, Any], image: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(pair[0].encode_image(image)["image_embeds"].double(), dim=-1)


def words(pair: tuple[Any, Any], text: str) -> torch.Tensor:
    from mixology.host.mixer import mix_text

    return torch.nn.functional.normalize(mix_text(pair[1], text, 1.0, None)[0].embedding.double(), dim=-1)


def test_similarity_and_direction_are_cosines(pair: tuple[Any, Any]) -> None:
    image, source = pictures(0, 3, 64, 64), pictures(1, 1, 40, 56)
    report, similarity, directional = ClipMetrics.execute(
        *pair, image=image, text=CAPTION, source_image=source, source_text=OTHER).result or NOTHING
    after, before, text, start = embed(pair, image), embed(pair, source), words(pair, CAPTION), words(pair, OTHER)
    assert similarity == pytest.approx(float((after @ text.T).mean()), abs=1e-6)
    change, way = after - before, (text - start)[0]
    expected = (change @ way) / (change.norm(dim=1) * way.norm())
    assert directional == pytest.approx(float(expected.mean()), abs=1e-6)
    lines = str(report).split("\n")
    assert [line.split() for line in lines[6:8]][0] == ["picture", "similarity", "directional"]
    assert float(lines[7].split()[2]) == pytest.approx(float(expected[0]), abs=1e-4)


def test_two_styles_are_measured_on_the_whole_and_on_halves(pair: tuple[Any, Any]) -> None:
    image, source = pictures(0, 2, 64, 64), pictures(1, 2, 64, 64)
    report, *_ = measure_clip(*pair, image, Texts(CAPTION, OTHER, "a red star", "a green ring"), source)
    lines = [line.split() for line in report.split("\n")]
    assert lines[0] == ["similarity", "whole", "left", "half", "right", "half"] and lines[5][0] == "directional"
    seen = [image, pad_to_square(image[:, :, :32]), pad_to_square(image[:, :, 32:])]
    for row, text in ((2, "a red star"), (3, "a green ring")):
        expected = [float((embed(pair, part) @ words(pair, text).T).mean()) for part in seen]
        assert [float(cell) for cell in lines[row][1:]] == pytest.approx(expected, abs=1e-4)
    before = embed(pair, pad_to_square(source[:, :, 32:]))
    change, way = embed(pair, seen[2]) - before, (words(pair, "a green ring") - words(pair, OTHER))[0]
    expected = float(((change @ way) / (change.norm(dim=1) * way.norm())).mean())
    assert float(lines[8][3]) == pytest.approx(expected, abs=1e-4)


def test_a_picture_that_is_not_square_is_cropped_or_filled_up(pair: tuple[Any, Any]) -> None:
    wide = pictures(0, 1, 64, 128)
    middle = measure_clip(*pair, wide[:, :, 32:96], Texts(CAPTION))[1]
    assert measure_clip(*pair, wide, Texts(CAPTION))[1] == pytest.approx(middle, abs=1e-6)
    padded = measure_clip(*pair, wide, Texts(CAPTION), fit="pad")[1]
    assert padded == pytest.approx(measure_clip(*pair, pad_to_square(wide), Texts(CAPTION))[1], abs=1e-9)
    assert abs(padded - middle) > 1e-3
    filled = pad_to_square(wide)
    assert filled.shape == (1, 128, 128, 3) and torch.equal(filled[:, 32:96], wide)
    assert filled[0, 0, 0].tolist() == pytest.approx(wide.mean((0, 1, 2)).tolist(), abs=1e-5)
    assert torch.equal(cut(wide, "right half", "crop"), wide[:, :, 64:]), "a half that is square stays as it is"


@pytest.mark.parametrize(("texts", "source", "told"), [
    (Texts(CAPTION, left_text="red"), False, "left_text is not measured without right_text; write both, or neither"),
    (Texts(CAPTION, right_text="red"), False, "right_text is not measured without left_text"),
    (Texts(CAPTION, source_text=OTHER), False, "source_text is not measured without source_image; connect the"),
    (Texts(CAPTION), True, "source_image is not measured without source_text; write what it shows"),
    (Texts(CAPTION, source_text=CAPTION), True, "text and source_text say the same"),
    (Texts("star " * 90), False, "text ('star star star star star st...') is longer than what CLIP reads at once"),
])
def test_inputs_that_cannot_act_are_told(
    pair: tuple[Any, Any], notices: list[str], texts: Texts, source: bool, told: str,
) -> None:
    report, similarity, directional = measure_clip(*pair, pictures(0), texts, pictures(1) if source else None)
    assert len(notices) == 1 and told in notices[0] and math.isfinite(similarity)
    assert math.isnan(directional) or texts.source_text == CAPTION
    assert "left half" not in report


def test_a_picture_without_a_change_is_told(pair: tuple[Any, Any], notices: list[str]) -> None:
    image = pictures(0)
    assert measure_clip(*pair, image, Texts(CAPTION, source_text=OTHER), image.clone())[2] == 0
    assert len(notices) == 1 and "a picture is its source_image" in notices[0]


def test_nothing_is_told_where_all_acts(pair: tuple[Any, Any], notices: list[str]) -> None:
    measure_clip(*pair, pictures(0), Texts(CAPTION, OTHER, "red", "blue"), pictures(1))
    assert not notices


def test_encoders_of_two_spaces_are_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    clip = load_text(tmp_path / "clip_l.safetensors", text_state())
    with pytest.raises(ValueError, match="of one CLIP, got pictures in a space of 128 numbers and texts in one of"):
        measure_clip(pair[0], clip, pictures(0), Texts(CAPTION))
    with pytest.raises(ValueError, match=r"pictures in a space of 768 numbers \(ViT-L/14\) and texts in one of 128"):
        measure_clip(vision(tmp_path, projection_dim=768), pair[1], pictures(0), Texts(CAPTION))
    with pytest.raises(ValueError, match="Clip Metrics expected a CLIP vision model with its projection, got .*"):
        measure_clip(vision(tmp_path), pair[1], pictures(0), Texts(CAPTION))
    without = {name: value for name, value in text_state().items() if "projection" not in name}
    bare = load_text(tmp_path / "bare.safetensors", without)
    with pytest.raises(ValueError, match="Clip Metrics expected a text encoder with its projection, got one without"):
        measure_clip(vision(tmp_path, projection_dim=16), bare, pictures(0), Texts(CAPTION))
    with pytest.raises(ValueError, match="Clip Metrics expected a text encoder, got none; load the text encoder of"):
        measure_clip(pair[0], None, pictures(0), Texts(CAPTION))


def test_of_two_text_encoders_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    """An SDXL pair holds CLIP-L without a projection beside CLIP-G with one."""
    first = {name: value for name, value in text_state(layers=3).items() if "projection" not in name}
    clip = load_two_texts(tmp_path, first, text_state(seed=5, layers=32))
    network = clip.cond_stage_model
    network.clip_l.transformer.text_projection = torch.nn.Linear(24, 24, bias=False)
    seen = vision(tmp_path, projection_dim=16)
    assert math.isfinite(measure_clip(seen, clip, pictures(0), Texts(CAPTION))[1])


@pytest.mark.parametrize(("image", "texts", "source", "text"), [
    (pictures(0), Texts("  "), None, "Clip Metrics expected a text, got an empty one; write what the pictures shall"),
    (pictures(0), Texts(CAPTION, OTHER), pictures(1, 3), "one for each of the 2 pictures, got 3; make the two batches"),
    (pictures(0) * math.nan, Texts(CAPTION), None, "Clip Metrics expected pictures of values from 0 to 1"),
])
def test_what_cannot_be_measured(pair: tuple[Any, Any], image: torch.Tensor, texts: Texts,
                                 source: torch.Tensor | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        measure_clip(*pair, image, texts, source)
